"""The probe's check of itself: its per-sample gradients against one ordinary backward pass."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from assay.probe.gradient import PerSampleGradient
from assay.tasks import Task
from assay.tasks.base import unfused

_TOLERANCE = 1e-3
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Check:
    """A reduction that measures the probe's gradients against autograd's.

    With fixed weights c_b, ordinary autograd gives D_p, the gradient of Σ_b c_b ℓ_b in parameter p. If
    the probe's per-sample gradients g_b,p are right then Σ_b c_b ⟨g_b,p, D_p⟩ = ‖D_p‖². Both are taken with D_p
    scaled to a largest entry of 1, for the square of a gradient may be beyond its type.

    Attributes:
        weights: c, (B,), as ``signed_weights`` gives them: a gradient that is booked on the wrong sample changes its
            sign half of the time, and with it the sum; where it does not, it changes its length.
        gradients: D_p by parameter.
        tolerance: the relative error allowed.
        finite: (B,), the samples whose loss is finite.
        hooks: by parameter, the names of what was registered to change its gradient.
        impossible: why nothing can be differentiated, if nothing can.
        is_trial: whether it is of a batch that nobody wants the signals of.
        dots: ⟨g_b,p, D_p / max |D_p|⟩ (B,) by parameter, filled as the probe's backward pass runs.
    """

    weights: Tensor
    gradients: dict[str, Tensor]
    tolerance: float
    finite: Tensor
    hooks: Mapping[str, Sequence[str]]
    impossible: str | None = None
    is_trial: bool = False
    dots: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> Collection[str]:
        return self.gradients.keys()

    @property
    def is_loose(self) -> bool:
        """Whether numbers are so coarse that a wrong gradient may pass now and then."""
        return self.tolerance > _TOLERANCE

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        expected = self.gradients[parameter]
        self.dots[parameter] = gradient.dot(expected / self._scale(parameter))
        return self.dots[parameter]

    def _scale(self, parameter: str) -> float:
        """max |D_p|; 1 of a gradient that is 0, or empty."""
        gradient = self.gradients[parameter]
        return (float(gradient.abs().max()) if gradient.numel() else 0.0) or 1.0

    def finish(self) -> bool:
        """Compare, and say whether that was conclusive: False if a gradient is not finite.

        Raises:
            RuntimeError: a parameter's gradients differ, or there are none.
        """
        if self.impossible is not None and self.gradients:
            raise RuntimeError(self.impossible)
        for message in self.complaints().values():
            raise RuntimeError(message)
        return self.is_conclusive

    @property
    def is_conclusive(self) -> bool:
        """Whether all gradients are finite."""
        return all(math.isfinite(norm) for norm in self._norms().values())

    def without_bad(self, batch: Any) -> Any | None:
        """The batch with a sample whose loss is finite, of the same sign, in place of each whose loss is not.

        None if there is no such sample, or none is needed, or the batch is no collection of tensors.
        """
        fine, size = self.finite.tolist(), len(self.weights)
        signs = self.weights.sign().tolist()
        good = {sign: [b for b in range(size) if fine[b] and signs[b] == sign] for sign in (1.0, -1.0)}
        if all(fine) or not all(good.values()):
            return None
        alike = [good[sign] for sign in signs]
        pick = [b if fine[b] else alike[b][b % len(alike[b])] for b in range(size)]
        leaves, spec = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        if not all(isinstance(x, Tensor) for x in leaves):
            return None
        return tree_unflatten([x[pick] if x.shape[:1] == (size,) else x for x in leaves], spec)

    def refuse_guesses(self, layers: Sequence[str]) -> None:
        """Raise RuntimeError if these layers' inputs leave a choice, which a check that is not finite cannot make."""
        if layers and bool(self.finite.any()):
            raise RuntimeError(
                f"layer {layers[0]!r}: by its shape its input may hold the samples in more ways than one, and the "
                "check that tells which is right found gradients that are not finite. Leave the samples out whose loss "
                "or gradient is not finite, or score samples one by one"
            )

    def complaints(self) -> dict[str, str]:
        """What there is to say of the parameters that ``wrong`` names."""
        return {
            name: (
                f"parameter {name!r}: the probe's per-sample gradients do not add up to autograd's gradient (<probe, "
                f"autograd> = {found:.6g}, expected {expected:.6g}). Likely causes: {self._hooked(name)}its weight is "
                "used behind the layer's back, as in F.linear(x, embedding.weight); the batch is not the first "
                "dimension of the layer's input; the samples of a batch influence each other; the model is random in "
                f"eval mode. Leave the parameter out (layers=['*', {'!' + name!r}])"
            )
            for name, (found, expected) in self.wrong().items()
        }

    def _hooked(self, parameter: str) -> str:
        if not (names := self.hooks.get(parameter)):
            return ""
        return (
            f"a hook on it ({', '.join(names)}; Tensor.register_hook) changes autograd's gradient, and no sample's own "
            "(take it off, or pass verify=False: the samples' are then what the losses give); "
        )

    def wrong(self) -> dict[str, tuple[float, float]]:
        """Σ_b c_b ⟨g_b,p, D_p⟩ and ‖D_p‖² of the parameters where they differ; none if a gradient is not finite.

        The error is measured against ‖D_p‖² + Σ_b |c_b ⟨g_b,p, D_p⟩|, so that samples whose gradients cancel
        raise no alarm, and against ‖D_p‖ times the largest ‖D_q‖, so that a gradient that is zero but for
        rounding (the bias of attention keys) raises none either.
        """
        norms = self._norms()
        if not all(math.isfinite(norm) for norm in norms.values()):
            return {}
        largest, differ = max(norms.values(), default=0.0), {}
        for name, norm in norms.items():
            dots = self.dots.get(name)
            terms = torch.zeros_like(self.weights) if dots is None else self.weights * dots.to(self.weights.device)
            found, magnitude = float(terms.double().sum()), float(terms.double().abs().sum())
            scale = self._scale(name)
            expected = norm / scale * norm
            slack = self.tolerance * (expected + magnitude) + self.tolerance / 25 * norm / scale * largest
            if not abs(found - expected) <= slack:
                differ[name] = found * scale, norm**2
        return differ

    def _norms(self) -> dict[str, float]:
        return {name: float(torch.linalg.vector_norm(g, dtype=torch.float64)) for name, g in self.gradients.items()}


