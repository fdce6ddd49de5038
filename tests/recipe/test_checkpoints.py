"""Language models are loaded whole or not at all, by safetensors in one file or several, and by GGUF."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from assay.recipe import checkpoints
from assay.recipe.errors import EngineError
from assay.recipe.models import TransformersSpec
from tests.small_models import edit_json, edit_weights, llama_config, save_model

Q = "model.layers.1.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


def spec(path) -> TransformersSpec:
    return TransformersSpec(kind="transformers", path=str(path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "m")


def same_as_transformers(path) -> bool:
    own, theirs = spec(path).build(), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert own.dtype == torch.float32
    assert not own.training
    pairs = zip(own.state_dict().items(), theirs.state_dict().items(), strict=True)
    ids = torch.arange(20)[None]
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs) and torch.equal(
        own(ids).logits, theirs.eval()(ids).logits
    )


@pytest.mark.parametrize(
    "config",
    [
        llama_config(),
        llama_config(tie_word_embeddings=True),
        llama_config(dtype="bfloat16"),
        GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=256),
        MixtralConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
        ),
    ],
    ids=["llama", "tied", "bfloat16", "gpt2", "mixtral"],
)
@pytest.mark.parametrize("size", ["1GB", "30KB"])
def test_what_is_whole_is_loaded_as_transformers_does(tmp_path, config, size):
    save_model(tmp_path / "m", config=config, max_shard_size=size)
    assert (tmp_path / "m/model.safetensors").exists() == (size == "1GB")
    assert same_as_transformers(tmp_path / "m")


FAULTS = [
    (lambda t: t.pop("lm_head.weight"), "they lack lm_head.weight, which its config wants"),
    (lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name], r"they lack .* and 6 more, which"),
    (lambda t: t.update({"model.layers.2.x": torch.zeros(3)}), "they hold model.layers.2.x, which its config does not"),
    (lambda t: t.update({"score.weight": torch.zeros(3)}), "they hold score.weight, which its config does not want"),
    (lambda t: t.update({Q: torch.zeros(16, 32)}), f"they hold {Q} 16×32 for 32×32, the shape that its config wants"),
    (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} hold no floating-point numbers"),
    (
        lambda t: t.update({"embed_tokens.weight": t["model.embed_tokens.weight"] + 1}),
        "model.embed_tokens.weight twice",
    ),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message[:40] for _, message in FAULTS])
def test_tensors_that_are_missing_left_over_or_of_other_shapes_are_named(folder, capfd, change, message):
    edit_weights(folder / "model.safetensors", change)
    with pytest.raises(EngineError, match=message) as caught:
        spec(folder).build()
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layers", [1, 4])
def test_a_config_of_other_layers_than_the_weights_is_refused(folder, layers):
    edit_json(folder / "config.json", num_hidden_layers=layers)
    with pytest.raises(EngineError, match=r"model\.layers\.[12]\..* more, which its config"):
        spec(folder).build()


def test_tied_weights_may_be_absent_or_equal_but_not_differ(tmp_path):
    path = save_model(tmp_path / "m", config=llama_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = spec(path).build()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit_weights(path / "model.safetensors", lambda t: t.update({"lm_head.weight": t[EMBED].clone()}))
    model = spec(path).build()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit_weights(path / "model.safetensors", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(EngineError, match=r"says that lm_head\.weight is model\.embed_tokens\.weight"):
        spec(path).build()
    edit_weights(path / "model.safetensors", lambda t: [t.pop("lm_head.weight"), t.pop("model.embed_tokens.weight")])
    with pytest.raises(EngineError, match="they lack"):
        spec(path).build()


def test_every_class_of_timm_is_known():
    from transformers.models.auto import modeling_auto

    mappings = [value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    assert {kind for m in mappings for kind, names in m.items() if "Timm" in str(names)} == checkpoints._TIMM


STRANGER = {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b", "model_args": {"checkpoint_path": "x.pth"}}


@pytest.mark.parametrize(
    "config",
    [
        STRANGER,
        {"model_type": "detr", "backbone_config": STRANGER},
        {"model_type": "llava", "vision_config": {"more": [{"backbone_config": STRANGER | {"backbone": "x"}}]}},
        {"model_type": "table-transformer", "backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50"}},
        {"model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50"},
        {"model_type": "detr"},  # has one of its own accord
        {"model_type": "fast_vlm"},
        {"model_type": "gemma3n"},
        {"architecture": "resnet50", "pretrained_cfg": {"file": "x.pth"}},
    ],
    ids=lambda config: str(config)[:60],
)
def test_models_of_timm_are_refused(folder, config):
    """timm unpickles the files that a config names."""
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"config\.json: has a model of timm in it \(\w+\), which may run code"):
        spec(folder).build()


def test_a_name_that_a_header_has_twice_is_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    entry = header[header.index('"model.norm.weight"') :].split("}")[0] + "}"
    twice = (header[:-1] + "," + entry + "}").encode()
    (folder / "model.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    with pytest.raises(EngineError, match=r"names model\.norm\.weight twice"):
        spec(folder).build()


def test_shards_hold_what_their_index_says(tmp_path):
    path = save_model(tmp_path / "m", max_shard_size="30KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    first, other = sorted(set(index.values()))[:2]
    whole = load_file(path / first)
    name = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != name}, path / first)
    with pytest.raises(EngineError, match=f"{first}: lacks {name}, which model.safetensors.index.json"):
        spec(path).build()
    save_file(whole | {"more": torch.zeros(2)}, path / first)
    with pytest.raises(EngineError, match=f"{first}: holds more, which model.safetensors.index.json does not list"):
        spec(path).build()
    save_file(whole, path / first)
    edit_weights(path / other, lambda t: t.update({name: whole[name]}))
    with pytest.raises(EngineError, match=f"{name} stand in another of the model's files too"):
        spec(path).build()


def test_nothing_that_a_library_prints_reaches_the_terminal(folder, capfd, caplog):
    edit_weights(folder / "model.safetensors", lambda t: t.pop("lm_head.weight"))
    with caplog.at_level(logging.INFO), pytest.raises(EngineError, match=r"lack lm_head\.weight"):
        spec(folder).build()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def write_gguf(path, layers: int = 2, skip: str = "", head: bool = True):
    """A random Llama as llama.cpp writes it."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(64)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(chr(0x2581) + chr(97 + i) for i in range(26)),
        *(chr(65 + i) for i in range(35)),
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 64)
    writer.add_token_types([2, 3, 3] + [1] * 61)
    shapes = {"token_embd.weight": (64, 32), "output_norm.weight": (32,)} | (
        {"output.weight": (64, 32)} if head else {}
    )
    for i in range(2):
        shapes |= {f"blk.{i}.{n}.weight": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.ffn_gate.weight": (64, 32), f"blk.{i}.ffn_up.weight": (64, 32)}
        shapes |= {f"blk.{i}.ffn_down.weight": (32, 64), f"blk.{i}.attn_norm.weight": (32,)}
        shapes |= {f"blk.{i}.ffn_norm.weight": (32,)}
    for name, shape in shapes.items():
        if name != skip:
            writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files_are_loaded_whole(tmp_path, capfd):
    model = spec(write_gguf(tmp_path / "m.gguf")).build()
    assert len(model.model.layers) == 2
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tied = spec(write_gguf(tmp_path / "tied.gguf", head=False)).build()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with pytest.raises(EngineError, match=r"they lack model\.layers\.1\.mlp\.up_proj\.weight, which its config wants"):
        spec(write_gguf(tmp_path / "less.gguf", skip="blk.1.ffn_up.weight")).build()
    with pytest.raises(EngineError, match=r"they lack .* more, which its config wants"):
        spec(write_gguf(tmp_path / "more.gguf", layers=3)).build()
    with pytest.raises(EngineError, match=r"llama\.block_count is 1,000,000,000, but the weights hold only 21 tensors"):
        spec(write_gguf(tmp_path / "many.gguf", layers=10**9)).build()
    assert capfd.readouterr() == ("", "")


def test_damaged_gguf_files_are_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    for damaged, message in [
        (data[: len(data) // 2], "is cut short"),
        (data[:100], "not a GGUF file, or cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"", "is empty"),
        (b"PK" + data, "not a GGUF file"),
        (data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), r"names blk\.0\.ffn_up\.weight twice"),
        (data[:16] + (2**62).to_bytes(8, "little") + data[24:], "not a GGUF file, or cut short"),
    ]:
        path.write_bytes(damaged)
        for load in (spec(path).build, spec(path).tokenizer):
            with pytest.raises(EngineError, match=message) as caught:
                load()
            assert str(path) in str(caught.value)
            assert len(str(caught.value)) < 500
