"""Images: tiny vision models of transformers with preprocessors of their own, from the recipe to the scores."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from assay.corpus.images import ImageLimits
from assay.corpus.scores_folder import open_scores
from assay.engine.batches import score_samples
from assay.engine.local import run
from assay.engine.rows import Sample
from assay.methods import Ensemble, Scorer
from assay.recipe.errors import ChangedError, EngineError, RecipeError
from assay.recipe.models import MlpSpec
from assay.recipe.preprocessor import parse
from assay.recipe.recipe import BatchSpec, load_recipe
from assay.recipe.tasks.classification import ClassificationSpec
from assay.recipe.tasks.images import ImageInputs
from assay.tasks import Classification
from tests.small_architectures import save

Image = pytest.importorskip("PIL.Image")
CLASSES, COUNT = 3, 11
RNG = np.random.default_rng(0)
SIZES = [(int(height), int(width)) for height, width in RNG.integers(8, 40, (COUNT, 2))]
PICTURES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
LABELS = RNG.integers(0, CLASSES, COUNT).tolist()
PREPROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}},
    "resnet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}},
}


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two checkpoints of each architecture, and the models themselves."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for kind, values in PREPROCESSORS.items():
        for seed in (0, 1):
            path = root / f"{kind}-{seed}"
            made[path.name] = save(path, kind, "AutoModelForImageClassification", seed, num_labels=CLASSES)
            (path / "preprocessor_config.json").write_text(json.dumps(values))
    return root, made


def write_recipe(root: Path, models: Path, kind: str, **task: Any) -> Path:
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "classification", "image_column": "image", "classes": CLASSES, **task},
        "models": {f"m{seed}": {"kind": "transformers", "path": str(models / f"{kind}-{seed}")} for seed in (0, 1)},
        "methods": [
            {"method": "ensemble", "models": ["m0", "m1"]},
            {"method": "grad_mimic", "model": "m0", "reference": "m1", "layers": "*classifier*"},
        ],
        "output": "scores",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml"


def losses_of(model: Any, kind: str) -> np.ndarray:
    """As transformers alone has them, an image at a time."""
    module = __import__("transformers.models." + {"vit": "vit", "resnet": "convnext"}[kind], fromlist=["*"])
    values = {key: value for key, value in PREPROCESSORS[kind].items() if key == "size"}
    processor = getattr(module, PREPROCESSORS[kind]["image_processor_type"] + "Pil")(**values)
    with torch.no_grad():
        logits = torch.cat([model(**processor(Image.fromarray(p), return_tensors="pt")).logits for p in PICTURES])
    return torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS), reduction="none").numpy()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_losses_are_those_of_transformers_whatever_the_form(tmp_path: Path, models: Any, kind: str) -> None:
    folder, made = models
    data = tmp_path / "data"
    (data / "sub/images").mkdir(parents=True)
    for i, picture in enumerate(PICTURES):
        (data / f"sub/images/{i}.png").write_bytes(png(picture))
    structs = [{"bytes": png(p), "path": "anything.png"} for p in PICTURES]
    pq.write_table(pa.table({"image": structs, "label": LABELS}), data / "structs.parquet")
    pq.write_table(pa.table({"image": [png(p) for p in PICTURES], "label": LABELS}), data / "bytes.parquet")
    pq.write_table(pa.table({"image": [p.tolist() for p in PICTURES], "label": LABELS}), data / "pixels.parquet")
    rows = [{"image": f"images/{i}.png", "label": label} for i, label in enumerate(LABELS)]
    (data / "sub/paths.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = run(load_recipe(str(write_recipe(tmp_path, folder, kind))))
    assert summary.clean
    assert summary.rows_scored == 4 * COUNT
    expected = [losses_of(made[f"{kind}-{seed}"], kind) for seed in (0, 1)]
    for name in ("structs", "bytes", "pixels", "sub/paths"):
        table = pq.read_table(tmp_path / f"scores/{name}.parquet")
        np.testing.assert_allclose(table["loss"].to_numpy(), expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(table["reference_loss"].to_numpy(), expected[1], rtol=1e-5, atol=1e-5)
    one_by_one = load_recipe(str(write_recipe(tmp_path, folder, kind)), ["batch.samples=1", "output=alone"])
    run(one_by_one)
    for name in ("mimic", "ensemble_nll", "ensemble_entropy"):
        own, alone = (
            pq.read_table(tmp_path / f"{where}/bytes.parquet")[name].to_numpy() for where in ("scores", "alone")
        )
        np.testing.assert_allclose(own, alone, rtol=1e-5, atol=1e-6)


OWN = {"do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def own_losses(model: Any, pictures: list[Any], labels: list[int]) -> np.ndarray:
    """Of images in sizes of their own, each by itself, with nothing but torch."""
    made = [(torch.from_numpy(p).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5 for p in pictures]
    with torch.no_grad():
        logits = torch.cat([model(x).logits for x in made])
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none").numpy()


def test_images_of_differing_sizes_are_scored_as_each_by_itself(tmp_path: Path, models: Any) -> None:
    """In batches of one size each, in the rows' order; with autograd's gradients."""
    shapes = [(9, 14), (20, 8), (9, 14), (33, 40), (20, 8), (9, 14), (14, 9)]
    pictures = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    labels = [0, 1, 2, 0, 1, 2, 0]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [png(p) for p in pictures], "label": labels}), tmp_path / "data/a.parquet")
    recipe = str(write_recipe(tmp_path, models[0], "resnet", preprocessor=OWN))
    assert run(load_recipe(recipe)).clean
    table = pq.read_table(tmp_path / "scores/a.parquet")
    assert table["row"].to_pylist() == list(range(len(shapes)))
    for seed, column in ((0, "loss"), (1, "reference_loss")):
        expected = own_losses(models[1][f"resnet-{seed}"], pictures, labels)
        np.testing.assert_allclose(table[column].to_numpy(), expected, rtol=1e-5, atol=1e-5)
    head, other = (models[1][f"resnet-{seed}"].classifier[1] for seed in (0, 1))
    step = [other.weight - head.weight, other.bias - head.bias]
    norm = sum(v.square().sum() for v in step).sqrt()
    mimic = []
    for picture, label in zip(pictures, labels, strict=True):
        x = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        loss = torch.nn.functional.cross_entropy(models[1]["resnet-0"](x).logits, torch.tensor([label]))
        gradient = torch.autograd.grad(loss, [head.weight, head.bias])
        mimic.append(-sum((g * v).sum() for g, v in zip(gradient, step, strict=True)) / norm)
    np.testing.assert_allclose(table["mimic"].to_numpy(), torch.stack(mimic).detach(), rtol=1e-4, atol=1e-6)
    for changes in (["batch.samples=1"], ["batch.tokens=3"]):
        run(load_recipe(recipe, [*changes, "output=other"]), rescore=True)
        other_table = pq.read_table(tmp_path / "other/a.parquet")
        for name in table.column_names[2:]:
            np.testing.assert_allclose(other_table[name], table[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("told", "expected"),
    [(384, (384, 384)), ([20, 30], (20, 30)), (10**9, (224, 224)), ("x", (224, 224)), (None, (224, 224))],
)
def test_images_that_stay_as_they_are_are_tried_out_at_the_models_size(told: Any, expected: tuple[int, int]) -> None:
    """If it is one: a config may say anything."""
    model = Patches()
    model.config = {"image_size": told}  # type: ignore[assignment]
    limits = ImageLimits()
    images = ImageInputs(
        "image", parse({**OWN, "image_processor_type": "ViTImageProcessor"}, "x"), limits, {"m": model}
    )
    height, width = expected
    assert images.shapes == [(3, height, width), (3, height, width + 32)]


class Patches(torch.nn.Module):
    """Takes images of any size of at least 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 4, 8, 4), torch.nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.conv(x).mean((2, 3)))
        return made


