"""Samples that are images, prepared as the models' own preprocessor configuration says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from assay._lazy import require
from assay.corpus.errors import BadRow
from assay.corpus.images import MAX_BYTES, MAX_PIXELS, Beside, ImageLimits, decode_image
from assay.corpus.named_files import NamedFiles
from assay.corpus.shards import Shard
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.recipe.model_files import one_line
from assay.recipe.models import ModelSpec, naming
from assay.recipe.preprocessor import Preprocessor, preprocessor_folder, shared_preprocessor
from assay.recipe.tasks.base import Encoded, Models, TaskSpec, attempt
from assay.recipe.trials import device_of, in_eval_mode
from assay.tasks.base import call, logits_of, to_device
from assay.tasks.special_tokens import setting

# An image takes part in the batch's budget of tokens as if these were its patches, as most transformers' are.
_PIXELS_PER_TOKEN = 256
_USUAL_SIDE, _MOST_SIDE = 224, 1 << 10  # of an image that a model is tried out on
T = TypeVar("T")


class ImageTaskSpec(TaskSpec):
    """A task with images: how large they may be, and what is made of them where the models' folders do not tell.

    ``preprocessor`` has the keys of a ``preprocessor_config.json``; without a type it is a ViTImageProcessor.
    """

    preprocessor: dict[str, Any] | None = None
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    max_bytes: Annotated[int, Field(ge=1)] = MAX_BYTES

    @property
    def files_column(self) -> str | None:
        column: str | None = getattr(self, "image_column", None)
        return column

    def look_for_preprocessors(self, specs: Mapping[str, ModelSpec]) -> None:
        """EngineError, before a model loads, if one can have no preprocessor and the recipe gives none."""
        for name, spec in specs.items() if self.preprocessor is None else ():
            with naming(f"models.{name}"):
                preprocessor_folder(spec)

    def images(self, column: str, models: Models) -> ImageInputs:
        """What reads the images of a column. ImportError without Pillow, before the first of them comes."""
        require("PIL.Image", "image")
        return ImageInputs.of(column, self.preprocessor, ImageLimits(self.max_pixels, self.max_bytes), models)


class ImageInputs:
    """The images of one column to tensors (B, C, H, W); decoded and resized while they wait, 8 bits a channel.

    Where the preprocessor leaves them in sizes of their own, each is a sample of its ``shape``.
    """

    apart = False

    def __init__(
        self,
        column: str,
        preprocessor: Preprocessor,
        limits: ImageLimits,
        models: Mapping[str, nn.Module],
        folder: Beside | None = None,
    ) -> None:
        self.columns = (column,)
        self.preprocessor = preprocessor
        self._limits, self._models, self._folder = limits, models, folder

    @classmethod
    def of(
        cls,
        column: str,
        given: Mapping[str, Any] | None,
        limits: ImageLimits,
        models: Models,
    ) -> ImageInputs:
        """For these models, which must prepare an image alike unless a preprocessor is ``given``."""
        channels = {name: _channels(f"models.{name}", model) for name, (_, model) in models.items()}
        own = shared_preprocessor({name: spec for name, (spec, _) in models.items()}, given, channels)
        return cls(column, own, limits, {name: model for name, (_, model) in models.items()})

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessor": self.preprocessor.identity}

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of every image, or, where they have sizes of their own, two that they may have."""
        return self.preprocessor.shapes(_usual_size(self._models.values()))

    @property
    def own_sizes(self) -> bool:
        """Whether images may differ in size."""
        return self.preprocessor.own_sizes

    def beside(self, shard: Shard) -> ImageInputs:
        """For the rows of this shard, whose paths lead from where it lies."""
        folder = Beside(shard.store, shard.folder)
        return ImageInputs(self.columns[0], self.preprocessor, self._limits, self._models, folder)

    @property
    def files(self) -> NamedFiles:
        return {} if self._folder is None else self._folder.files

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        return [attempt(self._encode_value, value) for (value,) in rows]

    def _encode_value(self, value: Any) -> Encoded:
        image = decode_image(self.columns[0], value, self._limits, self._folder)
        pixels = self.preprocessor.pixels(self.columns[0], image, self._limits.pixels)
        length = max(1, self.preprocessor.area(pixels) // _PIXELS_PER_TOKEN)
        return Encoded(pixels, length, pixels.nbytes, pixels.shape if self.own_sizes else ())

    def examples(self, count: int, shape: tuple[int, int, int] | None = None) -> list[npt.NDArray[np.uint8]]:
        """Some that a model can be tried out on, of one shape."""
        return list(np.random.default_rng(0).integers(0, 256, (count, *(shape or self.shapes[0])), np.uint8))

    def collate(self, data: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor | dict[str, torch.Tensor]:
        return self.preprocessor.batch(data)

    def misfit(self, data: npt.NDArray[np.uint8]) -> BadRow | None:
        return self.misfit_of(data, lambda model: _logits(model, self, [data]))

    def misfit_of(self, data: npt.NDArray[np.uint8], run: Callable[[nn.Module], object]) -> BadRow | None:
        """Why a model, as ``run`` runs it, does not take an image of this size, if images have sizes of their own."""
        what = f"{self.columns[0]} becomes {_by(data.shape)}, which models."
        models = self._models.items() if self.own_sizes else ()
        return next((BadRow(what + why) for name, model in models if (why := _failure(name, model, run))), None)


def _channels(key: str, model: nn.Module) -> int:
    """Of a model's images, as a config of transformers tells; 3 unless it does."""
    config = getattr(model, "config", None)
    told = getattr(getattr(config, "vision_config", None) or config, "num_channels", 3)
    if told not in (1, 3):
        raise EngineError(f"{key}: takes images of {told} channels; an image has 3, or 1 if it is grey")
    return int(told)


def _failure(name: str, model: nn.Module, run: Callable[[nn.Module], object]) -> str | None:
    try:
        with torch.no_grad(), quietly(), in_eval_mode(model):
            run(model)
    except Exception as error:  # whatever a model may raise
        return f"{name} cannot be run on ({one_line(error)})"
    return None


def _usual_size(models: Iterable[nn.Module]) -> tuple[int, int]:
    """(H, W) that the models' configs speak of, or what most models have."""
    for model in models:
        config = setting(model, "config")
        size = setting(setting(config, "vision_config") or config, "image_size")
        height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        if all(isinstance(side, int) and 0 < side <= _MOST_SIDE for side in (height, width)):
            return height, width
    return _USUAL_SIDE, _USUAL_SIDE


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def each_shape(key: str, images: ImageInputs, run: Callable[[list[npt.NDArray[np.uint8]]], T], count: int = 1) -> T:
    """``run`` with examples of each shape -> what it gave of the first. An EngineError that begins with ``key`` if it
    fails: a model does not take these images."""
    first, *others = images.shapes
    with torch.no_grad(), quietly():
        with refusing(f"{key}: cannot be run on images of {_by(first)}, as its preprocessor makes them"):
            result = run(images.examples(count, first))
        for other in others:
            with refusing(
                f"{key}: runs on images of {_by(first)}, but not of {_by(other)} too, and its preprocessor leaves them "
                "in sizes of their own; give a preprocessor with size: {height, width}, or with do_center_crop and "
                "crop_size"
            ):
                run(images.examples(count, other))
    return result


def try_out(key: str, model: nn.Module, images: ImageInputs) -> None:
    """Run a model that takes nothing else. An EngineError that begins with ``key`` if it does not take these images."""
    each_shape(key, images, lambda some: _logits(model, images, some))


def _logits(model: nn.Module, images: ImageInputs, some: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    return logits_of(call(model, to_device(images.collate(some), device_of(model))))
