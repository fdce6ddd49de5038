"""Runs methods over batches: every model once per batch, whatever number of methods want it."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need, Views, in_table
from assay.probe import Jvp, Pooled, Probe, Reduction, Signals
from assay.probe.selection import coverage, select
from assay.tasks import Task
from assay.tasks.base import base_task

# What one probe runs: a model's identity, the task whose forward pass it is, the view, and the layer that is pooled.
_Key = tuple[int, Task, str | None, str | Pooled | None]


@dataclass
class _Run:
    """What one probe has to serve: by task the reductions of everybody who wants its reading of the forward pass."""

    model: nn.Module
    embeddings: str | Pooled | None
    readings: dict[Task, dict[str, Reduction | Jvp]] = field(default_factory=dict)
    logits: bool = False
    strict: set[str] = field(default_factory=set)  # parameters that somebody does not allow to be left out
    lenient: set[str] = field(default_factory=set)

    def add(self, need: Need, task: Task, names: Mapping[str, str]) -> None:
        self.logits |= need.logits
        own = {names[name]: reduction for name, reduction in need.reductions.items()}
        self.readings.setdefault(task, {}).update(own)
        (self.lenient if need.skip_unsupported else self.strict).update(_tapped(need))

    def probe(self, verify: bool, inference: bool) -> Probe:
        (task, reductions), *others = self.readings.items()
        return Probe(
            self.model,
            task,
            factors=(),
            reductions=reductions,
            embeddings=self.embeddings,
            logits=self.logits,
            skip_unsupported=self.lenient - self.strict,
            verify=verify,
            readings=others,
            inference=inference,
        )


@dataclass(frozen=True)
class _Role:
    """Where a method's role gets its signals: which probe, and its reductions' names -> their keys there."""

    need: Need
    run: _Key | None
    reductions: Mapping[str, str]


class Scorer:
    """Scores batches with several methods.

    Args:
        methods: objects with the ``Method`` protocol; their column names must not clash.
        verify: let each probe check itself against autograd.
        inference: run models of which nobody takes gradients in ``torch.inference_mode``; see ``Probe``.

    Attributes:
        model_seconds, method_seconds: how long the models ran so far, and the methods' formulas.

    Raises:
        ValueError: two methods give a column of the same name, or a model cannot be tapped as a method needs it.
    """

    def __init__(self, methods: Sequence[Method], *, verify: bool = True, inference: bool = False) -> None:
        self.methods = list(methods)
        self.columns = all_columns(self.methods)
        needs = [dict(method.needs()) for method in self.methods]
        pooled = _pooled_layers([need for roles in needs for need in roles.values()])
        runs: dict[_Key, _Run] = {}
        self._roles: list[dict[str, _Role]] = []  # per method
        for i, method_needs in enumerate(needs):
            roles: dict[str, _Role] = {}
            for role, need in method_needs.items():
                names = {name: f"{i}.{role}.{name}" for name in need.reductions}
                key: _Key | None = None
                if need.model is not None and need.task is not None:
                    forward = (id(need.model), base_task(need.task), need.view)
                    key = (*forward, need.embeddings or pooled[forward])
                    runs.setdefault(key, _Run(need.model, key[-1])).add(need, need.task, names)
                roles[role] = _Role(need, key, names)
            self._roles.append(roles)
        differentiated = {key[0] for key, run in runs.items() if any(run.readings.values())}
        self._probes = {key: run.probe(verify, inference and key[0] not in differentiated) for key, run in runs.items()}
        self.model_seconds = self.method_seconds = 0.0
        self._models = list({id(run.model): run.model for run in runs.values()}.values())
        self._places = {key: {task: i for i, task in enumerate(run.readings)} for key, run in runs.items()}

    def fresh(self) -> Scorer:
        """The same probes, which have checked themselves, for copies of the methods. Of a scorer that has not scored
        itself, they have gathered nothing."""
        other = copy.copy(self)
        other.methods = [copy.copy(method) for method in self.methods]
        other.model_seconds = other.method_seconds = 0.0
        return other

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
        parts = {key: _part(views, key[2]) for key in self._probes}
        raw = {n: _raw(views, n) for roles in self._roles for role in roles.values() for n in role.need.raw}
        size = _same_size({_described(key[2]): key[1].size(part) for key, part in parts.items()}, raw)
        if size == 0:
            return {c.name: torch.zeros((0,) if c.width == 1 else (0, c.width or 0)) for c in self.columns}
        began = time.perf_counter()
        signals = {key: probe.read(parts[key]) for key, probe in self._probes.items()}
        _wait_for(self._models)  # else the next to wait, a method, would be booked the models' time
        self.model_seconds += (scoring := time.perf_counter()) - began
        scores: dict[str, Tensor] = {}
        for method, roles in zip(self.methods, self._roles, strict=True):
            given: dict[str, Signals] = {}
            for name, role in roles.items():
                own = Signals(torch.full((size,), torch.nan))
                if role.run is not None and role.need.task is not None:
                    own = signals[role.run][self._places[role.run][role.need.task]]
                reduced = {reduction: own.reduced[key] for reduction, key in role.reductions.items()}
                given[name] = own.with_reduced(reduced, {column: raw[column] for column in role.need.raw})
            with torch.no_grad():
                scores |= _checked(method, method.score(given), size)
        self.method_seconds += time.perf_counter() - scoring
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

    def _left_out(self, roles: Mapping[str, _Role], while_fitting: Collection[str]) -> dict[str, str]:
        shares, layers = [], []
        for role in roles.values():
            need, tapped = role.need, _tapped(role.need)
            if not tapped or role.run is None or need.model is None:
                continue
            dropped = {name for name in self._probes[role.run].left_out if name in tapped} | set(while_fitting)
            if need.skip_unsupported:
                selection = select(need.model, need.layers, skip_unsupported=True)
                tapped, dropped = set(selection.names), dropped | selection.left_out.keys()
            if dropped:
                shares.append(coverage(need.model, tapped - dropped))
                layers += [name.rpartition(".")[0] or name for name in sorted(dropped)]
        if not layers:
            return {}
        return {"coverage": f"{min(shares):.4f}", "left_out_layers": ", ".join(dict.fromkeys(layers))}


def _wait_for(models: Sequence[nn.Module]) -> None:
    """Until the GPUs that hold the models are done, if any does."""
    for device in {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}:
        torch.cuda.synchronize(device)


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


def _tapped(need: Need) -> set[str]:
    """The parameters whose gradients are asked for."""
    return {name for r in need.reductions.values() if not isinstance(r, Jvp) for name in r.parameters}


def _pooled_layers(needs: Sequence[Need]) -> dict[tuple[int, Task, str | None], str | Pooled | None]:
    """By forward pass and view: the layer that is pooled in the run of those that want no embeddings."""
    layers: dict[tuple[int, Task, str | None], str | Pooled | None] = {}
    for need in needs:
        if need.model is not None and need.task is not None:
            forward = (id(need.model), base_task(need.task), need.view)
            layers[forward] = layers.get(forward) or need.embeddings
    return layers


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
        checked[column.name] = in_table(values)
    return checked
