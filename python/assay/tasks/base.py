"""What every task is made of: its outputs, its protocol, and small helpers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from assay.tasks.output_layer import OutputLayer

IGNORE = -100
"""The label of a row at which nothing is predicted."""


SUM_TOLERANCE = 1e-4
"""How far the sum of a soft label's probabilities may be from 1."""


class Lazy:
    """A data class' field that may be given as a function without arguments: it is called when first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return None  # the field's default
        value = instance.__dict__[self.name]
        if callable(value) and not isinstance(value, Tensor):
            value = instance.__dict__[self.name] = value()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value


def is_made(instance: Any, name: str) -> bool:
    """Whether a ``Lazy`` field has its value already."""
    value = instance.__dict__[name]
    return isinstance(value, Tensor) or not callable(value)


def later(instance: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """A ``Lazy`` field's value, changed; what makes that, if it has not been made."""
    return change(getattr(instance, name)) if is_made(instance, name) else lambda: change(getattr(instance, name))


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives.

    ``losses`` (B,) float32, with their autograd graph; ``logits`` (N, C) and ``labels`` (N,) int64, one row
    per position, ``labels`` being -100 where nothing is predicted; ``rows`` (N,) int64, the sample that owns
    each row, or None when row i is sample i. With an ``output_layer`` the logits have not been made: reading
    them makes them. ``row_losses``, (B,) or (B, T) with their graph, are the cross entropies that the losses are made
    of, 0 where nothing is predicted. Without a graph, both may be given as functions. ``prediction`` and ``target``,
    (B, ...) both, are a regression's, which has neither logits nor labels.
    """

    losses: Tensor = Lazy()  # type: ignore[assignment]
    logits: Tensor | None = Lazy()  # type: ignore[assignment]
    labels: Tensor | None = None
    rows: Tensor | None = None
    output_layer: OutputLayer | None = None
    row_losses: Tensor | None = Lazy()  # type: ignore[assignment]
    prediction: Tensor | None = None
    target: Tensor | None = None

    def with_losses(self, losses: Tensor) -> Outputs:
        """The same outputs with other losses; logits that have not been made stay so."""
        other = copy.copy(self)
        object.__setattr__(other, "losses", losses)
        return other


@runtime_checkable
class Task(Protocol):
    """Runs a model on a batch and gives per-sample losses. Equal tasks do the same, and have a hash: of a data class,
    ``@dataclass(frozen=True)``."""

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
class OfTask:
    """What a task that is made of another has from it: its batches."""

    task: Task

    def size(self, batch: Any) -> int:
        return self.task.size(batch)

    def to(self, batch: Any, device: torch.device) -> Any:
        return self.task.to(batch, device)

    def mask(self, batch: Any) -> Tensor | None:
        return self.task.mask(batch)


def base_task(task: Task) -> Task:
    """The task that runs the model.

    A task that only reads other losses off another one's forward pass has that one as ``task``, and a ``read`` from its
    outputs to its own: both are had from one pass.
    """
    return base_task(_own(task)) if hasattr(task, "read") else task


def read(task: Task, outputs: Outputs) -> Outputs:
    """A task's outputs from those of its base task."""
    return task.read(read(_own(task), outputs)) if hasattr(task, "read") else outputs


def _own(task: Any) -> Task:
    inner: Task = task.task
    return inner


class Labelled(Protocol):
    """``Outputs``, and a probe's signals."""

    @property
    def labels(self) -> Tensor | None: ...
    @property
    def rows(self) -> Tensor | None: ...
    @property
    def target(self) -> Tensor | None: ...


def unlabelled(outputs: Labelled, samples: int) -> Tensor | None:
    """(B,) bool: the samples of which nothing is predicted: all their labels are -100, or a number of their target is
    NaN. None where the task has neither."""
    labels, rows = outputs.labels, outputs.rows
    if outputs.target is not None:
        return outputs.target.isnan().reshape(samples, -1).any(1)
    if labels is None:
        return None
    predicted = (labels != IGNORE).long()
    if rows is not None:
        predicted = torch.zeros(samples, dtype=torch.long, device=labels.device).index_add_(0, rows, predicted)
    return predicted == 0


@runtime_checkable
class Relabels(Protocol):
    """A task whose rows can be given other labels."""

    def relabelled(self, batch: Any, labels: Tensor) -> Any:
        """The batch with these labels, (N,) int64, one for each row of the outputs; -100 where nothing is predicted."""
        ...


