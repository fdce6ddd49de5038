"""Runs methods over batches: every model once per batch, whatever number of methods want it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from assay.methods.base import Column, Method, Need
from assay.probe import Probe, Reduction, Signals


class Scorer:
    """Scores batches with several methods.

    A context manager, because it holds probes (hooks and frozen weights) on the methods' models until it is closed.

    Args:
        methods: objects with the ``Method`` protocol; their column names must not clash.
        verify: let each probe check itself against autograd on its first batch.

    Raises:
        ValueError: two methods give a column of the same name.
    """

    def __init__(self, methods: Sequence[Method], *, verify: bool = True) -> None:
        self.methods = list(methods)
        self.columns: list[Column] = []
        owner: dict[str, str] = {}
        for method in self.methods:
            for column in method.columns:
                if column.name in owner:
                    raise ValueError(
                        f"column {column.name!r} comes from {owner[column.name]} and from {type(method).__name__}; "
                        "give one of them another name="
                    )
                owner[column.name] = type(method).__name__
                self.columns.append(column)
        self._verify = verify
        self._stack = ExitStack()
        self._probes: dict[tuple[int, Any], Probe] = {}
        self._roles: list[dict[str, tuple[tuple[int, Any], dict[str, str]]]] = []

    def __enter__(self) -> Scorer:
        wanted: dict[tuple[int, Any], Need] = {}
        self._roles = []
        for i, method in enumerate(self.methods):
            roles = {}
            for role, need in method.needs().items():
                key = (id(need.model), need.task)
                keys = {name: f"{i}.{role}.{name}" for name in need.reductions}
                mine: dict[str, Reduction] = {keys[name]: r for name, r in need.reductions.items()}
                known = wanted.get(key, replace(need, logits=False, reductions={}))
                wanted[key] = replace(
                    known, logits=known.logits or need.logits, reductions={**known.reductions, **mine}
                )
                roles[role] = (key, keys)
            self._roles.append(roles)
        self._probes = {
            key: self._stack.enter_context(
                Probe(
                    need.model,
                    need.task,
                    factors=(),
                    reductions=need.reductions,
                    logits=need.logits,
                    verify=self._verify,
                )
            )
            for key, need in wanted.items()
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the probes off the models."""
        self._stack.close()
        self._probes = {}

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """A batch of what the methods' task takes -> (B,) float32 on the CPU per column."""
        if not self._probes and self.methods:
            raise RuntimeError("Scorer: use it in a with statement: with Scorer(methods) as score: score(batch)")
        signals = {key: probe(batch) for key, probe in self._probes.items()}
        scores: dict[str, Tensor] = {}
        for method, roles in zip(self.methods, self._roles, strict=True):
            mine: Mapping[str, Signals] = {
                role: replace(signals[key], reduced={n: signals[key].reduced[k] for n, k in keys.items()})
                for role, (key, keys) in roles.items()
            }
            with torch.no_grad():
                scores |= {n: v.detach().float().cpu() for n, v in method.score(mine).items()}
        return {column.name: scores[column.name] for column in self.columns}

    def metadata(self) -> dict[str, str]:
        """``<method>.<fact>`` for the table's footer."""
        return {f"{m.name}.{fact}": value for m in self.methods for fact, value in m.metadata().items()}
