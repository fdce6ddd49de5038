"""Runs methods over batches: every model once per batch, whatever number of methods want it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from assay.methods.base import Column, Method, Need, Views
from assay.probe import Jvp, Probe, Reduction, Signals

# What one probe runs: a model's identity, its task, the view of the samples, and the layer whose input is pooled.
_Key = tuple[int, Any, str | None, str | None]


@dataclass(frozen=True)
class _Role:
    """Where a method's role gets its signals: which probe, its reductions' names -> their keys there, raw columns."""

    run: _Key | None
    reductions: Mapping[str, str]
    raw: Sequence[str]


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
        needs = [dict(method.needs()) for method in self.methods]
        pooled = _pooled_layers([need for roles in needs for need in roles.values()])
        runs: dict[_Key, Need] = {}
        self._roles: list[dict[str, _Role]] = []  # per method
        for i, method_needs in enumerate(needs):
            roles: dict[str, _Role] = {}
            for role, need in method_needs.items():
                if need.model is None:
                    roles[role] = _Role(None, {}, need.raw)
                    continue
                run = (id(need.model), need.task, need.view)
                key = (*run, need.embeddings or pooled[run])
                names = {name: f"{i}.{role}.{name}" for name in need.reductions}
                own: dict[str, Reduction | Jvp] = {names[name]: r for name, r in need.reductions.items()}
                others = runs.get(key, replace(need, logits=False, reductions={}, embeddings=key[-1], raw=()))
                runs[key] = replace(
                    others, logits=others.logits or need.logits, reductions={**others.reductions, **own}
                )
                roles[role] = _Role(key, names, need.raw)
            self._roles.append(roles)
        self._probes = {key: _probe(need, verify) for key, need in runs.items()}

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Score a batch.

        Args:
            batch: what the methods' task takes, or a ``Views`` of it.

        Returns:
            Per column float32 on the CPU: (B,), (B, width), or (B, T) of a column without a fixed width.

        Raises:
            ValueError: the batch lacks a view or a raw column that a method needs, its parts differ in their number of
                samples, or a method gives scores of another shape than its column says.
        """
        views = batch if isinstance(batch, Views) else Views(batch)
        signals = {key: probe(_part(views, key[2])) for key, probe in self._probes.items()}
        raw = {n: _raw(views, n) for roles in self._roles for role in roles.values() for n in role.raw}
        size = _same_size({_described(key[2]): len(s.losses) for key, s in signals.items()}, raw)
        scores: dict[str, Tensor] = {}
        for method, roles in zip(self.methods, self._roles, strict=True):
            given: dict[str, Signals] = {}
            for name, role in roles.items():
                own = Signals(torch.full((size,), torch.nan)) if role.run is None else signals[role.run]
                reduced = {reduction: own.reduced[key] for reduction, key in role.reductions.items()}
                given[name] = own.with_reduced(reduced, {column: raw[column] for column in role.raw})
            with torch.no_grad():
                scores |= _checked(method, method.score(given), size)
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


def _pooled_layers(needs: Sequence[Need]) -> dict[tuple[int, Any, str | None], str | None]:
    """By model, task and view: the layer that is pooled in the run of those that want no embeddings."""
    layers: dict[tuple[int, Any, str | None], str | None] = {}
    for need in needs:
        run = (id(need.model), need.task, need.view)
        layers[run] = layers.get(run) or need.embeddings
    return layers


def _probe(need: Need, verify: bool) -> Probe:
    assert need.model is not None
    assert need.task is not None
    return Probe(
        need.model,
        need.task,
        factors=(),
        reductions=need.reductions,
        embeddings=need.embeddings,
        logits=need.logits,
        verify=verify,
    )


def _described(view: str | None) -> str:
    return "the main view" if view is None else f"view {view!r}"


def _part(views: Views, view: str | None) -> Any:
    if view is None:
        return views.main
    if view not in views.others:
        raise ValueError(f"the batch has no view {view!r}; expected methods.Views(main, others={{{view!r}: ...}})")
    return views.others[view]


def _raw(views: Views, column: str) -> Sequence[Any]:
    if column not in views.raw:
        expected = f"methods.Views(main, raw={{{column!r}: ...}})"
        raise ValueError(f"the batch has no raw column {column!r}; expected {expected}")
    return views.raw[column]


def _same_size(views: Mapping[str, int], raw: Mapping[str, Sequence[Any]]) -> int:
    """The number of samples; 0 of a batch that nobody looks at."""
    sizes = dict(views) | {f"raw column {name!r}": len(values) for name, values in raw.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{part} has {size}" for part, size in sizes.items())
        raise ValueError(f"the parts of a batch differ in their number of samples: {listed}")
    return next(iter(sizes.values()), 0)


def _checked(method: Method, scores: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    checked = {}
    for column in method.columns:
        if column.name not in scores:
            raise ValueError(f"{method.name}: gave no score {column.name!r}, only {', '.join(map(repr, scores))}")
        values = scores[column.name]
        expected = (size,) if column.width == 1 else (size, column.width or "T")
        fits = values.shape == expected if column.width is not None else values.ndim == 2 and len(values) == size
        if not fits:
            raise ValueError(f"{column.name}: scores of shape {tuple(values.shape)}; expected {expected}")
        checked[column.name] = values.detach().float().cpu()
    return checked
