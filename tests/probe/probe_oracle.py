"""Per-sample gradients by torch.func, which knows nothing of hooks, and a probe compared with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from assay.probe import Dot, Factors, PerSampleGradient, Probe, Signals, SqNorm, tapped_parameters
from assay.probe.holding import Held, Summed
from assay.probe.selection import select
from assay.probe.training import TrainingTaps
from assay.tasks import Task

Losses = Callable[[Callable[..., Any], Any], Tensor]
"""(model as a function, batch) -> per-sample losses (B,), written without assay."""


class Collect:
    """A reduction that keeps every per-sample gradient, multiplied out."""

    def __init__(self, parameters: Collection[str]) -> None:
        self.parameters = parameters
        self.dense: dict[str, Tensor] = {}

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        assert parameter not in self.dense, "folded twice"
        self.dense[parameter] = gradient.dense()
        return torch.zeros(len(self.dense[parameter]))


def jacobian(model: nn.Module, losses: Losses, batch: Any) -> dict[str, Tensor]:
    """Every trainable parameter's (B, *shape) gradients of the samples' losses, in eval mode."""
    function, trainable = _functional(model, losses, batch)
    was_training = model.training
    model.eval()
    gradients = torch.func.jacrev(function)(trainable)
    model.train(was_training)
    return {name: gradient.detach() for name, gradient in gradients.items()}


def directional(model: nn.Module, losses: Losses, batch: Any, direction: dict[str, Tensor]) -> Tensor:
    """(B,): the derivative of the losses along ``direction``, in forward mode."""
    function, trainable = _functional(model, losses, batch)
    full = {name: direction.get(name, torch.zeros_like(p)) for name, p in trainable.items()}
    was_training = model.training
    model.eval()
    _, tangent = torch.func.jvp(function, (trainable,), (full,))
    model.train(was_training)
    return tangent.detach()


def _functional(model: nn.Module, losses: Losses, batch: Any) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def function(parameters: dict[str, Tensor]) -> Tensor:
        def run(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, parameters, args, kwargs)

        return losses(run, batch)

    return function, trainable


def random_direction(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(parameters[name].shape, generator=generator, dtype=parameters[name].dtype) for name in names
    }


def check_probe(
    model: nn.Module,
    task: Task,
    batch: Any,
    losses: Losses,
    *,
    tolerance: float = 1e-10,
    forward_mode: bool = True,
    with_factors: str | None = None,
    online: Collection[str] = ("all", "half"),
) -> Signals:
    """The probe's losses, dots, norms, gradients and factors (of all layers that have them) are torch.func's.

    ``online``: of which share of the parameters the same is tried in a trainer's pass, which follows no weight that is
    used behind its layer's back.
    """
    names = tapped_parameters(model)
    expected = jacobian(model, losses, batch)
    assert set(names) == set(expected)
    direction = random_direction(model, names)
    collect = Collect(names)
    reductions = {"dot": Dot(direction), "sqnorm": SqNorm(names), "collect": collect}
    factored = select(model, with_factors, skip_unsupported=True, bare=False).names
    with Probe(model, task, factors=factored, reductions=reductions) as probe:
        signals = probe(batch)
    assert probe.coverage == 1.0

    for name in names:
        zero = torch.zeros_like(expected[name])
        close(collect.dense.get(name, zero), expected[name], tolerance, name)
    close(signals.reduced["dot"], sum(dots(expected[n], direction[n]) for n in names), tolerance, "dot")
    close(signals.reduced["sqnorm"], sum(dots(expected[n], expected[n]) for n in names), tolerance, "sqnorm")
    if forward_mode:
        close(signals.reduced["dot"], directional(model, losses, batch, direction), tolerance, "jvp")
    check_factors(model, signals, expected, tolerance)
    check_training(model, batch, losses, expected, tolerance, online)
    return signals


def check_training(
    model: nn.Module,
    batch: Any,
    losses: Losses,
    expected: dict[str, Tensor],
    tolerance: float,
    shares: Collection[str],
) -> None:
    """In a trainer's own pass, of all layers and of every second one: dots, norms and weighted gradients are
    torch.func's, and the parameters that are not tapped get autograd's."""
    model.eval()
    size = len(next(iter(expected.values())))
    factors = torch.rand(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    scale = torch.arange(1, size + 1, dtype=torch.float64) / size
    reached = [name for name in tapped_parameters(model) if bool(expected[name].any())]  # a layer may not run at all
    largest = max(float(gradient.abs().max()) for gradient in expected.values())

    def check(reduced: Mapping[str, Tensor], by_sample: Mapping[str, Tensor]) -> None:
        close(reduced["dot"], sum(dots(expected[n], direction[n]) for n in names), tolerance, "online dot")
        close(reduced["sqnorm"], sum(dots(expected[n], expected[n]) for n in names), tolerance, "online sqnorm")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                mean = torch.einsum("b,b...->...", by_sample[name].to(expected[name]), expected[name])
                found = torch.zeros_like(mean) if parameter.grad is None else parameter.grad
                error = float((found.double() - mean.double()).abs().max())
                assert error <= tolerance * largest, f"online gradient of {name}: {error:.2e} off, of {largest:.2e}"
        model.zero_grad()

    for names in [{"all": reached, "half": reached[::2]}[share] for share in shares]:
        direction = random_direction(model, names)
        taps = TrainingTaps(model, names, batch_size=lambda args, kwargs: size)
        own = losses(model, batch)
        assert taps.recorded()
        reductions = {"dot": Dot(direction), "sqnorm": SqNorm(names), "length": Length(names)}
        held = Held(names, own.detach())
        reduced = taps.backward(own, scale.to(own), reductions, held)
        taps.add(held, factors)
        close(reduced["length"], sum(_lengths(expected[n]) for n in names), tolerance, "online, unscaled")
        check(reduced, {name: scale * factors if name in names else scale for name in expected})
        # Again, summed at once, and multiplied out by a few rows wherever that is possible.
        own = losses(model, batch)
        assert taps.recorded()
        summed = Summed(names, own.detach())
        with mock.patch.multiple("assay.probe.gradient", _LONG=1, _TILE=8):
            reduced = taps.backward(own, scale.to(own), {"dot": Dot(direction), "sqnorm": SqNorm(names)}, summed)
        taps.add(summed, torch.ones_like(factors))
        taps.detach()
        check(reduced, dict.fromkeys(expected, scale))


class Length:
    """A reduction that does not say how it grows with the gradient."""

    def __init__(self, parameters: Collection[str]) -> None:
        self.parameters = parameters

    def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
        return _lengths(gradient.dense())


def _lengths(gradients: Tensor) -> Tensor:
    return gradients.abs().reshape(len(gradients), -1).sum(1)


def check_factors(model: nn.Module, signals: Signals, expected: dict[str, Tensor], tolerance: float) -> None:
    """The sum of the layers' own parts is the parameter's gradient."""
    modules, found = dict(model.named_modules()), {}
    names = {id(p): name for name, p in model.named_parameters()}
    for layer, factors in signals.factors.items():
        weight = modules[layer]._parameters["weight"]
        if weight is None or not weight.requires_grad:
            continue
        name = names[id(weight)]
        transposed = type(modules[layer]).__name__ == "Conv1D" and hasattr(modules[layer], "nf")
        part = multiplied_out(factors, weight.shape, transposed)
        found[name] = found.get(name, 0) + part
    assert found
    for name, gradient in found.items():
        close(gradient, expected[name], tolerance, f"factors of {name}")


def multiplied_out(factors: Factors, shape: torch.Size, transposed: bool = False) -> Tensor:
    if factors.kind == "scatter":
        onehot = nn.functional.one_hot(factors.inputs, shape[0]).to(factors.grads.dtype)
        return torch.einsum("btv,btd->bvd", onehot, factors.grads)
    if factors.kind == "elementwise":
        return (factors.inputs * factors.grads).sum(1).reshape(-1, *shape)
    dtype = torch.promote_types(factors.inputs.dtype, factors.grads.dtype)
    gradient = torch.einsum("bto,bti->boi", factors.grads.to(dtype), factors.inputs.to(dtype))
    return gradient.mT if transposed else gradient.reshape(-1, *shape)


def dots(gradients: Tensor, direction: Tensor) -> Tensor:
    return (gradients * direction).reshape(len(gradients), -1).sum(1)


def close(found: Tensor, expected: Tensor | int, tolerance: float, what: str) -> None:
    """Agreement relative to the largest entry."""
    assert isinstance(expected, Tensor)
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    scale = expected.abs().max().clamp(min=1e-12)
    error = float((found.double() - expected.double()).abs().max() / scale)
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"


def state(model: nn.Module) -> list[Any]:
    """All that a probe has to leave as it was."""
    found: list[Any] = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        hooks = [(attribute, dict(value)) for attribute, value in vars(module).items() if "hook" in attribute and value]
        found.append((name, module.training, hooks))
    return found
