"""Preprocessor configurations: as transformers' own processors, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.corpus.errors import BadRow
from assay.recipe.errors import EngineError
from assay.recipe.models import ModelSpec
from assay.recipe.preprocessor import Preprocessor, parse, shared_preprocessor

Image = pytest.importorskip("PIL.Image")
LIMIT = 1 << 20
RNG = np.random.default_rng(0)
IMAGES = [
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for height, width in [(40, 61), (61, 40), (33, 33), (7, 12), (1, 30)]
]

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("vit", {"size": 20}),
    ("vit", {"size": {"height": 20, "width": 31}, "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": 0.3}),
    ("vit", {"size": [16, 24], "resample": 0, "do_normalize": False}),
    ("vit", {"size": 20, "do_rescale": False}),
    ("vit", {"size": 20, "do_center_crop": True, "crop_size": 15}),
    ("vit", {"size": {"shortest_edge": 21}, "do_center_crop": True, "crop_size": {"height": 15, "width": 18}}),
    ("vit", {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 45, "width": 20}}),
    ("vit", {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 20, "width": 62}, "resample": None}),
    ("clip", {"size": 24, "crop_size": 24}),
    ("clip", {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}, "do_convert_rgb": True}),
    ("clip", {"size": 20, "crop_size": 24, "resample": 1}),
    ("convnext", {"size": {"shortest_edge": 20}}),
    ("convnext", {"size": 24, "crop_pct": 0.95, "resample": 2}),
    ("convnext", {"size": {"shortest_edge": 384}}),
    ("deit", {"size": 28, "crop_size": 21}),
    ("bit", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "rescale_factor": 1 / 127.5}),
    ("siglip", {"size": {"height": 18, "width": 18}}),
    ("blip", {"size": {"height": 18, "width": 18}, "do_pad": False, "_valid_processor_keys": ["images"]}),
]


def saved(model: str, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' own processor, and what it writes into its file."""
    module = pytest.importorskip(f"transformers.models.{model}.image_processing_pil_{model}")
    (name,) = module.__all__
    processor = getattr(module, name)(**values)
    return processor, json.loads(processor.to_json_string())


@pytest.mark.parametrize(("model", "values"), CONFIGS)
def test_equal_to_transformers(model: str, values: dict[str, Any]) -> None:
    processor, written = saved(model, values)
    named = {"image_processor_type": written["image_processor_type"]}
    for own in (parse(written, "file"), parse({**values, **named}, "file"), parse(values, "file", model_type=model)):
        for image in IMAGES:
            expected = processor(image, return_tensors="np")["pixel_values"]
            found = own.batch([own.pixels("image", image, LIMIT)]).numpy()
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
            assert own.shape is None or own.shape == found.shape[1:]


@pytest.mark.parametrize(
    "values", [{}, {"patch_size": 8, "max_num_patches": 20}, {"patch_size": 5, "max_num_patches": 1}]
)
def test_patches_are_those_of_transformers(values: dict[str, Any]) -> None:
    processor, written = saved("siglip2", values)
    images = [*IMAGES, Image.new("RGB", (300, 1)), Image.new("RGB", (2, 90)), Image.new("RGB", (1, 1))]
    for own in (parse(written, "file"), parse(values, "file", model_type="siglip2")):
        assert not own.own_sizes
        found = own.batch([own.pixels("image", image, 1 << 20) for image in images])
        expected = processor(images, return_tensors="pt")
        assert found.keys() == expected.keys()
        for name, values_ in expected.items():
            torch.testing.assert_close(found[name], values_.to(found[name].dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": 16}, "size is 16; Siglip2ImageProcessor takes patch_size and max_num_patches"),
        ({"do_resize": False}, "resizes images to whole patches"),
        ({"do_center_crop": True}, "resizes images to whole patches"),
        ({"max_num_patches": 0}, "max_num_patches is 0"),
        ({"patch_size": 10**6}, "patch_size is 1000000"),
        ({"patch_size": 512, "max_num_patches": 17}, "17 patches of 512 × 512 are more than 4,194,304 pixels"),
    ],
)
def test_patches_of_other_kinds_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        parse(values, "file", model_type="siglip2")


