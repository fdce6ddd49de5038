"""Readout model switching: how many nats does a sample's label cost, when readouts learn as they go?

*Evaluating Representations with Readout Model Switching*, 2302.09579: a prequential (predict, then learn) code in which
several readouts of the same features take turns, by fixed share (Herbster and Warmuth, 1998).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from assay.retrain import samples
from assay.retrain.out_of_fold import check_batch_size, check_members, predict_member, train_member


class SwitchingCode:
    """Code lengths −log Σ_k π_t(k) p_k(y_t) of labels, row after row, in nats.

    π_1 = 1/K. Behind row t the weights are π′ ∝ π_t p_k(y_t), of which the share α_t = min(1, (switches − 1)/t) is
    dealt out among all readouts alike: the sum of the lengths is that of the mixture of all sequences of readouts in
    which one stays with 1 − α_t + α_t/K and each other takes over with α_t/K. (The form of α_t is second-hand; with 1
    it is the plain Bayesian mixture, in which a readout that was bad early on has all of that to make good.)

    What a row costs follows from the rows before it, not from how they are cut into batches. Not from another order,
    either: whoever shuffles says so.

    Args:
        readouts: K.
        switches: at least 1.

    Attributes:
        seen: rows that have been coded.
        weights: (K,) float64, π of the next row.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, readouts: int, switches: float = 2.0) -> None:
        if readouts < 1:
            raise ValueError(f"readouts: expected at least 1, got {readouts}")
        if not 1 <= switches < math.inf:
            raise ValueError(f"switches: expected a finite number of at least 1, got {switches}")
        self.switches, self.seen = float(switches), 0
        self._logs = np.full(readouts, -math.log(readouts))  # of the weights, which without switches vanish

    @property
    def weights(self) -> NDArray[np.float64]:
        weights: NDArray[np.float64] = np.exp(self._logs)
        return weights

    def code(self, log_probabilities: Tensor) -> Tensor:
        """(T, K) log-probabilities that the readouts gave the next T rows' labels *before* they learned from them ->
        (T,) float64. A row with a NaN costs NaN and teaches nothing.

        Raises:
            ValueError: another shape, a probability above 1, or a row that all readouts call impossible; then none of
                the rows has been coded.
        """
        rows = log_probabilities.detach().cpu().double().numpy()
        if rows.ndim != 2 or rows.shape[1] != len(self._logs):
            raise ValueError(f"log_probabilities: expected shape (T, {len(self._logs)}), got {rows.shape}")
        if (rows > 1e-6).any():
            raise ValueError(f"log_probabilities: expected at most 0, got {float(np.nanmax(rows)):g}")
        lengths = np.full(len(rows), math.nan)
        before = self._logs, self.seen
        for i, row in enumerate(rows):
            if np.isnan(row).any():
                continue
            lengths[i] = self._step(row)
            if lengths[i] == math.inf:
                self._logs, self.seen = before
                raise ValueError(f"log_probabilities: row {i}: every readout gives it probability 0; smooth them")
        return torch.from_numpy(lengths)

    def _step(self, row: NDArray[np.float64]) -> float:
        """What the row costs; infinite of one that is impossible, which is not to be gone on from."""
        joint = self._logs + row
        whole = float(np.logaddexp.reduce(joint))
        self.seen += 1
        if whole == -math.inf:
            return math.inf
        share = min(1.0, (self.switches - 1) / self.seen)
        kept = joint - whole
        self._logs = np.log((1 - share) * np.exp(kept) + share / len(row)) if share > 0 else kept
        return -whole

    def state(self) -> dict[str, Any]:
        """What another one goes on from, as plain JSON; a weight of 0 has no logarithm and is null."""
        logs = [None if log == -math.inf else log for log in self._logs.tolist()]
        return {"switches": self.switches, "seen": self.seen, "log_weights": logs}

    @classmethod
    def resume(cls, state: Mapping[str, Any]) -> SwitchingCode:
        """The one whose ``state`` it was: the same bits from here on."""
        logs = [-math.inf if log is None else log for log in state["log_weights"]]
        made = cls(len(logs), state["switches"])
        made.seen, made._logs = int(state["seen"]), np.array(logs, np.float64)
        return made