@runtime_checkable
class ByToken(Protocol):
    """A task whose samples are tokens, (B, T), and that knows which token each row of its outputs is about."""

    def by_token(self, values: Tensor, labels: Tensor, samples: int) -> Tensor:
        """Rows' numbers and labels, (N,) both -> (B, T), the number of each token; NaN where none is predicted."""
        ...


def unfused(task: Task) -> Task:
    """The same task with every loss taken from the model's own logits: what a fused loss is checked against."""
    make = getattr(task, "unfused", None)
    found: Task = make() if callable(make) else task
    return found


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 if it is float64 already: what sums are held in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_bool(mask: Tensor) -> Tensor:
    return mask != 0


def call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, Mapping) else model(x)


def logits_of(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returned {describe(output)}; expected a tensor or an object with .logits")
    return logits


def pair(batch: Any, task: str, form: str) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"{task}: a batch is a pair {form}, got {describe(batch)}")
    return batch[0], batch[1]


def class_indices(labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels of dtype {labels.dtype}; expected integer class indices")
    return labels.long()


def outside_range(labels: Tensor, classes: int, ignore: int | None) -> Tensor:
    """Which labels are neither a class nor ``ignore``."""
    wrong = (labels < 0) | (labels >= classes)
    return wrong if ignore is None else wrong & (labels != ignore)


def check_range(labels: Tensor, classes: int, ignore: int | None) -> None:
    wrong = outside_range(labels, classes, ignore)
    if bool(wrong.any()):
        allowed = f"[0, {classes})" + (f" or {ignore}" if ignore is not None else "")
        raise ValueError(f"label {int(labels[wrong][0])} lies outside {allowed}, the classes of the model's logits")


def check_probabilities(labels: Tensor) -> None:
    """ValueError unless every row of (B, C) is a distribution: not negative, and of sum 1 within ``SUM_TOLERANCE``."""
    values = labels.detach().double()
    off = (values.sum(1) - 1).abs()
    wrong = ~((values >= 0).all(1) & (off <= SUM_TOLERANCE))  # NaN is neither
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        least, total = float(values[row].min()), float(values[row].sum())
        raise ValueError(
            f"soft label of row {row}: its smallest value is {least:.6g}, its sum {total:.6g}; expected probabilities, "
            f"not negative and of sum 1 within {SUM_TOLERANCE:g}"
        )


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # Autograd cannot save a tensor that was made in inference mode; a copy it can.
        own = value.clone() if value.is_inference() else value.detach()
        if device.type == "cuda" and not own.is_cuda:
            return own.pin_memory().to(device, non_blocking=True)  # the copy goes on while this thread does
        return own.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return _like(value, [to_device(item, device) for item in value])
    return value


def _like(value: Any, items: Sequence[Any]) -> Any:
    """A tuple, of the names that a named one has."""
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def token_ids(task: str, batch: Any) -> Tensor:
    """A batch's ``input_ids``, (B, T), checked."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise TypeError(f"{task}: a batch is a mapping with a tensor 'input_ids', got {describe(batch)}")
    ids: Tensor = batch["input_ids"]
    if ids.ndim != 2:
        raise ValueError(f"{task}: input_ids of shape {tuple(ids.shape)}; expected (B, T)")
    return ids


def token_mask(task: str, batch: Mapping[str, Any]) -> Tensor:
    """(B, T) bool: which of a batch's tokens hold data; all where it has no ``attention_mask``. ValueError for one of
    another shape than ``input_ids``."""
    ids, given = token_ids(task, batch), batch.get("attention_mask")
    if given is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if given.shape != ids.shape:
        raise ValueError(
            f"{task}: attention_mask of shape {tuple(given.shape)} for input_ids of shape {tuple(ids.shape)}; expected "
            "the same shape, one value per token"
        )
    return as_bool(given)


def take_samples(batch: Any, size: int, rows: Sequence[int]) -> Any:
    """Some samples of a batch of ``size``: their rows of every tensor that has as many, the rest as it is."""
    if isinstance(batch, Tensor) and batch.ndim and len(batch) == size:
        return batch[torch.tensor(rows, dtype=torch.int64, device=batch.device)]
    if isinstance(batch, Mapping):
        return {name: take_samples(value, size, rows) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return _like(batch, [take_samples(value, size, rows) for value in batch])
    return batch


def describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
