"""Directional derivatives of the forward pass: how a sample's hidden state moves when the parameters do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.ops import Sketch, project
from assay.probe.layouts import check_is_first
from assay.probe.quiet import exchanged
from assay.probe.selection import find_module
from assay.tasks import Task
from assay.tasks.base import logits_of, take_samples
from assay.tasks.output_layer import find_output_layer

# The cube root of float32's precision: where a central difference's truncation and rounding errors meet.
_STEP = 5e-3


@dataclass(frozen=True)
class Jvp:
    """∂h_b/∂θ · v for each of a few tangents v, laid end to end: (B, size), and no backward pass.

    h_b is what sample b gives at its last position. Derivatives are exact, by forward-mode differentiation (attention
    runs in its plain formula, for the fused ones have no forward mode). A model with an operation that has none is
    differenced centrally instead: two forward passes a tangent, within 4e-5 of the largest derivative on small networks
    in float32.

    Attributes:
        tangents: directions by parameter name; parameters that one does not name stay as they are in it.
        at: name or glob of the one layer whose input is h; the model runs no further. None: a language model's last
            hidden state, before the output layer; of other models the logits.
        sketch: projects the derivatives where they are more numbers than its ``dim``; Sparse or Rademacher.
    """

    tangents: Sequence[Mapping[str, Tensor]]
    at: str | None = None
    sketch: Sketch | None = None

    def __call__(self, model: nn.Module, task: Task, batch: Any) -> Tensor:
        """Run on a batch that lies on the model's device; the probe does, and nobody else has to."""
        run = _Forward(model, task, self.at)
        columns = torch.cat([run.derivative(batch, tangent) for tangent in self.tangents], 1)
        if self.sketch is None or columns.shape[1] <= self.sketch.dim:
            return columns
        return project(columns, self.sketch)


class _Reached(Exception):
    """The layer has its input: nothing behind it needs to run."""


class _Forward:
    """Model and task up to one layer, as a function of some parameters."""

    def __init__(self, model: nn.Module, task: Task, at: str | None) -> None:
        self.model, self._task = model, task
        fused = getattr(task, "fused", None)  # the name of a layer whose output the task replaces, if it is one
        name = fused if isinstance(fused, str) else None
        self._layer = find_output_layer(model, name) if at is None else find_module(model, at)[1]
        self._what = "jvp: what is differentiated" if at is None else f"jvp: the input of layer {at!r}"

    def derivative(self, batch: Any, tangent: Mapping[str, Tensor]) -> Tensor:
        """(B, D) float32."""
        known = dict(self.model.named_parameters())
        points = {name: known[name].detach() for name in tangent}
        steps = {name: v.to(points[name]) for name, v in tangent.items()}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                with forward_ad.dual_level():
                    duals = {name: forward_ad.make_dual(p, steps[name]) for name, p in points.items()}  # type: ignore[no-untyped-call]
                    moved = forward_ad.unpack_dual(self._at(duals, batch))  # type: ignore[no-untyped-call]
                    return (torch.zeros_like(moved.primal) if moved.tangent is None else moved.tangent).float()
            except NotImplementedError:
                length = _norm(steps)
                h = _STEP * max(_norm(points), 1e-3) / length if length > 0 else 1.0
                ahead, behind = (
                    self._at({name: p + sign * h * steps[name] for name, p in points.items()}, batch).float()
                    for sign in (1, -1)
                )
                return (ahead - behind) / (2 * h)

    def _at(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        hidden, size = self._hidden(parameters, batch), self._task.size(batch)
        if len(hidden) != size:
            raise RuntimeError(f"{self._what} has shape {tuple(hidden.shape)} in a batch of {size}; expected (B, …)")
        check_is_first(self._what, hidden, lambda: self._hidden({}, take_samples(batch, size, [0])))
        return self._last(hidden, batch)

    def _hidden(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """(B, …)."""
        caught: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
            raise _Reached

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            caught.append(logits_of(output))
            raise _Reached

        handle = (
            self.model.register_forward_hook(after)
            if self._layer is None
            else self._layer.register_forward_pre_hook(before, with_kwargs=True)
        )
        try:
            with exchanged(self.model, parameters):
                self._task.forward(self.model, batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        if not caught:
            raise RuntimeError("jvp: the layer was not run in the forward pass; choose another with at=")
        return caught[0]

    def _last(self, hidden: Tensor, batch: Any) -> Tensor:
        """(B, …) -> (B, D): the last position that holds data, where there are positions."""
        mask = self._task.mask(batch)
        if mask is None or hidden.shape[:2] != mask.shape or hidden.ndim < 3:
            return hidden.flatten(1)
        last = mask.long().cumsum(1).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].flatten(1)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([t.float().square().sum() for t in tensors.values()]).sum().sqrt())
