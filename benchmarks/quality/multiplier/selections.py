"""What each selection prefers: a score for every piece of the pool, higher is better.

Nothing here sees the test set. Hyper-parameters are the papers' or the library's defaults; the one exception, the
number of steps by which the reference is fine-tuned, is chosen on the validation set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import vstack
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

import assay
from assay.methods import LESS, DsDm, Ensemble, GradMimic
from assay.methods.base import Method
from assay.methods.influence import Influence, Kernel
from assay.ops import Kronecker
from assay.tasks import CausalLM
from benchmarks.quality.multiplier import model
from benchmarks.quality.multiplier.corpus import Corpus
from benchmarks.quality.multiplier.reselection import Reselection

Scores = NDArray[np.float64]
BATCH = 64
SAMPLES_PER_NUMBER = 8  # for the second moment: pieces of the pool for each number of a feature


@dataclass(frozen=True)
class Proxy:
    """The warmed-up model that the methods read, and the reference fine-tuned from it on the target set."""

    checkpoints: list[model.Checkpoint]
    reference: torch.nn.Module
    seconds: float

    @property
    def last(self) -> model.Checkpoint:
        return self.checkpoints[-1]


@dataclass(frozen=True)
class Scored:
    scores: Scores  # (pool,)
    seconds: float


def warm_up(shape: model.Shape, data: Corpus, steps: int, count: int, seed: int) -> Proxy:
    """Train the proxy on a random tenth of the pool, keeping ``count`` checkpoints of the warm-up's second half."""
    start = time.perf_counter()
    rows = np.random.default_rng(seed).choice(len(data.pool), len(data.pool) // 10, replace=False)
    proxy = model.language_model(shape, seed + 1000)
    every = max(1, steps // (2 * count))
    kept = model.checkpoints(proxy, data.pool[rows], model.Schedule(steps), seed, data.validation, every)[-count:]
    # The fine-tuning's own length is the point where the validation set's loss is least.
    few = max(10, 5 * len(data.target) // 16)
    tuned = model.checkpoints(
        kept[-1].model, data.target, model.Schedule(few, learning_rate=5e-4), seed, data.validation, max(1, few // 10)
    )
    best = min(tuned, key=lambda c: c.loss)
    return Proxy(kept, best.model, time.perf_counter() - start)


def score(data: Corpus, proxy: Proxy, seed: int, names: Sequence[str]) -> dict[str, Scored]:
    """The named selections' preferences; whichever they are, what one draws is the same."""
    found = {}
    for name in names:
        start = time.perf_counter()
        scores = MAKERS[name](data, proxy, np.random.default_rng([seed + 2000, NAMES.index(name)]))
        found[name] = Scored(scores, time.perf_counter() - start)
    return found


def _rho(data: Corpus, proxy: Proxy) -> Scores:
    """loss − reference loss: two forward passes."""
    task = CausalLM()
    before, after = (_run(Ensemble([m], task), data, "ensemble_nll") for m in (proxy.last.model, proxy.reference))
    return before - after


def _cosine(data: Corpus, proxy: Proxy) -> Influence:
    """Of plain gradients at the warm-up's end."""
    kernel = Kernel(normalize=True)
    models, sketch = [proxy.last.model], Kronecker(64, 64)
    return Influence(models, CausalLM(), _target(data), kernel=kernel, sketch=sketch, together=True, name="cosine")


def _less(data: Corpus, proxy: Proxy) -> Influence:
    models, states = [c.model for c in proxy.checkpoints], [c.adam for c in proxy.checkpoints]
    return LESS(models, CausalLM(), _target(data), optimizers=states)


def _dsdm(data: Corpus, proxy: Proxy) -> Influence:
    return DsDm([c.model for c in proxy.checkpoints], CausalLM(), _target(data), name="dsdm")


def _reselection(data: Corpus, proxy: Proxy) -> Reselection:
    return Reselection(proxy.last.model, data.pool, data.target)


def _target(data: Corpus) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {data.domain: [{"input_ids": x} for x in data.target.split(BATCH)]}


def dsir(data: Corpus, rng: np.random.Generator) -> Scores:
    """log p_target − log p_pool under bags of hashed 1-2-grams, 10,000 bins, plus Gumbel noise (2302.03169).

    The raw models are normalised over the bins with one added to each count.
    """
    counter = HashingVectorizer(n_features=10_000, ngram_range=(1, 2), norm=None, alternate_sign=False, **_WORDS)
    pool, target = counter.transform(_texts(data.pool)), counter.transform(_texts(data.target))
    logs = [np.log((np.asarray(m.sum(0)).ravel() + 1) / (m.sum() + m.shape[1])) for m in (target, pool)]
    return np.asarray(pool @ (logs[0] - logs[1])).ravel() + rng.gumbel(size=pool.shape[0])


def classifier(data: Corpus, rng: np.random.Generator) -> Scores:
    """Logistic regression on hashed 1-2-grams: the target set against as many random pieces of the pool, five times."""
    vectorizer = HashingVectorizer(n_features=2**18, ngram_range=(1, 2), alternate_sign=False, **_WORDS)
    pool, target = vectorizer.transform(_texts(data.pool)), vectorizer.transform(_texts(data.target))
    negatives = pool[rng.choice(pool.shape[0], min(5 * target.shape[0], pool.shape[0]), replace=False)]
    labels = np.repeat([1, 0], [target.shape[0], negatives.shape[0]])
    fitted = LogisticRegression(max_iter=1000, class_weight="balanced").fit(vstack([target, negatives]), labels)
    return np.asarray(fitted.decision_function(pool))


# Words and punctuation marks, as DSIR counts them.
_WORDS = {"token_pattern": r"\w+|[^\w\s]", "lowercase": True}


def _texts(pieces: torch.Tensor) -> list[str]:
    return [bytes(row).decode("utf-8", errors="replace") for row in pieces.to(torch.uint8).numpy()]


def _run(method: Method, data: Corpus, column: str) -> Scores:
    stream = [{"input_ids": x} for x in data.pool.split(BATCH)]
    if isinstance(method, Influence):
        # The pool is in random order. Fewer samples would overfit the second moment.
        method.fit(stream[: -(-SAMPLES_PER_NUMBER * method.sketch.dim // BATCH)])
    return assay.score(stream, [method])[column].to_numpy().astype(np.float64)


Maker = Callable[[Corpus, Proxy, np.random.Generator], Scores]
MAKERS: dict[str, Maker] = {
    "random": lambda data, proxy, rng: rng.random(len(data.pool)),
    "domain labels (oracle)": lambda data, proxy, rng: data.of_domain + rng.random(len(data.pool)) / 2,
    "n-grams (DSIR)": lambda data, proxy, rng: dsir(data, rng),
    "classifier": lambda data, proxy, rng: classifier(data, rng),
    "reference loss": lambda data, proxy, rng: -_run(Ensemble([proxy.reference], CausalLM()), data, "ensemble_nll"),
    "RHO": lambda data, proxy, rng: _rho(data, proxy),
    "mimic": lambda data, proxy, rng: _run(GradMimic(proxy.last.model, proxy.reference, CausalLM()), data, "mimic"),
    "gradient cosine": lambda data, proxy, rng: _run(_cosine(data, proxy), data, "cosine"),
    "LESS": lambda data, proxy, rng: _run(_less(data, proxy), data, "less"),
    "DsDm": lambda data, proxy, rng: _run(_dsdm(data, proxy), data, "dsdm"),
    "MAGIC": lambda data, proxy, rng: _reselection(data, proxy).gradient(np.ones(len(data.pool))),
    "MGD": lambda data, proxy, rng: _reselection(data, proxy).descended(rng),
}
NAMES = list(MAKERS)
