"""Model folders from strangers: every damage is one short line that names the file, soon, and opens nothing else."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from assay import cli
from assay.engine import make_plan, open_workshop
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe
from tests.small_models import byte_tokenizer, edit_json, edit_weights, llama_config, save_model, write_recipe

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
BAD = [None, "x", [], [1], {}, {"a": 1}, -1, 0, 10**9, 10**30, 1.5, "9" * 10_000]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    save_model(root / "llama")
    save_model(root / "gpt2", config=GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    save_model(root / "sharded", max_shard_size="30KB")
    return root


def refusal(folder: Path) -> str:
    """What `assay validate` would say of a recipe with this model."""
    recipe = load_recipe(str(write_recipe(folder.parent, {"small": folder})))
    started = time.monotonic()
    with pytest.raises(EngineError) as caught:
        open_workshop(make_plan(recipe), fit=False)
    assert time.monotonic() - started < 20
    message = str(caught.value)
    assert len(message) < 500
    assert "\n" not in message
    assert str(folder) in message or "models.small" in message
    return message


# Fields whose bad values no model can be built or run with.
LLAMA = {
    "model_type": [v for v in BAD if v is not None] + [None, "evil", "bert/../llama"],
    "hidden_size": BAD,
    "num_hidden_layers": BAD,
    "num_attention_heads": [v for v in BAD if v is not None],
    "num_key_value_heads": ["x", [], {"a": 1}, -1, 0, 10**9, 10**30],
    "intermediate_size": BAD,
    "vocab_size": BAD,
    "hidden_act": [None, "x", [], [1], {}, -1, 10**9, 1.5],
    "rms_norm_eps": [None, "x", [], [1], {"a": 1}, "9" * 10_000],
    "rope_parameters": ["x", [1], 5, {"rope_type": "nope"}, {"rope_type": []}, {"rope_theta": "x"}],
    "head_dim": ["x", [], {"a": 1}, 0, 10**9, 10**30],
    "quantization_config": ["x", [1], {"quant_method": "gptq", "bits": 4}, {"a": "9" * 10_000}],
    "max_position_embeddings": ["x", [1], {"a": 1}, 0, -1],
}
GPT2 = {
    "n_layer": BAD,
    "n_embd": BAD,
    "n_head": [v for v in BAD if v is not None],
    "n_positions": BAD,
    "activation_function": [None, "x", [], {}, -1],
    "layer_norm_epsilon": [None, "x", [], {"a": 1}],
}
MUTATIONS = [
    (kind, key, value)
    for kind, fields in (("llama", LLAMA), ("gpt2", GPT2))
    for key, values in fields.items()
    for value in values
]


def test_there_are_enough_mutations():
    assert len(MUTATIONS) >= 100


@pytest.mark.parametrize(
    ("kind", "key", "value"), MUTATIONS, ids=[f"{kind}-{key}-{str(v)[:20]}" for kind, key, v in MUTATIONS]
)
def test_a_config_of_nonsense_is_refused(saved, tmp_path, kind, key, value, capfd):
    folder = shutil.copytree(saved / kind, tmp_path / "m")
    edit_json(folder / "config.json", **{key: value})
    refusal(folder)
    assert capfd.readouterr() == ("", "")


DAMAGES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("config.json", lambda b: b"", "config.json: is empty"),
    ("config.json", lambda b: LFS, "config.json: is a Git LFS pointer"),
    ("config.json", lambda b: b"null", "config.json: holds null; expected a mapping"),
    ("config.json", lambda b: b"[1]", "config.json: holds a list; expected a mapping"),
    ("config.json", lambda b: b'"x"', "config.json: holds a str; expected a mapping"),
    ("config.json", lambda b: b"{}", "config.json: has no model_type"),
    ("config.json", lambda b: b[: len(b) // 2], "config.json: not valid JSON"),
    ("config.json", lambda b: b"\xff\xfe" + b, "config.json: not valid JSON"),
    ("config.json", lambda b: b"[" * 100_000, "config.json: not valid JSON"),
    ("config.json", lambda b: b'{"a":' * 200 + b"1" + b"}" * 200, "config.json: is nested more than"),
    ("config.json", lambda b: b'{"n": ' + b"9" * 10_000 + b"}", "config.json: not valid JSON"),
    ("model.safetensors", lambda b: b"", "model.safetensors: is empty"),
    ("model.safetensors", lambda b: LFS, "model.safetensors: is a Git LFS pointer"),
    ("model.safetensors", lambda b: b[:4], "model.safetensors: not a safetensors file, or cut short"),
    ("model.safetensors", lambda b: b[:500], "model.safetensors: not a safetensors file, or cut short"),
    ("model.safetensors", lambda b: b[:-100], "model.safetensors: is cut short"),
    ("model.safetensors", lambda b: b + b"x", "model.safetensors: is followed by something else"),
    ("model.safetensors", lambda b: b"\xff" * 8 + b[8:], "model.safetensors: not a safetensors file"),
    ("model.safetensors", lambda b: b"PK\x03\x04" * 100, "model.safetensors: not a safetensors file"),
    ("tokenizer.json", lambda b: b"", "tokenizer.json: is empty"),
    ("tokenizer.json", lambda b: LFS, "tokenizer.json: is a Git LFS pointer"),
    ("tokenizer.json", lambda b: b"null", "tokenizer.json: holds null"),
    ("tokenizer.json", lambda b: b"{}", "its tokenizer files: transformers cannot load"),
    ("tokenizer.json", lambda b: b[: len(b) // 2], "tokenizer.json: not valid JSON"),
    ("tokenizer.json", lambda b: b.replace(b'"BPE"', b'"Nope"'), "its tokenizer files: transformers cannot load"),
    ("tokenizer.json", lambda b: b.replace(b'"ByteLevel"', b"[]"), "its tokenizer files: transformers cannot load"),
    (
        "tokenizer.json",
        lambda b: b.replace(b'"id":256', b'"id":-1').replace(b'"id": 256', b'"id": -1'),
        "tokenizer files",
    ),
    ("tokenizer_config.json", lambda b: b"null", "tokenizer_config.json: holds null"),
    ("tokenizer_config.json", lambda b: b'["x"]', "tokenizer_config.json: holds a list"),
    ("tokenizer_config.json", lambda b: b'{"tokenizer_class": 5}', "its tokenizer files: transformers cannot load"),
    ("tokenizer_config.json", lambda b: b'{"auto_map": 5}', "its tokenizer files: transformers cannot load"),
    (
        "tokenizer_config.json",
        lambda b: b'{"added_tokens_decoder": 5}',
        "its tokenizer files: transformers cannot load",
    ),
]


@pytest.mark.parametrize(
    ("name", "damage", "message"), DAMAGES, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(DAMAGES)]
)
def test_a_damaged_file_is_named(saved, tmp_path, name, damage, message, capfd):
    folder = shutil.copytree(saved / "llama", tmp_path / "m")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert message in refusal(folder)
    assert capfd.readouterr() == ("", "")


INDICES: list[tuple[Any, str]] = [
    (None, "index.json: holds null"),
    ([], "index.json: holds a list"),
    ({}, "index.json: has no weight_map"),
    ({"weight_map": None}, "index.json: has no weight_map"),
    ({"weight_map": []}, "index.json: has no weight_map"),
    ({"weight_map": {"a": 5}}, "a is said to be in 5; expected"),
    ({"weight_map": {"a": "../secret.safetensors"}}, "a is said to be in ../secret.safetensors; expected"),
    ({"weight_map": {"a": "/etc/passwd"}}, "a is said to be in /etc/passwd; expected"),
    ({"weight_map": {"a": "sub/x.safetensors"}}, "a is said to be in sub/x.safetensors; expected"),
    ({"weight_map": {"a": "pytorch_model.bin"}}, "a is said to be in pytorch_model.bin; expected"),
    ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors: cannot be read"),
    ({"weight_map": {"a": "x\x00.safetensors"}}, ".safetensors: cannot be read"),
    ({"weight_map": {"a" * 10_000_000: "/" * 10_000_000}}, "is said to be in"),
]


@pytest.mark.parametrize(("index", "message"), INDICES, ids=[message[:30] for _, message in INDICES])
def test_an_index_names_only_safetensors_beside_it(saved, tmp_path, index, message):
    folder = shutil.copytree(saved / "sharded", tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(folder)


def test_names_of_ten_megabytes_make_short_errors(saved, tmp_path):
    folder = shutil.copytree(saved / "llama", tmp_path / "m")
    edit_weights(folder / "model.safetensors", lambda t: t.update({"x" * 10_000_000: torch.zeros(1)}))
    assert "x…x" in refusal(folder)


def test_only_regular_files_are_opened(saved, tmp_path):
    folder = shutil.copytree(saved / "llama", tmp_path / "m")
    (folder / "tokenizer.model").symlink_to("/dev/zero")
    assert "tokenizer.model: is no regular file" in refusal(folder)
    (folder / "tokenizer.model").unlink()
    os.mkfifo(folder / "vocab.json")
    assert "vocab.json: is no regular file" in refusal(folder)
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.model").symlink_to("nowhere")
    assert "tokenizer.model: cannot be read" in refusal(folder)


def test_nothing_else_is_opened(saved, tmp_path, monkeypatch):
    """Pickles, code, generation files, and whatever a config points to."""
    folder = shutil.copytree(saved / "llama", tmp_path / "m")
    secret = save_model(tmp_path / "secret", seed=1)
    for name in ("pytorch_model.bin", "optimizer.pt", "modeling_x.py", "generation_config.json", "trainer_state.json"):
        (folder / name).write_bytes(b"\x80\x04.")
    edit_json(
        folder / "config.json",
        auto_map={"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"},
        transformers_weights="../secret/model.safetensors",
        _name_or_path=str(secret),
        custom_generate="modeling_x.py",
        _attn_implementation="evil/kernel",
        num_labels=10**12,
    )
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_file=str(secret / "tokenizer.json"),
        vocab_file=str(secret / "vocab.json"),
        name_or_path=str(secret),
    )
    allowed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    opened: set[str] = set()
    true_open = builtins.open

    def watched(file, *args, **kwargs):
        if isinstance(file, str | os.PathLike) and os.path.realpath(file).startswith(str(tmp_path)):
            opened.add(os.path.realpath(file))
        return true_open(file, *args, **kwargs)

    recipe = load_recipe(str(write_recipe(tmp_path, {"small": folder})))
    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(io, "open", watched)
    open_workshop(make_plan(recipe), fit=False)
    models = {path for path in opened if path.startswith((str(folder), str(secret)))}
    assert models == {str(folder / name) for name in allowed}


@pytest.mark.parametrize("damage", [b"null", b"[]", b"{", b'{"temperature": "x"}', LFS])
def test_files_that_scores_do_not_depend_on_do_not_matter(saved, tmp_path, damage):
    folder = shutil.copytree(saved / "llama", tmp_path / "m")
    (folder / "generation_config.json").write_bytes(damage)
    open_workshop(make_plan(load_recipe(str(write_recipe(tmp_path, {"small": folder})))), fit=False)


def test_the_command_says_it_in_one_escaped_line(saved, tmp_path, capfd):
    folder = shutil.copytree(saved / "llama", tmp_path / "m")
    edit_json(folder / "config.json", model_type="\x1b[31mred\n" * 5)
    assert cli.main(["validate", str(write_recipe(tmp_path, {"small": folder}))]) == cli.BAD
    output, error = capfd.readouterr()
    assert output == ""
    assert error.startswith(f"assay: models.small: {folder}/config.json: ")
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert "internal error" not in error


def test_a_tokenizer_that_fails_on_a_text_quarantines_it(tmp_path):
    folder = save_model(tmp_path / "m", config=llama_config(), tokenizer=byte_tokenizer())
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}
    data["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    workshop = open_workshop(make_plan(load_recipe(str(write_recipe(tmp_path, {"small": folder})))), fit=False)
    good, bad = workshop.encoder.encode([("a b a",), ("a c",)])
    assert good.length == 3
    assert str(bad).startswith("text cannot be cut into tokens (")
