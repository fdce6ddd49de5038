"""The loss that a model of transformers gives for a batch, split into its samples' losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.probe.quiet import undisturbed
from assay.tasks.base import to_device

IGNORE = -100


@dataclass(frozen=True)
class TokenLosses:
    """Losses by token, (B, T) with a graph, of labels that are aligned with them, and which of the tokens count."""

    losses: Tensor
    counted: Tensor

    def as_wide_as(self, other: TokenLosses) -> TokenLosses:
        """With as many columns: the last ones, in which nothing counts, are there or not."""
        more = other.losses.shape[1] - self.losses.shape[1]
        if more < 0 and bool(self.counted[:, more:].any()):
            return self
        return TokenLosses(F.pad(self.losses, (0, more)), F.pad(self.counted, (0, more)))

    def means(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B,), over each sample's tokens that count, and (B,) float, how many those are."""
        counts = self.counted.sum(1)
        if bool((counts == 0).any()):
            raise RuntimeError(
                f"sample {int((counts == 0).nonzero()[0])} of the batch has nothing to predict, all its labels are "
                f"{IGNORE}, so that it has no loss and no score; leave such samples out of the training data"
            )
        losses = self.losses if weights is None else self.losses * weights
        return losses.masked_fill(~self.counted, 0).sum(1) / counts, counts.float()


@dataclass(frozen=True)
class ModelLosses:
    """Losses by sample, and what the trainer is given in their place.

    The model's output holds a copy of a leaf in place of its loss (of transformers) or of its tokens' log
    probabilities (of the head that TRL fuses); the trainer makes its loss of it, and the gradient of that loss with
    respect to the leaf says exactly what the trainer multiplied the model's loss with.

    Attributes:
        losses: (B,), with a graph: the mean over a sample's tokens.
        counts: (B,) float, of a sample's tokens; 1 where it has none.
        leaf: what the trainer sees.
        unit: of the model's loss, that is unit · Σ_b counts_b losses_b; None: the leaf holds tokens.
        counted: (B, T), which tokens of the leaf are.
        tokens: what the losses are means of; None where a sample has none.
        logits, labels: (B, C) and (B,), of classification; else None.
    """

    losses: Tensor
    counts: Tensor
    leaf: Tensor
    unit: Tensor | None = None
    counted: Tensor | None = None
    tokens: TokenLosses | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None

    def multiplier(self, loss: Tensor) -> Tensor:
        """(), m: the trainer's loss is m Σ_b counts_b losses_b.

        Raises:
            RuntimeError: it is not.
        """
        found = torch.autograd.grad(loss, self.leaf, allow_unused=True)[0] if loss.requires_grad else None
        if found is None:
            raise RuntimeError(
                "the loss that the trainer backpropagates is not made of the model's own loss, so that weights would "
                "be lost: leave compute_loss to the trainer, without label smoothing or a loss of your own"
            )
        whole, part = loss.detach(), (found * self.leaf.detach()).sum()
        if not _close(whole, part):
            raise RuntimeError(
                f"the trainer's loss is {float(whole):.6g}, and the model's part of it {float(part):.6g}: a "
                "compute_loss override or a load-balancing loss adds what has no samples; leave it out"
            )
        if self.counted is None:
            assert self.unit is not None
            return found * self.unit
        tokens = -found[self.counted]
        if not torch.allclose(tokens, tokens[:1].expand_as(tokens), rtol=1e-4, atol=0):
            raise RuntimeError("the trainer weighs tokens of its own accord; expected each to count alike")
        return tokens[0]


def split_loss(model: nn.Module, arguments: Mapping[str, Any], output: Any) -> ModelLosses:
    """Split the loss in a model's output, and put a leaf in its place.

    Args:
        model: called with ``arguments``.
        output: a mapping, which is changed.

    Raises:
        RuntimeError: it has no loss, or one that is not cross-entropy (or one of the losses of a classifier of
            transformers) of ``labels``.
    """
    if not isinstance(output, dict):
        raise RuntimeError(f"the model gave a {type(output).__name__}; expected a mapping with its loss and logits")
    with torch.autocast(_device(output).type, enabled=False):
        return _fused(output) if output.get("log_probs") is not None else _plain(model, arguments, output)


def reference_losses(reference: nn.Module, args: Any, arguments: Mapping[str, Any]) -> ModelLosses:
    """The losses of another model on what a model is called with, in eval mode, on its own device.

    Raises:
        RuntimeError: as ``split_loss``.
    """
    device = next(reference.parameters()).device
    own = {name: value for name, value in arguments.items() if name not in ("fused_lm_head", "num_items_in_batch")}
    with undisturbed(reference), torch.no_grad():
        args, own = to_device(args, device), to_device(own, device)
        output = reference(*args, **own)
        return split_loss(reference, own, output)


