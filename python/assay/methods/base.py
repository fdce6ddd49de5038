"""What a method is: the signals it needs, the columns it gives, and the formula between them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from assay.ops import Sketch
from assay.probe import Jvp, Pooled, Reduction, Signals
from assay.tasks import Task

if TYPE_CHECKING:
    from typing_extensions import Self

Keep = Literal["high", "low", "none"]


@dataclass(frozen=True)
class Column:
    """One score: its name in the table, the end worth training on, and one line that says what it is.

    ``keep`` is ``"high"`` or ``"low"``; ``"none"`` marks a score that says nothing about worth on its own (an
    entropy never saw the label).

    ``width`` 1 is a number per sample, (B,); n are n numbers, (B, n); None is a number per token, (B, T) with NaN where
    a sample has no such token.
    """

    name: str
    keep: Keep
    description: str
    width: int | None = 1


@dataclass(frozen=True)
class Need:
    """What a method wants to know about one model on every batch. Losses always come.

    Attributes:
        model, task: what is run, in which form. Neither where only ``raw`` is asked for.
        logits: whether the signals keep the logits.
        reductions: folded while the backward pass runs; without any, there is no backward pass. Those of the kind
            ``Jvp`` come from the forward pass alone.
        embeddings: name or glob of the one layer whose input, averaged over positions, is wanted; or a ``Pooled``.
        raw: names of the sample's own columns.
        view: another view of the sample than the batch's main one; see ``Views``.
        layers, skip_unsupported: what the reductions' parameters were selected with, and whether a layer that turns
            out not to be tapped may be left out.

    Raises:
        ValueError: a model without a task or the reverse, or nothing that is asked for.
        TypeError: a task without a hash.
    """

    model: nn.Module | None = None
    task: Task | None = None
    logits: bool = False
    reductions: Mapping[str, Reduction | Jvp] = field(default_factory=dict)
    embeddings: str | Pooled | None = None
    raw: Sequence[str] = ()
    view: str | None = None
    layers: str | Sequence[str] | None = None
    skip_unsupported: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) != (self.task is None):
            raise ValueError("Need: a model is run with a task; expected both or neither")
        if self.model is None and (self.logits or self.reductions or self.embeddings or self.view):
            raise ValueError("Need: logits, reductions, embeddings and views are a model's; expected model and task")
        if not isinstance(self.task, Hashable):
            raise TypeError(
                f"Need: {type(self.task).__name__} has no hash, by which methods of one task share a forward pass; "
                "expected a task that has one: of a data class, @dataclass(frozen=True)"
            )
        if self.model is None and not self.raw:
            raise ValueError("Need: asks for nothing; expected a model and a task, or raw columns")


@dataclass(frozen=True)
class Kept:
    """What a method keeps of one checkpoint: see ``Keeper``.

    Attributes:
        size: numbers per sample.
        sketch: what projected them, if anything did.
        extra: name of one more number per sample.
    """

    size: int
    sketch: Sketch | None = None
    extra: str | None = None


@dataclass(frozen=True)
class Views:
    """A batch of which methods want more than one form.

    Attributes:
        main: what the methods' task takes, as a plain batch.
        others: by name, other forms of the same samples in the same order: the text behind another prompt, say.
        raw: by column, the samples' own values.
    """

    main: Any
    others: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """Scores samples from signals. It cannot tell whether a corpus run or a trainer made them.

    Subclass it. A constructor stores its arguments and checks them, and does no work.
    """

    name: str
    uses_pool: ClassVar[bool] = False
    """Whether ``fit`` looks at the pool, so that scores depend on it."""
    needs_prompts: ClassVar[bool] = False
    """Whether it says nothing of samples all of whose tokens count."""
    gathers: ClassVar[int | None] = None
    """How many of a shard's first samples ``metadata`` speaks of: 0 if it says the same before anything is scored; None
    if of all, so that no shard is scored in parts. A method that leaves ``metadata`` alone gathers nothing."""

    if TYPE_CHECKING:

        @property
        def columns(self) -> Sequence[Column]:
            """The scores, in the order of the table."""
            ...
    else:  # no property, for a subclass may also set it in its constructor
        columns: Sequence[Column]

    def needs(self) -> Mapping[str, Need]:
        """Role -> what to run. The same roles key the signals that ``score`` gets."""
        ...

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Look at the targets, and at a random sample of the pool, before anything is scored.

        Args:
            pool: batches; gone through several times, so a list rather than a generator.
        """
        return self

    def refresh(self) -> None:
        """The models have moved, or are about to: nothing that was made of their weights may be kept from now on.

        A ``Reweighter`` calls this when it is made and before each scored step's backward pass; what reductions hold
        may change, which parameters they name may not.
        """
        return None

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        """Signals by role -> a tensor per column name, of the column's width."""
        ...

    def metadata(self) -> dict[str, str]:
        """Facts and warnings about what was scored so far, for the table's footer."""
        return {}


class Keeper(Method):
    """A method whose scores are made of a few numbers per sample that know nothing of targets: with ``keep_features``
    these are stored, and scored for other targets without a model."""

    left_out: Mapping[str, str]
    """What could not be tapped while it was fitted, with the reason."""

    @property
    def kept(self) -> Sequence[Kept]:
        """What ``raw_features`` gives, by checkpoint. A ValueError if that cannot be told before anything runs."""
        raise NotImplementedError

    def raw_features(self, signals: Mapping[str, Signals]) -> tuple[list[Tensor], list[Tensor] | None]:
        """(B, size) of each checkpoint and, where something is kept beside them, (B,) of each."""
        raise NotImplementedError

    def score_features(self, features: Sequence[Tensor], extras: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Scores of what ``raw_features`` gave, fresh or stored."""
        raise NotImplementedError


def in_table(scores: Tensor) -> Tensor:
    """Scores as a table holds them, float32 on the host. What is infinite there is NaN: a squared error of 1e40 is too
    large for float32, not worth more than all else."""
    numbers = scores.detach().float().cpu()
    return numbers.masked_fill(numbers.isinf(), torch.nan)


def samples_gathered(method: Method) -> int | None:
    """How many of a shard's first samples the method's metadata speaks of; None: of all of them."""
    made, said = (
        next((each for each in type(method).__mro__ if name in vars(each)), object) for name in ("metadata", "gathers")
    )
    if made is Method:
        return 0
    return method.gathers if issubclass(said, made) else None  # metadata of a subclass may speak of more