def prepare_check(model: nn.Module, task: Task, batch: Any, parameters: Collection[str]) -> Check:
    """Run the ordinary forward and backward pass; the model's parameters are frozen before and after.

    Nothing is fused in it, so that it does not share what it checks.
    """
    wanted = {name: p for name, p in model.named_parameters() if name in parameters}
    try:
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        losses = unfused(task).forward(model, batch).losses
        check_losses(task, losses, task.size(batch))
        impossible = None if losses.requires_grad else _why_impossible(model, task, batch)
        weights = signed_weights(len(losses)).to(losses.device)
        loose = _is_low_precision(wanted.values(), losses.device)
        with torch.autocast(losses.device.type, enabled=False):
            gradients = _gradients((weights * losses).sum(), list(wanted.values()))
            finite = losses.detach().isfinite()
    finally:
        for parameter in wanted.values():
            parameter.requires_grad_(False)
    found = dict(zip(wanted, gradients, strict=True))
    return Check(weights, found, 5e-2 if loose else _TOLERANCE, finite, _hooks(wanted), impossible)


def check_losses(task: Task, losses: Tensor, size: int) -> None:
    """ValueError unless there is one for each sample."""
    if losses.shape != (size,):
        raise ValueError(f"{type(task).__name__}: losses of shape {tuple(losses.shape)}; expected ({size},)")


def _why_impossible(model: nn.Module, task: Task, batch: Any) -> str | None:
    """What there is to say of losses that depend on none of the model's parameters, tapped or not."""
    parameters = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        return None if task.forward(model, batch).losses.requires_grad else without_graph(task)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def without_graph(task: Task) -> str:
    """The message for losses of which nothing can be differentiated."""
    return (
        f"{type(task).__name__}: its losses have no graph, so that every gradient would be 0: numbers were taken out "
        "of it between the model's parameters and the losses. Expected losses made of what the model gives by torch's "
        "operations, without detach(), item(), numpy() or torch.no_grad()"
    )


def signed_check(
    losses: Tensor, tapped: Mapping[str, nn.Parameter], cuts: Sequence[tuple[Tensor, Tensor]], is_coarse: bool
) -> Check:
    """The same of a forward pass that somebody else made, whose graph is kept.

    Args:
        losses: (B,).
        tapped: by name, parameters that ask for their gradients.
        cuts: where the graph was cut, (value, the leaf that the model went on with), in the order of the model.
        is_coarse: whether a layer gave its output in 16 bits, as under autocast, which is over by now.
    """
    weights = signed_weights(len(losses)).to(losses.device)
    ends = [*tapped.values(), *(leaf for _, leaf in cuts)]
    gradients: dict[int, Tensor] = {}

    def add(root: Tensor, grads: Tensor | None) -> None:
        found = torch.autograd.grad(root, ends, grads, retain_graph=True, allow_unused=True)
        for end, more in zip(ends, found, strict=True):
            if more is not None:
                gradients[id(end)] = gradients[id(end)] + more if id(end) in gradients else more

    add((weights * losses).sum(), None)
    for value, leaf in reversed(cuts):
        if value.requires_grad and id(leaf) in gradients:
            add(value, gradients[id(leaf)])
    found = {name: gradients.get(id(p), torch.zeros_like(p)) for name, p in tapped.items()}
    loose = is_coarse or _is_low_precision(tapped.values(), losses.device) or losses.dtype in _HALF
    return Check(weights, found, 5e-2 if loose else _TOLERANCE, losses.detach().isfinite(), _hooks(tapped))


def signed_weights(size: int) -> Tensor:
    """(size,) numbers of which no two are the same, from 1 to 2 and half of them negative: the same for every batch of
    that size. Of a few samples a wrong order leaves the signs as they are now and then, but not the numbers."""
    return signs(size) * torch.linspace(1, 2, size)


def signs(size: int) -> Tensor:
    """(size,) of 1 and −1, the same for every batch of that size.

    As many of one as of the other, in random order: of few that differ, another order changes too little.
    """
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return 2.0 * (drawn % 2) - 1


def _gradients(total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _hooks(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """By parameter, the names of the functions that its gradient goes through; those that run once it is accumulated do
    not change it."""
    return {
        name: [getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks.values()]
        for name, parameter in parameters.items()
        if (hooks := parameter._backward_hooks)
    }


def _is_low_precision(parameters: Collection[nn.Parameter], device: torch.device) -> bool:
    return (
        torch.is_autocast_enabled(device.type)
        or torch.get_float32_matmul_precision() != "highest"
        or any(parameter.dtype in _HALF for parameter in parameters)
    )
