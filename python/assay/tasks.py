"""Tasks: what a batch is, how a model is run on it, and what one sample's loss is.

A sample's loss never depends on its neighbours in the batch or on padding, so that its score is a fact about
the sample. The one exception says so in its definition: a contrastive loss compares a sample with the rest of
its batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from assay import ops

IGNORE = -100
"""The label of a row at which nothing is predicted."""

_CHUNK = 1 << 19  # logits worked on at a time: 2 MiB of float32 stay in cache from one operation to the next


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives.

    ``losses`` (B,) float32, with their autograd graph; ``logits`` (N, C) and ``labels`` (N,) int64, one row
    per position, ``labels`` being -100 where nothing is predicted; ``rows`` (N,) int64, the sample that owns
    each row, or None when row i is sample i.
    """

    losses: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None
    rows: Tensor | None = None


@runtime_checkable
class Task(Protocol):
    """Runs a model on a batch and gives per-sample losses."""

    def size(self, batch: Any) -> int:
        """The number of samples, B."""
        ...

    def to(self, batch: Any, device: torch.device) -> Any:
        """The batch on ``device``, its tensors detached: nobody differentiates with respect to the data."""
        ...

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        """Run ``model`` once."""
        ...

    def mask(self, batch: Any) -> Tensor | None:
        """(B, T) bool, True at positions that hold data; None when every position does."""
        ...


