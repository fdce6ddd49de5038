"""LoRA adapters as peft saves them: a folder like any other, with its base model."""

from __future__ import annotations

import json
import shutil

import peft
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from assay.engine import run
from assay.recipe.errors import ChangedError, EngineError, RecipeError
from assay.recipe.models import TransformersSpec
from assay.recipe.recipe import load_recipe
from tests.small_architectures import save
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
    return tmp_path


def spec(root, base="base", adapter="lora", **options) -> TransformersSpec:
    return TransformersSpec(kind="transformers", path=str(root / base), adapter=str(root / adapter), **options)


def entry(root, **options) -> dict[str, str]:
    """A recipe's model."""
    return {"kind": "transformers", "path": str(root / "base"), "adapter": str(root / "lora"), **options}


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
    model = spec(tmp_path, saved / "base").build()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert not model.training


def test_an_adapter_stands_beside_its_base(models):
    assert spec(models).tokenizer()("gold")["input_ids"] == byte_tokenizer()("gold")["input_ids"]
    edit_json(models / "lora/adapter_config.json", base_model_name_or_path="meta-llama/Llama-3.2-1B")
    spec(models).build()  # what it was once trained on is no matter
    for load in (lambda s: s.build(), lambda s: s.fingerprint(), lambda s: s.tokenizer()):
        message = r"lora: is a LoRA adapter; give its base model \(its config names meta-llama/Llama-3\.2-1B\) as path"
        with pytest.raises(EngineError, match=message):
            load(TransformersSpec(kind="transformers", path=str(models / "lora")))
        with pytest.raises(EngineError, match=r"base: no adapter_config\.json in it"):
            load(spec(models, adapter="base"))
    path = str(write_recipe(models, {"m": entry(models)}))
    with pytest.raises(RecipeError, match=r"models\.m\.train: goes with an adapter"):
        load_recipe(path, ["models.m.adapter=null", "models.m.train=all"])
    (models / "m.gguf").write_bytes(b"x")
    with pytest.raises(RecipeError, match=r"models\.m\.adapter: goes with a model's folder, not with a \.gguf file"):
        load_recipe(path, ["models.m.path=m.gguf"])


def test_its_own_parameters_train_or_all(models):
    some, every = spec(models).build(), spec(models, train="all").build()
    assert all(p.requires_grad == ("lora_" in name) for name, p in some.named_parameters())
    assert all(p.requires_grad for p in every.parameters())
    assert spec(models).identity() == spec(models, train="adapter").identity() != spec(models, train="all").identity()
    methods = [{"method": "grad_mimic", "model": "small", "reference": "other"}]
    save_adapter(models / "base", models / "other", seed=1)
    shares = []
    for train in ("adapter", "all"):
        small, other = (entry(models, train=train) | more for more in ({}, {"adapter": str(models / "other")}))
        path = write_recipe(models, {"small": small, "other": other}, methods=methods, output=train)
        assert run(load_recipe(str(path))).clean
        shares.append(pq.read_table(models / f"{train}/a.parquet")["mimic"].to_pylist())
    # The base is the same on both sides: what differs is the adapter's, and so is the whole direction.
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_has_its_models_type(models, dtype):
    assert {p.dtype for p in spec(models, dtype=dtype).build().parameters()} == {getattr(torch, dtype)}


