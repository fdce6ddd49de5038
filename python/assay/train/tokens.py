"""Losses of tokens: their means by sample, and weights for those that a reference finds easier than the model does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from assay.probe.packing import Packing
from assay.tasks.base import wide
from assay.train.weights import best_share, gathered

IGNORE = -100


def token_weights(
    losses: Tensor,
    reference_losses: Tensor,
    keep: float,
    counted: Tensor | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Selective language modelling: N / n for the n tokens with the highest excess loss, 0 for the others.

    *Rho-1: Not All Tokens Are What You Need*, 2404.07965. The excess of a token is its loss less its loss under a
    reference; the best share ``keep`` of the N counted tokens of the global batch is kept, of equal ones the first, and
    the paper's loss is the mean over those. Weights make it of whatever mean over all N counted tokens the loop takes::

        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        weights = assay.train.token_weights(losses, reference_losses, 0.6, targets != -100)
        loss = (weights * losses).sum() / (targets != -100).sum()

    Their mean over the counted tokens is 1. With several processes it is so over all of them: divide by the tokens of
    all processes over their number, as ``DistributedDataParallel`` averages the gradients.

    Args:
        losses: (B, T), of each token, as the model in training has them.
        reference_losses: (B, T), the reference's of the same tokens.
        keep: in (0, 1]; the paper's is 0.6 to 0.7.
        counted: (B, T) bool, which tokens have a loss; None: all.
        process_group: over which a batch is global; None: the default group, or this process alone if there is none.

    Returns:
        (B, T) float32, without a graph. A token whose reference loss is not finite is never kept.

    Raises:
        ValueError: shapes that differ, or ``keep`` out of its range.
        RuntimeError: a counted token's own loss is not finite; none can be kept. On every process alike.
    """
    counted = _check(losses, reference_losses, keep, counted)
    own = losses.detach()[counted].double()
    excess = own - reference_losses.detach().to(losses.device)[counted].double()
    everyone, mine = gathered(torch.stack([excess, own.isfinite().double()], 1), process_group)
    finite = everyone[:, 1].bool()
    if not bool(finite.all()):
        raise RuntimeError(
            f"token_weights: {int((~finite).sum())} of the batch's {len(finite)} counted losses are not finite; "
            "expected finite losses"
        )
    scores = torch.where(everyone[:, 0].isfinite(), everyone[:, 0], torch.nan)
    if bool(scores.isnan().all()):
        raise RuntimeError(
            f"token_weights: none of the batch's {len(scores)} counted tokens has a finite reference loss; expected "
            "tokens to choose from"
        )
    weights = torch.zeros(losses.shape, dtype=torch.float32, device=losses.device)
    weights[counted] = best_share(scores, keep)[mine].float()
    return weights


def sample_means(losses: Tensor, counted: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """The mean loss of each sample's tokens -> (B,), differentiable.

    Args:
        losses: (R, T), by token.
        counted: (R, T) bool, which tokens have a loss, for instance ``targets != -100``.
        seq_idx: (R, T) int64, of packed rows: the sample that each position belongs to, from 0 on, −1 for nobody's;
            None: a row is a sample.

    Raises:
        ValueError: shapes that differ, or samples without a position.
        RuntimeError: a sample has no token that counts.
    """
    if losses.ndim != 2 or losses.shape != counted.shape or counted.dtype != torch.bool:
        raise ValueError(
            f"sample_means: losses {tuple(losses.shape)} and counted {tuple(counted.shape)} of {counted.dtype}; "
            "expected one shape, (R, T), the second of bool"
        )
    if seq_idx is not None and seq_idx.shape != losses.shape:
        raise ValueError(f"sample_means: seq_idx {tuple(seq_idx.shape)}; expected {tuple(losses.shape)}")
    packing = None if seq_idx is None else Packing.of(seq_idx)
    return TokenLosses(losses, counted, packing).means()[0]


@dataclass(frozen=True)
class TokenLosses:
    """Losses by token, (R, T) with a graph, of labels that are aligned with them, and which of the tokens count.

    ``packing``: of rows that hold many samples; else a row is a sample.
    """

    losses: Tensor
    counted: Tensor
    packing: Packing | None = None

    def as_wide_as(self, other: TokenLosses) -> TokenLosses:
        """With as many columns: the last ones, in which nothing counts, are there or not."""
        more = other.losses.shape[1] - self.losses.shape[1]
        if more < 0 and bool(self.counted[:, more:].any()):
            return self
        return TokenLosses(F.pad(self.losses, (0, more)), F.pad(self.counted, (0, more)), self.packing)

    def means(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B,), over each sample's tokens that count, and (B,) float, how many those are."""
        counts = self._sums(self.counted.float())
        if bool((counts == 0).any()):
            raise RuntimeError(
                f"sample {int((counts == 0).nonzero()[0])} of the batch has nothing to predict, all its labels are "
                f"{IGNORE}, so that it has no loss and no score; leave such samples out of the training data"
            )
        losses = self.losses if weights is None else self.losses * weights
        return self._sums(losses.masked_fill(~self.counted, 0)) / counts, counts

    def _sums(self, values: Tensor) -> Tensor:
        return wide(values).sum(1) if self.packing is None else self.packing.sums(values)


def _check(losses: Tensor, reference_losses: Tensor, keep: float, counted: Tensor | None) -> Tensor:
    """Which tokens count."""
    if counted is None:
        counted = torch.ones_like(losses, dtype=torch.bool, requires_grad=False)
    if not losses.ndim == 2 or not losses.shape == reference_losses.shape == counted.shape:
        raise ValueError(
            f"token_weights: losses {tuple(losses.shape)}, reference_losses {tuple(reference_losses.shape)} and "
            f"counted {tuple(counted.shape)}; expected one shape, (B, T), a number per token: reduction='none'"
        )
    if counted.dtype != torch.bool:
        raise ValueError(f"token_weights: counted of {counted.dtype}; expected bool, for instance labels != -100")
    if not 0 < keep <= 1:
        raise ValueError(f"token_weights: keep: expected a share in (0, 1], found {keep}")
    return counted.to(losses.device)