@pytest.mark.parametrize("model", ["vit", "clip", "convnext", "deit", "bit", "siglip", "blip"])
def test_defaults_are_transformers(model: str) -> None:
    processor, written = saved(model, {})
    own = parse({}, "file", model_type=model)
    assert own == parse(written, "file")
    expected = processor(IMAGES[0], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(own.batch([own.pixels("i", IMAGES[0], LIMIT)]).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_model_of_grey_images() -> None:
    grey = IMAGES[0].convert("L")
    processor, _ = saved("vit", {"size": 20, "image_mean": [0.4], "image_std": [0.2]})
    values = {"size": 20, "image_mean": [0.4], "image_std": [0.2]}
    own = parse(values, "file", 1, "vit")
    expected = processor(np.asarray(grey)[None], return_tensors="np", input_data_format="channels_first")[
        "pixel_values"
    ]
    found = own.batch([own.pixels("image", grey.convert("RGB"), LIMIT)]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(EngineError, match="image_mean has 3 numbers; the model's images have 1 channels"):
        parse({"size": 20}, "file", 1, "vit")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_processor_type": "MobileViTImageProcessor"}, "MobileViTImageProcessor, which is not known here"),
        ({"image_processor_type": 3}, "has no image_processor_type"),
        ({}, "has no image_processor_type"),
        ({"do_flip_channel_order": True}, "asks for do_flip_channel_order, which ViTImageProcessor is not known"),
        ({"crop_pct": 0.9}, "asks for crop_pct"),
        ({"do_pad": True, "pad_size": {"height": 9, "width": 9}}, "asks for do_pad, pad_size"),
        ({"size": {"longest_edge": 30}}, "size is .*longest_edge.*expected height and width"),
        ({"size": {"shortest_edge": 30, "longest_edge": 60}}, "size asks for longest_edge"),
        ({"size": {"height": 30}}, "expected height and width"),
        ({"size": 0}, "size.height is 0; expected an integer from 1 to 8,192"),
        ({"size": 10**9}, "size.height is 1000000000"),
        ({"size": "224"}, "size is '224'"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; expected true or false"),
        ({"resample": 6}, "resample is 6"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"do_center_crop": True}, "crop_size is None"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
        ({"image_mean": [0.5, 0.5]}, "image_mean has 2 numbers"),
        ({"image_mean": ["a", 0, 0]}, "image_mean is 'a'"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std has a 0"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"height": 9, "width": 9}},
            "takes a shortest_edge",
        ),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 20, "crop_pct": 2}, "crop_pct is 2"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": 20, "do_center_crop": True, "crop_size": 20},
            "do_center_crop and for a crop_pct",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    kind = {} if not values or "image_processor_type" in values else {"image_processor_type": "ViTFeatureExtractor"}
    with pytest.raises(EngineError, match=said) as caught:
        parse({**kind, **values}, "some/file")
    assert str(caught.value).startswith("some/file: ")
    assert "\n" not in str(caught.value)


def test_an_image_that_resizing_would_blow_up_is_a_bad_row() -> None:
    own = parse({"size": 24, "crop_size": 24}, "file", model_type="clip")
    with pytest.raises(BadRow, match=r"would be resized to 24,000 × 24, more than 100,000"):
        own.pixels("image", Image.new("RGB", (1000, 1)), 100_000)


class Somewhere(ModelSpec):
    """A model that only lies somewhere."""


def folder(path: Path, **files: dict[str, Any]) -> ModelSpec:
    path.mkdir()
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return Somewhere.model_construct(kind="somewhere", path=str(path))


def shared(specs: dict[str, ModelSpec], given: dict[str, Any] | None = None) -> Preprocessor:
    return shared_preprocessor(specs, given, dict.fromkeys(specs, 3))


def test_models_share_a_preprocessor_or_say_what_differs(tmp_path: Path) -> None:
    vit = {"image_processor_type": "ViTImageProcessor", "size": 32}
    one = folder(tmp_path / "one", preprocessor_config=vit)
    same = folder(tmp_path / "same", config={"model_type": "vit"}, preprocessor_config={"size": [32, 32]})
    nested = folder(tmp_path / "nested", processor_config={"image_processor": vit}, preprocessor_config={"size": "?"})
    other = folder(tmp_path / "other", preprocessor_config={**vit, "resample": 3})
    bare = folder(tmp_path / "bare", config={"model_type": "vit"})
    assert shared({"a": one, "b": same, "c": nested}).size == (32, 32)
    with pytest.raises(EngineError, match=r"models.a and models.b prepare images differently \(resample\)"):
        shared({"a": one, "b": other})
    with pytest.raises(EngineError, match=r"^models.b: .*has no preprocessor_config.json"):
        shared({"a": one, "b": bare})
    assert shared({"a": one, "b": other, "c": bare}, {"size": 16}).size == (16, 16)
    clip = {"size": 16, "crop_size": 8}
    assert shared({"a": bare}, {"feature_extractor_type": "CLIPFeatureExtractor", **clip}) == parse(
        {"image_processor_type": "CLIPImageProcessor", **clip}, "file"
    )
    with pytest.raises(EngineError, match=r"^task.preprocessor: asks for colour"):
        shared({"a": bare}, {"size": 16, "colour": "red"})
    with pytest.raises(EngineError, match=r"models.a 3, models.b 1"):
        shared_preprocessor({"a": one, "b": one}, None, {"a": 3, "b": 1})


@pytest.mark.parametrize(
    ("path", "said"), [(None, "has no path"), ("weights.safetensors", "is one file, .*weights.safetensors")]
)
def test_a_model_without_a_folder_has_no_preprocessor(tmp_path: Path, path: str | None, said: str) -> None:
    if path is not None:
        (tmp_path / path).touch()
        path = str(tmp_path / path)
    bare = Somewhere.model_construct(kind="python", path=path)
    with pytest.raises(EngineError, match=rf"^models\.a: is of kind python and {said}; .*task\.preprocessor") as caught:
        shared({"a": bare})
    assert "\n" not in str(caught.value)
    assert shared({"a": bare}, {"size": 16}).size == (16, 16)
