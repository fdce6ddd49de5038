"""What a model's own preprocessor configuration makes of an image, in a few lines of Pillow and numpy.

Equal to what transformers' processors on Pillow do; those on torchvision resize a little differently. A key that asks
for something that is not done here is an error that names it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from assay.corpus.errors import BadRow
from assay.recipe.errors import EngineError
from assay.recipe.model_files import CONFIG, read_mapping, shortened
from assay.recipe.models import ModelSpec, naming
from assay.recipe.patches import patched_size, patches

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"

_HALF = ([0.5] * 3, [0.5] * 3)
_CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_NEAREST, _BILINEAR, _BICUBIC, _HAMMING = 0, 2, 3, 5  # Pillow's numbers: 0 to 5
_MOST_SIDE = 1 << 13
_MOST_AREA = 1 << 22  # of an image in patches, which is filled up to all of them


def _defaults(size: Any, resample: int, colours: tuple[list[float], list[float]], crop: int | None) -> dict[str, Any]:
    """What a class of transformers does where its configuration is silent."""
    return {
        "do_resize": True,
        "size": size,
        "resample": resample,
        "do_center_crop": crop is not None,
        "crop_size": crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": colours[0],
        "image_std": colours[1],
    }


_SHORTEST = {"shortest_edge": 224}
_KINDS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _defaults(224, _BILINEAR, _HALF, None),
    "DeiTImageProcessor": _defaults(256, _BICUBIC, _HALF, 224),
    "SiglipImageProcessor": _defaults({"height": 224, "width": 224}, _BICUBIC, _HALF, None),
    "Siglip2ImageProcessor": _defaults(None, _BILINEAR, _HALF, None) | {"patch_size": 16, "max_num_patches": 256},
    "BlipImageProcessor": _defaults(384, _BICUBIC, _CLIP, None),
    "CLIPImageProcessor": _defaults(_SHORTEST, _BICUBIC, _CLIP, 224),
    "ChineseCLIPImageProcessor": _defaults(_SHORTEST, _BICUBIC, _CLIP, 224),
    "BitImageProcessor": _defaults(_SHORTEST, _BICUBIC, _CLIP, 224),
    "ConvNextImageProcessor": _defaults({"shortest_edge": 384}, _BICUBIC, _HALF, None) | {"crop_pct": 224 / 256},
}
_PATCHES = "Siglip2ImageProcessor"
# Those for which a size of one number is that of a square.
_SQUARE = ("ViTImageProcessor", "DeiTImageProcessor", "BlipImageProcessor")
# A configuration without a type is that of its model's.
_OF_MODELS = {
    **dict.fromkeys(["vit", "vit_mae", "vit_msn", "swin", "swinv2", "hiera", "ijepa"], "ViTImageProcessor"),
    **dict.fromkeys(["convnext", "convnextv2", "resnet", "regnet", "cvt"], "ConvNextImageProcessor"),
    **dict.fromkeys(["bit", "dinov2"], "BitImageProcessor"),
    "deit": "DeiTImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "blip": "BlipImageProcessor",
    "clip": "CLIPImageProcessor",
    "chinese_clip": "ChineseCLIPImageProcessor",
}
# Keys that change no pixel: names, and what is about batches or devices. Every image is converted to RGB.
_IDLE = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys"),
    *("data_format", "device", "return_tensors", "disable_grouping", "do_convert_rgb", "model_input_names"),
}


@dataclass(frozen=True)
class Preprocessor:
    """Image -> resized -> cropped -> (C, H, W) float32, scaled and normalised; steps that are None are left out.

    ``size`` (H, W) is what an image is resized to; ``shortest`` what its shorter edge is, at the same ratio; with
    ``patches`` it becomes at most so many of ``patch`` by ``patch`` pixels, and is handed on as those.
    """

    size: tuple[int, int] | None
    shortest: int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    channels: int = 3
    patch: int | None = None
    patches: int = 0

    @property
    def own_sizes(self) -> bool:
        """Whether images of differing sizes share no batch."""
        return self.shape is None and self.patch is None

    def area(self, image: npt.NDArray[np.uint8]) -> int:
        """How many pixels an image, as ``pixels`` gives it, takes in a batch."""
        return image.shape[1] * image.shape[2] if self.patch is None else self.patches * self.patch**2

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """The (C, H, W) of what comes out; None if it depends on the image."""
        size = self.crop or self.size
        return None if size is None else (self.channels, *size)

    def shapes(self, base: tuple[int, int]) -> list[tuple[int, int, int]]:
        """Some (C, H, W) that come out: the only one, or two; ``base`` (H, W) is where images stay as they are."""
        if self.shape is not None:
            return [self.shape]
        if self.patch is not None:
            return [(self.channels, self.patch, self.patch), (self.channels, self.patch, self.patch * self.patches)]
        height, width = base if self.shortest is None else (self.shortest, self.shortest)
        return [(self.channels, height, width), (self.channels, height, width + 32)]

    @property
    def identity(self) -> dict[str, Any]:
        return asdict(self)

    def pixels(self, name: str, image: Any, limit: int) -> npt.NDArray[np.uint8]:
        """A PIL image in RGB, resized and cropped: (C, H, W). BadRow if it would grow beyond ``limit`` pixels."""
        if self.channels == 1:
            image = image.convert("L")
        height, width = self.size or self._size_by_edge(image.height, image.width)
        if height * width > limit:
            raise BadRow(
                f"{name} is {image.width:,} × {image.height:,} pixels and would be resized to {width:,} × {height:,}, "
                f"more than {limit:,}; the limit is the task's max_pixels"
            )
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), resample=self.resample)
        array = np.asarray(image).reshape(height, width, self.channels).transpose(2, 0, 1)
        return np.ascontiguousarray(array if self.crop is None else _centre(array, self.crop))

    def _size_by_edge(self, height: int, width: int) -> tuple[int, int]:
        if self.patch is not None:
            return patched_size(height, width, self.patch, self.patches)
        if self.shortest is None:
            return height, width
        short, long = sorted((height, width))
        stretched = int(self.shortest * long / short)
        return (stretched, self.shortest) if width <= height else (self.shortest, stretched)

    def batch(self, images: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor | dict[str, torch.Tensor]:
        """Images of one shape (C, H, W), as ``pixels`` gives them, as the model's input (B, C, H, W) float32; or images
        of whole patches as those, by the names that a model calls them."""
        if self.patch is not None:
            return patches([self._stacked([image])[0] for image in images], self.patch, self.patches)
        return self._stacked(images)

    def _stacked(self, images: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        tables = self._tables()
        result = np.empty((len(images), *images[0].shape), np.float32)
        for i, image in enumerate(images):
            for c, table in enumerate(tables):
                np.take(table, image[c], out=result[i, c], mode="clip")
        # A copy of torch's own making: numpy aligns to 16 bytes, and a matrix product may round by alignment.
        return torch.from_numpy(result).clone()

    def _tables(self) -> npt.NDArray[np.float32]:
        """(C, 256): what becomes of a pixel's value, rounded as transformers rounds it."""
        values = np.arange(256)
        scaled = (values if self.scale is None else values.astype(np.float64) * self.scale).astype(np.float32)
        tables = np.repeat(scaled[None], self.channels, 0)
        if self.mean is not None and self.std is not None:
            tables = (tables - np.array(self.mean, np.float32)[:, None]) / np.array(self.std, np.float32)[:, None]
        return tables


