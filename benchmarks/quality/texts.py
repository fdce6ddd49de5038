"""Do scores that read nothing but the text find a kind of text? ``python -m benchmarks.quality.texts [--quick]``.

The target is docstrings of Python's standard library, the pool what else a Python installation has of text, docstrings
of other modules among it. *Pieces* are the multiplier's mixture: 128 bytes each, all of one length. *Documents* are
whole files (of a module all docstrings), at most 16 KB, in which length tells kinds apart and is the control to beat.
AUROC of the pool's docstrings against everything else, and their share of the best fifth, beside a random order, the
text's length and scikit-learn's classifier of hashed n-grams on its own features. Seeds draw split and mixture anew.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.sparse import vstack
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import assay
from assay._json import dumps
from assay.methods import BM25, DSIR, NGramClassifier, Views
from assay.ops import ngram_counts
from benchmarks import options
from benchmarks.quality.multiplier import corpus
from benchmarks.timing import RESULTS, machine

Scores = NDArray[np.float64]
BATCH = 256
BEST = 0.2
LONGEST = 16_384  # bytes of a document


def pieces(seed: int, size: int) -> tuple[list[str], NDArray[np.bool_], list[str]]:
    """The pool, which of it are docstrings, and the target."""
    data = corpus.build(size, size // 16, 16, 16, seed)
    texts = [[bytes(row).decode(errors="replace") for row in part.to(torch.uint8).numpy()] for part in _both(data)]
    return texts[0], data.of_domain, texts[1]


def _both(data: corpus.Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    return data.pool, data.target


def documents(seed: int, size: int) -> tuple[list[str], NDArray[np.bool_], list[str]]:
    """The same of whole files, as many of each kind as there are, at most a sixth of ``size``."""
    rng = np.random.default_rng(seed)
    pool: list[str] = []
    own: list[bool] = []
    target: list[str] = []
    for kind, files in corpus.files(corpus.LIBRARY).items():
        drawn = [files[i][:LONGEST].decode(errors="replace") for i in rng.permutation(len(files))[: size // 6]]
        if kind == corpus.TARGET:
            target, drawn = drawn[: len(drawn) // 3], drawn[len(drawn) // 3 :]
        pool += drawn
        own += [kind == corpus.TARGET] * len(drawn)
    return pool, np.array(own), target


def scores_of(pool: list[str], target: list[str], seed: int) -> Iterator[tuple[str, Scores, float]]:
    """Name, a number per text, high where it is like the target, and the seconds that it took."""
    targets = {"docstrings": _views(target)}
    rng = np.random.default_rng(seed + 100)
    makers: dict[str, Callable[[], Scores]] = {
        "BM25": lambda: _run(BM25(targets), pool),
        "BM25, contrast": lambda: _run(BM25(targets, contrast=True), pool),
        "DSIR": lambda: _run(DSIR(targets), pool),
        "DSIR, smoothing 1e-4": lambda: _run(DSIR(targets, smoothing=1e-4), pool),
        "DSIR per n-gram": lambda: _run(DSIR(targets), pool) / _lengths(pool),
        "n-gram classifier": lambda: _run(NGramClassifier(targets), pool),
        "scikit-learn's classifier": lambda: classifier(pool, target, rng),
        "length, short first": lambda: -_lengths(pool),
        "random": lambda: rng.random(len(pool)),
    }
    for name, make in makers.items():
        began = time.perf_counter()
        yield name, make(), time.perf_counter() - began


def _views(texts: Sequence[str]) -> list[Views]:
    return [Views(None, raw={"text": list(texts[i : i + BATCH])}) for i in range(0, len(texts), BATCH)]


def _run(method: Any, pool: list[str]) -> Scores:
    """The whole pool is fitted to: rows without a score come last."""
    table = assay.score(_views(pool), [method.fit(_views(pool))])
    found = table[method.name].to_numpy().astype(np.float64)
    return np.nan_to_num(found, nan=-np.inf)


def _lengths(pool: list[str]) -> Scores:
    return np.maximum(ngram_counts(pool, 1, 2, punctuation=True).lengths, 1).astype(np.float64)


def classifier(pool: list[str], target: list[str], rng: np.random.Generator) -> Scores:
    """As the multiplier has it: scikit-learn's hashes, five random texts of the pool for each of the target."""
    vectorizer = HashingVectorizer(
        n_features=2**18, ngram_range=(1, 2), alternate_sign=False, token_pattern=r"\w+|[^\w\s]"
    )
    features, positives = vectorizer.transform(pool), vectorizer.transform(target)
    negatives = features[rng.choice(len(pool), min(5 * len(target), len(pool)), replace=False)]
    labels = np.repeat([1, 0], [len(target), negatives.shape[0]])
    solver = LogisticRegression(max_iter=1000, class_weight="balanced").fit(vstack([positives, negatives]), labels)
    return np.asarray(solver.decision_function(features))


def judged(scores: Scores, own: NDArray[np.bool_]) -> dict[str, float]:
    best = np.argsort(-scores, kind="stable")[: round(BEST * len(scores))]
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable")  # infinite ones too
    return {"AUROC": float(roc_auc_score(own, ranks)), "share of the best fifth": float(own[best].mean())}


def one_seed(setting: str, seed: int, size: int) -> dict[str, dict[str, float]]:
    """By score: AUROC, share of the best fifth, seconds; and the share that chance gives."""
    pool, own, target = {"pieces": pieces, "documents": documents}[setting](seed, size)
    found = {name: judged(values, own) | {"seconds": took} for name, values, took in scores_of(pool, target, seed)}
    return found | {"chance": {"share of the best fifth": float(own.mean())}}


def summary(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over the seeds."""
    return {name: {key: statistics.mean(run[name][key] for run in runs) for key in runs[0][name]} for name in runs[0]}


def show(console: Console, setting: str, found: Mapping[str, Mapping[str, float]]) -> None:
    table = Table("score", "AUROC", "share of the best fifth", "seconds", title=setting)
    for name, row in found.items():
        cells = [f"{row[key]:.3f}" if key in row else "" for key in ("AUROC", "share of the best fifth", "seconds")]
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    quick = options.quick(__doc__)
    torch.set_num_threads(1)
    console, result = Console(), dict[str, Any]()
    for setting, size in (("pieces", 8000), ("documents", 3000)):
        seeds = range(1 if quick else 3)
        runs = [one_seed(setting, seed, size // 8 if quick else size) for seed in seeds]
        result[setting] = {"seeds": runs, "mean": summary(runs)}
        show(console, setting, result[setting]["mean"])
    if not quick:
        (RESULTS / "quality-texts.json").write_text(dumps(machine() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
