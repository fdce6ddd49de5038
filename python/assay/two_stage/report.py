"""What a two-stage experiment has found, as a table, as JSON and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from assay.two_stage.training import Evaluation, Training

SELECTION, RANDOM, EVERYTHING = "selection", "random", "everything"


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        data: what on: the selection, as many random rows, or everything.
        rows: how many samples that is.
        evaluations: in the order of steps, the last at the end.
    """

    data: str
    seed: int
    rows: int
    evaluations: Sequence[Evaluation]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
        by, top: the selection's score and amount.
        rule: the selection in words.
        model: the name of the model that was trained.
        untrained: that model on the held-out samples, before any training.
        held_out: how many those are.
    """

    by: str
    top: int | float
    rule: str
    model: str
    training: Training
    untrained: Evaluation
    held_out: int
    trials: Sequence[Trial]

    def of(self, data: str) -> list[Trial]:
        """By seed."""
        return sorted((trial for trial in self.trials if trial.data == data), key=lambda trial: trial.seed)

    @property
    def gains(self) -> list[float]:
        """By seed, how far the held-out loss lies below that after random rows."""
        return [theirs.loss - ours.loss for ours, theirs in self._pairs()]

    @property
    def accuracy_gains(self) -> list[float]:
        """By seed, how far the accuracy lies above that after random rows; empty where there is none."""
        pairs = [(ours.accuracy, theirs.accuracy) for ours, theirs in self._pairs()]
        return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]

    def _pairs(self) -> list[tuple[Evaluation, Evaluation]]:
        """By seed, the end after the selection and that after random rows."""
        pairs = zip(self.of(SELECTION), self.of(RANDOM), strict=True)
        return [(ours.last, theirs.last) for ours, theirs in pairs]

    def verdict(self) -> str:
        """One sentence, which claims no more than the seeds show."""
        told = [_told("the held-out loss", [-gain for gain in self.gains], "lower")]
        if self.accuracy_gains:
            told.append(_told("the accuracy", self.accuracy_gains, "higher"))
        return f"beside random rows, after the selection {', and '.join(told)}"

    def rows(self) -> list[list[str]]:
        """The table: what trained on, samples, held-out loss, accuracy; means over seeds, ± standard deviation."""
        table = [["no training", "0", f"{self.untrained.loss:.4f}", _accuracy([self.untrained])]]
        for data in (SELECTION, RANDOM, EVERYTHING):
            last = [trial.last for trial in self.of(data)]
            table.append([data, f"{self.of(data)[0].rows:,}", _mean([e.loss for e in last]), _accuracy(last)])
        return table

    def markdown(self) -> str:
        """For ``report.md``."""
        lines = [
            f"# Two stages: {self.model} on {self.by}'s best",
            "",
            f"{self.rule}. {self.training.steps} steps of {self.training.batch_size} samples each, "
            f"{self.training.seeds} seeds; {self.held_out:,} held-out samples.",
            "",
            "| trained on | samples | held-out loss | accuracy |",
            "|---|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in self.rows()),
            "",
            f"In short: {self.verdict()}.",
            "",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"gains_over_random": self.gains, "accuracy_gains_over_random": self.accuracy_gains}


def _told(what: str, changes: Sequence[float], better: str) -> str:
    """A mean change, and with how many seeds it is for the better."""
    mean, sign = float(np.mean(changes)), 1 if better == "higher" else -1
    wins = sum(sign * change > 0 for change in changes)
    direction = "higher" if mean > 0 else "lower"
    return (
        f"{what} is {abs(mean):.4f}{_spread(changes, '.4f')} {direction} ({better} with {wins} of {len(changes)} seeds)"
    )


def _mean(values: Sequence[float], form: str = ".4f") -> str:
    return f"{np.mean(values):{form}}{_spread(values, form)}"


def _spread(values: Sequence[float], form: str) -> str:
    return f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""


def _accuracy(evaluations: Sequence[Evaluation]) -> str:
    known = [e.accuracy for e in evaluations if e.accuracy is not None]
    return _mean(known, ".3f") if known else "–"