@dataclass(frozen=True)
class CodeLengths:
    """What labels cost, in nats, over some orders of the rows.

    Attributes:
        lengths: (N,) float64, each sample's mean over the orders: high is unexpected.
        totals: (orders,) float64, of the whole data set in each order.
        readouts: (orders, K) float64, what it costs with each readout alone.
        weights: (orders, K) float64, the readouts' weights behind the last row.
    """

    lengths: Tensor
    totals: Tensor
    readouts: Tensor
    weights: Tensor


def readout_switching(
    members: Sequence[Any],
    x: Any,
    y: ArrayLike,
    *,
    first: int = 32,
    growth: float = 1.5,
    switches: float = 2.0,
    orders: int = 4,
    seed: int = 0,
    batch_size: int = 1024,
) -> CodeLengths:
    """Train readouts on ever longer beginnings of the data, and code what comes next by what they say.

    The first ``first`` rows cost log C each. Whenever the rows seen have grown by ``growth``, every readout is trained
    afresh on all of them, and what it gives the next block is p′ = (n p + 1)/(n + C), n the rows it was trained on, so
    that no label is impossible. An early row costs more than a late one, which knows more of the data: hence the mean
    over random ``orders``.

    Args:
        members: K readouts, as ``out_of_fold`` takes them, but for trained ones.
        x: features of N samples, of a frozen model for instance, in the forms that ``out_of_fold`` takes.
        y: (N,) labels.
        first, growth: where the blocks end: first, first · growth, first · growth², …
        switches: as in ``SwitchingCode``.
        orders: random orders of the rows, of ``seed``.
        batch_size: rows per prediction of a callable.

    Raises:
        TypeError, ValueError: an argument, named, that is none of these, or fewer than two classes.
    """
    x = samples.inputs(x)
    labels, classes = samples.class_numbers(y)
    _check(members, x, labels, first, growth, orders)
    check_batch_size(batch_size)
    lengths, totals, alone, weights = torch.zeros(len(labels), dtype=torch.float64), [], [], []
    for order in _orders(len(labels), orders, seed):
        code = SwitchingCode(len(members), switches)
        costs = torch.zeros(len(members), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for seen, rows in _blocks(order, first, growth):
            logs = _predicted(members, x, labels, classes, seen, rows, batch_size)
            own = code.code(logs)
            lengths[torch.from_numpy(rows)] += own / orders
            total, costs = total + own.sum(), costs - logs.sum(0)
        totals.append(total)
        alone.append(costs)
        weights.append(torch.from_numpy(code.weights))
    return CodeLengths(lengths, torch.stack(totals), torch.stack(alone), torch.stack(weights))


def _check(members: Any, x: Any, labels: NDArray[np.int64], first: int, growth: float, orders: int) -> None:
    check_members(members, trained=False)
    if samples.count(x) != len(labels):
        raise ValueError(f"y: expected one label per sample, shape ({samples.count(x)},), got {labels.shape}")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"y: expected at least two classes, got {len(np.unique(labels))}")
    if not all(isinstance(count, int | np.integer) and count > 0 for count in (first, orders)):
        raise ValueError(f"expected first and orders of at least 1, got {first} and {orders}")
    if not 1 < growth < math.inf:
        raise ValueError(f"growth: expected a finite number above 1, got {growth}")


def _orders(count: int, orders: int, seed: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    for _ in range(orders):
        yield generator.permutation(count)


def _blocks(
    order: NDArray[np.int64], first: int, growth: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The rows before each block, and its own."""
    start, end = 0, first
    while start < len(order):
        yield order[:start], order[start:end]
        start, end = end, max(end + 1, math.ceil(min(end * growth, len(order))))


def _predicted(
    members: Sequence[Any],
    x: Any,
    labels: NDArray[np.int64],
    classes: NDArray[Any],
    seen: NDArray[np.int64],
    rows: NDArray[np.int64],
    batch_size: int,
) -> Tensor:
    """(rows, K) float64 smoothed log-probabilities of the rows' own labels by readouts trained on those seen."""
    found = torch.full((len(rows), len(members)), -math.log(len(classes)), dtype=torch.float64)
    if len(np.unique(labels[seen])) < 2:
        return found
    own, n = torch.from_numpy(labels[rows])[:, None], len(seen)
    for k, member in enumerate(members):
        where = f"members[{k}], after {n} rows"
        model = train_member(member, samples.take(x, seen), labels[seen], where)
        logits = predict_member(model, x, rows, classes, batch_size, where).double()
        p = logits.softmax(1).gather(1, own)[:, 0]
        found[:, k] = ((n * p + 1) / (n + len(classes))).log()
    return found
