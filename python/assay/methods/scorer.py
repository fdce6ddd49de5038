"""Runs methods over batches: every model once per batch, whatever number of methods want it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.probe import Jvp, Probe, Reduction, Signals
from assay.probe.selection import coverage, select
from assay.tasks import Task
from assay.tasks.base import base_task

_Key = tuple[int, Task]  # a model's identity and the task that runs it: one probe, one forward pass


@dataclass
class _Plan:
    """What one probe has to serve: by task the reductions of everybody who wants its reading of the forward pass."""

    model: nn.Module
    readings: dict[Task, dict[str, Reduction | Jvp]] = field(default_factory=dict)
    logits: bool = False
    strict: set[str] = field(default_factory=set)  # parameters that somebody does not allow to be left out
    lenient: set[str] = field(default_factory=set)

    def add(self, need: Need, names: Mapping[str, str]) -> None:
        self.logits |= need.logits
        mine = {names[name]: reduction for name, reduction in need.reductions.items()}
        self.readings.setdefault(need.task, {}).update(mine)
        tapped = {name for r in mine.values() if not isinstance(r, Jvp) for name in r.parameters}
        (self.lenient if need.skip_unsupported else self.strict).update(tapped)

    def probe(self, verify: bool) -> Probe:
        (task, reductions), *others = self.readings.items()
        return Probe(
            self.model,
            task,
            factors=(),
            reductions=reductions,
            logits=self.logits,
            skip_unsupported=self.lenient - self.strict,
            verify=verify,
            readings=others,
        )


class Scorer:
    """Scores batches with several methods.

    Args:
        methods: objects with the ``Method`` protocol; their column names must not clash.
        verify: let each probe check itself against autograd.

    Raises:
        ValueError: two methods give a column of the same name, or a model cannot be tapped as a method needs it.
    """

    def __init__(self, methods: Sequence[Method], *, verify: bool = True) -> None:
        self.methods = list(methods)
        self.columns = all_columns(self.methods)
        plans: dict[_Key, _Plan] = {}
        # Per method: role -> which probe and which reading serve it, and its reductions' names -> their keys there.
        self._roles: list[dict[str, tuple[_Key, Need, dict[str, str]]]] = []
        for i, method in enumerate(self.methods):
            roles = {}
            for role, need in method.needs().items():
                key = (id(need.model), base_task(need.task))
                names = {name: f"{i}.{role}.{name}" for name in need.reductions}
                plans.setdefault(key, _Plan(need.model)).add(need, names)
                roles[role] = (key, need, names)
            self._roles.append(roles)
        self._probes = {key: plan.probe(verify) for key, plan in plans.items()}
        self._places = {key: {task: i for i, task in enumerate(plan.readings)} for key, plan in plans.items()}

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """A batch of what the methods' task takes -> (B,) float32 on the CPU per column."""
        if any(task.size(batch) == 0 for _, task in self._probes):
            return {column.name: torch.zeros(0) for column in self.columns}
        signals = {key: probe.read(batch) for key, probe in self._probes.items()}
        scores: dict[str, Tensor] = {}
        for method, roles in zip(self.methods, self._roles, strict=True):
            own: dict[str, Signals] = {}
            for role, (key, need, names) in roles.items():
                found = signals[key][self._places[key][need.task]]
                own[role] = found.with_reduced({name: found.reduced[k] for name, k in names.items()})
            with torch.no_grad():
                scores |= {n: v.detach().float().cpu() for n, v in method.score(own).items()}
        return {column.name: scores[column.name] for column in self.columns}

    def metadata(self) -> dict[str, str]:
        """``<method>.<fact>`` for the table's footer.

        Where layers were left out, ``coverage`` and ``left_out_layers`` are among the facts: the least share of a
        model's trainable parameters that the method has seen, and the layers of those that it has not.
        """
        facts: dict[str, str] = {}
        for method, roles in zip(self.methods, self._roles, strict=True):
            own = {**method.metadata(), **self._left_out(roles, getattr(method, "left_out", ()))}
            facts |= {f"{method.name}.{fact}": value for fact, value in own.items()}
        return facts

    def _left_out(
        self, roles: Mapping[str, tuple[_Key, Need, Mapping[str, str]]], while_fitting: Collection[str]
    ) -> dict[str, str]:
        shares, layers = [], []
        for key, need, _ in roles.values():
            tapped = {n for r in need.reductions.values() if not isinstance(r, Jvp) for n in r.parameters}
            if not tapped:
                continue
            dropped = {name for name in self._probes[key].left_out if name in tapped} | set(while_fitting)
            if need.skip_unsupported:
                selection = select(need.model, need.layers, skip_unsupported=True)
                tapped, dropped = set(selection.names), dropped | selection.left_out.keys()
            if dropped:
                shares.append(coverage(need.model, tapped - dropped))
                layers += [name.rpartition(".")[0] or name for name in sorted(dropped)]
        if not layers:
            return {}
        return {"coverage": f"{min(shares):.4f}", "left_out_layers": ", ".join(dict.fromkeys(layers))}


def all_columns(methods: Sequence[Method]) -> list[Column]:
    """Every method's columns. ValueError if two have the same name."""
    owner: dict[str, str] = {}
    columns = []
    for method in methods:
        for column in method.columns:
            if column.name in owner:
                raise ValueError(
                    f"column {column.name!r} comes from {owner[column.name]} and from {type(method).__name__}; "
                    "give one of them another name="
                )
            owner[column.name] = type(method).__name__
            columns.append(column)
    return columns