def test_a_size_that_the_model_does_not_take_is_its_rows_fault_alone(tmp_path: Path) -> None:
    spec = ClassificationSpec(kind="classification", image_column="image", classes=CLASSES, preprocessor=OWN)
    model = Patches().eval()
    encoder = spec.encoder({"m": (MlpSpec(kind="mlp", path=str(tmp_path)), model)})
    rows = [(png(np.full((height, 9, 3), 9, np.uint8)), 0) for height in (8, 7, 8, 7, 16)]
    samples = [Sample(i, str(i), encoded) for i, encoded in enumerate(encoder.encode(rows))]  # type: ignore[arg-type]
    scorer = Scorer([Ensemble([model], Classification())])
    scores, failed = score_samples(scorer, encoder, samples, BatchSpec())
    assert failed.keys() == {1, 3}
    assert failed[1].startswith("image becomes 3 × 7 × 9, which models.m cannot be run on (RuntimeError: ")
    assert np.isfinite(scores["ensemble_nll"]).tolist() == [True, False, True, False, True]

    def broken(batch: Any) -> Any:
        raise RuntimeError("a bug")

    broken.columns = scorer.columns  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="a bug"):
        score_samples(broken, encoder, samples[:1], BatchSpec())  # type: ignore[arg-type]


def test_what_is_no_image_is_quarantined_with_its_reason(tmp_path: Path, models: Any) -> None:
    good = png(PICTURES[0])
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.png").write_bytes(good)
    images = [good, None, b"text", good[:60], png(np.zeros((300, 400, 3), np.uint8)), good]
    (tmp_path / "data").mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": [0, 0, 0, 0, 0, 7]}), tmp_path / "data/a.parquet")
    paths = ["../outside.png", str(tmp_path / "outside.png"), "none.png"]
    (tmp_path / "data/b.jsonl").write_text("\n".join(json.dumps({"image": p, "label": 0}) for p in paths))
    summary = run(load_recipe(str(write_recipe(tmp_path, models[0], "vit", max_pixels=100_000))))
    assert (summary.rows_scored, summary.rows_quarantined) == (1, 8)
    lists = sorted((tmp_path / "scores/quarantine").rglob("*.jsonl"))
    reasons = [json.loads(line)["reason"] for file in lists for line in file.read_text().splitlines()]
    for reason, said in zip(
        reasons,
        ["is null", "no image", "no PNG that can be decoded", "400 × 300 pixels", "outside the classes"]
        + 2 * ["expected one relative to the table"]
        + ["cannot be read (FileNotFoundError)"],
        strict=True,
    ):
        assert said in reason


