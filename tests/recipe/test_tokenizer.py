"""Tokenizers: what they inherit is overruled, and models share one only if theirs do the same."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import normalizers

from assay.engine import make_plan, open_workshop, run
from assay.recipe.errors import EngineError
from assay.recipe.models import TransformersSpec
from assay.recipe.recipe import load_recipe
from tests.small_models import TEXTS, byte_tokenizer, edit_json, llama_config, save_model, write_recipe


def opened(root, models, *overrides, **changes):
    return open_workshop(make_plan(load_recipe(str(write_recipe(root, models, **changes)), overrides)), fit=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "a")


@pytest.fixture
def pair(saved, tmp_path):
    return {"small": shutil.copytree(saved, tmp_path / "a"), "large": shutil.copytree(saved, tmp_path / "b")}


def edit_tokenizer(folder, change) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def lowercase(data) -> None:
    data["normalizer"] = {"type": "Lowercase"}


def prefix_space(data) -> None:
    data["pre_tokenizer"]["add_prefix_space"] = True


def two_swapped(data) -> None:
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def merged(data) -> None:
    data["model"]["vocab"]["in"] = 257
    data["model"]["merges"] = [["i", "n"]]


def bos(data) -> None:
    data["post_processor"] = json.loads(byte_tokenizer(bos=True).backend_tokenizer.to_str())["post_processor"]


def ordinary_eos(data) -> None:
    data["added_tokens"][0]["lstrip"] = True


DIFFERENCES = [
    (lowercase, "normalizer"),
    (prefix_space, "pre-tokenizer"),
    (two_swapped, "vocabularies"),
    (merged, "vocabularies"),
    (bos, r"post-processor \(tokens added at the ends\)"),
    (ordinary_eos, "added tokens '<eos>'"),
]


@pytest.mark.parametrize(("change", "part"), DIFFERENCES, ids=[change.__name__ for change, _ in DIFFERENCES])
def test_tokenizers_that_differ_are_refused_with_what_differs(pair, tmp_path, change, part):
    edit_tokenizer(pair["large"], change)
    with pytest.raises(EngineError, match=f"models.small and models.large have tokenizers with different {part}; "):
        opened(tmp_path, pair)


def test_special_tokens_in_texts_are_part_of_it(pair, tmp_path):
    edit_json(pair["large"] / "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(EngineError, match="different split special tokens; "):
        opened(tmp_path, pair)


def test_state_that_does_not_change_tokens_is_no_difference(pair, tmp_path):
    def cut(data) -> None:
        data["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 2}
        data["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 5,
            "pad_type_id": 0,
            "pad_token": "<eos>",
        }
        data["decoder"] = None

    edit_tokenizer(pair["large"], cut)
    edit_json(
        pair["large"] / "tokenizer_config.json",
        truncation_side="left",
        padding_side="left",
        model_max_length=7,
        chat_template="{{ messages }}",
    )
    for models in (pair, dict(reversed(pair.items()))):
        (encoded,) = opened(tmp_path, models, "task.max_length=16").encoder.encode([(TEXTS[0],)])
        assert encoded.data.tolist() == byte_tokenizer()(TEXTS[0])["input_ids"][:16]


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_cut_to_their_first_tokens(tmp_path, side):
    save_model(tmp_path / "m", tokenizer=byte_tokenizer(truncation_side=side, padding_side="left", model_max_length=9))
    encoder = opened(tmp_path, {"small": tmp_path / "m"}, "task.max_length=16").encoder
    encoded = encoder.encode([(text,) for text in TEXTS])
    plain = byte_tokenizer()
    assert [sample.data.tolist() for sample in encoded] == [plain(text)["input_ids"][:16] for text in TEXTS]


def test_tokens_are_not_drawn(tmp_path):
    """BPE dropout, which training may use, would cut one text differently each time."""
    folder = save_model(tmp_path / "m")
    edit_tokenizer(folder, lambda data: (merged(data), data["model"].update(dropout=0.5)))
    tokenizer = TransformersSpec(kind="transformers", path=str(folder)).tokenizer()
    assert {len(tokenizer("in" * 50)["input_ids"]) for _ in range(5)} == {50}


def test_only_rows_with_a_token_beyond_the_embedding_are_quarantined(tmp_path, caplog):
    save_model(tmp_path / "m", tokenizer=byte_tokenizer("<image>"))
    path = write_recipe(tmp_path, {"small": tmp_path / "m"})
    lines = [json.dumps({"text": text}) for text in ("plain gold", "an <image> of gold", "more gold")]
    (tmp_path / "data/a.jsonl").write_text("\n".join(lines))
    summary = run(load_recipe(str(path)))
    assert (summary.rows_scored, summary.rows_quarantined) == (2, 1)
    (line,) = (tmp_path / "scores/quarantine/a.jsonl").read_text().splitlines()
    reason = "text has the token '<image>' (number 257); models.small knows those below 257"
    assert (json.loads(line)["row"], json.loads(line)["reason"]) == (1, reason)
    assert "1 tokens of its tokenizer, from 257 on, are not the model's" in caplog.text


def test_the_smallest_model_decides_which_tokens_can_be_scored(tmp_path):
    for name, size in (("small", 257), ("large", 264)):
        save_model(tmp_path / name, config=llama_config(vocab_size=size), tokenizer=byte_tokenizer("<image>"))
    mimic = {"method": "ensemble", "name": "one", "models": ["large"]}, {"method": "ensemble", "models": ["small"]}
    models = {name: tmp_path / name for name in ("large", "small")}
    good, bad = opened(tmp_path, models, methods=list(mimic)).encoder.encode([("gold",), ("<image>",)])
    assert good.length == 4
    assert "models.small knows those below 257" in str(bad) or "nothing in it" in str(bad)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save_model(tmp_path / "m", config=llama_config(vocab_size=100, bos_token_id=1, eos_token_id=1))
    with pytest.raises(EngineError, match=r"models\.small: knows 100 tokens, its tokenizer 257: not of one model"):
        opened(tmp_path, {"small": tmp_path / "m"})


def test_an_ensemble_takes_a_vocabulary_that_is_padded_differently(tmp_path):
    for name, size in (("small", 257), ("large", 264)):
        save_model(tmp_path / name, config=llama_config(vocab_size=size))
    models = {name: tmp_path / name for name in ("small", "large")}
    methods = [{"method": "ensemble", "name": name, "models": [name]} for name in models]
    methods.append({"method": "ensemble", "models": list(models)})
    assert run(load_recipe(str(write_recipe(tmp_path, models, methods=methods)))).clean
    (table,) = (tmp_path / "scores").rglob("*.parquet")
    scores = pq.read_table(table).to_pandas()
    for together, apart in (("mean_nll", "nll"), ("expected_entropy", "entropy")):
        own = (scores[f"small_{apart}"] + scores[f"large_{apart}"]) / 2
        np.testing.assert_allclose(scores[f"ensemble_{together}"], own, rtol=1e-5)


def test_validate_refuses_an_ensemble_whose_vocabularies_differ_by_more_than_padding(tmp_path):
    for name, size in (("small", 257), ("large", 1282)):
        save_model(tmp_path / name, config=llama_config(vocab_size=size))
    models = {name: tmp_path / name for name in ("small", "large")}
    with pytest.raises(EngineError, match=r"methods.*output layers of 257, 1282 classes") as caught:
        opened(tmp_path, models)
    assert "\n" not in str(caught.value)
    apart = [{"method": "ensemble", "name": name, "models": [name]} for name in models]
    assert run(load_recipe(str(write_recipe(tmp_path, models, methods=apart)))).clean


def test_normalizers_of_libraries_keep_their_meaning(tmp_path):
    """The tokenizer is the library's own, apart from its state."""
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    folder = save_model(tmp_path / "m", tokenizer=tokenizer)
    own = TransformersSpec(kind="transformers", path=str(folder)).tokenizer()
    assert (
        own("ﬁne gold")["input_ids"]
        == tokenizer("ﬁne gold")["input_ids"]
        == [256, *byte_tokenizer()("fine gold")["input_ids"]]
    )