def save_classifier(root, name, targets, labels):
    """A base model of another task, and an adapter that peft made a classifier's head with."""
    kind = "AutoModelForCausalLM" if name == "llama" else "AutoModelForMaskedLM"
    save(root / "base", name, kind)
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=labels)
    options = {"task_type": "SEQ_CLS", "r": 2, "target_modules": targets, "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    adapted.save_pretrained(root / "lora")
    return adapted.eval()


@pytest.mark.parametrize(
    ("name", "targets", "labels"), [("llama", ["q_proj"], 5), ("llama", ["q_proj"], 2), ("distilbert", ["q_lin"], 16)]
)
def test_a_head_may_be_the_adapters(tmp_path, name, targets, labels):
    theirs = save_classifier(tmp_path, name, targets, labels)
    adapted = spec(tmp_path)
    model = adapted.build_for("AutoModelForSequenceClassification")
    ids = torch.arange(1, 21)[None]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert adapted.output_size(model) == labels == model(ids).logits.shape[1]
    trained = {
        n
        for n, p in spec(tmp_path, train="all").build_for("AutoModelForSequenceClassification").named_parameters()
        if not p.requires_grad
    }
    assert trained
    assert all(".original_module." in n for n in trained)
    edit_weights(tmp_path / "lora/adapter_model.safetensors", lambda t: [t.pop(n) for n in list(t) if "lora" not in n])
    with pytest.raises(EngineError, match="the weights do not fit the config: they lack"):
        adapted.build_for("AutoModelForSequenceClassification")


def test_a_pooler_that_nobody_saved_is_not_made_up(tmp_path):
    save_classifier(tmp_path, "bert", ["query"], 3)
    with pytest.raises(EngineError, match=r"they lack bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight, which"):
        spec(tmp_path).build_for("AutoModelForSequenceClassification")


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
        spec(models).build()
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
        ({"modules_to_save": ["lm_head"]}, r"peft cannot put the adapter .*lm_head"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of layers' names"),
        ({"modules_to_save": ["(.*.*.*)*nope"]}, "modules_to_save must be a list of layers' names"),
        ({"rank_pattern": {"(m|.)" * 30 + "nope": 3}}, "rank_pattern must map names"),
        ({"alpha_pattern": {".?" * 30 + "nope": 3}}, "alpha_pattern must map names"),
        ({"r": 10**12}, "wants a rank of 1000000000000; no tensor of its weights is larger than 64"),
        ({"rank_pattern": {"q_proj": 10**12}}, "wants a rank of 1000000000000; no tensor"),
        ({"rank_pattern": {f"layer{i}": 1 for i in range(2000)}}, "rank_pattern names more layers than"),
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens; only LoRA, rsLoRA and DoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "sets layer_replication; only LoRA"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices; only LoRA"),
        ({"of_next_year": 16}, "sets of_next_year; only LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4, which changes the base model's"),
        ({"init_lora_weights": [1]}, "init_lora_weights is .*, which changes the base model's"),
    ],
)
def test_configs_of_nonsense_are_refused(models, changes, message):
    edit_json(models / "lora/adapter_config.json", **changes)
    with pytest.raises(EngineError, match=message) as caught:
        spec(models).build()
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_target_pattern_is_not_matched(models):
    """Which layers are adapted follows from the weights; a pattern could take for ever."""
    slow = "(m|mo|mod|.)*(.*.*.*.*)*nope"
    edit_json(models / "lora/adapter_config.json", target_modules=slow, exclude_modules=slow)
    spec(models).build()


def test_patterns_may_have_a_few_alternatives(saved, tmp_path):
    ranks = {r"^model\.layers\.(0|1)\.self_attn\.(q|k|v)_proj$": 3}
    save_adapter(saved / "base", tmp_path / "lora", rank_pattern=ranks, exclude_modules=r".*layers\.1\.mlp.*")
    model = spec(tmp_path, saved / "base").build()
    assert {p.shape[0] for n, p in model.named_parameters() if "q_proj.lora_A" in n} == {3}
    assert not any("lora_" in n for n, _ in model.named_parameters() if "layers.1.mlp" in n)


def test_no_module_of_an_adapters_choice_is_imported(models, monkeypatch):
    (models / "stranger.py").write_text(f"open({str(models / 'mark')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(models))
    path = models / "lora/adapter_config.json"
    edit_json(path, megatron_core="stranger")
    spec(models).build()
    edit_json(path, megatron_config={"tensor_model_parallel_size": 1})
    with pytest.raises(EngineError, match="sets megatron_config; only LoRA, rsLoRA and DoRA can be scored with"):
        spec(models).build()
    assert not (models / "mark").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_base_model_stays_as_it_is_without_the_adapter(models, dtype):
    """Positions are computed of float32 buffers, whatever the type of the weights."""
    base = TransformersSpec(kind="transformers", path=str(models / "base"), dtype=dtype).build()
    buffers = dict(spec(models, dtype=dtype).build().named_buffers())
    assert {"model.rotary_emb.inv_freq"} <= {name for name, _ in base.named_buffers()} <= buffers.keys()
    for name, buffer in base.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)


def test_an_adapters_numbers_beyond_its_models_type_are_refused(models):
    edit_weights(models / "lora/adapter_model.safetensors", lambda t: t[sorted(t)[0]].fill_(70_000))
    spec(models, dtype="bfloat16").build()
    with pytest.raises(EngineError, match=r"lora: .*lora_A.* hold numbers that float16 has not; take bfloat16"):
        spec(models, dtype="float16").build()


def test_its_base_is_part_of_its_fingerprint(models):
    path = write_recipe(models, {"small": entry(models)})
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
    path = write_recipe(models, {"small": entry(models)}, methods=[less, some], targets={"t": {"path": "target"}})
    assert run(load_recipe(str(path))).clean
    table = pq.read_table(models / "scores/a.parquet")
    for name in ("less", "some"):
        assert len(set(table[name].to_pylist())) == len(TEXTS)


def test_the_adapters_weights_decide(models):
    path = write_recipe(
        models,
        {"small": entry(models), "base": models / "base"},
        methods=[{"method": "ensemble", "name": name, "models": [name]} for name in ("small", "base")],
    )
    run(load_recipe(str(path)))
    table = pq.read_table(models / "scores/a.parquet")
    assert table["small_nll"].to_pylist() != table["base_nll"].to_pylist()
    assert sorted(load_file(models / "lora/adapter_model.safetensors"))[0].startswith("base_model.model.")
