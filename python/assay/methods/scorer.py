"""Runs methods over batches: every model once per batch, whatever number of methods want it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from assay.methods.base import Column, Method, Need
from assay.probe import Jvp, Probe, Reduction, Signals

_Key = tuple[int, Any]  # a model's identity and its task: what one probe runs


class Scorer:
    """Scores batches with several methods.

    Args:
        methods: objects with the ``Method`` protocol; their column names must not clash.
        verify: let each probe check itself against autograd on its first batch.

    Raises:
        ValueError: two methods give a column of the same name, or a model cannot be tapped as a method needs it.
    """

    def __init__(self, methods: Sequence[Method], *, verify: bool = True) -> None:
        self.methods = list(methods)
        self.columns = all_columns(self.methods)
        wanted: dict[_Key, Need] = {}
        # Per method: role -> which probe serves it, and its reductions' names -> their keys in that probe.
        self._roles: list[dict[str, tuple[_Key, dict[str, str]]]] = []
        for i, method in enumerate(self.methods):
            roles = {}
            for role, need in method.needs().items():
                key = (id(need.model), need.task)
                names = {name: f"{i}.{role}.{name}" for name in need.reductions}
                mine: dict[str, Reduction | Jvp] = {names[name]: r for name, r in need.reductions.items()}
                known = wanted.get(key, replace(need, logits=False, reductions={}))
                wanted[key] = replace(
                    known, logits=known.logits or need.logits, reductions={**known.reductions, **mine}
                )
                roles[role] = (key, names)
            self._roles.append(roles)
        self._probes = {
            key: Probe(need.model, need.task, factors=(), reductions=need.reductions, logits=need.logits, verify=verify)
            for key, need in wanted.items()
        }

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """A batch of what the methods' task takes -> (B,) float32 on the CPU per column."""
        signals = {key: probe(batch) for key, probe in self._probes.items()}
        scores: dict[str, Tensor] = {}
        for method, roles in zip(self.methods, self._roles, strict=True):
            mine: Mapping[str, Signals] = {
                role: signals[key].with_reduced({n: signals[key].reduced[k] for n, k in keys.items()})
                for role, (key, keys) in roles.items()
            }
            with torch.no_grad():
                scores |= {n: v.detach().float().cpu() for n, v in method.score(mine).items()}
        return {column.name: scores[column.name] for column in self.columns}

    def metadata(self) -> dict[str, str]:
        """``<method>.<fact>`` for the table's footer."""
        return {f"{m.name}.{fact}": value for m in self.methods for fact, value in m.metadata().items()}


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
