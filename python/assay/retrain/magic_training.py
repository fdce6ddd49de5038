"""A deterministic training run, and the derivative of any one of its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from assay.probe.quiet import exchanged
from assay.retrain import samples
from assay.retrain.magic_optimizers import SGD, Adam, Optimizer, State, clipped, decayed_parameters, rates
from assay.tasks import Task
from assay.tasks.base import to_device, unfused

Losses = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> (B,) losses with their graph, one per sample and none of them a matter of another's weight."""


class Diverged(ValueError):
    """A sample's loss is not finite."""


@dataclass(frozen=True, eq=False)
class Training:
    """One run: where it starts, in which order it sees what, and how it steps.

    Step t takes g = (1/B) Σ_{b∈batch t} w_b ∇ℓ_b with B the *number* of rows in the batch: a sample of weight 0 is one
    that was removed from an unchanged batch. The optimiser is told g, or g clipped. A parameter that a batch's losses
    do not reach has gradient 0 there, and decays (torch's optimisers leave it alone if its ``.grad`` is None).

    Args:
        model: the start: its parameters as they are, of which those that require gradients are trained. It is neither
            changed nor copied. Its modules run in the mode in which they are.
        losses: a task, or a function (model, batch) -> (B,). Losses are differentiated twice. A task's are float32.
        data: N samples: a tensor or array, a tuple or mapping of such (or of lists), from which a batch takes rows; or
            a function from row numbers (B,) int64 to a batch, with ``samples``.
        batches: row numbers of the samples of each step; a sample may come any number of times.
        optimizer: ``SGD`` or ``Adam``, with the rate of every step.
        clip: the largest norm of g, as of ``clip_grad_norm_``; None: not clipped.
        rows_at_once: rows of a batch that are run together, where a batch is too large; None: all of it.
        dropout_seed: makes dropout a part of the run: the masks of step t follow from this seed and t. Without it, a
            model that drops is refused.
        samples: N, where ``data`` is a function.

    Raises:
        TypeError, ValueError: no batches, or one that is empty or has a row that is none; a schedule of another length;
            nothing to train, parameters of several types or narrower than float32.
    """

    model: nn.Module
    losses: Task | Losses
    data: Any
    batches: Sequence[ArrayLike]
    optimizer: Optimizer
    clip: float | None = None
    rows_at_once: int | None = None
    dropout_seed: int | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(self.model).__name__}")
        if not isinstance(self.losses, Task) and not callable(self.losses):
            raise TypeError(f"losses: expected a task or a function (model, batch), got {type(self.losses).__name__}")
        if not isinstance(self.optimizer, (SGD, Adam)):
            raise TypeError(
                f"optimizer: expected assay.retrain.SGD or Adam, got {type(self.optimizer).__name__}; one of torch "
                "becomes such by optimizer_of(optimizer, model)"
            )
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise ValueError(f"clip: expected a finite number above 0, or None, got {self.clip}")
        for name, value, least in (("rows_at_once", self.rows_at_once, 1), ("dropout_seed", self.dropout_seed, 0)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name}: expected an integer of at least {least}, or None, got {value!r}")
        _ = self.size, self.rows, self.rates, self.start, self.decayed  # each refuses what it cannot be made of

    # ---- What it is made of

    @cached_property
    def size(self) -> int:
        """N."""
        if callable(self.data):
            if not isinstance(self.samples, int) or isinstance(self.samples, bool) or self.samples < 1:
                raise ValueError(
                    f"samples: expected the number of samples, as data is a function, got {self.samples!r}"
                )
            return self.samples
        columns = self._columns
        sizes = [samples.count(c) for c in columns] if isinstance(columns, tuple) else [samples.count(columns)]
        if not sizes or len(set(sizes)) != 1 or not sizes[0]:
            raise ValueError(f"data: expected columns of one length, and samples in them, got {sizes}")
        if self.samples not in (None, sizes[0]):
            raise ValueError(f"samples: expected {sizes[0]}, as many as data has, or None, got {self.samples}")
        return sizes[0]

    @cached_property
    def _columns(self) -> Any:
        """The data in forms from which rows are taken."""
        return tuple(map(samples.inputs, self.data)) if isinstance(self.data, tuple) else samples.inputs(self.data)

    @cached_property
    def rows(self) -> list[NDArray[np.int64]]:
        """Row numbers by step."""
        found = []
        for step, batch in enumerate(self.batches):
            rows = np.asarray(samples.to_numpy(batch))
            if rows.ndim != 1 or not rows.size or rows.dtype.kind not in "iu":
                raise ValueError(
                    f"batches[{step}]: expected row numbers, (B,) integers, got {rows.dtype} of shape {rows.shape}"
                )
            if rows.min() < 0 or rows.max() >= self.size:
                wrong = rows[(rows < 0) | (rows >= self.size)][0]
                raise ValueError(f"batches[{step}]: row {wrong} lies outside the data's 0..{self.size - 1}")
            found.append(rows.astype(np.int64))
        if not found:
            raise ValueError("batches: expected one at least, got none")
        return found

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rows)

    @cached_property
    def rates(self) -> list[float]:
        """η by step."""
        return rates(self.optimizer, self.steps)

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """By name the parameters that are trained, tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @cached_property
    def start(self) -> Tensor:
        """(P,) the trained parameters before the first step: a copy."""
        kinds = {(p.dtype, p.device) for p in self.trained.values()}
        if not kinds:
            raise ValueError("model: none of its parameters requires a gradient, so that nothing would be trained")
        if len(kinds) > 1:
            raise ValueError(
                f"model: expected parameters of one type on one device, got {samples.short(sorted(map(str, kinds)))}"
            )
        if next(iter(kinds))[0] not in (torch.float32, torch.float64):
            raise ValueError(
                f"model: its parameters are {next(iter(kinds))[0]}, in which replayed steps lose the derivative; "
                "expected float32 or float64: model.float()"
            )
        return torch.cat([p.detach().reshape(-1) for p in self.trained.values()])

    @cached_property
    def decayed(self) -> Tensor | None:
        """(P,) bool, None where all parameters decay."""
        found = decayed_parameters(self.optimizer, {name: p.numel() for name, p in self.trained.items()})
        return None if found is None else found.to(self.start.device)

    @property
    def state_bytes(self) -> int:
        """Of the parameters and the optimiser's moments."""
        return self.start.numel() * self.start.element_size() * (1 + self.optimizer.moments)

    def initial(self) -> State:
        """The state before the first step."""
        return (self.start, *(torch.zeros_like(self.start) for _ in range(self.optimizer.moments)))

    def weights(self, weights: ArrayLike | Tensor | None = None) -> Tensor:
        """(N,) in the parameters' type; None: ones.

        Raises:
            ValueError: another shape, or a weight that is not finite.
        """
        if weights is None:
            return self.start.new_ones(self.size)
        found = torch.as_tensor(weights).detach().to(self.start)
        if found.shape != (self.size,) or not bool(found.isfinite().all()):
            raise ValueError(f"weights: expected finite numbers of shape ({self.size},), got {samples.short(found)}")
        return found

    # ---- Running

    def train(self, weights: ArrayLike | Tensor | None = None) -> dict[str, Tensor]:
        """The whole run with these weights (N,) -> the trained parameters by name.

        Raises:
            ValueError: the weights, or a loss that is not finite.
        """
        given, state = self.weights(weights), self.initial()
        with running():
            for step in range(self.steps):
                state = self.advance(state, step, given)
        return {name: p.clone() for name, p in self.named(state[0]).items()}

    def advance(self, state: State, step: int, weights: Tensor) -> State:
        """The state after ``step``, from the one before it."""
        gradient = self.gradient(state[0], step, weights)
        with torch.no_grad():
            return self._step(state, gradient, step)

    def gradient(self, theta: Tensor, step: int, weights: Tensor) -> Tensor:
        """g of a step at parameters (P,), not clipped."""
        return _total(self._gradient(part, weights)[0] for part in self._parts(theta, step))

    def weighted_loss(self, theta: Tensor, step: int, weights: Tensor) -> Tensor:
        """Of the first part of a step, with its graph."""
        return self._loss(next(self._parts(theta, step)), weights)[0]

    def curvature(self, theta: Tensor, step: int, weights: Tensor, direction: Tensor) -> Tensor:
        """H times the direction (P,), H the Hessian of a step's weighted loss at parameters (P,)."""
        curved = torch.zeros_like(theta)
        for part in self._parts(theta, step):
            made, _ = self._gradient(part, weights, create_graph=True)
            curved += _pull((made,), (direction,), (part.theta,))[0]
        return curved

    def pull_back(
        self, state: State, step: int, weights: Tensor, adjoints: list[State], after: State | None = None
    ) -> Tensor:
        """What the derivatives in the state after ``step`` are in the state before it and in the weights.

        Args:
            state: before the step.
            adjoints: one per target: the derivatives of its loss in every part of the state after the step. They become
                those in the state before, one by one, so that memory holds one of them twice and not all.
            after: the state after the step, as it was made, where that is known.

        Returns:
            (targets, B) derivatives in the weights of the batch's rows.

        Raises:
            RuntimeError: the step leads elsewhere than it did.
        """
        parts = list(self._parts(state[0], step))
        graphs = [self._gradient(part, weights, create_graph=True) for part in parts[:1]] if len(parts) == 1 else []
        gradient = _total(g for g, _ in graphs or (self._gradient(part, weights) for part in parts))
        leaves = [x.detach().requires_grad_() for x in (*state, gradient)]
        made_again = self._step(tuple(leaves[:-1]), leaves[-1], step)
        if after is not None and not _about_the_same(state[-1], made_again[-1].detach(), after[-1]):
            raise RuntimeError(
                f"step {step} leads elsewhere than when it was made: its losses are other ones, or random, from then on"
            )
        directions = []
        for target, adjoint in enumerate(adjoints):
            *pulled, direction = _pull(made_again, adjoint, leaves)
            adjoints[target] = tuple(pulled)
            directions.append(direction)
        shares = [self._pull_part(part, weights, adjoints, directions, graphs) for part in parts]
        return torch.cat(shares, 1)

    def _pull_part(
        self,
        part: _Part,
        weights: Tensor,
        adjoints: list[State],
        directions: Sequence[Tensor],
        graphs: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Add what comes to the parameters through a part's gradient -> (targets, rows) derivatives in its weights."""
        made, own = graphs[0] if graphs else self._gradient(part, weights, create_graph=True)
        in_weights = []
        for target, direction in enumerate(directions):
            curved, inner = _pull((made,), (direction,), (part.theta, own))
            theta, *moments = adjoints[target]
            adjoints[target] = (theta + curved, *moments)
            in_weights.append(inner)
        return torch.stack(in_weights)

    def target_gradient(self, theta: Tensor, losses: Task | Losses, batches: Sequence[Any]) -> tuple[float, Tensor]:
        """A target's mean loss over its samples, and its derivative (P,) in the parameters; in eval mode.

        Raises:
            ValueError: no samples, or a loss that is not finite.
        """
        net, total, gradient, count = _Net(self.model, losses), 0.0, torch.zeros_like(theta), 0
        with evaluating(self.model):
            for batch in batches:
                leaf = theta.detach().requires_grad_()
                each = net.losses(self.named(leaf), net.placed(batch, theta.device))
                (own,) = torch.autograd.grad(each.sum(), leaf)
                total, gradient, count = total + float(each.detach().double().sum()), gradient + own, count + len(each)
        if not count:
            raise ValueError("expected samples, got none")
        if not np.isfinite(total) or not bool(gradient.isfinite().all()):
            raise ValueError(f"the trained model's loss or its gradient is not finite: {total / count}")
        return total / count, gradient / count

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """(P,) -> parameters by name."""
        parts = torch.split(theta, [p.numel() for p in self.trained.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.trained.items(), parts, strict=True)}

    def batch(self, rows: NDArray[np.int64]) -> Any:
        """The samples at ``rows`` as the losses take them."""
        if callable(self.data):
            return self.data(rows)
        if isinstance(self._columns, tuple):
            return tuple(_tensor(samples.take(column, rows)) for column in self._columns)
        taken = samples.take(self._columns, rows)
        return {name: _tensor(c) for name, c in taken.items()} if isinstance(taken, Mapping) else _tensor(taken)

    def _parts(self, theta: Tensor, step: int) -> Iterator[_Part]:
        """The pieces in which a step's batch is run."""
        rows = self.rows[step]
        most = self.rows_at_once or len(rows)
        for begin in range(0, len(rows), most):
            yield _Part(theta.detach().requires_grad_(), rows[begin : begin + most], len(rows), step, begin)

    def _gradient(self, part: _Part, weights: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """(P,) its share of the step's gradient, and its rows' weights as leaves of the graph."""
        total, own = self._loss(part, weights, create_graph)
        (gradient,) = torch.autograd.grad(total, part.theta, create_graph=create_graph, materialize_grads=True)
        return gradient, own

    def _loss(self, part: _Part, weights: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Its share of the step's weighted loss, and its rows' weights."""
        net = _Net(self.model, self.losses)
        own = weights[torch.from_numpy(part.rows).to(weights.device)].requires_grad_(create_graph)
        with seeded(self.dropout_seed, part.step, part.begin, part.theta.device):
            each = net.losses(self.named(part.theta), net.placed(self.batch(part.rows), part.theta.device))
        if each.shape != own.shape:
            raise ValueError(f"losses: expected one per sample, shape {tuple(own.shape)}, got {tuple(each.shape)}")
        if not bool(each.isfinite().all()):
            wrong = int((~each.isfinite()).nonzero()[0])
            raise Diverged(f"step {part.step}: the loss of sample {part.rows[wrong]} is {float(each[wrong].detach())}")
        return (own * each).sum() / part.batch, own

    def _step(self, state: State, gradient: Tensor, step: int) -> State:
        return self.optimizer.step(state, clipped(gradient, self.clip), step, self.rates[step], self.decayed)


@dataclass(frozen=True)
class _Part:
    """Rows of one step's batch of ``batch`` rows, beginning with its row ``begin``; ``theta`` (P,) is a leaf."""

    theta: Tensor
    rows: NDArray[np.int64]
    batch: int
    step: int
    begin: int


class _Net:
    """The model and its losses, which may use more of the model than its forward pass."""

    def __init__(self, model: nn.Module, losses: Task | Losses) -> None:
        self._model, self._task = model, unfused(losses) if isinstance(losses, Task) else None
        self._function = losses

    def losses(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """(B,) with these in the place of the model's own."""
        with exchanged(self._model, parameters):
            if self._task is not None:
                return self._task.forward(self._model, batch).losses
            each = self._function(self._model, batch)  # type: ignore[operator]
        if not isinstance(each, Tensor) or each.ndim != 1:
            found = f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(f"losses: expected a tensor (B,), one loss per sample, got {found}")
        return each

    def placed(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device) if self._task is None else self._task.to(batch, device)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Gradients on, autocast off, and attention by its formula: its fused kernels have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def seeded(seed: int | None, step: int, begin: int, device: torch.device) -> Iterator[None]:
    """torch's generators at what follows from the numbers, and as they were afterwards; untouched without a seed."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, begin]).generate_state(1, np.uint64)[0] >> 1))
        yield


def _pull(outputs: Sequence[Tensor], directions: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives of Σ ⟨output, direction⟩ in the inputs; the graph stays."""
    value = reduce(torch.add, (torch.dot(a, b) for a, b in zip(outputs, directions, strict=True)))
    return list(torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True))


def _about_the_same(before: Tensor, made: Tensor, known: Tensor) -> bool:
    """Whether a step was made again, but for rounding, which may differ where a graph is kept. The last part of a state
    tells best: Adam's parameters move as far for a gradient of rounding errors as for a real one."""
    rounding = 64 * torch.finfo(known.dtype).eps * float(known.norm())
    return not float((made - known).norm()) > 0.05 * float((known - before).norm()) + rounding


def _total(gradients: Iterable[Tensor]) -> Tensor:
    """Their sum, without a graph."""
    return reduce(torch.add, (gradient.detach() for gradient in gradients))


def _tensor(column: Any) -> Any:
    return torch.as_tensor(column) if isinstance(column, np.ndarray) and column.dtype.kind in "biuf" else column