def test_a_changed_image_file_is_a_changed_shard(tmp_path: Path, models: Any) -> None:
    """Of those that name it, and of them alone."""
    data = tmp_path / "data"
    data.mkdir()
    for i, picture in enumerate(PICTURES):
        (data / f"{i}.png").write_bytes(png(picture))
    for name in ("a", "b"):
        rows = [{"image": f"{i}.png", "label": label} for i, label in enumerate(LABELS) if name == "a" or i]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = load_recipe(str(write_recipe(tmp_path, models[0], "vit")))
    assert run(recipe).scored == 2
    assert run(recipe).scored == 0
    before = [pq.read_table(tmp_path / f"scores/{name}.parquet") for name in ("a", "b")]
    (data / "0.png").write_bytes(png(PICTURES[1]))
    (status, other) = open_scores(str(tmp_path / "scores")).shards
    assert (status.state.value, other.state.value) == ("changed", "done")
    assert status.detail == "'0.png', which it names, has changed since it was scored"
    summary = run(recipe)
    assert (summary.scored, summary.rescored, summary.done_before) == (1, 1, 1)
    after = [pq.read_table(tmp_path / f"scores/{name}.parquet") for name in ("a", "b")]
    assert after[1].equals(before[1], check_metadata=True)
    assert before[0]["loss"][0] != after[0]["loss"][0]
    assert after[0].slice(1).equals(before[0].slice(1))
    assert run(recipe).scored == 0


