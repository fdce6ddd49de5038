"""The per-sample weight gradient of an output layer that was fused with its loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.ops import Kronecker, Sketch, grad_sketch, head_scores, linear_cross_entropy, linear_ensemble_stats

# Rows of the weight whose gradient is multiplied out at a time.
_ROWS = 4096


@dataclass(frozen=True)
class Head:
    """Σ_t scale[b,t] (p − y)[b,t] hidden[b,t]ᵀ, (C, D), with p = softmax(hidden weightᵀ + bias), y = onehot(labels).

    ``hidden`` (B, T, D), ``weight`` (C, D), ``bias`` (C,) or None, ``labels`` (B, T) int64, -100 where nothing is
    predicted, ``scale`` (B, T): the gradient of the sample's loss in the position's. Nothing of size B·T·C is made
    except by ``residual``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: Tensor

    def dot(self, direction: Tensor) -> Tensor:
        return self.dot_by_position(direction).sum(1)

    def dot_by_position(self, direction: Tensor) -> Tensor:
        """Each position's part of ``dot``, (B, T)."""
        scores = head_scores(
            self.hidden.flatten(0, 1),
            self.weight,
            self.labels.flatten(),
            bias=self.bias,
            directions=direction,
            fields=(),
        )
        assert scores.grad_dot is not None
        return scores.grad_dot[0].view(self.labels.shape) * self.scale

    def sqnorm(self, others: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """‖gradient‖² (B,); with ``others`` (B, S, D), that of the gradient plus others[b,s] in row ids[b,s].

        The logits are taken a second time, for as many rows of the weight as are at hand; then nothing can cancel.
        """
        totals = []
        for b in range(len(self.hidden)):
            total = self.hidden.new_zeros((), dtype=torch.float64)
            for start, rows in self._gradient_rows(b):
                if others is not None and ids is not None:
                    here = (ids[b] >= start) & (ids[b] < start + len(rows))
                    rows.index_put_((ids[b][here] - start,), others[b][here].to(rows.dtype), accumulate=True)
                total += rows.square().sum(dtype=torch.float64)
            totals.append(total)
        return torch.stack(totals).to(self._wide)

    def _gradient_rows(self, b: int) -> Iterator[tuple[int, Tensor]]:
        """Sample b's gradient, multiplied out a piece at a time: (first row, (at most _ROWS, D))."""
        predicted = self.labels[b] >= 0
        hidden, labels = self.hidden[b][predicted].to(self._wide), self.labels[b][predicted]
        scale = self.scale[b][predicted].to(self._wide)[:, None]
        nll = linear_ensemble_stats(hidden, self.weight, labels, bias=self.bias, fields=["nll"]).nll
        assert nll is not None
        target = (hidden * self.weight[labels].to(self._wide)).sum(1)
        if self.bias is not None:
            target += self.bias[labels].to(self._wide)
        for start in range(0, len(self.weight), _ROWS):
            weight = self.weight[start : start + _ROWS].to(self._wide)
            bias = None if self.bias is None else self.bias[start : start + _ROWS].to(self._wide)
            # log p = (z - z_y) - nll, in this order: a large offset common to all logits is gone before nll comes
            residual = F.linear(hidden, weight, bias).sub_(target[:, None]).sub_(nll[:, None]).exp_()
            here = ((labels >= start) & (labels < start + len(weight))).nonzero()[:, 0]
            residual[here, labels[here] - start] = torch.expm1(-nll[here])  # p_y - 1
            yield start, residual.mul_(scale).T @ hidden

    def sketch(self, sketch: Sketch, shape: Sequence[int]) -> Tensor:
        """Σ_t scale[b,t] left[b,t] right[b,t]ᵀ (B, rows · cols); sketches of other kinds need the residual."""
        if not isinstance(sketch, Kronecker):
            return torch.cat([grad_sketch(one.hidden, one.residual(), sketch) for one in self._one_by_one()])
        scores = head_scores(
            self.hidden.flatten(0, 1),
            self.weight,
            self.labels.flatten(),
            bias=self.bias,
            sketch=sketch,
            fields=(),
        )
        assert scores.left is not None
        assert scores.right is not None
        left = scores.left[0].view(*self.labels.shape, -1) * self.scale[..., None]
        return (left.mT @ scores.right[0].view(*self.labels.shape, -1)).flatten(1)

    def dense(self, shape: Sequence[int]) -> Tensor:
        """Multiplied out, (B, C, D)."""
        return (self.residual().mT @ self.hidden.to(self._wide)).reshape(-1, *shape)

    def scaled(self, factors: Tensor) -> Head:
        return replace(self, scale=self.scale * factors.to(self.scale)[:, None])

    def weighted(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        """Σ_b factors_b · gradient, (C, D): the fused loss's own."""
        with torch.enable_grad():
            weight = self.weight.detach().requires_grad_()
            losses = linear_cross_entropy(self.hidden.flatten(0, 1), weight, self.labels.flatten(), bias=self.bias)
            (total,) = torch.autograd.grad(losses, weight, self.scaled(factors).scale.flatten().to(losses.dtype))
        return total

    def residual(self) -> Tensor:
        """scale (p − y), (B, T, C): the gradient in the logits, which the fused layer never made."""
        bias = None if self.bias is None else self.bias.to(self._wide)
        p = F.linear(self.hidden.to(self._wide), self.weight.to(self._wide), bias).softmax(-1)
        target = self.labels.clamp(min=0)[..., None]
        p.scatter_add_(-1, target, p.new_full((1, 1, 1), -1).expand(target.shape))
        return p.mul_(self.scale.to(self._wide)[..., None]).masked_fill_((self.labels < 0)[..., None], 0)

    def bias_gradient(self) -> Tensor:
        """(B, C)."""
        return torch.cat([one.residual().sum(1) for one in self._one_by_one()])

    def bias_dot_by_position(self, direction: Tensor) -> Tensor:
        """Each position's part of the bias' gradient times a direction (C,), (B, T)."""
        return torch.cat([one.residual() @ direction.to(self._wide) for one in self._one_by_one()])

    @property
    def samples(self) -> int:
        return len(self.hidden)

    def part(self, samples: slice) -> Head:
        return Head(self.hidden[samples], self.weight, self.bias, self.labels[samples], self.scale[samples])

    def _one_by_one(self) -> list[Head]:
        return [self.part(slice(b, b + 1)) for b in range(self.samples)]

    def join(self, other: Head) -> Head:
        """Both uses of one weight, end to end along T."""
        pairs = ((self.hidden, other.hidden), (self.labels, other.labels), (self.scale, other.scale))
        hidden, labels, scale = (torch.cat(pair, 1) for pair in pairs)
        return Head(hidden, self.weight, self.bias, labels, scale)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.hidden.dtype, torch.float32)
