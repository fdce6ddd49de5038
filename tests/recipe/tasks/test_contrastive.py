"""Pairs for models that are called otherwise than CLIP: SigLIP's filled up texts and loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import Siglip2Tokenizer

import assay
from assay.engine.local import run
from assay.ops import project
from assay.probe import Probe, Sketched
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe
from assay.tasks import Contrastive
from tests.engine.test_contrastive import (
    GROUPS,
    PICTURES,
    TEXTS,
    make_tokenizer,
    png,
    scored_pairs,
    write_pairs,
    write_recipe,
)
from tests.small_architectures import save

Image = pytest.importorskip("PIL.Image")
PREPROCESSOR = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}}


@pytest.fixture(scope="module")
def siglips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two checkpoints, in folders of the names that `write_recipe` looks for, and the models themselves."""
    root = tmp_path_factory.mktemp("models")
    made = []
    for seed in (0, 1):
        path = root / f"clip-{seed}"
        made.append(save(path, "siglip", "AutoModel", seed))
        (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        make_tokenizer().save_pretrained(path)
    return root, made


def own_batch(rows: list[int]) -> dict[str, torch.Tensor]:
    """As transformers alone prepares these pairs for a SigLIP."""
    module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = module.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    pixels = processor([Image.fromarray(PICTURES[i]) for i in rows], return_tensors="pt")
    own = {"padding": "max_length", "max_length": 12, "truncation": True, "return_tensors": "pt"}
    return {**pixels, "input_ids": make_tokenizer()([TEXTS[i] for i in rows], **own)["input_ids"]}


def own_losses(model: Any, rows: list[int]) -> torch.Tensor:
    return pair_losses(model, own_batch(rows))


def pair_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Pair by pair: a sample's own, and half of each that it is one of, the other one's embedding held fixed."""
    output, rows = model(**batch), range(len(batch["input_ids"]))
    image, text, scale, bias = output.image_embeds, output.text_embeds, model.logit_scale.exp(), model.logit_bias
    losses = []
    for i in range(len(rows)):
        loss = -F.logsigmoid(scale * image[i] @ text[i] + bias)
        for j in set(range(len(rows))) - {i}:
            for logit in (image[i] @ text[j].detach(), image[j].detach() @ text[i]):
                loss = loss - F.logsigmoid(-(scale * logit + bias)) / 2
        losses.append(loss)
    return torch.cat(losses)


@pytest.fixture(scope="module")
def scored(siglips: tuple[Path, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return scored_pairs(tmp_path_factory.mktemp("run"), siglips[0])


def test_losses_are_those_of_transformers(siglips: Any, scored: pa.Table) -> None:
    for model, column in zip(siglips[1], ("loss", "reference_loss"), strict=True):
        with torch.no_grad():
            expected = torch.cat([own_losses(model, rows)[known:] for rows, known in GROUPS])
            whole = model(**own_batch(GROUPS[0][0]), return_loss=True).loss
        np.testing.assert_allclose(scored[column].to_numpy(), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scored[column].to_numpy()[:8].mean(), whole, rtol=1e-5)


def test_mimic_is_the_product_of_autograds_gradient_and_the_direction(siglips: Any, scored: pa.Table) -> None:
    model, reference = siglips[1]
    own, others = dict(model.named_parameters()), dict(reference.named_parameters())
    direction = {name: (others[name] - p).detach() for name, p in own.items()}
    norm = sum(v.double().square().sum() for v in direction.values()).sqrt()
    rows, _ = GROUPS[0]
    expected = []
    for loss in own_losses(model, rows):
        gradient = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
        dots = [(g * v).sum() for g, v in zip(gradient, direction.values(), strict=True) if g is not None]
        expected.append(-sum(dots) / norm)
    found = scored["mimic"].to_numpy()[: len(rows)]
    np.testing.assert_allclose(found, torch.stack(expected).detach(), rtol=1e-3, atol=1e-5)


def test_sketches_are_those_of_autograds_gradients(siglips: Any) -> None:
    model, batch = siglips[1][0], own_batch([0, 1, 2, 3])
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(x, list(named.values()), retain_graph=True) for x in own_losses(model, [0, 1, 2, 3])]
    sketch = assay.Sparse(16, seed=3)
    expected = torch.zeros(4, 16)
    for name, *gradients in zip(named, *rows, strict=True):
        expected += project(torch.stack(gradients).flatten(1), sketch.named(name))
    reduction = Sketched({name: tuple(p.shape) for name, p in named.items()}, sketch, together=True)
    pairs = batch.pop("pixel_values"), batch
    found = Probe(model, Contrastive(), reductions={"x": reduction})(pairs).reduced["x"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


OWN_SIZES = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "do_center_crop": False}


@pytest.fixture(scope="module")
def duals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two models of images of any size."""
    root = tmp_path_factory.mktemp("models")
    made = []
    for seed in (0, 1):
        made.append(save(root / f"clip-{seed}", "dual", "AutoModel", seed))
        (root / f"clip-{seed}/preprocessor_config.json").write_text(json.dumps(OWN_SIZES))
        make_tokenizer().save_pretrained(root / f"clip-{seed}")
    return root, made


def test_images_of_differing_sizes_are_embedded_by_size_and_compared(duals: Any, tmp_path: Path) -> None:
    """A group's losses are those of embeddings that were made one image at a time, whatever the batches."""
    shapes = [(16, 40), (16, 16), (24, 16), (16, 40), (16, 16), (24, 16), (16, 16), (16, 40)]
    pictures = [np.random.default_rng(i).integers(0, 256, (*s, 3), dtype=np.uint8) for i, s in enumerate(shapes)]
    write_pairs(tmp_path / "data/a.parquet", [png(p) for p in pictures], TEXTS[:8])
    ensemble = f"methods={json.dumps([{'method': 'ensemble', 'models': ['m0', 'm1']}])}"
    recipe = str(write_recipe(tmp_path, duals[0]))
    assert run(load_recipe(recipe, [ensemble])).clean
    table = pq.read_table(tmp_path / "scores/a.parquet")
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    texts = make_tokenizer()(TEXTS[:8], padding=True, return_tensors="pt")
    texts = {name: texts[name] for name in ("input_ids", "attention_mask")}
    made = []
    with torch.no_grad():
        for model in duals[1]:
            images = [processor(Image.fromarray(p), return_tensors="pt")["pixel_values"] for p in pictures]
            each = torch.cat([model(pixel_values=image, **texts).image_embeds for image in images])
            text = model(pixel_values=images[0], **texts).text_embeds
            made.append((model.logit_scale.exp() * each @ text.T).softmax(1))
    expected = -torch.stack(made).mean(0).diagonal().log()
    np.testing.assert_allclose(table["ensemble_nll"].to_numpy(), expected, rtol=1e-5, atol=1e-5)
    run(load_recipe(recipe, [ensemble, "batch.tokens=12", "output=other"]))
    other = pq.read_table(tmp_path / "other/a.parquet")
    np.testing.assert_allclose(other["ensemble_nll"], table["ensemble_nll"], rtol=1e-5, atol=1e-5)
    methods = (
        {"method": "grad_mimic", "model": "m0", "reference": "m1"},
        {"method": "gradient_cosine", "model": "m0"},
    )
    for method in methods:
        changes = [f"methods={json.dumps([method])}", "targets={t: {path: data}}", "output=third"]
        with pytest.raises(EngineError, match=r"^methods.*differing sizes.*give a preprocessor with size") as caught:
            run(load_recipe(recipe, changes))
        assert "\n" not in str(caught.value)


def test_siglip_2_takes_images_of_any_size_as_patches(tmp_path: Path) -> None:
    """Losses are transformers'. Its table of positions, which it resizes for each image, is refused by name."""
    values = {"patch_size": 8, "max_num_patches": 6}
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"w0123456789"]
    tokenizer = Siglip2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    made = []
    for seed in (0, 1):
        path = tmp_path / f"clip-{seed}"
        made.append(save(path, "siglip2", "AutoModel", seed))
        (path / "preprocessor_config.json").write_text(json.dumps(values))
        tokenizer.save_pretrained(path)
    shapes = [(16, 40), (16, 16), (50, 16), (5, 5), (16, 16), (24, 16), (16, 16), (16, 40)]
    pictures = [np.random.default_rng(i).integers(0, 256, (*s, 3), dtype=np.uint8) for i, s in enumerate(shapes)]
    write_pairs(tmp_path / "data/a.parquet", [png(p) for p in pictures], TEXTS[:8])
    recipe = str(write_recipe(tmp_path, tmp_path))
    with pytest.raises(EngineError, match=r"'vision_model\.embeddings\.position_embedding\.weight'.*Leave it out"):
        run(load_recipe(recipe))
    layers = 'methods.1.layers=["*", "!vision_model.embeddings.position_embedding"]'
    assert run(load_recipe(recipe, [layers])).clean
    table = pq.read_table(tmp_path / "scores/a.parquet")
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    batch = dict(module.Siglip2ImageProcessorPil(**values)([Image.fromarray(p) for p in pictures], return_tensors="pt"))
    own = {"padding": "max_length", "max_length": 12, "truncation": True, "padding_side": "right"}
    batch["input_ids"] = tokenizer(TEXTS[:8], return_tensors="pt", **own)["input_ids"]
    assert len(batch["input_ids"].unique(dim=0)) == 8
    for model, column in zip(made, ("loss", "reference_loss"), strict=True):
        with torch.no_grad():
            whole = model(**batch, return_loss=True).loss
        np.testing.assert_allclose(table[column].to_numpy().mean(), whole, rtol=1e-5)
    step = {n: p.detach() for n, p in made[1].named_parameters() if "vision_model.embeddings.position" not in n}
    named = {n: p for n, p in made[0].named_parameters() if n in step}
    losses = pair_losses(made[0], batch)
    np.testing.assert_allclose(table["loss"].to_numpy(), losses.detach(), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    direction = [step[name] - p.detach() for name, p in named.items()]
    norm = sum(v.double().square().sum() for v in direction).sqrt()
    expected = [-sum((g * v).sum() for g, v in zip(row, direction, strict=True)) / norm for row in gradients]
    np.testing.assert_allclose(table["mimic"].to_numpy(), torch.stack(expected), rtol=1e-3, atol=1e-5)


def refusal(root: Path, *paths: Path) -> str:
    write_pairs(root / "data/a.parquet")
    changes = [f"models.m{i}.path={path}" for i, path in enumerate(paths)]
    with pytest.raises(EngineError) as caught:
        run(load_recipe(str(write_recipe(root, paths[0].parent)), changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_of_two_losses_or_without_padding_are_refused(siglips: Any, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    save(clip, "clip", "AutoModel")
    (clip / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    make_tokenizer().save_pretrained(clip)
    own = siglips[0] / "clip-0"
    said = "models.m1 judges every pair by itself (it has a logit_bias, as SigLIP has), models.m0 compares"
    assert said in refusal(tmp_path, clip, own)
    endless = tmp_path / "clip-0"
    save(endless, "siglip", "AutoModel")
    (endless / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(endless)
    assert "its tokenizer has no pad_token" in refusal(tmp_path, endless, endless)
