"""A selection rule from plain options, as a command line or a form has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import pyarrow as pa

from assay import select
from assay.corpus.errors import CorpusError
from assay.curate.auditing import Audit, Labels, Rule
from assay.curate.mixes import Mix
from assay.select import Selection
from assay.select.rules import amount_rows

_KINDS = ("top", "threshold", "quantile", "gmm", "kmeans", "sample", "random", "mix", "audit", "ccs")
_WITHIN_GROUPS = ("top", "quantile", "sample", "random", "mix", "audit")


@dataclass(frozen=True)
class RuleOptions:
    """Exactly one of the first seven, ``mix``, ``audit`` or ``ccs``, says which rule. Amounts are texts: 1 and 1.0
    differ."""

    top: str | None = None
    threshold: float | None = None
    quantile: float | None = None
    gmm: bool = False
    kmeans: bool = False
    sample: str | None = None
    random: str | None = None
    by: str | None = None
    keep: str | None = None
    seed: int = 0
    temperature: float | None = None
    weigh: bool = False
    """Whether kept rows are to have weights: the rule's own, or softmax(worth / temperature)."""
    where: str | None = None
    """A condition; it needs no rule, and one that is given chooses among the rows that pass."""
    mix: Mix | None = None
    group: str | None = None
    """Choose within groups; the rule's table has them in a column `group_column`."""
    audit: Labels | None = None
    beta: float | None = None
    ccs: str | None = None
    hard: str | None = None
    drop: float | None = None

    @property
    def judges(self) -> bool:
        """Whether the score decides anything; it does not with ``random``, nor with ``where`` alone."""
        return self.weigh or any(kind != "random" for kind in self._given)

    @property
    def both_ends(self) -> str | None:
        """The rule, if it is one that takes rows of both ends of the score."""
        return next((kind for kind in self._given if kind in ("mix", "ccs")), None)

    @property
    def _given(self) -> list[str]:
        # By identity: a threshold of 0.0 is a threshold.
        return [kind for kind in _KINDS if getattr(self, kind) is not None and getattr(self, kind) is not False]

    def rule(self) -> Rule | Audit:
        """The rule that was asked for. CorpusError unless it is one, and complete."""
        given = self._given
        if self.seed < 0:
            raise CorpusError(f"--seed {self.seed}: expected 0 or more")
        if self.where is not None and not given:
            self._check_owners("where")
            self._check_group("where")
            return self._all_that_pass()
        if len(given) != 1:
            got = ", ".join(f"--{kind}" for kind in given) or "none"
            raise CorpusError(
                f"expected exactly one of {', '.join(f'--{kind}' for kind in _KINDS)}, or --where; got {got}"
            )
        self._check_group(given[0])
        keep = parse_end(self.keep)
        if self.by is None and given != ["random"]:
            raise CorpusError(f"--by is missing: --{given[0]} needs a score to judge by")
        if self.temperature is not None and given != ["sample"] and not self.weigh:
            raise CorpusError(
                f"--temperature {self.temperature}: has no effect with --{given[0]}; expected with --sample, or "
                "--format weights"
            )
        self._check_owners(given[0])
        if self.audit is not None:
            return self._audit(self.audit, keep)
        rule = self._rule(self.by or "", keep)
        return self._weighed(rule, given[0], keep) if self.weigh else rule

    def _check_owners(self, kind: str) -> None:
        """CorpusError for an option of another rule."""
        for option, owner in (("beta", "audit"), ("hard", "ccs"), ("drop", "ccs")):
            value = getattr(self, option)
            if value is not None and kind != owner:
                alone = " alone" if kind == "where" else ""
                raise CorpusError(f"--{option} {value}: has no effect with --{kind}{alone}; expected with --{owner}")

    def _check_group(self, kind: str) -> None:
        by_group = self.mix is not None and isinstance(self.mix.rates, Mapping)
        if self.group is not None and kind not in _WITHIN_GROUPS:
            alone = " alone" if kind == "where" else ""
            expected = ", ".join(f"--{kind}" for kind in _WITHIN_GROUPS)
            raise CorpusError(
                f"--group {self.group}: has no effect with --{kind}{alone}; expected with one of {expected}"
            )
        if kind == "mix" and by_group is not (self.group is not None):
            raise CorpusError(
                "--mix: its rates are by group; add --group"
                if by_group
                else f"--group {self.group}: --mix has the same rates for all; expected them by {self.group}"
            )

    def _audit(self, labels: Labels, keep: Literal["high", "low"] | None) -> Audit:
        by, group = self.by or "", None if self.group is None else group_column(self.group, self.by or "")
        audit = Audit(labels, by, 1.0 if self.beta is None else self.beta, self.seed, keep, group=group)
        if not self.weigh:
            return audit
        self._weighed(_everything, "audit", keep)  # whether it can be
        return replace(audit, weighed=lambda rule: self._weighed(rule, "audit", keep))

    def _all_that_pass(self) -> Rule:
        if self.keep is not None and not self.weigh:
            raise CorpusError(f"--keep {self.keep}: has no effect with --where alone; leave it out, or add a rule")
        if self.temperature is not None and not self.weigh:
            raise CorpusError(f"--temperature {self.temperature}: has no effect with --where alone; leave it out")
        return self._weighed(_everything, "where", parse_end(self.keep)) if self.weigh else _everything

    def _weighed(self, rule: Rule, kind: str, keep: Literal["high", "low"] | None) -> Rule:
        by, temperature = self.by, self.temperature
        if kind == "mix":
            if temperature is not None:
                raise CorpusError(f"--temperature {temperature}: --mix weighs rows by their copies; leave it out")
            return lambda table: _weighed_by_copies(rule(table))
        if kind == "sample":
            raise CorpusError("--format weights: --sample draws by the score already; take --top, or --random")
        if kind == "gmm":
            if temperature is not None:
                raise CorpusError(f"--temperature {temperature}: --gmm has weights of its own; leave it out")
            return rule
        if temperature is None:
            raise CorpusError(
                f"--format weights: --{kind} weighs all rows that it keeps alike; add --temperature, by which weights "
                "are softmax(worth / temperature), or take --gmm"
            )
        if by is None:
            raise CorpusError("--by is missing: --format weights needs a score to weigh by")
        return lambda table: select.weigh(table, rule(table), by, temperature, keep)

    def _rule(self, by: str, keep: Literal["high", "low"] | None) -> Rule:
        group = None if self.group is None else group_column(self.group, by)
        if self.mix is not None:
            bands, rates = self.mix.bands, self.mix.rates
            return lambda table: select.mix(table, by, bands, rates, self.seed, keep, group)
        if self.top is not None:
            best = parse_amount(self.top)
            return _of_some(best, lambda table: select.top(table, by, best, keep, group))
        if self.threshold is not None:
            limit = self.threshold
            return lambda table: select.threshold(table, by, limit, keep)
        if self.quantile is not None:
            q = self.quantile
            return lambda table: select.quantile(table, by, q, keep, group)
        if self.sample is not None:
            drawn = parse_amount(self.sample)
            return _of_some(
                drawn, lambda table: select.sample(table, by, drawn, self.seed, self.temperature, keep, group)
            )
        if self.random is not None:
            uniform = parse_amount(self.random)
            return _of_some(uniform, lambda table: select.random(table, uniform, self.seed, group))
        if self.ccs is not None:
            return self._ccs(by, parse_amount(self.ccs))
        if self.gmm:
            return lambda table: select.gmm(table, by, keep, self.seed)
        return lambda table: select.kmeans(table, by, keep)

    def _ccs(self, by: str, amount: int | float) -> Rule:
        if self.hard is None:
            raise CorpusError("--hard is missing: --ccs needs to know which end of the score is hard, high or low")
        if self.keep is not None and not self.weigh:
            raise CorpusError(
                f"--keep {self.keep}: has no effect with --ccs but for --format weights; --hard says which end is which"
            )
        if self.hard not in ("high", "low"):
            raise CorpusError(f"--hard {self.hard}: expected high or low")
        hard, drop = cast("Literal['high', 'low']", self.hard), 0.1 if self.drop is None else self.drop
        return _of_some(amount, lambda table: select.ccs(table, by, amount, self.seed, hard=hard, drop=drop))