def test_a_changed_image_of_a_target_is_a_changed_target(tmp_path: Path, models: Any) -> None:
    """What a method is fitted to are the images, not the table that names them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "target").mkdir()
    pq.write_table(pa.table({"image": list(map(png, PICTURES[:4])), "label": LABELS[:4]}), tmp_path / "data/a.parquet")
    (tmp_path / "target/t.jsonl").write_text(json.dumps({"image": "t.png", "label": 0}))
    (tmp_path / "target/t.png").write_bytes(png(PICTURES[5]))
    method = {"method": "less", "models": ["m0"], "optimizers": None, "layers": "classifier"}
    method["sketch"] = {"kind": "sparse", "dim": 4}
    changes = [f"methods={json.dumps([method])}", "targets={t: {path: target}}"]
    recipe = load_recipe(str(write_recipe(tmp_path, models[0], "vit")), changes)
    assert run(recipe).scored == 1
    assert run(recipe).done_before == 1
    before = pq.read_table(tmp_path / "scores/a.parquet")["less"]
    (tmp_path / "target/t.png").write_bytes(png(PICTURES[6]))
    with pytest.raises(ChangedError, match=r"files of targets\.t: sha256:.* → sha256:"):
        run(recipe)
    assert run(recipe, rescore=True).rescored == 1
    assert pq.read_table(tmp_path / "scores/a.parquet")["less"] != before


def test_features_of_a_changed_image_file_are_made_anew(tmp_path: Path, models: Any) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i, picture in enumerate(PICTURES[:4]):
        (data / f"{i}.png").write_bytes(png(picture))
    rows = "\n".join(json.dumps({"image": f"{i}.png", "label": LABELS[i]}) for i in range(4))
    (data / "a.jsonl").write_text(rows)
    method = {
        "method": "less",
        "models": ["m0"],
        "optimizers": None,
        "layers": "classifier",
        "keep_features": "float32",
    }
    method["sketch"] = {"kind": "sparse", "dim": 4}
    pq.write_table(pa.table({"image": [png(PICTURES[5])], "label": [0]}), tmp_path / "target.parquet")
    changes = [f"methods={json.dumps([method])}", "targets={t: {path: target.parquet}}"]
    recipe = load_recipe(str(write_recipe(tmp_path, models[0], "vit")), changes)
    assert run(recipe).scored == 1
    first = pq.read_table(tmp_path / "scores/a.parquet")
    (tmp_path / "scores/a.parquet").unlink()
    assert run(recipe).reused == 1
    (data / "0.png").write_bytes(png(PICTURES[5]))
    summary = run(recipe)
    assert (summary.scored, summary.reused) == (1, 0)
    second = pq.read_table(tmp_path / "scores/a.parquet")
    assert first["less"][0] != second["less"][0]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"input_column": "x"}, "task.image_column: is given beside input_column"),
        ({"shape": [3]}, "task.shape: goes with input_column"),
        ({"image_column": None, "max_pixels": 9}, "task.max_pixels: goes with image_column"),
        ({"preprocessor": {"size": 16, "do_flip": True}}, "task.preprocessor: asks for do_flip"),
        (
            {"preprocessor": {"size": {"shortest_edge": 16}}},
            r"models.m0: runs on images of 3 × 16 × 16, but not of 3 × 16 × 48 too.*give a preprocessor with size:",
        ),
        ({"preprocessor": {"size": 24}}, r"models.m0: cannot be run on images of 3 × 24 × 24"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, models: Any, task: dict[str, Any], said: str) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [png(PICTURES[0])], "label": [0]}), tmp_path / "data/a.parquet")
    with pytest.raises((EngineError, RecipeError), match=said) as caught:
        run(load_recipe(str(write_recipe(tmp_path, models[0], "vit", **task))))
    assert "\n" not in str(caught.value)