@dataclass(frozen=True)
class Classification:
    """Batches ``(x, y)``: cross entropy of ``model(x)`` (B, C) against the class indices ``y`` (B,).

    ``x`` is a tensor, or a mapping of keyword arguments. Every label must lie in [0, C).
    """

    def size(self, batch: Any) -> int:
        return len(_pair(batch, "Classification", "(x, y)")[1])

    def to(self, batch: Any, device: torch.device) -> Any:
        return _to(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        x, y = _pair(batch, "Classification", "(x, y)")
        logits = _logits(_call(model, x))
        if logits.ndim != 2 or y.shape != logits.shape[:1]:
            raise ValueError(
                f"Classification: logits of shape {tuple(logits.shape)} and labels of shape "
                f"{tuple(y.shape)}; expected (B, C) and (B,)"
            )
        labels = _class_indices(y)
        _check_range(labels, logits.shape[1], ignore=None)
        return Outputs(row_losses(logits, labels).float(), logits, labels)

    def mask(self, batch: Any) -> Tensor | None:
        x, _ = _pair(batch, "Classification", "(x, y)")
        if isinstance(x, Mapping) and "attention_mask" in x:
            return _as_bool(x["attention_mask"])
        return None


@dataclass(frozen=True)
class Regression:
    """Batches ``(x, y)``: the mean over a sample's outputs of (prediction - y)²; no factor of one half.

    ``model(x)`` and ``y`` must have the same shape (B, ...): (B,) against (B, 1) would broadcast to (B, B).
    """

    def size(self, batch: Any) -> int:
        return len(_pair(batch, "Regression", "(x, y)")[1])

    def to(self, batch: Any, device: torch.device) -> Any:
        return _to(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        x, y = _pair(batch, "Regression", "(x, y)")
        prediction = _logits(_call(model, x))
        if prediction.shape != y.shape:
            raise ValueError(
                f"Regression: prediction of shape {tuple(prediction.shape)} and target of shape "
                f"{tuple(y.shape)}; expected equal shapes: reshape the target"
            )
        prediction = _wide(prediction)
        squares = (prediction - y.to(prediction.dtype)).square()
        return Outputs(squares.flatten(1).mean(1).float() if squares.ndim > 1 else squares.float())

    def mask(self, batch: Any) -> Tensor | None:
        return None


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction. Batches are mappings: ``input_ids`` (B, T), and optionally ``attention_mask``
    (B, T), ``labels`` (B, T; default ``input_ids``) and further arguments of the model such as
    ``position_ids``.

    A sample's loss is the mean (``reduction="sum"``: the sum) over its predicted tokens: those whose label is
    not -100 and that, with the position before them, are not padding. A sample without any has loss NaN and
    gradient 0.

    Logits keep all T positions, so that they are a view of the model's own: the label of position t is token
    t + 1, and -100 at the last. The mask must be ones, then zeros (padding on the right): with any other the
    model counts positions from the padding, unless the batch has ``position_ids``.
    """

    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"CausalLM: reduction {self.reduction!r}; expected 'mean' or 'sum'")

    def size(self, batch: Any) -> int:
        return self._ids(batch).shape[0]

    def to(self, batch: Any, device: torch.device) -> Any:
        return _to(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        ids = self._ids(batch)
        logits = _logits(model(**self._arguments(model, batch)))
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ValueError(
                f"CausalLM: logits of shape {tuple(logits.shape)} for input_ids of shape {tuple(ids.shape)}; "
                "expected (B, T, vocabulary)"
            )
        size, length, classes = logits.shape
        labels = self._next_tokens(batch)
        _check_range(labels, classes, ignore=IGNORE)
        flat = logits.reshape(size * length, classes)
        totals = row_losses(flat, labels.reshape(-1)).view(size, length).sum(1)
        predicted = (labels != IGNORE).sum(1)
        losses = totals / predicted.clamp(min=1) if self.reduction == "mean" else totals
        # where() sends no gradient to what it did not choose: a NaN here harms nobody's gradient.
        losses = torch.where(predicted > 0, losses, torch.nan).float()
        rows = torch.arange(size, device=logits.device).repeat_interleave(length)
        return Outputs(losses, flat, labels.reshape(-1), rows)

    def mask(self, batch: Any) -> Tensor:
        ids = self._ids(batch)
        given = batch.get("attention_mask")
        if given is None:
            return torch.ones_like(ids, dtype=torch.bool)
        if given.shape != ids.shape:
            raise ValueError(
                f"CausalLM: attention_mask of shape {tuple(given.shape)} for input_ids of shape "
                f"{tuple(ids.shape)}; expected the same shape, one value per token"
            )
        return _as_bool(given)

    def _ids(self, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise TypeError(f"CausalLM: a batch is a mapping with a tensor 'input_ids', got {_describe(batch)}")
        ids: Tensor = batch["input_ids"]
        if ids.ndim != 2:
            raise ValueError(f"CausalLM: input_ids of shape {tuple(ids.shape)}; expected (B, T)")
        return ids

    def _next_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T): the token that each position has to predict, -100 where none."""
        ids, mask = self._ids(batch), self.mask(batch)
        given = batch.get("labels", ids)
        if given.shape != ids.shape:
            raise ValueError(
                f"CausalLM: labels of shape {tuple(given.shape)} for input_ids of shape {tuple(ids.shape)}; "
                "expected the same shape (they are shifted here, not by the caller)"
            )
        labels = torch.full_like(ids, IGNORE, dtype=torch.int64)
        labels[:, :-1] = given[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORE)
        return labels

    def _arguments(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        mask = self.mask(batch)
        if "position_ids" not in batch and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(
                "CausalLM: a sample has padding before its tokens, so that the model would count positions "
                "from the padding; pad on the right, or put position_ids into the batch"
            )
        arguments = {name: value for name, value in batch.items() if name != "labels"}
        arguments["use_cache"] = False
        parameters = inspect.signature(model.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            # A plain module may know neither: padding on the right cannot reach a causal model's real
            # positions.
            for name in {"use_cache", "attention_mask"} - parameters.keys():
                arguments.pop(name, None)
        return arguments


@dataclass(frozen=True)
class Contrastive:
    """Batches ``(images, texts)``: the CLIP loss, which couples the samples of a batch.

    A sample's loss is the mean of its own row (its image against all texts) and its own column (its text
    against all images) *with the other samples' embeddings held fixed*: only so does a sample have a gradient
    of its own.

    The model returns ``(image_embeds, text_embeds)``, both (B, D) as they are to be compared (CLIP normalises
    them), with the temperature's multiplier as a third item, as open_clip does; or an object with these two
    attributes, as Hugging Face does. Without a third item the multiplier is ``exp(model.logit_scale)``;
    ``scale`` replaces whatever the model says. It is called ``model(images, texts)``, or, when ``texts`` is a
    mapping (a tokenizer's output), ``model(pixel_values=images, **texts)``.
    """

    scale: float | None = None

    def size(self, batch: Any) -> int:
        return len(_pair(batch, "Contrastive", "(images, texts)")[0])

    def to(self, batch: Any, device: torch.device) -> Any:
        return _to(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        images, texts = _pair(batch, "Contrastive", "(images, texts)")
        by_name = isinstance(texts, Mapping)
        output = model(pixel_values=images, **texts) if by_name else model(images, texts)
        image, text, scale = self._embeddings(model, output)
        pairs = (image * text).sum(1, keepdim=True)
        own = torch.eye(len(image), dtype=torch.bool, device=image.device)
        rows = torch.where(own, pairs, image @ text.detach().T) * scale
        columns = torch.where(own, pairs, text @ image.detach().T) * scale
        labels = torch.arange(len(image), device=image.device)
        losses = (row_losses(rows, labels) + row_losses(columns, labels)) / 2
        return Outputs(losses.float(), rows, labels)

    def mask(self, batch: Any) -> Tensor | None:
        return None

    def _embeddings(self, model: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor | float]:
        if isinstance(output, tuple) and len(output) in (2, 3):
            image, text = output[:2]
        elif hasattr(output, "image_embeds") and hasattr(output, "text_embeds"):
            image, text = output.image_embeds, output.text_embeds
        else:
            raise TypeError(
                f"Contrastive: the model returned {_describe(output)}; expected (image_embeds, text_embeds"
                "[, logit_scale]) or an object with image_embeds and text_embeds"
            )
        if image.ndim != 2 or image.shape != text.shape:
            raise ValueError(
                f"Contrastive: image_embeds of shape {tuple(image.shape)} and text_embeds of shape "
                f"{tuple(text.shape)}; expected (B, D) both"
            )
        return _wide(image), _wide(text), self._multiplier(model, output)

    def _multiplier(self, model: nn.Module, output: Any) -> Tensor | float:
        if self.scale is not None:
            return self.scale
        if isinstance(output, tuple) and len(output) == 3:
            scale: Tensor | float = output[2]
            return scale
        logarithm = getattr(model, "logit_scale", None)
        if not isinstance(logarithm, Tensor):
            raise ValueError(
                "Contrastive: the model returns no logit_scale and has no parameter of that name; "
                "give the multiplier: Contrastive(scale=100.0)"
            )
        return logarithm.exp()


class _RowLosses(torch.autograd.Function):
    """Cross entropy of rows in float32 or wider that keeps the logits as they are and two numbers per row.

    ``F.cross_entropy(logits.float())`` would keep two more tensors of the logits' size; here the gradient is the only
    one, written in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = ops.ensemble_stats([logits], labels, ignore_index=IGNORE, fields=("nll",)).nll
        assert losses is not None
        peak = _wide(logits.amax(1) if logits.numel() else logits.new_zeros(len(logits)))
        target = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        # log Σ e^z as (maximum, log of the rest): under a large common offset their sum would lose digits
        spread = losses + (_wide(target) - peak)
        impossible = target == -torch.inf  # ∞ − ∞: an infinite loss has a gradient all the same
        if bool(impossible.any()):
            spread[impossible] = (_wide(logits[impossible]) - peak[impossible, None]).exp().sum(1).log()
        ctx.save_for_backward(logits, labels, peak, spread)
        return losses.masked_fill(labels == IGNORE, 0)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        logits, labels, peak, spread = ctx.saved_tensors
        (outer,) = outputs
        grads = torch.empty_like(logits)
        for part in _row_parts(logits):
            wide = grads[part] if grads.dtype == peak.dtype else torch.empty_like(grads[part], dtype=peak.dtype)
            torch.sub(logits[part], peak[part, None], out=wide)
            wide.sub_(spread[part, None]).exp_()
            target = labels[part].clamp(min=0)[:, None]
            wide.scatter_add_(1, target, wide.new_full((1, 1), -1).expand_as(target))
            wide.mul_(outer[part, None]).masked_fill_(labels[part, None] == IGNORE, 0)
            if wide.dtype != grads.dtype:
                grads[part] = wide
        return grads, None


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, C), (N,) int64 -> (N,): each row's cross entropy in float32 (float64 if the logits are), 0 at -100.

    Labels must lie in [0, C) or be -100. One row's NaN stays in its row; an ignored row has gradient 0.
    """
    losses: Tensor = _RowLosses.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses


def _row_parts(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(1, logits.shape[1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _as_bool(mask: Tensor) -> Tensor:
    return mask != 0


def _call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, Mapping) else model(x)


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returned {_describe(output)}; expected a tensor or an object with .logits")
    return logits


def _pair(batch: Any, task: str, form: str) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"{task}: a batch is a pair {form}, got {_describe(batch)}")
    return batch[0], batch[1]


def _class_indices(labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels of dtype {labels.dtype}; expected integer class indices")
    return labels.long()


def _check_range(labels: Tensor, classes: int, ignore: int | None) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if ignore is not None:
        wrong &= labels != ignore
    if bool(wrong.any()):
        allowed = f"[0, {classes})" + (f" or {ignore}" if ignore is not None else "")
        raise ValueError(f"label {int(labels[wrong][0])} lies outside {allowed}, the classes of the model's logits")


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # Autograd cannot save a tensor that was made in inference mode; a copy it can.
        return (value.clone() if value.is_inference() else value.detach()).to(device)
    if isinstance(value, Mapping):
        return {name: _to(item, device) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_to(item, device) for item in value)
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
