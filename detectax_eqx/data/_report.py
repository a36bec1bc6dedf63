"""What is wrong with a dataset: where it was found, what it is and what to do about it."""

from collections import Counter
from dataclasses import dataclass

from ._store import Location


# An error lists this many problems in full and counts the rest.
MAX_LISTED = 20


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a dataset.

    - `kind`: a few words, the same for all problems of a kind; a report counts by it.
    - `file`: the annotation file. `image_id`, `annotation_id`, `image_file`: where in it, as far as that is known.
    - `what`: what was found. `remedy`: what to do about it, or what was done.
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

    - `errors`: with them it cannot be used. A dataset that was loaded has none.
    - `repairs`: they were made in memory. `notes`: what looks like a mistake, and was left as it is.
    """

    errors: tuple[Problem, ...] = ()
    repairs: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many repairs and notes there are of each kind."""
        return dict(Counter(problem.kind for problem in (*self.repairs, *self.notes)))

    def __str__(self) -> str:
        parts = []
        for name, problems in (("repaired", self.repairs), ("kept as it is", self.notes)):
            kinds = Counter(problem.kind for problem in problems)
            if kinds:
                parts.append(f"{name}: " + ", ".join(f"{kind} ×{count:,}" for kind, count in kinds.items()))
        return "; ".join(parts) or "nothing to repair"


class DatasetError(ValueError):
    """A dataset that cannot be used, or a file of it that cannot be read. `problems` lists what is wrong, if known."""

    def __init__(self, message: str, problems: tuple[Problem, ...] = ()):
        super().__init__(message)
        self.problems = problems


class BadImageError(DatasetError):
    """An image file that is missing, damaged, or of another size than annotated."""


class Collector:
    """Gathers problems while a dataset is read, so that all are reported at once."""

    def __init__(self, file: Location):
        self.file = file
        self.errors: list[Problem] = []
        self.repairs: list[Problem] = []
        self.notes: list[Problem] = []

    def error(self, kind: str, what: str, remedy: str, **where: object) -> None:
        """Notes a problem that nothing but the dataset's owner can fix. `where`: `Problem`'s last three fields."""
        self.errors.append(Problem(kind, self.file, what, remedy, **where))  # type: ignore[arg-type]

    def repair(self, kind: str, what: str, remedy: str, **where: object) -> None:
        """Notes a problem that was repaired. `where`: `Problem`'s last three fields."""
        self.repairs.append(Problem(kind, self.file, what, remedy, **where))  # type: ignore[arg-type]

    def note(self, kind: str, what: str, remedy: str, **where: object) -> None:
        """Notes what looks like a mistake but need not be one. `where`: `Problem`'s last three fields."""
        self.notes.append(Problem(kind, self.file, what, remedy, **where))  # type: ignore[arg-type]

    def report(self) -> Report:
        """All that was gathered, or a `DatasetError` listing what could not be repaired."""
        if self.errors:
            listed = [f"  {problem}" for problem in self.errors[:MAX_LISTED]]
            if len(self.errors) > MAX_LISTED:
                listed.append(f"  … and {len(self.errors) - MAX_LISTED} more")
            kinds = Counter(problem.kind for problem in self.errors)
            summary = ", ".join(f"{kind} ×{count}" for kind, count in kinds.most_common())
            head = f"{self.file} cannot be used: {summary}."
            raise DatasetError("\n".join([head, *listed]), tuple(self.errors))
        return Report(repairs=tuple(self.repairs), notes=tuple(self.notes))
