"""Recipes of texts, completions and conversations: what they may say, and losses that are transformers' own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from assay.corpus.facts import MIXED
from assay.corpus.format import ColumnFacts
from assay.engine import make_plan, open_workshop, run
from assay.recipe.errors import EngineError, RecipeError
from assay.recipe.recipe import load_recipe
from assay.recipe.tasks.causal_lm import CausalLMSpec, _special_tokens
from tests.recipe.tasks.chat_tokenizers import MARKED, PLAIN, UNSTABLE, word_tokenizer
from tests.small_models import llama_config, save_model

CHATS = [
    [{"role": "user", "content": "gold?"}, {"role": "assistant", "content": "yes."}],
    [
        {"role": "system", "content": "dig here"},
        {"role": "user", "content": "is it gold?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "dig?"},
        {"role": "assistant", "content": "yes. dig."},
    ],
    [{"role": "user", "content": "ore?"}],
]
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [[{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]
PAIRS = [("gold?", " yes."), ("is it ore here? dig ", "no"), ("dig", None)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = llama_config(vocab_size=24, bos_token_id=0, eos_token_id=1)
    for seed, (name, template) in enumerate({"plain": PLAIN, "marked": MARKED, "none": None}.items()):
        save_model(folder / name, seed, config, word_tokenizer(template))
    return folder


def write(root, models, task, names=("plain",), **changes):
    (root / "data").mkdir(exist_ok=True)
    rows = [
        {"chat": chat, "shared": shared, "ask": ask, "answer": answer, "asked": chat[:-1], "said": chat[-1:]}
        for chat, shared, (ask, answer) in zip(CHATS, SHAREGPT, PAIRS, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "data/a.parquet")
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "causal_lm", "max_length": 64, **task},
        "models": {name: {"kind": "transformers", "path": str(models / name)} for name in names},
        "methods": [{"method": "ensemble", "models": list(names)}],
        "output": "scores",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
    return str(root / "recipe.yaml")


def own_loss(folder, ids, labels) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss)


CHAT = {"messages_column": "chat"}
PROMPT = {"prompt_column": "ask", "completion_column": "answer"}
TURNS = {"prompt_column": "asked", "completion_column": "said"}


@pytest.mark.parametrize("task", [CHAT, CHAT | {"loss_on": "completion"}, CHAT | {"loss_on": "all"}])
def test_losses_of_conversations_are_transformers_own(models, tmp_path, task):
    summary = run(load_recipe(write(tmp_path, models, task)))
    everything = task.get("loss_on") == "all"
    assert (summary.rows_scored, summary.rows_quarantined) == (3 if everything else 2, 0 if everything else 1)
    table = pq.read_table(tmp_path / "scores/a.parquet")
    tokenizer = word_tokenizer(MARKED)  # of the same text, with marks: the masks of transformers itself
    for row, score in zip(table["row"].to_pylist(), table["ensemble_mean_nll"].to_pylist(), strict=True):
        out = tokenizer.apply_chat_template(CHATS[row], return_dict=True, return_assistant_tokens_mask=True)
        counts = [True] * len(out["input_ids"]) if everything else out["assistant_masks"]
        if task.get("loss_on") == "completion":
            start = len(tokenizer.apply_chat_template(CHATS[row][:-1], return_dict=True)["input_ids"])
            counts = [c if i >= start else 0 for i, c in enumerate(counts)]
        labels = [id_ if c else -100 for id_, c in zip(out["input_ids"], counts, strict=True)]
        assert score == pytest.approx(own_loss(models / "plain", out["input_ids"], labels), rel=1e-5)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_losses_of_completions_are_transformers_own(models, tmp_path, loss_on):
    methods = [{"method": "grad_mimic", "model": "plain", "reference": "marked"}]
    path = write(tmp_path, models, PROMPT | {"loss_on": loss_on}, names=("plain", "marked"), methods=methods)
    assert run(load_recipe(path)).rows_quarantined == 1
    table = pq.read_table(tmp_path / "scores/a.parquet")
    tokenizer = word_tokenizer()
    for (ask, answer), score in zip(PAIRS, table["loss"].to_pylist(), strict=False):
        ids = [*tokenizer(ask + answer)["input_ids"], tokenizer.eos_token_id]
        start = len(tokenizer(ask)["input_ids"]) if loss_on == "completion" else 0
        assert score == pytest.approx(own_loss(models / "plain", ids, [-100] * start + ids[start:]), rel=1e-5)


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "all"])
def test_losses_of_completions_of_messages_are_transformers_own(models, tmp_path, loss_on):
    task = TURNS | {"loss_on": loss_on} | ({"conversational": True} if loss_on == "assistant" else {})
    assert run(load_recipe(write(tmp_path, models, task))).rows_quarantined == 1
    table = pq.read_table(tmp_path / "scores/a.parquet")
    tokenizer = word_tokenizer(MARKED)  # of the same text, with marks
    for row, score in zip(table["row"].to_pylist(), table["ensemble_mean_nll"].to_pylist(), strict=True):
        out = tokenizer.apply_chat_template(CHATS[row], return_dict=True, return_assistant_tokens_mask=True)
        before = tokenizer.apply_chat_template(CHATS[row][:-1], return_dict=True, add_generation_prompt=True)
        ids, marks = out["input_ids"], out["assistant_masks"]
        start = 0 if loss_on == "all" else len(before["input_ids"])
        counts = [i >= start and (loss_on != "assistant" or marks[i]) for i in range(len(ids))]
        labels = [id_ if c else -100 for id_, c in zip(ids, counts, strict=True)]
        assert score == pytest.approx(own_loss(models / "plain", ids, labels), rel=1e-5)


def test_sharegpts_conversations_have_the_scores_of_plain_ones(models, tmp_path):
    path = write(tmp_path, models, CHAT)
    run(load_recipe(path))
    run(load_recipe(path, ["task.messages_column=shared", "output=shared-scores"]))
    plain, shared = (pq.read_table(tmp_path / name / "a.parquet") for name in ("scores", "shared-scores"))
    assert plain.num_rows == 2
    assert plain.equals(shared)


def seen(**types):
    spec = CausalLMSpec(kind="causal_lm", **PROMPT)
    return spec.seen({name: ColumnFacts(type_) for name, type_ in types.items()}).conversational


def test_lists_are_messages_and_texts_are_texts():
    turns = "list<struct<role: string, content: string>>"
    assert (
        seen(ask=turns, answer=turns) is seen(ask="list<null>", answer=MIXED) is seen(ask=turns, answer="null") is True
    )
    assert seen(ask="string", answer="string") is seen(ask="string", answer=MIXED) is seen(ask="string") is None
    for types in ({"ask": turns, "answer": "string"}, {"ask": "string", "answer": turns}):
        with pytest.raises(
            EngineError, match=r"^task\.prompt_column, .* holds lists, and '\w+' texts; expected messages"
        ):
            seen(**types)
    told = CausalLMSpec(kind="causal_lm", conversational=False, **PROMPT)
    assert told.seen({"ask": ColumnFacts(turns), "answer": ColumnFacts(turns)}).conversational is False


def test_a_column_that_mixes_texts_and_messages_is_one_of_messages(models, tmp_path):
    path = write(tmp_path, models, PROMPT)
    (tmp_path / "data/a.parquet").unlink()
    ask, answer = CHATS[0][:1], CHATS[0][1:]
    rows = [(ask, answer), ("gold?", answer), (json.dumps(ask), answer), ("gold?", "yes"), (ask, "yes")]
    lines = [json.dumps({"ask": one, "answer": other}) for one, other in rows]
    (tmp_path / "data/a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert run(load_recipe(path)).rows_quarantined == 3
    assert pq.read_table(tmp_path / "scores/a.parquet")["row"].to_pylist() == [0, 2]
    reasons = [json.loads(line) for line in (tmp_path / "scores/quarantine/a.jsonl").read_text().splitlines()]
    named = [(entry["row"], entry["reason"].split(";")[0]) for entry in reasons]
    told = "is a text that is no JSON (JSONDecodeError)"
    assert named == [(1, f"ask {told}"), (3, f"ask {told}"), (4, f"answer {told}")]


def test_messages_in_json_are_told_of(models, tmp_path):
    path = write(tmp_path, models, PROMPT)
    rows = [{"ask": json.dumps(chat[:-1]), "answer": json.dumps(chat[-1:])} for chat in CHATS[:2]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/a.parquet")
    assert run(load_recipe(path)).rows_quarantined == 2
    assert "task.conversational: true" in (tmp_path / "scores/quarantine/a.jsonl").read_text()
    assert run(load_recipe(path, ["task.conversational=true", "output=json"])).rows_scored == 2
    run(load_recipe(write(tmp_path, models, TURNS, output="lists")))
    assert pq.read_table(tmp_path / "json/a.parquet").equals(pq.read_table(tmp_path / "lists/a.parquet").slice(0, 2))


def test_tools_of_texts_are_one_line_before_weights_are_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr("assay.engine.workshop.build_models", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(EngineError, match=r"^task\.tools_column: goes with messages, and 'ask' holds texts; leave it"):
        open_workshop(make_plan(load_recipe(write(tmp_path, models, PROMPT | {"tools_column": "chat"}))))
    with pytest.raises(EngineError, match=r"^models\.none: its tokenizer has no chat template"):
        open_workshop(make_plan(load_recipe(write(tmp_path, models, TURNS, names=("none",)))))
    save_model(tmp_path / "unstable", 0, llama_config(vocab_size=24), word_tokenizer(UNSTABLE))
    for more in ({}, {"conversational": True, "loss_on": "assistant"}):
        with pytest.raises(EngineError, match=r"^models\.unstable: its chat template is not prefix-stable"):
            open_workshop(make_plan(load_recipe(write(tmp_path, tmp_path, TURNS | more, names=("unstable",)))))


def test_one_batch_or_many(models, tmp_path):
    path = write(tmp_path, models, CHAT, methods=[{"method": "ensemble", "models": ["plain"]}])
    run(load_recipe(path))
    run(load_recipe(path, ["batch.samples=1", "output=single"]))
    together, single = (pq.read_table(tmp_path / name / "a.parquet") for name in ("scores", "single"))
    for name in together.column_names[2:]:
        assert together[name].to_pylist() == pytest.approx(single[name].to_pylist(), rel=1e-5)


def test_a_base_model_without_a_template_takes_the_chat_models(models, tmp_path):
    path = write(tmp_path, models, CHAT, names=("none", "plain"))
    assert run(load_recipe(path)).rows_scored == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("none",), r"^models\.none: its tokenizer has no chat template"),
        (("plain", "marked"), r"^models\.marked and models\.plain have tokenizers with different chat template; "),
    ],
)
def test_templates_that_do_not_do_are_one_line_before_weights_are_read(models, tmp_path, monkeypatch, names, message):
    monkeypatch.setattr("assay.engine.workshop.build_models", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(EngineError, match=message) as caught:
        open_workshop(make_plan(load_recipe(write(tmp_path, models, CHAT, names=names))))
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_prefix_stable_is_refused_before_weights_are_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr("assay.engine.workshop.build_models", lambda *_: pytest.fail("a model was loaded"))
    save_model(tmp_path / "unstable", 0, llama_config(vocab_size=24), word_tokenizer(UNSTABLE))
    with pytest.raises(EngineError, match=r"^models\.unstable: its chat template is not prefix-stable"):
        open_workshop(make_plan(load_recipe(write(tmp_path, tmp_path, CHAT, names=("unstable",)))))


def test_tokens_that_end_a_text_must_agree(models, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<end>"
    save_model(tmp_path / "other", 0, llama_config(vocab_size=24), tokenizer)
    save_model(tmp_path / "plain", 0, llama_config(vocab_size=24), word_tokenizer())
    with pytest.raises(EngineError, match="different tokens that end a text"):
        open_workshop(make_plan(load_recipe(write(tmp_path, tmp_path, PROMPT, names=("plain", "other")))))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            CHAT | {"text_column": "text"},
            r"task\.messages_column: stands beside text_column; expected one of text_column",
        ),
        (CHAT | PROMPT, r"task\.prompt_column: stands beside messages_column"),
        ({"prompt_column": "ask"}, r"task\.completion_column: is missing; prompt_column goes with it"),
        ({"completion_column": "ask"}, r"task\.prompt_column: is missing; completion_column goes with it"),
        ({"text_column": "text", "completion_column": "ask"}, r"task\.prompt_column: is missing"),
        ({"text_column": "text", "tools_column": "t"}, r"task\.tools_column: goes with messages_column alone"),
        ({"tools_column": "t"}, r"task\.tools_column: goes with messages_column alone"),
        ({"loss_on": "assistant"}, r"task\.loss_on: assistant means nothing for text_column; expected all"),
        (PROMPT | {"loss_on": "assistant"}, r"means nothing for prompt_column; expected completion or all"),
        (CHAT | {"conversational": True}, r"task\.conversational: goes with prompt_column"),
        ({"conversational": False}, r"task\.conversational: goes with prompt_column"),
        (
            PROMPT | {"conversational": False, "tools_column": "t"},
            r"task\.tools_column: goes with messages_column alone",
        ),
        (
            PROMPT | {"conversational": False, "loss_on": "assistant"},
            r"expected completion or all \(assistant, with ",
        ),
        ({"loss_on": "prompt"}, r"task\.loss_on: input should be 'all', 'completion' or 'assistant'"),
        ({"truncate": "middle"}, r"task\.truncate: input should be 'right', 'left' or 'drop'"),
        ({"message_column": "chat"}, r"task\.message_column: unknown key; did you mean 'messages_column'"),
    ],
)
def test_what_makes_no_sense_is_one_line(models, tmp_path, task, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(tmp_path, models, task))
    assert "\n" not in str(caught.value)


def test_some_conversations_have_tools(tmp_path):
    template = "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + PLAIN
    save_model(tmp_path / "m", 0, llama_config(vocab_size=24, bos_token_id=0, eos_token_id=1), word_tokenizer(template))
    task = CHAT | {"tools_column": "tools"}
    recipe = load_recipe(write(tmp_path, tmp_path, task, names=("m",)))
    (tmp_path / "data/a.parquet").unlink()
    tools = [{"name": "dig"}]
    for name, rows in {
        "keys": [{"chat": CHATS[0]}, {"chat": CHATS[0], "tools": tools}, {"tools": tools}],
        "nulls": [{"chat": CHATS[0], "tools": None}, {"chat": CHATS[0], "tools": tools}],
    }.items():
        (tmp_path / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(recipe)
    assert (report.rows_scored, report.rows_quarantined) == (4, 1)
    keys, nulls = (pq.read_table(tmp_path / f"scores/{name}.parquet") for name in ("keys", "nulls"))
    found = keys["ensemble_nll"].to_pylist()
    assert found == pytest.approx(nulls["ensemble_nll"].to_pylist(), rel=1e-6)
    assert abs(found[0] - found[1]) > 1e-4
    assert "line has no key 'chat'" in (tmp_path / "scores/quarantine/keys.jsonl").read_text()


@dataclass(slots=True)
class Slots:
    pad_token_id: int = 3
    image_token_index: int = 4
    vocab_size: int = 24


@pytest.mark.parametrize("config", [Slots(), SimpleNamespace(**asdict(Slots())), asdict(Slots())])
def test_a_config_may_be_anything(config):
    model = torch.nn.Linear(2, 2)
    model.config = config
    assert _special_tokens(model) == {3, 4}


def test_a_resolved_recipe_says_what_was_meant(models, tmp_path):
    for task, column, loss_on in (
        ({}, "text_column", "all"),
        (CHAT, "messages_column", "assistant"),
        (PROMPT, "prompt_column", "completion"),
    ):
        recipe = load_recipe(write(tmp_path, models, task))
        assert recipe.task.loss_on == loss_on
        assert getattr(recipe.task, column)
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_a_changed_template_changes_the_model(models, tmp_path):
    save_model(tmp_path / "m", 0, llama_config(vocab_size=24), word_tokenizer(PLAIN))
    path = write(tmp_path, tmp_path, CHAT, names=("m",))
    before = make_plan(load_recipe(path)).identity.models
    jinja = tmp_path / "m/chat_template.jinja"
    jinja.write_text(jinja.read_text().replace("<end>", "<end><end>"))
    assert make_plan(load_recipe(path)).identity.models != before
    assert (
        json.loads(make_plan(load_recipe(path)).identity.model_dump_json())["recipe"]["task"]["loss_on"] == "assistant"
    )


def test_positions_are_found_whatever_the_configs_class():
    spec = CausalLMSpec(kind="causal_lm", max_length=64)
    model = torch.nn.Linear(2, 2)
    for said in (64, None):
        model.config = {"max_position_embeddings": said}
        spec._check_positions("m", model)
    model.config = {"max_position_embeddings": 63}
    with pytest.raises(EngineError, match=r"task\.max_length is 64, but models\.m has 63 positions"):
        spec._check_positions("m", model)
