"""Products with the Gauss–Newton matrix of a model's losses, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.probe.quiet import exchanged, undisturbed
from assay.tasks import Task
from assay.tasks.base import take_samples, unfused

_SIGNS = 8
Products = list[tuple[Tensor, ...]]


class GaussNewton:
    """v -> Gv with G = E JᵀSJ: J the derivative of a sample's logits (or predictions), S its loss' Hessian in them.

    The mean is over the samples with a loss of a fixed list of batches. A sample whose product is not finite is left
    out for good; with its whole batch, where that cannot be taken apart: what has no rows by samples, and losses that
    compare samples.

    Attributes:
        batches: without those samples; None where none is left.
        left_out: how many they are.
        samples: how many samples the last product was the mean over; 0 before the first.
        counts: by number of a batch, its samples with a loss; known from the first product on.
    """

    def __init__(self, model: nn.Module, task: Task, parameters: Sequence[str], batches: Sequence[Any]) -> None:
        self._model, self._task, self._plain = model, task, unfused(task)
        self.batches: list[Any | None] = [batch if task.size(batch) else None for batch in batches]
        known = dict(model.named_parameters())
        self._parameters = {name: known[name] for name in parameters}
        self.left_out = 0
        self.samples = 0
        self.counts: dict[int, int] = {}

    def __call__(self, vectors: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Gv of each vector, by parameter.

        Raises:
            ValueError: losses that are not made of logits or predictions alone; no sample whose products are finite.
        """
        with _exactly(self._model):
            own = [{name: v.clone() if v.is_inference() else v for name, v in vector.items()} for vector in vectors]
            totals = [{name: torch.zeros_like(v) for name, v in vector.items()} for vector in own]
            for number in range(len(self.batches)):
                self.counts[number], products = self._finite_products(number, own)
                for total, product in zip(totals, products, strict=False):  # none of a batch that is left out
                    for name, p in zip(total, product, strict=True):
                        total[name] += p.to(total[name])
        if not (count := sum(self.counts.values())):
            raise ValueError("the pool has no sample with a loss and finite derivatives")
        self.samples = count
        return [{name: t / count for name, t in total.items()} for total in totals]

    def _finite_products(self, number: int, vectors: Sequence[Mapping[str, Tensor]]) -> tuple[int, Products]:
        """`_products` of a batch, from which samples with others are taken out first; none of one that is left out."""
        while (batch := self.batches[number]) is not None:
            samples, products = self._products(batch, vectors)
            if _are_finite(products):
                return samples, products
            size, sound = self._task.size(batch), self._sound_samples(batch, vectors)
            if len(sound) == size:  # sound each, and not together
                sound = []
            self.left_out += size - len(sound)
            self.batches[number] = take_samples(batch, size, sound) if sound else None
        return 0, []

    def _sound_samples(self, batch: Any, vectors: Sequence[Mapping[str, Tensor]]) -> list[int]:
        """The samples of a batch whose products are finite; none of one in which they have other losses than apart."""
        size = self._task.size(batch)
        try:
            if size < 2 or self._task.size(take_samples(batch, size, [0])) != 1:
                return []
            sound = self._sound(batch, range(size), vectors)
        except Exception:  # whatever a model says of what is no batch: rows that are not by sample
            return []
        if not sound:
            return []
        device = next(iter(self._parameters.values())).device
        with torch.no_grad():
            both = (self._task.to(own, device) for own in (batch, take_samples(batch, size, sound)))
            whole, part = (self._plain.forward(self._model, own).losses for own in both)
        same = torch.allclose(whole[sound], part, rtol=1e-3, atol=1e-5, equal_nan=True)
        return sound if same else []

    def _sound(self, batch: Any, rows: Sequence[int], vectors: Sequence[Mapping[str, Tensor]]) -> list[int]:
        """Those of the samples ``rows`` whose products are finite, found by halving."""
        if _are_finite(self._products(take_samples(batch, self._task.size(batch), rows), vectors)[1]):
            return list(rows)
        middle = len(rows) // 2
        halves = (rows[:middle], rows[middle:]) if middle else ()
        return [row for half in halves for row in self._sound(batch, half, vectors)]

    def _products(self, batch: Any, vectors: Sequence[Mapping[str, Tensor]]) -> tuple[int, Products]:
        """The samples with a loss, and the sums of JᵀSJv over them."""
        leaves = {name: p.detach().requires_grad_() for name, p in self._parameters.items()}
        device = next(iter(leaves.values())).device
        with exchanged(self._model, leaves):
            outputs = self._plain.forward(self._model, self._task.to(batch, device))
        losses, z = outputs.losses, outputs.logits if outputs.prediction is None else outputs.prediction
        with_loss = ~losses.detach().isnan()
        inputs = list(leaves.values())
        if z is None or not z.requires_grad:
            raise ValueError(
                f"{type(self._task).__name__} gives neither logits nor predictions, of which curvature is made"
            )
        if _passed_by(losses, z, inputs):
            raise ValueError(
                f"{type(self._task).__name__}: its losses are not made of its logits or predictions alone, of which "
                "curvature is made"
            )
        (slope,) = torch.autograd.grad(losses[with_loss].sum(), z, create_graph=True, materialize_grads=True)
        dual = torch.zeros_like(z, requires_grad=True)
        back = torch.autograd.grad((z * dual).sum(), inputs, create_graph=True, materialize_grads=True)
        found = []
        for vector in vectors:
            along = sum((b * vector[name].to(b)).sum() for name, b in zip(leaves, back, strict=True))
            (moved,) = torch.autograd.grad(along, dual, retain_graph=True, materialize_grads=True)  # type: ignore[arg-type]
            (bent,) = torch.autograd.grad((slope * moved).sum(), z, retain_graph=True, materialize_grads=True)
            found.append(torch.autograd.grad((z * bent).sum(), inputs, retain_graph=True, materialize_grads=True))
        return int(with_loss.sum()), found


def _passed_by(losses: Tensor, z: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the losses depend on one of the leaves by another way than through ``z``."""
    own = {id(leaf) for leaf in leaves}
    stack, seen = [losses.grad_fn], {None, z.grad_fn}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in own:
            return True
        stack += [after for after, _ in node.next_functions]  # type: ignore[union-attr]
    return False


def _are_finite(products: Products) -> bool:
    return all(bool(p.isfinite().all()) for product in products for p in product)


def trace_of(
    product: Callable[[Sequence[Mapping[str, Tensor]]], Sequence[Mapping[str, Tensor]]], like: Mapping[str, Tensor]
) -> float:
    """The trace of G, from products with random signs (Hutchinson); ``like`` has the parameters' shapes and types."""
    generator = torch.Generator().manual_seed(0)
    signs = [
        {name: (2 * torch.randint(2, g.shape, generator=generator) - 1).to(g) for name, g in like.items()}
        for _ in range(_SIGNS)
    ]
    dots = [
        (own[name].double() * g.double()).sum()
        for v, own in zip(signs, product(signs), strict=True)
        for name, g in v.items()
    ]
    return float(torch.stack(dots).sum()) / _SIGNS


@contextmanager
def _exactly(model: nn.Module) -> Iterator[None]:
    """In eval mode, with gradients, without autocast, and with attention's formula: its kernels are not differentiable
    twice."""
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
