"""The per-sample gradients of a mixture's experts, which lie in one tensor (experts, out, in) and gather tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.ops import Kronecker, Mask, Sketch, grad_sketch, project


@dataclass(frozen=True)
class Experts:
    """Σ_m left[m]ᵀ right[m] over the rows m of a sample, each in the slice of its expert.

    ``left`` (M, R), ``right`` (M, C), ``expert`` (M,) int64 and ``owner`` (M,) int64, the sample, in [0, samples).
    """

    left: Tensor
    right: Tensor
    expert: Tensor
    owner: Tensor
    samples: int

    def dot(self, direction: Tensor) -> Tensor:
        products = self.left.new_zeros(len(self.left))
        for e in torch.unique(self.expert).tolist():
            here = self.expert == e
            products[here] = (self.left[here] @ direction[e].to(self.left) * self.right[here]).sum(1)
        return products.new_zeros(self.samples).index_put_((self.owner,), products, accumulate=True)

    def sqnorm(self) -> Tensor:
        """From the Gram matrices of each sample's rows at each expert."""
        total = self.left.new_zeros(self.samples)
        for sample, _, left, right in self._groups():
            total[sample] += ((left @ left.T) * (right @ right.T)).sum()
        return total

    def sketch(self, sketch: Sketch, shape: Sequence[int]) -> Tensor:
        """One sample at a time: its gradient is as large as the experts."""
        sketched = []
        unit = torch.eye(shape[0], dtype=self.left.dtype, device=self.left.device)[None]
        for b in range(self.samples):
            matrix = self.part(slice(b, b + 1)).dense(shape).flatten(2)
            two_sided = isinstance(sketch, Kronecker | Mask)
            sketched.append(grad_sketch(matrix, unit, sketch) if two_sided else project(matrix.flatten(1), sketch))
        return torch.cat(sketched)

    def dense(self, shape: Sequence[int]) -> Tensor:
        values = self.left.new_zeros(self.samples, *shape)
        for sample, expert, left, right in self._groups():
            values[sample, expert] = left.T @ right
        return values

    def scaled(self, factors: Tensor) -> Experts:
        return replace(self, left=self.left * factors.to(self.left)[self.owner, None])

    def weighted(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        values, own = self.left.new_zeros(*shape), self.scaled(factors)
        for e in torch.unique(self.expert).tolist():
            here = self.expert == e
            values[e] = own.left[here].T @ own.right[here]
        return values

    def part(self, samples: slice) -> Experts:
        start, stop, _ = samples.indices(self.samples)
        here = (self.owner >= start) & (self.owner < stop)
        rows = (self.left[here], self.right[here], self.expert[here], self.owner[here] - start)
        return Experts(*rows, samples=max(stop - start, 0))

    def _groups(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(sample, expert, left, right) of the rows that fall on the same place."""
        pairs = torch.stack([self.owner, self.expert], 1)
        for sample, expert in torch.unique(pairs, dim=0).tolist():
            here = (self.owner == sample) & (self.expert == expert)
            yield sample, expert, self.left[here], self.right[here]


@dataclass(frozen=True)
class Routing:
    """Where a mixture sends its N tokens: ``index`` (N, k) int64 experts and ``weights`` (N, k).

    ``owner`` (N,) int64 is the sample of each token, −1 where it is nobody's; ``samples`` are B.
    """

    index: Tensor
    weights: Tensor
    owner: Tensor
    samples: int

    def term(self, module: Any, local: str, tokens: Tensor, grads: Tensor) -> Experts:
        """The gradient of ``gate_up_proj`` or ``up_proj``, ``down_proj``, or a bias of theirs as columns (E, O, 1).

        Args:
            module: experts of transformers, Σ_j weight_j · down_j(gate(up_j(token))).
            local: the parameter's name.
            tokens: (N, D).
            grads: (N, D), of the module's output.
        """
        kind = torch.promote_types(tokens.dtype, torch.float32)
        gate = module._apply_gate if module.has_gate else module.act_fn
        each = []
        for e in range(len(module.down_proj)):
            token, slot = torch.where((self.index == e) & (self.owner >= 0)[:, None])
            token_states = tokens[token].to(kind)
            outer = grads[token].to(kind) * self.weights[token, slot, None].to(kind)
            with torch.enable_grad():
                gated = F.linear(token_states, *_expert(module, _up(module), e, kind)).requires_grad_()
                inner = gate(gated)
            if local.startswith("down_proj"):
                left, right = outer, inner.detach()
            else:
                (left,) = torch.autograd.grad(inner, gated, outer @ _expert(module, "down_proj", e, kind)[0])
                right = token_states
            if local.endswith("_bias"):
                left, right = left, left.new_ones(len(left), 1)
            elif module.is_transposed:
                left, right = right, left
            each.append((left, right, torch.full_like(token, e), self.owner[token]))
        left, right, expert, owner = (torch.cat(parts) for parts in zip(*each, strict=True))
        return Experts(left, right, expert, owner, self.samples)


def _expert(module: Any, name: str, e: int, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """One expert's linear map: weight (O, I) and bias (O,) or None."""
    weight = getattr(module, name)[e].detach().to(kind)
    bias = getattr(module, f"{name}_bias")[e].detach().to(kind) if module.has_bias else None
    return weight.T if module.is_transposed else weight, bias


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def are_experts(module: nn.Module) -> bool:
    """Whether a module's forward pass is what ``Routing`` has the formula of."""
    cls = type(module)
    if not cls.__name__.endswith("Experts") or not cls.__module__.startswith("transformers."):
        return False
    flags = [getattr(module, name, None) for name in ("has_gate", "has_bias", "is_transposed")]
    if any(flag is None for flag in flags) or getattr(module, "has_post_expert_norm", None) is not False:
        return False
    names = {_up(module), "down_proj"}
    biases = {f"{name}_bias" for name in names} if module.has_bias else set()
    return {name for name, _ in module.named_parameters()} == names | biases
