"""Recipes that ask judges, and the IFD of recipes with prompts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import processors
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import assay
from assay.corpus.storage import Store
from assay.engine import make_plan, open_workshop, run
from assay.engine.workshop import open_encoder
from assay.methods import IFD, AskLLM
from assay.recipe.errors import EngineError, RecipeError
from assay.recipe.recipe import load_recipe
from assay.tasks import CausalLM, Judge, Prompt
from assay.tasks.prompt import ASK_LLM, CUE
from assay.two_stage.laboratory import Trainee, laboratory
from assay.two_stage.training import Training
from tests.recipe.tasks.chat_tokenizers import PLAIN, word_tokenizer
from tests.small_models import byte_tokenizer, llama_config, save_model

TEXTS = ["gold", "ore is gold. " * 30, "dig here", "gold</s>yes", "", "It is it?"]
QUESTION = "Is {document} gold?\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    config = llama_config(vocab_size=24, bos_token_id=0, eos_token_id=1)
    save_model(folder / "decoder", 0, config, word_tokenizer(PLAIN))
    save_model(folder / "bytes")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 24}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=3, pad_token_id=1, eos_token_id=1))
    with torch.no_grad():
        for parameter in t5.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    t5.save_pretrained(folder / "encoder_decoder")
    word_tokenizer(PLAIN).save_pretrained(folder / "encoder_decoder")
    return folder


def write(root: Path, model: Path, **task: Any) -> str:
    (root / "data").mkdir(exist_ok=True)
    (root / "data/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "judge", "question": QUESTION, "max_length": 48, **task},
        "models": {"judge": {"kind": "transformers", "path": str(model)}},
        "methods": [{"method": "ask_llm", "model": "judge"}],
        "output": "scores",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(root / "recipe.yaml")


@pytest.mark.parametrize(("kind", "chat"), [("decoder", False), ("decoder", True), ("encoder_decoder", False)])
def test_a_recipe_asks_as_python_does(tmp_path, models, kind, chat) -> None:
    summary = run(load_recipe(write(tmp_path, models / kind, judge=kind, chat=chat)))
    assert (summary.rows_scored, summary.rows_quarantined) == (4, 2)
    table = pq.read_table(tmp_path / "scores/a.parquet")
    prompt = Prompt(word_tokenizer(PLAIN), QUESTION, chat=chat, max_length=48)
    load = AutoModelForCausalLM if kind == "decoder" else T5ForConditionalGeneration
    model = load.from_pretrained(models / kind, dtype=torch.float32).eval()
    expected = assay.score([prompt([TEXTS[i]]) for i in (0, 1, 2, 5)], [AskLLM(model, Judge())])
    for name in expected.column_names[2:]:
        assert table[name].to_pylist() == pytest.approx(expected[name].to_pylist(), rel=1e-4)
    assert len(set(table["ask_llm"].to_pylist())) == 4


def test_a_tokenizer_that_ends_texts_does_not_end_a_decoders_question(tmp_path, models) -> None:
    ending = word_tokenizer(PLAIN)
    ends = [("<s>", 0), ("</s>", 1)]
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    shutil.copytree(models / "decoder", tmp_path / "model")
    ending.save_pretrained(tmp_path / "model")
    (asked,) = open_encoder(load_recipe(write(tmp_path, tmp_path / "model"))).encode([("gold",)])
    assert asked.data.tolist() == word_tokenizer(PLAIN)("Is gold gold?\n")["input_ids"]


def test_what_is_no_sample_says_why(tmp_path, models) -> None:
    run(load_recipe(write(tmp_path, models / "decoder", truncate="drop")))
    (path,) = (tmp_path / "scores/quarantine").rglob("*.jsonl")
    reasons = {row["row"]: row["reason"] for row in map(json.loads, path.read_text().splitlines())}
    assert reasons[1] == "text is longer than task.max_length, 48 tokens with the question"
    assert reasons[3] == "text has tokens of its own that are special to the judge ('</s>')"
    assert sorted(reasons) == [1, 3, 4]


def test_the_papers_question_is_the_default(tmp_path, models) -> None:
    for changes, cue in (({}, CUE), ({"chat": True}, ""), ({"judge": "encoder_decoder"}, "")):
        recipe = load_recipe(write(tmp_path, models / "decoder", question=None, **changes))
        assert recipe.task.question == ASK_LLM + cue
        assert recipe.identity()["task"]["question"] == ASK_LLM + cue


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("decoder", {"max_length": 16}, r"task\.question: cannot be put to models\.judge \(.*max_length is 16, and"),
        ("decoder", {"yes": "sure"}, "no token that is 'sure'; expected an answer that is one token"),
        ("bytes", {}, "no token that is 'yes'"),
        ("decoder", {"max_length": 256}, r"task\.max_length is 256, but models\.judge has 128 positions"),
        ("encoder_decoder", {}, r"architecture t5 for this task .*judge \(task\.kind: judge, judge: encoder_decoder\)"),
        ("bytes", {"chat": True}, r"task\.chat: the tokenizer of models\.judge has no chat template; leave"),
    ],
)
def test_judges_that_cannot_be_asked(tmp_path, models, model, task, message) -> None:
    with pytest.raises(EngineError, match=message):
        open_workshop(make_plan(load_recipe(write(tmp_path, models / model, **task))))


def test_recipes_that_ask_nothing(tmp_path, models) -> None:
    with pytest.raises(RecipeError, match=r"task\.question: has \{document\} 0 times"):
        load_recipe(write(tmp_path, models / "decoder", question="Is it gold?"))
    path = write(tmp_path, models / "decoder")
    with pytest.raises(EngineError, match=r"methods\.0 \(ask_llm\): AskLLM: asks a judge, and the task is CausalLM"):
        open_workshop(make_plan(load_recipe(path, ["task={kind: causal_lm, max_length: 48}"])))


def test_nobody_is_trained_to_say_yes(tmp_path, models) -> None:
    path = write(tmp_path, models / "decoder")
    (tmp_path / "held.jsonl").write_text('{"text": "gold"}\n')
    output, trainee = Store.at(str(tmp_path / "out")), Trainee("judge", str(tmp_path / "held.jsonl"))
    with (
        pytest.raises(EngineError, match="train: nobody is trained on a task of kind judge; select by its scores"),
        laboratory(load_recipe(path), trainee, output, Training(steps=1)),
    ):
        pass


@pytest.mark.parametrize(
    "task",
    [
        {"text_column": "text"},
        {"messages_column": "talk", "loss_on": "all"},
        {"prompt_column": "ask", "completion_column": "answer", "loss_on": "all"},
    ],
    ids=lambda task: next(iter(task)),
)
def test_ifd_needs_prompts(tmp_path, models, task) -> None:
    path, change = write(tmp_path, models / "decoder"), {"kind": "causal_lm", **task}
    with pytest.raises(RecipeError, match=r"methods\.0\.method: is about responses behind prompts, and every token"):
        load_recipe(path, [f"task={change}", "methods=[{method: ifd, model: judge}]"])


PAIRS = [("gold? ", "yes."), ("is it ore here?", "no"), ("dig", " here. dig here. It is gold"), ("", "yes.")]


@pytest.mark.parametrize("bos", [False, True])
def test_ifd_of_a_recipe_is_that_of_its_tokens(tmp_path, bos) -> None:
    save_model(tmp_path / "model", tokenizer=byte_tokenizer(bos=bos))
    (tmp_path / "data").mkdir()
    rows = [{"ask": ask, "answer": answer} for ask, answer in PAIRS]
    (tmp_path / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "causal_lm", "prompt_column": "ask", "completion_column": "answer", "max_length": 64},
        "models": {"small": {"kind": "transformers", "path": str(tmp_path / "model")}},
        "methods": [{"method": "ifd", "model": "small"}],
        "output": "scores",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(load_recipe(str(tmp_path / "recipe.yaml")))
    table = pq.read_table(tmp_path / "scores/a.parquet")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens, begin = byte_tokenizer(), [256] if bos else []
    # Without a prompt the ratio is 1, or there is none.
    assert table["ifd"].to_pylist()[3] == pytest.approx(1 if bos else math.nan, abs=1e-6, nan_ok=True)
    for i, (ask, answer) in enumerate(PAIRS[:3]):
        prompt, response = [*begin, *tokens(ask)["input_ids"]], [*tokens(answer)["input_ids"], 256]
        ids = torch.tensor([[*prompt, *response]])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        own = assay.score([{"input_ids": ids, "labels": labels}], [IFD(model, CausalLM())])
        assert table["ifd"].to_pylist()[i] == pytest.approx(own["ifd"].to_pylist()[0], rel=1e-4)
        counted = slice(len(prompt) + (not bos), None)
        with torch.no_grad():
            given = model(ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
        assert table["ifd_given"].to_pylist()[i] == pytest.approx(-float(given[counted.start - 1 :].mean()), rel=1e-4)
