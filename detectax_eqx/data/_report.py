"""Problems of a dataset: the location, description and remedy of each."""

from collections import Counter
from dataclasses import dataclass

from ._store import Location


# An error message lists at most this many problems, followed by the number of the others.
MAX_LISTED = 20


@dataclass(frozen=True)
class Problem:
    """One problem of a dataset.

    - `kind`: a few words, the same for all problems of a kind. Reports count problems by kind.
    - `file`: the annotation file. `image_id`, `annotation_id`, `image_file`: the location in it, as far as known.
    - `what`: a description of the problem. `remedy`: what to do about it, or what was done.
    """

    kind: str
    file: Location
    what: str
    remedy: str
    image_id: object = None
    annotation_id: object = None
    image_file: str | None = None

    def __str__(self) -> str:
        place = []
        if self.image_id is not None:
            place.append(f"image {self.image_id}" + (f" ({self.image_file})" if self.image_file else ""))
        if self.annotation_id is not None:
            place.append(f"annotation {self.annotation_id}")
        where = f"{self.file}: {', '.join(place)}" if place else str(self.file)
        return f"{where}: {self.kind}: {self.what} {self.remedy}"


@dataclass(frozen=True)
class Report:
    """The problems of a dataset.

    - `errors`: problems that make the dataset unusable. A dataset that was loaded has none.
    - `repairs`: problems that were repaired in memory. `notes`: possible mistakes, which were left unchanged.
    """

    errors: tuple[Problem, ...] = ()
    repairs: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """The number of repairs and notes of each kind."""
        return dict(Counter(problem.kind for problem in (*self.repairs, *self.notes)))

    def __str__(self) -> str:
        parts = []
        for name, problems in (("repaired", self.repairs), ("kept as it is", self.notes)):
            kinds = Counter(problem.kind for problem in problems)
            if kinds:
                parts.append(f"{name}: " + ", ".join(f"{kind} ×{count:,}" for kind, count in kinds.items()))
        return "; ".join(parts) or "nothing to repair"


class DatasetError(ValueError):
    """A dataset cannot be used, or one of its files cannot be read. `problems` lists the causes, if known."""

    def __init__(self, message: str, problems: tuple[Problem, ...] = ()):
        super().__init__(message)
        self.problems = problems


class BadImageError(DatasetError):
    """An image file is missing, damaged, or not of the annotated size."""


class Collector:
    """Collects problems while a dataset is read, so that all are reported at once."""

    def __init__(self, file: Location):
        self.file = file
        self.errors: list[Problem] = []
        self.repairs: list[Problem] = []
        self.notes: list[Problem] = []

    def error(self, kind: str, what: str, remedy: str, **where: object) -> None:
        """Records a problem that only the user can fix. `where`: the last three fields of `Problem`."""
        self.errors.append(Problem(kind, self.file, what, remedy, **where))  # type: ignore[arg-type]

    def repair(self, kind: str, what: str, remedy: str, **where: object) -> None:
        """Records a problem that was repaired. `where`: the last three fields of `Problem`."""
        self.repairs.append(Problem(kind, self.file, what, remedy, **where))  # type: ignore[arg-type]

    def note(self, kind: str, what: str, remedy: str, **where: object) -> None:
        """Records a possible mistake. `where`: the last three fields of `Problem`."""
        self.notes.append(Problem(kind, self.file, what, remedy, **where))  # type: ignore[arg-type]

    def report(self) -> Report:
        """Returns the repairs and notes. Raises a `DatasetError` that lists the errors if there are any."""
        if self.errors:
            listed = [f"  {problem}" for problem in self.errors[:MAX_LISTED]]
            if len(self.errors) > MAX_LISTED:
                listed.append(f"  … and {len(self.errors) - MAX_LISTED} more")
            kinds = Counter(problem.kind for problem in self.errors)
            summary = ", ".join(f"{kind} ×{count}" for kind, count in kinds.most_common())
            head = f"{self.file} cannot be used: {summary}."
            raise DatasetError("\n".join([head, *listed]), tuple(self.errors))
        return Report(repairs=tuple(self.repairs), notes=tuple(self.notes))