def group_column(group: str, by: str) -> str:
    """What the column of the groups is called beside that of the score, which may have the same name."""
    return group if group != by else f"{group} of the corpus"


def _weighed_by_copies(selection: Selection) -> Selection:
    assert selection.copies is not None
    return replace(selection, weights=selection.copies.astype(np.float64))


def _everything(table: pa.Table) -> Selection:
    rows = table.num_rows
    return Selection("every row", np.ones(rows, bool), np.ones(rows, np.uint8), ("", "kept: passes"))


def parse_end(text: str | None) -> Literal["high", "low"] | None:
    """Which end of a score is better; None leaves it to the score."""
    if text not in (None, "high", "low"):
        raise CorpusError(f"--keep {text}: expected high or low")
    return cast("Literal['high', 'low'] | None", text)


def _of_some(amount: int | float, rule: Rule) -> Rule:
    """The rule, but a CorpusError for a share that is less than half a row of a table."""

    def checked(table: pa.Table) -> Selection:
        if table.num_rows and not amount_rows(amount, table.num_rows):
            raise CorpusError(
                f"{amount} of {table.num_rows:,} rows is none; expected a larger share, or a number of rows (1000)"
            )
        return rule(table)

    return checked


def parse_amount(text: str) -> int | float:
    """``1000`` is a number of rows, ``0.5`` a share; ``1`` is one row and ``1.0`` all of them. CorpusError for none."""
    expected = "expected rows (1000) or a share (0.5) of at most 1.0"
    try:
        amount = int(text) if re.fullmatch(r"\d+", text) else float(text)
    except ValueError:
        raise CorpusError(f"{text!r} is no amount; {expected}") from None
    if amount == 0:
        raise CorpusError(f"{text!r} selects nothing; {expected}")
    if isinstance(amount, float) and not 0 < amount <= 1:
        raise CorpusError(f"{text!r} is no amount; {expected}")
    return amount
