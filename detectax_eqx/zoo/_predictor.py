"""A detector with its categories and image sizes, which detects objects in images with one call."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._types import Detections
from ..data import CANVASES, Category, check_categories, list_images, make_buckets
from ..models import AbstractDetector, Selection, detect_batch
from ..weights import read_safetensors, replace_leaves, save_safetensors
from ._about import about, canvases as own_canvases, with_about
from ._architecture import Architecture, NormName
from ._inputs import is_folder, padded_images, pixels_of
from ._prediction import Prediction
from ._published import announce, pretrained, published, published_file
from ._run import load_run
from ._weights import load_weights, with_keypoints


# Images are padded to multiples of this, so that few programs are compiled for images of many sizes.
SOURCE_STEP = 256
# The default batch size on an accelerator. On a CPU, a larger batch is no faster.
BATCH_SIZE = 8
# The only file of a saved predictor.
FILE = "predictor.safetensors"

# The canvas and the source shape of a program, each `(height, width)`.
_Shape = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Predictor:
    """A model with the categories of its labels and the canvases on which images are placed.

    - `categories`: id and name of each label, or `None` if the weights have none.
    - `canvases`: `(height, width)` of each canvas, see `data.make_buckets`. A program is compiled per canvas used.
    - `architecture`: how to rebuild the model, required by `save`. `None` for a detector that is not in the zoo.

    >>> import equinox as eqx, jax.random as jr
    >>> from detectax_eqx import models, nn
    >>> backbone = nn.BackboneWithFPN(nn.resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = models.faster_rcnn(backbone, 2, key=jr.key(2), hidden_size=32)
    >>> model = replace(model, preprocessing=models.Preprocessing(models.ShortestEdge(64, 96)))
    >>> predictor = Predictor(model, (Category(1, "cat"), Category(2, "dog")), canvases=((64, 96),))
    >>> prediction = predictor(np.zeros((50, 70, 3), np.uint8), score_threshold=0.9)
    >>> prediction
    Prediction(array, 50×70: nothing)
    """

    model: AbstractDetector
    categories: tuple[Category, ...] | None = None
    canvases: tuple[tuple[int, int], ...] = CANVASES
    architecture: Architecture | None = None

    @classmethod
    def pretrained(cls, name: str) -> "Predictor":
        """Loads a detector with its published weights, see `zoo.pretrained`."""
        weights, model = published(name), pretrained(name)
        return cls(model, weights.categories, own_canvases(model), weights.architecture)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike) -> "Predictor":
        """Loads the best detector of a `train.py` run, or the detector of one of its checkpoints.

        The exponential moving average is loaded if there is one. If `path` is a run and its checkpoint is damaged, a
        warning is issued and the previous checkpoint is used. If `path` is a checkpoint, no other is used instead.
        Raises a `ValueError` if the checkpoint was not written by `train.py`.
        """
        return cls(*load_run(Path(path)))

    @classmethod
    def from_weights(cls, name: str, file: str | os.PathLike, *, norm: NormName | None = None) -> "Predictor":
        """Loads the named detector with the weights of a torchvision `.pth` or a `.safetensors` file.

        For a detector of Detectron2, the file is a `.pkl` of its model zoo or a `.pth` of its trainer.

        If the file has the name of the detector's published weights, their norm and categories are used. Otherwise, the
        norm is `frozen_batch` unless given, and the categories and image sizes are those that `save_weights` stored in
        the file. A warning is issued if a `.safetensors` file has none.
        """
        path = Path(file)
        known = published_file(name, path.name)
        norm = norm or (known.architecture.norm if known else "frozen_batch")
        architecture = with_keypoints(Architecture(name, norm), path)
        model = load_weights(architecture, path)
        predictor = cls(model, canvases=own_canvases(model), architecture=architecture)
        if known is not None:
            announce(known)
        if known is not None and len(known.categories) == predictor.model.num_classes:
            return replace(predictor, categories=known.categories)
        if path.suffix != ".safetensors":
            return predictor
        model, categories, canvases = with_about(predictor.model, read_safetensors(path)[1], path)
        if canvases is None:
            warnings.warn(
                f"{path} does not say at which sizes it was trained: images are resized by "
                f"{model.preprocessing.resize}, unless other sizes are given (--min-size, --max-size).",
                stacklevel=2,
            )
            return predictor
        return replace(predictor, model=model, categories=categories, canvases=canvases)

    def save_weights(self, path: str | os.PathLike) -> None:
        """Writes the weights to a `.safetensors` file, with the categories and image sizes for `from_weights`."""
        save_safetensors(self.model, path, metadata=about(self.model, self.categories, self.canvases))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Predictor":
        """Loads the predictor that `save` wrote to a folder.

        Raises a `FileNotFoundError` if there is none, and a `ValueError` that names the file if it is damaged.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no {FILE}, which Predictor.save writes.")
        arrays, metadata = read_safetensors(path)
        try:
            architecture = Architecture.from_fields(json.loads(metadata["architecture"]))
            shapes = architecture.shapes(int(metadata["num_classes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its metadata is not what Predictor.save writes ({error!r}).") from None
        model = replace_leaves(shapes, arrays, source=str(path))
        model, categories, canvases = with_about(model, metadata, path)
        return cls(model, categories, canvases or own_canvases(model), architecture)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the predictor to a folder, from which `load` reads it without further arguments.

        Raises a `ValueError` if there is no `architecture`.
        """
        if self.architecture is None:
            raise ValueError(
                "The predictor has no architecture, so that load could not build its model. Pass a zoo.Architecture, "
                "or use save_weights and build the model yourself."
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        metadata = about(self.model, self.categories, self.canvases)
        metadata["architecture"] = json.dumps(asdict(self.architecture))
        metadata["num_classes"] = str(self.model.num_classes)
        save_safetensors(self.model, Path(folder) / FILE, metadata=metadata)

    def category_ids(
        self,
        categories: Sequence[Category] | None = None,
        *,
        file: str | Path = "the annotations",
        allow_renamed: bool = False,
    ) -> tuple[int, ...]:
        """The category id of each label, checked against the `categories` of an annotation file if they are given.

        If the model has no categories of its own and as many classes as the file, its labels are the file's categories
        in the order of their ids. If it has more, such as torchvision's 90 for COCO's 80, the category id is
        label + 1.

        - `file`: the name of the annotation file in messages. `allow_renamed`: whether its category names may differ
          from the model's.
        """
        if self.categories is not None:
            if categories is not None:
                check_categories(
                    categories,
                    self.categories,
                    found_in=str(file),
                    known_in="the model",
                    same_ids=False,
                    allow_renamed=allow_renamed,
                )
            return tuple(category.id for category in self.categories)
        num_classes = self.model.num_classes
        ids = None if categories is None else tuple(category.id for category in categories)
        if ids is not None and num_classes == len(ids):
            return ids
        if ids is None or num_classes >= max(ids):
            return tuple(range(1, num_classes + 1))
        raise ValueError(
            f"The model has {num_classes} classes, but {file} has {len(ids)} categories with ids up to {max(ids)}: the "
            "meaning of the model's labels is unknown. Use the annotations that it was trained on."
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label, or its category id as a string if the model has no categories."""
        if self.categories is None:
            return tuple(map(str, self.category_ids()))
        return tuple(category.name for category in self.categories)

    def __call__(
        self,
        images: Any,
        *,
        selection: Selection | None = None,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int | None = None,
        max_pixels: int | None = None,
    ) -> Any:
        """Detects objects. Returns a `Prediction` for one image, and a list of them for a folder or a list of images.

        - `images`: a path or URL, a folder (all image files in it, sorted by name), a Pillow image, or a uint8 RGB
          array `(h, w, 3)`; or a list or tuple of these. The channel order is not checked: convert OpenCV's BGR to
          RGB.
        - `selection`, `score_threshold`, `max_detections`: which detections are returned, as for `models.detect`.
        - `batch_size`: the number of images per forward pass, by default 8 on an accelerator and 1 on a CPU.
        - `max_pixels`: as for `data.read_image`.

        Raises a `BadImageError` for a file that is not an image, and a `TypeError` or `ValueError` that identifies
        common mistakes with arrays: fractional values, channels first, grayscale, or a batch.
        """
        single = not isinstance(images, list | tuple) and not is_folder(images)
        pictures: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        predictions = list(
            self.iterate(
                pictures,
                selection=selection,
                score_threshold=score_threshold,
                max_detections=max_detections,
                batch_size=batch_size,
                max_pixels=max_pixels,
            )
        )
        return predictions[0] if single else predictions

    def iterate(
        self,
        images: Iterable[Any],
        *,
        selection: Selection | None = None,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int | None = None,
        max_pixels: int | None = None,
    ) -> Iterator[Prediction]:
        """Yields a `Prediction` per image, in order, and holds few images in memory. Arguments as for a call."""
        if batch_size is None:
            batch_size = 1 if jax.default_backend() == "cpu" else BATCH_SIZE
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}.")
        options = {"selection": selection, "score_threshold": score_threshold, "max_detections": max_detections}
        pictures = (picture for image in images for picture in (list_images(image) if is_folder(image) else [image]))
        while window := list(islice(pictures, 4 * batch_size)):
            arrays = [pixels_of(picture, self.model.preprocessing.channels, max_pixels) for picture in window]
            detections: dict[int, Detections] = {}
            for group in self._groups(arrays, batch_size):
                detections |= self._detect(group, arrays, batch_size, options)
            for index, picture in enumerate(window):
                on_disk = isinstance(picture, str | os.PathLike)
                yield Prediction(
                    detections[index],
                    (arrays[index].shape[0], arrays[index].shape[1]),
                    str(picture) if on_disk else None,
                    self.class_names,
                    self.category_ids(),
                    None if on_disk else arrays[index],
                    self.model.paste,
                    tuple(category.skeleton for category in self.categories or ()),
                )

    def _groups(self, arrays: Sequence[np.ndarray], batch_size: int) -> Iterator[tuple[_Shape, list[int]]]:
        """Groups the positions of images that share a program, at most `batch_size` per group."""
        groups: dict[_Shape, list[int]] = {}
        for index, array in enumerate(arrays):
            size = array.shape[0], array.shape[1]
            (bucket,) = make_buckets([size], canvases=self.canvases, **self.model.preprocessing.limits)
            source = tuple(-(-side // SOURCE_STEP) * SOURCE_STEP for side in size)
            groups.setdefault((bucket.canvas, (source[0], source[1])), []).append(index)
        for shape, indices in groups.items():
            for start in range(0, len(indices), batch_size):
                yield shape, indices[start : start + batch_size]

    def _detect(
        self, group: tuple[_Shape, list[int]], arrays: Sequence[np.ndarray], batch_size: int, options: dict[str, Any]
    ) -> dict[int, Detections]:
        """The valid detections of each image of a group, by the image's position."""
        (canvas, source), indices = group
        # A power of two or a whole batch, so that few programs are compiled for all group sizes.
        count = min(batch_size, 1 << (len(indices) - 1).bit_length())
        images = padded_images([arrays[index] for index in indices], source, canvas, count=count)
        batch = jax.tree.map(np.asarray, detect_batch(self.model, images, **options))
        rows = (jax.tree.map(lambda x, row=row: x[row], batch) for row in range(len(indices)))
        return {i: jax.tree.map(lambda x, keep=row.valid: x[keep], row) for i, row in zip(indices, rows, strict=True)}
