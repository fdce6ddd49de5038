"""LoRA adapters as peft saves them: a folder like any other, with its base model."""

from __future__ import annotations

import json
import shutil

import peft
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from assay.engine import run
from assay.recipe.errors import ChangedError, EngineError
from assay.recipe.models import TransformersSpec
from assay.recipe.recipe import load_recipe
from tests.small_models import TEXTS, byte_tokenizer, edit_json, edit_weights, save_model, write_recipe


def save_adapter(base, path, seed=0, **options):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    adapted.save_pretrained(path)
    return adapted.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_model(root / "base")
    save_adapter(root / "base", root / "lora")
    return root


@pytest.fixture
def models(saved, tmp_path):
    for name in ("base", "lora"):
        shutil.copytree(saved / name, tmp_path / name)
    edit_json(tmp_path / "lora/adapter_config.json", base_model_name_or_path="../base")
    return tmp_path


def spec(path, **options) -> TransformersSpec:
    return TransformersSpec(kind="transformers", path=str(path), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.1\..*(up|down)_proj"},
        {"rank_pattern": {"layers.1.mlp.down_proj": 4}, "alpha_pattern": {"q_proj": 32}, "use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
    ],
    ids=["plain", "all", "pattern", "ranks", "head", "dora"],
)
def test_an_adapter_computes_what_peft_does(saved, tmp_path, options):
    theirs = save_adapter(saved / "base", tmp_path / "lora", **options)
    model = spec(tmp_path / "lora", base=str(saved / "base")).build()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert not model.training


def test_the_base_is_the_folder_that_it_names_or_the_recipes(models):
    assert spec(models / "lora").tokenizer()("gold")["input_ids"] == byte_tokenizer()("gold")["input_ids"]
    edit_json(models / "lora/adapter_config.json", base_model_name_or_path="meta-llama/Llama-3.2-1B")
    with pytest.raises(EngineError, match=r"base model meta-llama/Llama-3\.2-1B is no folder here; give .* key base"):
        spec(models / "lora").build()
    spec(models / "lora", base=str(models / "base")).build()
    with pytest.raises(EngineError, match="base goes with a LoRA adapter"):
        spec(models / "base", base=str(models / "base")).build()
    with pytest.raises(EngineError, match="an adapter again"):
        spec(models / "lora", base=str(models / "lora")).build()


DAMAGES = [
    (lambda t: t.pop(sorted(t)[0]), "adapter_model.safetensors: lacks model.layers.0.mlp.down_proj.lora_A"),
    (lambda t: t.update({"base_model.model.model.layers.7.mlp.down_proj.lora_A.weight": torch.zeros(2, 64)}), "layers"),
    (lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 32)}), "no place for, .*score"),
    (lambda t: t.update({sorted(t)[0]: torch.zeros(3, 64)}), "peft cannot put the adapter into .*size mismatch"),
    (lambda t: t.clear() or t.update({"x": torch.zeros(1)}), "hold no lora_A and lora_B of any layer"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_tensors_that_do_not_fit_are_named(models, capfd, change, message):
    edit_weights(models / "lora/adapter_model.safetensors", change)
    with pytest.raises(EngineError, match=message) as caught:
        spec(models / "lora").build()
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is PREFIX_TUNING; only LORA"),
        ({"peft_type": None}, "peft_type is None; only LORA"),
        ({"r": "x"}, "peft cannot put the adapter"),
        ({"r": 0}, "peft cannot put the adapter"),
        ({"lora_alpha": []}, "peft cannot put the adapter"),
        ({"rank_pattern": {"(a+)+$": 3}}, "rank_pattern must map names"),
        ({"alpha_pattern": [1]}, "alpha_pattern must map names"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": 5}, "names no base model"),
        ({"modules_to_save": ["lm_head"]}, r"peft cannot put the adapter .*lm_head"),
    ],
)
def test_configs_of_nonsense_are_refused(models, changes, message):
    edit_json(models / "lora/adapter_config.json", **changes)
    with pytest.raises(EngineError, match=message) as caught:
        spec(models / "lora").build()
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_target_pattern_is_not_matched(models):
    """Which layers are adapted follows from the weights; a pattern could take for ever."""
    edit_json(models / "lora/adapter_config.json", target_modules="(m|mo|mod|.)*(.*.*.*.*)*nope")
    spec(models / "lora").build()


def test_its_base_is_part_of_its_fingerprint(models):
    path = write_recipe(models, {"small": models / "lora"})
    run(load_recipe(str(path)))
    assert run(load_recipe(str(path))).done_before == 1
    edit_weights(models / "base/model.safetensors", lambda t: t["model.norm.weight"].add_(0.5))
    with pytest.raises(ChangedError, match=r"models\.small|small"):
        run(load_recipe(str(path)))
    assert run(load_recipe(str(path)), rescore=True).rescored == 1


def test_adapters_are_scored_by_their_own_parameters(models):
    target = models / "target"
    target.mkdir()
    (target / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]))
    less = {"method": "less", "models": ["small"], "optimizers": None, "sketch": {"kind": "sparse", "dim": 64}}
    some = less | {"name": "some", "layers": "*layers.1*lora_B*"}
    path = write_recipe(models, {"small": models / "lora"}, methods=[less, some], targets={"t": {"path": "target"}})
    assert run(load_recipe(str(path))).clean
    table = pq.read_table(models / "scores/a.parquet")
    for name in ("less", "some"):
        assert len(set(table[name].to_pylist())) == len(TEXTS)


def test_the_adapters_weights_decide(models):
    path = write_recipe(
        models,
        {"small": models / "lora", "base": models / "base"},
        methods=[{"method": "ensemble", "name": name, "models": [name]} for name in ("small", "base")],
    )
    run(load_recipe(str(path)))
    table = pq.read_table(models / "scores/a.parquet")
    assert table["small_nll"].to_pylist() != table["base_nll"].to_pylist()
    assert sorted(load_file(models / "lora/adapter_model.safetensors"))[0].startswith("base_model.model.")