def _fused(output: dict[str, Any]) -> ModelLosses:
    """Of TRL's head: log probabilities by token, 0 where the label is ignored."""
    counted, values = output["label_mask"], output["log_probs"]
    leaf = values.detach().requires_grad_()
    tokens = TokenLosses(-values.float(), counted)
    losses, counts = tokens.means()
    output["log_probs"] = leaf.clone()
    for name in ("loss", "entropy"):  # nothing is learned of them: let their graphs go
        if output.get(name) is not None:
            output[name] = output[name].detach()
    return ModelLosses(losses, counts, leaf, counted=counted, tokens=tokens)


def _plain(model: nn.Module, arguments: Mapping[str, Any], output: dict[str, Any]) -> ModelLosses:
    total, logits = output.get("loss"), output.get("logits")
    labels = arguments.get("labels")
    if total is None or logits is None or labels is None:
        missing = [n for n, v in (("loss", total), ("logits", logits), ("labels", labels)) if v is None]
        raise RuntimeError(
            f"the model ran without {' or '.join(missing)}, of which losses by sample are made; expected 'labels' in "
            "the batch, and a model that returns a loss and logits"
        )
    total = total.detach()  # its graph goes, before another is made
    leaf = total.clone().requires_grad_()
    output["loss"] = leaf.clone()  # which the trainer multiplies in place
    items = arguments.get("num_items_in_batch")
    seen = None
    for losses, counts, tokens in _by_sample(model, logits, labels, arguments.get("shift_labels")):
        summed = (losses.detach() * counts).sum()
        units = [1 / counts.sum()] if items is None else [1 / torch.as_tensor(items).to(counts), 1 / counts.sum()]
        unit = min(units, key=lambda u: abs(float(u * summed) - float(total)))
        seen = unit * summed if seen is None else seen
        if _close(total, unit * summed) or not math.isfinite(float(summed)):
            by_sample = logits.ndim == 2
            classes = (logits.detach(), labels) if by_sample else (None, None)
            return ModelLosses(losses, counts, leaf, unit, None, tokens if logits.ndim == 3 else None, *classes)
    raise RuntimeError(
        f"{type(model).__name__} gives the loss {float(total):.6g}"
        + ("" if seen is None else f", and its logits and labels {float(seen):.6g}")
        + f" (logits {tuple(logits.shape)}, labels {tuple(labels.shape)}): expected cross-entropy by token or sample, "
        "or what transformers trains classifiers of several labels and regressions with. With a loss of its own, or a "
        "load-balancing term, train in a loop of yours with Reweighter.backward"
    )


def _by_sample(
    model: nn.Module, logits: Tensor, labels: Tensor, shift_labels: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, TokenLosses | None]]:
    """What the model's loss may be made of, the likeliest first: (B,) losses, (B,) counts, and what they are of."""
    labels = labels.to(logits.device)
    if logits.ndim == 3 and labels.shape == logits.shape[:2] and not labels.is_floating_point():
        if shift_labels is not None:
            yield _tokens(logits, shift_labels.to(logits.device))
            return
        moved = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        for targets in (moved, labels) if _shifts(model) else (labels, moved):
            yield _tokens(logits, targets)
    elif (logits.ndim == 2 and labels.shape == logits.shape) or labels.numel() == logits.numel() == len(logits):
        targets = labels.view(logits.shape).float()
        squared = (logits.float() - targets).square()
        yield _rows(squared)
        yield _rows(F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none"))
    elif logits.ndim == 2 and labels.numel() == len(logits) and not labels.is_floating_point():
        yield _tokens(logits[:, None], labels.view(-1, 1))


def _tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, TokenLosses]:
    """Cross-entropy of (B, T, C) with (B, T), a mean over each sample's tokens that are not ignored."""
    rows = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    tokens = TokenLosses(rows.view(targets.shape), targets != IGNORE)
    return *tokens.means(), tokens


def _rows(values: Tensor) -> tuple[Tensor, Tensor, None]:
    losses = values.flatten(1).mean(1) if values.ndim > 1 else values
    return losses, torch.ones_like(losses, requires_grad=False), None


def _shifts(model: Any) -> bool:
    """Whether the labels are likely those of the positions before: what turns out otherwise is tried otherwise."""
    aligned = ("ForMaskedLM", "ForTokenClassification")
    return getattr(model, "loss_type", None) not in aligned and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )


def _device(output: Mapping[str, Any]) -> torch.device:
    for value in output.values():
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal as far as sums of the same numbers are, in the coarser of two types."""
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    rtol = max(1e-4, 4 * eps)
    return math.isclose(float(found), float(expected), rel_tol=rtol, abs_tol=1e-5)
