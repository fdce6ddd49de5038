"""Weights of tokens: train on those that a reference finds easier than the model does."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from assay.train.weights import best_share, gathered


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