def _centre(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The middle of an image (C, H, W), on a black ground where it is too small."""
    target = np.zeros((len(image), *size), np.uint8)
    into, of = zip(*(_overlap(own, wanted) for own, wanted in zip(image.shape[1:], size, strict=True)), strict=True)
    target[(slice(None), *into)] = image[(slice(None), *of)]
    return target


def _overlap(own: int, wanted: int) -> tuple[slice, slice]:
    """Along one edge: the places in the target that are filled, and those of the image that fill them."""
    start = (own - wanted) // 2
    if start >= 0:
        return slice(0, wanted), slice(start, start + wanted)
    before = -start  # the half that is left over goes before the image, as transformers has it
    return slice(before, before + own), slice(0, own)


def parse(values: Mapping[str, Any], where: str, channels: int = 3, model_type: str | None = None) -> Preprocessor:
    """A configuration as transformers saves it.

    Args:
        values: its keys.
        where: for errors: the file, or the recipe's key.
        channels: 3, or 1 for a model of grey images.
        model_type: whose configuration it is, should it not tell its own type.

    Raises:
        EngineError: it asks for something that is not known here, or holds something that is no value of its key.
    """
    kind = _kind(values, where, model_type)
    settings = _KINDS[kind] | {key: value for key, value in values.items() if value is not None}
    asked = [key for key, value in values.items() if key not in _KINDS[kind] and key not in _IDLE and value]
    if asked:
        raise EngineError(f"{where}: asks for {shortened(sorted(asked))}, which {kind} is not known here to do")
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not isinstance(settings[key], bool):
            raise EngineError(f"{where}: {key} is {_shown(settings[key])}; expected true or false")
    steps = Preprocessor(
        None, None, _integer(where, "resample", settings["resample"], _HAMMING, 0), None, None, None, None
    )
    if kind == _PATCHES and (settings["do_center_crop"] or not settings["do_resize"]):
        raise EngineError(
            f"{where}: {kind} resizes images to whole patches and does not crop; it asks for something else"
        )
    if settings["do_resize"]:
        steps = _resized(steps, settings, where, kind)
    if settings["do_center_crop"]:
        if steps.crop:
            raise EngineError(f"{where}: asks for do_center_crop and for a crop_pct; expected one of them")
        steps = replace(steps, crop=_square(where, "crop_size", settings["crop_size"]))
    if settings["do_rescale"]:
        steps = replace(steps, scale=_number(where, "rescale_factor", settings["rescale_factor"]))
    if settings["do_normalize"]:
        mean, std = (_numbers(where, key, settings[key], channels) for key in ("image_mean", "image_std"))
        if 0 in std:
            raise EngineError(f"{where}: image_std has a 0, by which nothing can be divided")
        steps = replace(steps, mean=mean, std=std)
    return replace(steps, channels=channels)


def _kind(values: Mapping[str, Any], where: str, model_type: str | None) -> str:
    named = (
        values.get("image_processor_type") or values.get("feature_extractor_type") or _OF_MODELS.get(model_type or "")
    )
    if not isinstance(named, str):
        raise EngineError(f"{where}: has no image_processor_type; expected one of {', '.join(_KINDS)}")
    kind = named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in _KINDS:
        raise EngineError(
            f"{where}: image_processor_type is {shortened([named])}, which is not known here; expected one of "
            f"{', '.join(_KINDS)}, or its own numbers under the recipe's task.preprocessor"
        )
    return kind


def _resized(steps: Preprocessor, settings: Mapping[str, Any], where: str, kind: str) -> Preprocessor:
    size = settings["size"]
    if kind == _PATCHES:
        if size is not None:
            raise EngineError(f"{where}: size is {_shown(size)}; {kind} takes patch_size and max_num_patches")
        number, side = (_integer(where, key, settings[key], _MOST_SIDE) for key in ("max_num_patches", "patch_size"))
        if number * side * side > _MOST_AREA:
            raise EngineError(f"{where}: {number:,} patches of {side} × {side} are more than {_MOST_AREA:,} pixels")
        return replace(steps, patch=side, patches=number)
    if isinstance(size, int) and kind not in _SQUARE:
        size = {"shortest_edge": size}
    if not isinstance(size, Mapping) or size.get("shortest_edge") is None:
        if kind == "ConvNextImageProcessor":
            raise EngineError(f"{where}: size is {_shown(size)}; {kind} takes a shortest_edge")
        return replace(steps, size=_square(where, "size", size))
    if other := sorted(str(key) for key, value in size.items() if key != "shortest_edge" and value is not None):
        raise EngineError(f"{where}: size asks for {shortened(other)} beside shortest_edge, which is not known here")
    edge = _integer(where, "size.shortest_edge", size["shortest_edge"], _MOST_SIDE)
    if kind != "ConvNextImageProcessor":
        return replace(steps, shortest=edge)
    if edge >= 384:  # transformers' own rule: larger ones are warped and not cropped
        return replace(steps, size=(edge, edge))
    share = _number(where, "crop_pct", settings["crop_pct"])
    if not 0 < share <= 1:
        raise EngineError(f"{where}: crop_pct is {share}; expected more than 0 and at most 1")
    return replace(steps, shortest=_integer(where, "size", int(edge / share), _MOST_SIDE), crop=(edge, edge))


def _square(where: str, key: str, value: Any) -> tuple[int, int]:
    """(H, W) of a size in any of its forms."""
    if isinstance(value, int):
        value = {"height": value, "width": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    given = {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}
    if given.keys() != {"height", "width"}:
        raise EngineError(f"{where}: {key} is {_shown(value)}; expected height and width")
    height, width = (_integer(where, f"{key}.{edge}", given[edge], _MOST_SIDE) for edge in ("height", "width"))
    return height, width


def _integer(where: str, key: str, value: Any, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise EngineError(f"{where}: {key} is {_shown(value)}; expected an integer from {least} to {most:,}")
    return value


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EngineError(f"{where}: {key} is {_shown(value)}; expected a number")
    return float(value)


def _numbers(where: str, key: str, value: Any, channels: int) -> tuple[float, ...]:
    numbers = value if isinstance(value, list | tuple) else [value] * channels
    if len(numbers) != channels:
        raise EngineError(f"{where}: {key} has {len(numbers)} numbers; the model's images have {channels} channels")
    return tuple(_number(where, key, number) for number in numbers)


def _shown(value: Any) -> str:
    return shortened([repr(value)])


def shared_preprocessor(
    specs: Mapping[str, ModelSpec], given: Mapping[str, Any] | None, channels: Mapping[str, int]
) -> Preprocessor:
    """What a recipe's models make of an image.

    Args:
        specs: the models, in whose folders transformers' configurations lie.
        given: the recipe's own ``task.preprocessor``, which stands in place of them.
        channels: of each model's images.

    Raises:
        EngineError: the models differ, or there is none.
    """
    if len(set(channels.values())) > 1:
        shown = ", ".join(f"models.{name} {count}" for name, count in channels.items())
        raise EngineError(f"the models' images differ in their channels ({shown}); score them in recipes of their own")
    if given is not None:
        typed = {"image_processor_type", "feature_extractor_type"} & given.keys()
        kind = {} if typed else {"image_processor_type": "ViTImageProcessor"}
        return parse({**kind, **given}, "task.preprocessor", next(iter(channels.values()), 3))
    first: tuple[str, Preprocessor] | None = None
    for name, spec in specs.items():
        with naming(f"models.{name}"):
            own = _of_folder(preprocessor_folder(spec), channels[name])
        if first is None:
            first = name, own
        elif first[1] != own:
            keys = [key for key, value in own.identity.items() if value != first[1].identity[key]]
            raise EngineError(
                f"models.{first[0]} and models.{name} prepare images differently ({shortened(keys)}); score them in "
                "recipes of their own, or say what both get under task.preprocessor"
            )
    if first is None:
        raise EngineError("the recipe has no model that an image could be prepared for")
    return first[1]


def preprocessor_folder(spec: ModelSpec) -> str:
    """The folder in which a model's preprocessor lies. EngineError if the model is of a kind that has none."""
    path: str | None = spec.path  # a kind may do without
    if path is None or os.path.isfile(path):
        where = "has no path" if path is None else f"is one file, {path}"
        raise EngineError(
            f"is of kind {spec.kind} and {where}; a {PREPROCESSOR} lies in a model's folder: say under "
            "task.preprocessor what is made of an image"
        )
    return path


def _of_folder(path: str, channels: int) -> Preprocessor:
    config = os.path.join(path, CONFIG)
    model_type = read_mapping(config).get("model_type") if os.path.isfile(config) else None
    model_type = model_type if isinstance(model_type, str) else None
    processor = os.path.join(path, PROCESSOR)
    if os.path.isfile(processor):  # in transformers' order
        nested = read_mapping(processor).get("image_processor")
        if isinstance(nested, dict):
            return parse(nested, f"{processor}: image_processor", channels, model_type)
    file = os.path.join(path, PREPROCESSOR)
    if not os.path.isfile(file):
        raise EngineError(
            f"{path}: has no {PREPROCESSOR}; save the model's image processor there, or say under task.preprocessor "
            "what is made of an image"
        )
    return parse(read_mapping(file), file, channels, model_type)
