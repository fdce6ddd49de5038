"""The loss that a model of transformers gives for a batch, split into its samples' losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.probe.company import Company, signature
from assay.probe.packing import Packing
from assay.probe.quiet import undisturbed
from assay.tasks.base import to_device
from assay.train.tokens import IGNORE, TokenLosses


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


def split_loss(
    model: nn.Module, arguments: Mapping[str, Any], output: Any, packing: Packing | None = None
) -> ModelLosses:
    """Split the loss in a model's output, and put a leaf in its place.

    Args:
        model: called with ``arguments``.
        output: a mapping, which is changed.
        packing: of rows that hold many samples.

    Raises:
        RuntimeError: it has no loss, or one that is not cross-entropy (or one of the losses of a classifier of
            transformers) of ``labels``.
    """
    if not isinstance(output, dict):
        raise RuntimeError(f"the model gave a {type(output).__name__}; expected a mapping with its loss and logits")
    with torch.autocast(_device(output).type, enabled=False):
        if output.get("log_probs") is not None:
            return _fused(output, packing)
        return _plain(model, arguments, output, packing)


def reference_losses(
    reference: nn.Module,
    args: Any,
    arguments: Mapping[str, Any],
    packing: Packing | None = None,
    apart: set[tuple[Any, ...]] | None = None,
) -> ModelLosses:
    """The losses of another model on what a model is called with, in eval mode, on its own device.

    Args:
        apart: ways of calling it in which it has kept the samples of packed rows apart; it grows.

    Raises:
        RuntimeError: as ``split_loss``; or samples of a packed row see one another.
    """
    device = next(reference.parameters()).device
    own = {name: value for name, value in arguments.items() if name not in ("fused_lm_head", "num_items_in_batch")}
    if packing is not None and getattr(getattr(reference, "config", None), "use_cache", None):
        own["use_cache"] = False  # a model with a cache takes a row for one sample
    args, own = to_device(args, device), to_device(own, device)
    if packing is not None and apart is not None:
        _keep_apart(reference, args, own, packing, apart)
    with undisturbed(reference), torch.no_grad():
        output = reference(*args, **own)
        return split_loss(reference, own, output, packing)


def _keep_apart(
    reference: nn.Module, args: Any, own: dict[str, Any], packing: Packing, apart: set[tuple[Any, ...]]
) -> None:
    """RuntimeError where a reference lets samples of a packed row see one another; looked at once for each way of
    calling it."""
    how = signature(args, own)
    if how in apart or not packing.has_company:
        return
    company = Company(packing)
    with undisturbed(reference), torch.enable_grad():
        with company.watched(reference):
            output = reference(*args, **own)
        losses = split_loss(reference, own, output, packing).losses
        try:
            known = company.check(losses)
        except RuntimeError as error:
            raise RuntimeError(f"ReweightMixin: reference: {error}") from error
    if known:
        apart.add(how)


def _fused(output: dict[str, Any], packing: Packing | None) -> ModelLosses:
    """Of TRL's head: log probabilities by token, 0 where the label is ignored."""
    counted, values = output["label_mask"], output["log_probs"]
    leaf = values.detach().requires_grad_()
    tokens = TokenLosses(-values.float(), counted, packing)
    losses, counts = tokens.means()
    output["log_probs"] = leaf.clone()
    for name in ("loss", "entropy"):  # nothing is learned of them: let their graphs go
        if output.get(name) is not None:
            output[name] = output[name].detach()
    return ModelLosses(losses, counts, leaf, counted=counted, tokens=tokens)


def _plain(
    model: nn.Module, arguments: Mapping[str, Any], output: dict[str, Any], packing: Packing | None
) -> ModelLosses:
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
    for losses, counts, tokens in _by_sample(model, logits, labels, arguments.get("shift_labels"), packing):
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
    model: nn.Module, logits: Tensor, labels: Tensor, shift_labels: Tensor | None, packing: Packing | None
) -> Iterator[tuple[Tensor, Tensor, TokenLosses | None]]:
    """What the model's loss may be made of, the likeliest first: (B,) losses, (B,) counts, and what they are of."""
    labels = labels.to(logits.device)
    if logits.ndim == 3 and labels.shape == logits.shape[:2] and not labels.is_floating_point():
        if shift_labels is not None:
            yield _tokens(logits, shift_labels.to(logits.device), packing)
            return
        moved = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        for targets in (moved, labels) if _shifts(model) else (labels, moved):
            yield _tokens(logits, targets, packing)
    elif packing is not None:
        return  # a sample has no row of its own
    elif (logits.ndim == 2 and labels.shape == logits.shape) or labels.numel() == logits.numel() == len(logits):
        targets = labels.view(logits.shape).float()
        squared = (logits.float() - targets).square()
        yield _rows(squared)
        yield _rows(F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none"))
    elif logits.ndim == 2 and labels.numel() == len(logits) and not labels.is_floating_point():
        yield _tokens(logits[:, None], labels.view(-1, 1))


def _tokens(logits: Tensor, targets: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor, TokenLosses]:
    """Cross-entropy of (R, T, C) with (R, T), a mean over each sample's tokens that are not ignored."""
    rows = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    tokens = TokenLosses(rows.view(targets.shape), targets != IGNORE, packing)
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
