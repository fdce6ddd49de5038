"""Models in bfloat16 and float16: float32 scores close to a float32 model's, and another identity."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from assay.engine import run
from assay.recipe.errors import ChangedError, EngineError, RecipeError
from assay.recipe.models import TransformersSpec
from assay.recipe.recipe import load_recipe
from tests.recipe.test_checkpoints import write_gguf
from tests.small_architectures import save
from tests.small_models import edit_weights, save_model, write_recipe

METHODS = [
    {"method": "ensemble", "models": ["small", "better"]},
    {"method": "grad_mimic", "model": "small", "reference": "better"},
]
MEANT = ("ensemble_nll", "ensemble_mutual_information", "mimic", "loss", "rho")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("small", "better")):
        save_model(root / name, seed=seed)
    return root


def scores(root, small: str, better: str) -> pa.Table:
    models = {
        name: {"kind": "transformers", "path": name, "dtype": dtype}
        for name, dtype in (("small", small), ("better", better))
    }
    path = write_recipe(root, models, methods=METHODS, output=f"{small}-{better}")
    assert run(load_recipe(str(path))).clean
    return pq.read_table(root / f"{small}-{better}/a.parquet")


def test_scores_are_those_of_float32_but_for_rounding(project):
    whole = scores(project, "float32", "float32")
    for small, better, tolerance in (
        ("bfloat16", "bfloat16", 0.05),
        ("float16", "float16", 0.01),
        ("bfloat16", "float32", 0.05),
    ):
        table = scores(project, small, better)
        for name in MEANT:
            assert table.schema.field(name).type == pa.float32()
            own, expected = (torch.tensor(t[name].to_pylist()) for t in (table, whole))
            assert not torch.equal(own, expected)
            torch.testing.assert_close(own, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_the_type_is_part_of_what_identifies_a_model(project):
    specs = [
        TransformersSpec(kind="transformers", path=str(project / "small"), dtype=dtype)
        for dtype in ("float32", "bfloat16", "float16")
    ]
    assert len({spec.fingerprint() for spec in specs}) == 3
    assert [spec.identity()["dtype"] for spec in specs] == ["float32", "bfloat16", "float16"]
    assert [spec.build().dtype for spec in specs] == [torch.float32, torch.bfloat16, torch.float16]
    path = str(write_recipe(project, {"small": "small"}, output="changed"))
    run(load_recipe(path))
    with pytest.raises(ChangedError, match=r"models\.small\.dtype: float32 → bfloat16"):
        run(load_recipe(path, ["models.small.dtype=bfloat16"]))
    with pytest.raises(RecipeError, match=r"models\.small\.dtype: input should be 'float32', 'bfloat16' or 'float16'"):
        load_recipe(path, ["models.small.dtype=int8"])


def test_numbers_that_float16_has_not_are_refused(tmp_path):
    folder = save_model(tmp_path / "m")
    edit_weights(folder / "model.safetensors", lambda t: t["model.norm.weight"][0].fill_(70_000))
    with pytest.raises(EngineError, match=r"model\.norm\.weight hold numbers that float16 has not; take bfloat16"):
        TransformersSpec(kind="transformers", path=str(folder), dtype="float16").build()
    TransformersSpec(kind="transformers", path=str(folder), dtype="bfloat16").build()


def test_gguf_files_too(tmp_path):
    path = str(write_gguf(tmp_path / "m.gguf"))
    wide, narrow = (TransformersSpec(kind="transformers", path=path, dtype=d) for d in ("float32", "bfloat16"))
    assert wide.fingerprint() != narrow.fingerprint()
    expected, own = wide.build().state_dict(), narrow.build().state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], tensor.bfloat16()) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_images_are_cast_where_the_model_does_not(tmp_path, name):
    save(tmp_path, name, "AutoModelForImageClassification")
    images = torch.randn(2, 3, 16, 16)
    wide, narrow = (
        TransformersSpec(kind="transformers", path=str(tmp_path), dtype=d).build_for("AutoModelForImageClassification")
        for d in ("float32", "bfloat16")
    )
    with torch.no_grad():
        expected, own = wide(pixel_values=images).logits, narrow(images).logits
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(own.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
