"""Images with their texts: tiny CLIP models of transformers, from the recipe to the scores."""

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
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from assay.engine.local import run
from assay.recipe.errors import EngineError
from assay.recipe.factories import PythonSpec
from assay.recipe.recipe import load_recipe
from assay.recipe.tasks.classification import ClassificationSpec
from assay.recipe.tasks.contrastive import ContrastiveSpec
from assay.recipe.tasks.regression import RegressionSpec
from tests.small_architectures import TOKENS, save

Image = pytest.importorskip("PIL.Image")
COUNT, GROUP = 21, 8
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(COUNT)]
WORDS = [f"w{i}" for i in range(TOKENS - 2)]
TEXTS = [" ".join(RNG.choice(WORDS, size)) for size in RNG.integers(1, 9, COUNT)]
PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": 16, "crop_size": 16}


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_tokenizer(end: int = TOKENS - 1) -> Any:
    """Words, between a token at the beginning and one at the end."""
    others = iter([*WORDS, "<start>"])
    vocabulary = {"<end>" if i == end else next(others): i for i in range(TOKENS)}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(name, vocabulary[name]) for name in ("<start>", "<end>")]
    own.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="w0", eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two checkpoints, and the models themselves."""
    root = tmp_path_factory.mktemp("models")
    made = []
    for seed in (0, 1):
        path = root / f"clip-{seed}"
        made.append(save(path, "clip", "AutoModel", seed))
        (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        make_tokenizer().save_pretrained(path)
    return root, made


def write_recipe(root: Path, models: Path, **task: Any) -> Path:
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "contrastive", "image_column": "image", "text_column": "text", "group": GROUP, **task},
        "models": {f"m{seed}": {"kind": "transformers", "path": str(models / f"clip-{seed}")} for seed in (0, 1)},
        "methods": [
            {"method": "ensemble", "models": ["m0", "m1"]},
            {"method": "grad_mimic", "model": "m0", "reference": "m1"},
        ],
        "output": "scores",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml"


def write_pairs(path: Path, images: list[bytes | None] | None = None, texts: list[str | None] | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images or [png(p) for p in PICTURES], "text": texts or TEXTS}), path)


def own_batch(rows: list[int]) -> dict[str, torch.Tensor]:
    """As transformers alone prepares these pairs."""
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(size=16, crop_size=16)
    pixels = processor([Image.fromarray(PICTURES[i]) for i in rows], return_tensors="pt")
    texts = make_tokenizer()([TEXTS[i] for i in rows], padding=True, return_tensors="pt")
    return {**pixels, "input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}


def own_losses(model: Any, rows: list[int]) -> torch.Tensor:
    """A sample's row and column, the other embeddings held fixed."""
    output = model(**own_batch(rows))
    image, text, scale = output.image_embeds, output.text_embeds, model.logit_scale.exp()
    diagonal, labels = torch.eye(len(rows), dtype=torch.bool), torch.arange(len(rows))
    pairs = (image * text).sum(1, keepdim=True)
    sides = torch.where(diagonal, pairs, image @ text.detach().T), torch.where(diagonal, pairs, text @ image.detach().T)
    return sum(F.cross_entropy(scale * side, labels, reduction="none") for side in sides) / 2


GROUPS = [(list(range(8)), 0), (list(range(8, 16)), 0), (list(range(13, 21)), 3)]


def scored_pairs(root: Path, models: Path) -> pa.Table:
    """The scores of the pairs by the models in a folder."""
    write_pairs(root / "data/a.parquet")
    assert run(load_recipe(str(write_recipe(root, models)))).clean
    return pq.read_table(root / "scores/a.parquet")