@pytest.mark.parametrize("kept", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "BertTokenizer", "LlamaTokenizer", "T5Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(saved, tmp_path, kind, kept):
    """transformers makes one of special tokens alone, of which every text is a row of unknown ones."""
    folder = shutil.copytree(saved, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "unk_token": "[UNK]"}))
    (folder / kept).exists() or (folder / kept).write_text("{}")
    with pytest.raises(
        EngineError, match=r"m: its tokenizer \(\w+\) has no vocabulary; expected|m: its tokenizer files"
    ):
        TransformersSpec(kind="transformers", path=str(folder)).tokenizer()


@pytest.mark.parametrize(
    ("name", "content"), [("vocab.json", '{"a": 5, "b": 6}'), ("tokenizer.json", None), ("merges.txt", "a b")]
)
def test_a_vocabulary_of_another_class_or_of_nothing_is_none(saved, tmp_path, name, content):
    folder = shutil.copytree(saved, tmp_path / "m")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] = {"type": "WordLevel", "vocab": {"[UNK]": 0, "<eos>": 256}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").unlink()
    (folder / name).write_text(content or json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(EngineError, match=r"m: its tokenizer \(\w+\) has no vocabulary; expected"):
        TransformersSpec(kind="transformers", path=str(folder)).tokenizer()


def test_bytes_need_no_vocabulary(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    tokenizer = TransformersSpec(kind="transformers", path=str(folder)).tokenizer()
    assert tokenizer("gold")["input_ids"] == [*(byte + 3 for byte in b"gold"), 1]


def test_further_chat_templates_are_the_tokenizers_and_part_of_the_model(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": "with {{ tools }}"}
    model = TransformersSpec(kind="transformers", path=str(save_model(tmp_path / "model", tokenizer=tokenizer)))
    assert model.tokenizer().chat_template == tokenizer.chat_template
    before = model.fingerprint()
    (tmp_path / "model/additional_chat_templates/tool_use.jinja").write_text("others {{ tools }}")
    assert model.tokenizer().get_chat_template(tools=[{}]) == "others {{ tools }}"
    assert model.fingerprint() != before


def test_an_adapters_tokenizer_is_taken_if_it_has_a_vocabulary(saved, tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (adapter / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    spec = TransformersSpec(kind="transformers", path=str(saved), adapter=str(adapter))
    assert spec.tokenizer()("gold")["input_ids"] == byte_tokenizer()("gold")["input_ids"]
    byte_tokenizer(bos=True).save_pretrained(adapter)
    assert spec.tokenizer()("gold")["input_ids"] == byte_tokenizer(bos=True)("gold")["input_ids"]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_no_setting_names_a_file(saved, tmp_path, file):
    folder = shutil.copytree(saved, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngold\nsilver\n")
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsilver\ngold\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (folder / "special_tokens_map.json").write_text("{}")
    for key in ("vocab", "vocab_file", "merges", "init_inputs", "word_shape_path"):
        value = [str(elsewhere)] if key == "init_inputs" else str(elsewhere)
        before = (folder / file).read_text()
        edit_json(folder / file, **{key: value})
        tokenizer = TransformersSpec(kind="transformers", path=str(folder)).tokenizer()
        assert tokenizer("gold")["input_ids"] == [2, 5, 3], key
        assert key == "vocab_file" or key not in tokenizer.init_kwargs or tokenizer.init_kwargs[key] != value
        (folder / file).write_text(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mecab_kwargs": {"mecab_option": "-r /etc/passwd"}}, "mecab_kwargs names files of a dictionary"),
        ({"sudachi_kwargs": {"sudachi_config_path": "/x"}}, "sudachi_kwargs names files of a dictionary"),
        ({"sudachi_kwargs": {"sudachi_resource_dir": "/x"}}, "sudachi_kwargs names files of a dictionary"),
        ({"sudachi_kwargs": {"sudachi_dict_type": "/x"}}, "sudachi_dict_type must be one of small, core, full"),
        ({"jumanpp_kwargs": "x"}, "jumanpp_kwargs names files of a dictionary"),
    ],
)
def test_no_dictionary_of_a_files_choice_is_opened(saved, tmp_path, settings, message):
    folder = shutil.copytree(saved, tmp_path / "m")
    edit_json(folder / "tokenizer_config.json", **settings)
    with pytest.raises(EngineError, match=message):
        TransformersSpec(kind="transformers", path=str(folder)).tokenizer()
    fine = {"mecab_kwargs": {"mecab_dic": "ipadic"}, "sudachi_kwargs": None, "jumanpp_kwargs": {}}
    edit_json(folder / "tokenizer_config.json", **fine)
    TransformersSpec(kind="transformers", path=str(folder)).tokenizer()
