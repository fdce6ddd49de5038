"""Products with the Gauss–Newton matrix of a model's losses, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.probe.quiet import undisturbed
from assay.tasks import Outputs, Task
from assay.tasks.base import unfused

_SIGNS = 8


class GaussNewton:
    """v -> Gv with G = E JᵀSJ: J the derivative of a sample's logits (or predictions), S its loss' Hessian in them.

    The mean is over the samples with a loss of a fixed list of batches. A batch whose product is not finite is left out
    for good, as one cannot be told apart that holds a single broken sample.

    Attributes:
        left_out: the numbers of such batches.
        samples: how many samples the last product was the mean over; 0 before the first.
        counts: by number of the others, the samples with a loss; known from the first product on.
    """

    def __init__(self, model: nn.Module, task: Task, parameters: Sequence[str], batches: Sequence[Any]) -> None:
        self._run, self._task, self._batches = _Run(model, unfused(task)), task, list(batches)
        known = dict(model.named_parameters())
        self._parameters = {name: known[name] for name in parameters}
        self.left_out: set[int] = set()
        self.samples = 0
        self.counts: dict[int, int] = {}

    def __call__(self, vectors: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Gv of each vector, by parameter.

        Raises:
            ValueError: losses that are not made of logits or predictions; no batch whose products are finite.
        """
        totals = [{name: torch.zeros_like(v) for name, v in vector.items()} for vector in vectors]
        with _exactly(self._run.model):
            for number, batch in enumerate(self._batches):
                if number in self.left_out:
                    continue
                samples, products = self._products(batch, vectors)
                if not all(bool(p.isfinite().all()) for product in products for p in product):
                    self.left_out.add(number)
                    self.counts.pop(number, None)
                    continue
                self.counts[number] = samples
                for total, product in zip(totals, products, strict=True):
                    for name, p in zip(total, product, strict=True):
                        total[name] += p.to(total[name])
        if not (count := sum(self.counts.values())):
            raise ValueError("the pool has no batch whose samples all have finite derivatives")
        self.samples = count
        return [{name: t / count for name, t in total.items()} for total in totals]

    def _products(self, batch: Any, vectors: Sequence[Mapping[str, Tensor]]) -> tuple[int, list[tuple[Tensor, ...]]]:
        """The samples with a loss, and the sums of JᵀSJv over them."""
        leaves = {name: p.detach().requires_grad_() for name, p in self._parameters.items()}
        device = next(iter(leaves.values())).device
        given = {f"model.{name}": leaf for name, leaf in leaves.items()}
        outputs: Outputs = functional_call(self._run, given, (self._task.to(batch, device),))
        losses, z = outputs.losses, outputs.logits if outputs.prediction is None else outputs.prediction
        with_loss = ~losses.detach().isnan()
        if z is None or not z.requires_grad:
            raise ValueError(
                f"{type(self._task).__name__} gives neither logits nor predictions, of which curvature is made"
            )
        inputs = list(leaves.values())
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


class _Run(nn.Module):
    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Outputs:
        return self.task.forward(self.model, batch)


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