@pytest.fixture(scope="module")
def scored(clips: tuple[Path, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return scored_pairs(tmp_path_factory.mktemp("run"), clips[0])


def test_losses_are_those_of_transformers_in_groups_of_rows(clips: Any, scored: pa.Table) -> None:
    for model, column in zip(clips[1], ("loss", "reference_loss"), strict=True):
        with torch.no_grad():
            expected = torch.cat([own_losses(model, rows)[known:] for rows, known in GROUPS])
            np.testing.assert_allclose(scored[column].to_numpy(), expected, rtol=1e-5, atol=1e-5)
            whole = model(**own_batch(GROUPS[0][0]), return_loss=True).loss
        np.testing.assert_allclose(scored[column].to_numpy()[:8].mean(), whole, rtol=1e-5)


def test_the_ensemble_is_that_of_the_texts_of_each_image(clips: Any, scored: pa.Table) -> None:
    with torch.no_grad():
        own = [torch.stack([m(**own_batch(rows)).logits_per_image.softmax(1) for m in clips[1]]) for rows, _ in GROUPS]
    expected = torch.cat([-p.mean(0).diagonal().log()[known:] for p, (_, known) in zip(own, GROUPS, strict=True)])
    np.testing.assert_allclose(scored["ensemble_nll"].to_numpy(), expected, rtol=1e-5, atol=1e-5)


def test_mimic_is_the_product_of_autograds_gradient_and_the_direction(clips: Any, scored: pa.Table) -> None:
    model, reference = clips[1]
    own, others = dict(model.named_parameters()), dict(reference.named_parameters())
    direction = {name: (others[name] - p).detach() for name, p in own.items()}
    norm = sum(v.double().square().sum() for v in direction.values()).sqrt()
    expected = []
    for rows, known in GROUPS:
        for loss in own_losses(model, rows)[known:]:
            gradient = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
            dots = [(g * v).sum() for g, v in zip(gradient, direction.values(), strict=True) if g is not None]
            expected.append(-sum(dots) / norm)
    np.testing.assert_allclose(scored["mimic"].to_numpy(), torch.stack(expected).detach(), rtol=1e-3, atol=1e-5)


def test_scores_depend_on_neither_budgets_nor_windows_nor_chunks(
    clips: Any, scored: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "data/a.parquet")
    monkeypatch.setattr("assay.engine.shard.WINDOW_ROWS", 3)
    monkeypatch.setattr("assay.corpus.format.CHUNK_ROWS", 5)
    run(load_recipe(str(write_recipe(tmp_path, clips[0])), ["batch.samples=2", "batch.tokens=1"]))
    found = pq.read_table(tmp_path / "scores/a.parquet")
    assert found.column_names == scored.column_names
    for name in found.column_names[2:]:
        np.testing.assert_array_equal(found[name].to_numpy(), scored[name].to_numpy())


def test_rows_in_quarantine_are_missing_in_their_group_alone(clips: Any, scored: pa.Table, tmp_path: Path) -> None:
    images: list[bytes | None] = [png(p) for p in PICTURES]
    texts: list[str | None] = [*TEXTS]
    images[9], texts[11], texts[12], texts[10] = b"no image", None, "", "w1 <end> w2"
    write_pairs(tmp_path / "data/a.parquet", images, texts)
    summary = run(load_recipe(str(write_recipe(tmp_path, clips[0]))))
    assert (summary.rows_scored, summary.rows_quarantined) == (COUNT - 4, 4)
    found = pq.read_table(tmp_path / "scores/a.parquet")
    kept = found["row"].to_numpy()
    outside = (kept < 8) | (kept >= 16)
    np.testing.assert_array_equal(found["mimic"].to_numpy()[outside], scored["mimic"].to_numpy()[kept[outside]])
    with torch.no_grad():
        expected = own_losses(clips[1][0], [8, 13, 14, 15])
    np.testing.assert_allclose(found["loss"].to_numpy()[~outside], expected, rtol=1e-5, atol=1e-5)


def test_a_row_alone_is_quarantined_and_targets_are_grouped(clips: Any, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data/one.parquet", [png(PICTURES[0])], [TEXTS[0]])
    write_pairs(tmp_path / "data/a.parquet")
    write_pairs(tmp_path / "target/t.parquet")
    sketch = {"kind": "kronecker", "rows": 2, "cols": 2}
    methods = [{"method": "less", "models": ["m0"], "optimizers": None, "sketch": sketch}]
    changes = [f"methods={json.dumps(methods)}", "targets={t: {path: target}}", "fit={samples: 10}"]
    summary = run(load_recipe(str(write_recipe(tmp_path, clips[0])), changes))
    assert (summary.rows_scored, summary.rows_quarantined) == (COUNT, 1)
    assert "no other row of its group" in (tmp_path / "scores/quarantine/one.jsonl").read_text()
    assert np.isfinite(pq.read_table(tmp_path / "scores/a.parquet")["less"].to_numpy()).all()
    write_pairs(tmp_path / "target/t.parquet", [png(PICTURES[0])], [TEXTS[0]])
    with pytest.raises(EngineError, match="one sample alone has nothing to be compared with"):
        run(load_recipe(str(write_recipe(tmp_path, clips[0])), [*changes, "output=again"]))


def test_a_group_beyond_memory(clips: Any, scored: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients it is embedded in pieces, with the same scores; with them the remedy is said."""
    kind = type(clips[1][0])
    forward = kind.forward

    def limited(self: Any, *arguments: Any, **named: Any) -> Any:
        if len(named["pixel_values"]) > 3:
            raise MemoryError
        return forward(self, *arguments, **named)

    monkeypatch.setattr(kind, "forward", limited)
    write_pairs(tmp_path / "data/a.parquet")
    recipe = str(write_recipe(tmp_path, clips[0]))
    methods = json.dumps([{"method": "ensemble", "models": ["m0", "m1"]}])
    assert run(load_recipe(recipe, [f"methods={methods}"])).clean
    found = pq.read_table(tmp_path / "scores/a.parquet")
    for name in found.column_names[2:]:
        np.testing.assert_allclose(found[name].to_numpy(), scored[name].to_numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(EngineError, match=r"8 samples with their gradients do not fit into memory.*task\.group"):
        run(load_recipe(recipe, ["output=other"]))


def refusal(root: Path, path: Path, **task: Any) -> str:
    write_pairs(root / "data/a.parquet")
    with pytest.raises(EngineError) as caught:
        run(load_recipe(str(write_recipe(root, path, **task))))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_do_not_fit_the_task_are_refused(clips: Any, tmp_path: Path) -> None:
    assert "task.max_length is 33, but models.m0 has 32 positions" in refusal(tmp_path, clips[0], max_length=33)
    assert "a text has 3 tokens or more" in refusal(tmp_path, clips[0], max_length=2)
    for seed in (0, 1):
        path = tmp_path / f"clip-{seed}"
        save(path, "clip", "AutoModel", seed)
        (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        make_tokenizer(end=50).save_pretrained(path)
    assert "does the eos_token_id of its config end its tokenizer's texts?" in refusal(tmp_path, tmp_path)


def test_a_model_of_texts_alone_is_no_clip(tmp_path: Path) -> None:
    for seed in (0, 1):
        save(tmp_path / f"clip-{seed}", "bert", "AutoModel", seed)
        make_tokenizer().save_pretrained(tmp_path / f"clip-{seed}")
    assert "models.m0: is a BertModel, without a logit_scale" in refusal(tmp_path, tmp_path)


def test_tokenizers_and_places_of_preprocessors_are_looked_at_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assay.engine.workshop.build_models", lambda *_: pytest.fail("a model was loaded"))
    for seed in (0, 1):
        save(tmp_path / f"clip-{seed}", "clip", "AutoModel", seed)
        (tmp_path / f"clip-{seed}/tokenizer.json").write_text("{")
    assert refusal(tmp_path, tmp_path).startswith("models.m0: ")
    for task in (
        ContrastiveSpec(kind="contrastive"),
        ClassificationSpec(kind="classification", image_column="image"),
        RegressionSpec(kind="regression", image_column="image"),
    ):
        make_tokenizer().save_pretrained(tmp_path / "words")
        spec = PythonSpec.model_construct(kind="python", path=None, tokenizer_path=str(tmp_path / "words"))
        with pytest.raises(EngineError, match=r"^models\.m: is of kind python and has no path; .*task\.preprocessor"):
            task.open({"m": spec})
