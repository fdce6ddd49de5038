"""What identifies a model, and MLPs from one file."""

from __future__ import annotations

import hashlib
import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.recipe import models
from assay.recipe.errors import EngineError
from assay.recipe.models import MlpSpec, TransformersSpec
from tests.small_models import edit_json, edit_weights, save_model
from tests.small_project import save_mlp


def fingerprint(path) -> str:
    return TransformersSpec(kind="transformers", path=str(path)).fingerprint()


def test_what_does_not_decide_outputs_is_not_in_the_fingerprint(tmp_path):
    folder = save_model(tmp_path / "m")
    before = fingerprint(folder)
    for name in (
        "README.md",
        "trainer_state.json",
        "training_args.bin",
        "optimizer.pt",
        "optimizer.safetensors",
        "adapter.txt",
        "scheduler.pt",
        "rng_state.pth",
        "all_results.json",
        "events.out.tfevents.1",
        "log.txt",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "generation_config.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache/model.safetensors").write_bytes(b"x")
    assert fingerprint(folder) == before
    TransformersSpec(kind="transformers", path=str(folder)).build()


@pytest.mark.parametrize(
    "change",
    [
        lambda p: edit_weights(p / "model.safetensors", lambda t: t["model.norm.weight"].add_(1)),
        lambda p: edit_json(p / "config.json", rms_norm_eps=1e-3),
        lambda p: edit_json(p / "tokenizer_config.json", model_max_length=7),
        lambda p: edit_json(p / "tokenizer.json", version="2"),
        lambda p: (p / "special_tokens_map.json").write_text("{}"),
        lambda p: (p / "added_tokens.json").write_text("{}"),
        lambda p: (p / "chat_template.jinja").write_text("{{ messages }}"),
        lambda p: (p / "preprocessor_config.json").write_text("{}"),
        lambda p: (p / "processor_config.json").write_text("{}"),
        lambda p: (p / "tokenizer.model").write_bytes(b"x"),
        lambda p: (p / "vocab.json").write_text("{}"),
        lambda p: (p / "merges.txt").write_text("x"),
    ],
    ids=range(12),
)
def test_what_decides_outputs_is(tmp_path, change):
    folder = save_model(tmp_path / "m")
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_names_need_not_be_utf8(tmp_path):
    folder = save_model(tmp_path / "m")
    before = fingerprint(folder)
    open(os.fsencode(folder) + b"/vocab\xff.txt", "w").close()
    with pytest.raises(EngineError, match="is empty"):
        fingerprint(folder)
    with open(os.fsencode(folder) + b"/vocab\xff.txt", "w") as file:
        file.write("x")
    assert fingerprint(folder) != before


def test_every_shard_of_the_weights_is(tmp_path):
    folder = save_model(tmp_path / "m", max_shard_size="30KB")
    names = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    prints = {fingerprint(folder)}
    for name in names:
        edit_weights(folder / name, lambda t: next(iter(t.values())).add_(1))
        prints.add(fingerprint(folder))
    assert len(prints) == len(names) + 1 > 2


MLP_FAULTS = [
    (lambda t: t.pop("2.weight"), "expected 0.weight, 0.bias, 2.weight"),
    (lambda t: t.update(more=torch.zeros(1)), "expected 0.weight, 0.bias, 2.weight"),
    (lambda t: t.update({"2.weight": torch.zeros(3, 9)}), "2.weight of shape (3, 9) does not fit"),
    (lambda t: t.update({"2.weight": torch.zeros(0, 8)}), "2.weight of shape (0, 8) does not fit"),
    (lambda t: t.update({"2.bias": torch.zeros(5)}), "2.bias of shape (5,) does not fit"),
    (lambda t: t.update({"2.weight": torch.zeros(3, 8, dtype=torch.int8)}), "2.weight hold no floating-point"),
    (lambda t: t.clear() or t.update({"x" * 10**6: torch.zeros(1)}), "expected 0.weight"),
]


@pytest.mark.parametrize(("change", "message"), MLP_FAULTS, ids=[message[:30] for _, message in MLP_FAULTS])
def test_an_mlp_is_whole_or_refused(tmp_path, change, message):
    save_mlp(tmp_path / "m.safetensors", 0)
    edit_weights(tmp_path / "m.safetensors", change)
    with pytest.raises(EngineError) as caught:
        MlpSpec(kind="mlp", path=str(tmp_path / "m.safetensors")).build()
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_mlp_is_not_its_file(tmp_path):
    """Written over, or away, while the model is in use."""
    save_mlp(tmp_path / "m.safetensors", 0)
    model = MlpSpec(kind="mlp", path=str(tmp_path / "m.safetensors")).build()
    before = [p.clone() for p in model.parameters()]
    save_mlp(tmp_path / "other.safetensors", 1)
    (tmp_path / "m.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_mlp_without_biases_is_one(tmp_path):
    save_mlp(tmp_path / "m.safetensors", 0)
    tensors = load_file(tmp_path / "m.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "0.bias"}, tmp_path / "m.safetensors")
    model = MlpSpec(kind="mlp", path=str(tmp_path / "m.safetensors")).build()
    assert model[0].bias is None
    assert torch.equal(model[2].bias, tensors["2.bias"])
    assert model(torch.zeros(2, 6)).shape == (2, 3)


@pytest.mark.parametrize(
    "data", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04 a pickle", b"\x08"]
)
def test_a_file_that_is_no_mlp_is_named(tmp_path, data):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(EngineError, match=r"m\.safetensors: "):
        MlpSpec(kind="mlp", path=str(tmp_path / "m.safetensors")).build()


def test_a_file_is_hashed_once_unless_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_HASHED", {})
    read, reads = models.sha256, []
    monkeypatch.setattr(models, "sha256", lambda file: reads.append(file.name) or read(file))
    path = tmp_path / "weights"
    path.write_bytes(b"gold")
    for _ in range(2):  # it has only just been written
        assert models.file_sha256(str(path)) == hashlib.sha256(b"gold").hexdigest()
    assert len(reads) == 2
    monkeypatch.setattr(models, "_SETTLED_NS", -(1 << 62))
    models.file_sha256(str(path))
    told = models.hashed_files()
    monkeypatch.setattr(models, "_HASHED", {})
    models.take_hashed(told)  # as a worker does
    assert models.file_sha256(str(path)) == hashlib.sha256(b"gold").hexdigest()
    assert len(reads) == 3
    before = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"lead")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert models.file_sha256(str(path)) == hashlib.sha256(b"lead").hexdigest()
