"""Samples that are images, prepared as the models' own preprocessor configuration says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from assay._lazy import require
from assay.corpus.errors import BadRow
from assay.corpus.images import MAX_BYTES, MAX_PIXELS, Beside, ImageLimits, decode_image
from assay.corpus.shards import Shard
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.recipe.models import ModelSpec, naming
from assay.recipe.preprocessor import Preprocessor, preprocessor_folder, shared_preprocessor
from assay.recipe.tasks.base import Encoded, Models, TaskSpec, attempt
from assay.recipe.trials import device_of
from assay.tasks.base import call, logits_of

# An image takes part in the batch's budget of tokens as if these were its patches, as most transformers' are.
_PIXELS_PER_TOKEN = 256


class ImageTaskSpec(TaskSpec):
    """A task with images: how large they may be, and what is made of them where the models' folders do not tell.

    ``preprocessor`` has the keys of a ``preprocessor_config.json``; without a type it is a ViTImageProcessor.
    """

    preprocessor: dict[str, Any] | None = None
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    max_bytes: Annotated[int, Field(ge=1)] = MAX_BYTES

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
    """The images of one column to tensors (B, C, H, W); decoded and resized while they wait, 8 bits a channel."""

    def __init__(
        self, column: str, preprocessor: Preprocessor, limits: ImageLimits, folder: Beside | None = None
    ) -> None:
        self.columns = (column,)
        self.preprocessor = preprocessor
        self._limits, self._folder = limits, folder

    @classmethod
    def of(
        cls,
        column: str,
        given: Mapping[str, Any] | None,
        limits: ImageLimits,
        models: Models,
    ) -> ImageInputs:
        """For these models, which must prepare an image alike unless a preprocessor is ``given``. EngineError if what
        comes out has no one shape: a batch's images are one tensor."""
        channels = {name: _channels(f"models.{name}", model) for name, (_, model) in models.items()}
        own = shared_preprocessor({name: spec for name, (spec, _) in models.items()}, given, channels)
        if own.shape is None:
            raise EngineError(
                f"task.{'preprocessor' if given is not None else 'image_column'}: the images would come out in sizes "
                "of their own; give a preprocessor with size: {height, width}, or with do_center_crop and crop_size"
            )
        return cls(column, own, limits)

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessor": self.preprocessor.identity}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        assert self.preprocessor.shape is not None
        return self.preprocessor.shape

    def beside(self, shard: Shard) -> ImageInputs:
        """For the rows of this shard, whose paths lead from where it lies."""
        return ImageInputs(self.columns[0], self.preprocessor, self._limits, Beside(shard.store, shard.folder))

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        return [attempt(self._encode_value, value) for (value,) in rows]

    def _encode_value(self, value: Any) -> Encoded:
        image = decode_image(self.columns[0], value, self._limits, self._folder)
        pixels = self.preprocessor.pixels(self.columns[0], image, self._limits.pixels)
        return Encoded(pixels, max(1, pixels.shape[1] * pixels.shape[2] // _PIXELS_PER_TOKEN), pixels.nbytes)

    def examples(self, count: int) -> list[npt.NDArray[np.uint8]]:
        """Some that a model can be tried out on."""
        return list(np.random.default_rng(0).integers(0, 256, (count, *self.shape), np.uint8))

    def collate(self, data: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        return self.preprocessor.batch(data)


def _channels(key: str, model: nn.Module) -> int:
    """Of a model's images, as a config of transformers tells; 3 unless it does."""
    config = getattr(model, "config", None)
    told = getattr(getattr(config, "vision_config", None) or config, "num_channels", 3)
    if told not in (1, 3):
        raise EngineError(f"{key}: takes images of {told} channels; an image has 3, or 1 if it is grey")
    return int(told)


def try_out(key: str, model: nn.Module, images: ImageInputs) -> None:
    """Run a model that takes nothing else. An EngineError that begins with ``key`` if it does not take these images."""
    device = device_of(model)
    shape = " × ".join(map(str, images.shape))
    with (
        torch.no_grad(),
        quietly(),
        refusing(f"{key}: cannot be run on images of {shape}, as its preprocessor makes them"),
    ):
        logits_of(call(model, images.collate(images.examples(1)).to(device)))
