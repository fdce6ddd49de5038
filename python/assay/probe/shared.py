"""Values that all samples of a batch share (positions, a class token, a bias table) and where they meet the samples.

Such a value has no batch dimension, so that autograd gives it one gradient, summed over the samples. It is followed
through the forward pass instead, to each operation that spreads it over the batch; there it is spread by hand, which
changes no number, and the gradient of every sample's own copy is caught.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from assay.probe import products
from assay.probe.pulling import pulled
from assay.probe.quiet import edge_of, on_gradient
from assay.probe.starts import Start, broadcast, coincidences, untapped
from assay.probe.terms import Dense, Term
from assay.tasks.base import wide

# Operations by name: the same one reaches a subclass as a function, a method or an operator.
_ELEMENTWISE = frozenset(
    f"{left}{name}{right}"
    for name in ("add", "sub", "mul", "div", "truediv", "true_divide", "radd", "rsub", "rmul", "iadd", "isub", "imul")
    for left, right in (("", ""), ("__", "__"), ("", "_"))
) | {"where"}
_EXPANSIONS = frozenset(["expand", "expand_as", "repeat", "tile", "broadcast_to"])
_BY_SHAPE = frozenset(["type_as", "to", "view_as", "reshape_as", "expand_as"])
_INDEXING = frozenset(["__getitem__", "index_select", "gather"])


class Shared(Tensor):
    """A tensor without a batch dimension that depends on the values of a ``Region``; otherwise an ordinary one."""

    region: Region
    sources: tuple[Start, ...]
    start: Start | None  # the value itself, not computed from it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward and (own := _region(args, kwargs)) is not None:
            with own.batch_second():
                return products.ATTENTION(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            leaves, spec = tree_flatten((args, kwargs or {}))
            shared = [x for x in leaves if isinstance(x, Shared) and hasattr(x, "region")]
            if not shared:
                return func(*args, **(kwargs or {}))
            return shared[0].region.apply(func, leaves, spec, shared)


@dataclass(eq=False)
class _Border:
    """A shared value that met the samples, and what their copies' gradients are."""

    value: Shared
    grads: Tensor | None = None
    terms: list[Term] = field(default_factory=list)

    def add(self, grads: Tensor) -> None:
        self.grads = grads if self.grads is None else self.grads + grads

    def take(self, term: Term) -> None:
        if isinstance(term, Dense):
            self.add(term.values)
        else:
            self.terms.append(term)


@dataclass(eq=False)
class Region:
    """The shared values of one forward pass over B samples.

    Args:
        size: B.
        constants: ids of tensors that no sample decides, the model's parameters and buffers.
        positions: T where a first dimension of B·T stands for all positions of all samples, one sample after the other.

    Attributes:
        is_coarse: whether something whose gradient is caught is in 16 bits.
    """

    size: int
    constants: Collection[int]
    positions: int | None = None
    recording: bool = True
    is_coarse: bool = False
    starts: list[Start] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    patterns: set[tuple[Any, ...]] = field(default_factory=set)
    in_training: bool = False  # parameters ask for their gradients, so that weights that are products' are cut off too
    edges: list[GradientEdge] = field(default_factory=list)  # in training: where the graph begins that nobody asks for
    cuts: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (value, the leaf that the model went on with)
    _borders: dict[int, _Border] = field(default_factory=dict)
    _second: bool = False  # samples lie in the second dimension
    _alone: bool = False  # there are none
    _closed: bool = False

    @contextmanager
    def batch_second(self) -> Iterator[None]:
        """Inside of a multi-head attention."""
        before, self._second = self._second, True
        try:
            yield
        finally:
            self._second = before

    @contextmanager
    def without_samples(self) -> Iterator[None]:
        """Inside of what computes a weight from parameters and from tensors that the model keeps."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    def begin(self, value: Tensor, what: str, parameters: tuple[str, ...], copy: bool = True) -> tuple[Start, Tensor]:
        """A new shared value -> what is known about it, and the tensor that the model is to go on with.

        ``copy``: that tensor may be modified in place, which no model does to its parameters.
        """
        within = isinstance(value, Shared) and value.requires_grad  # computed from another one
        own = value if within else value.detach().requires_grad_()
        start = Start(own, what, parameters)
        if self.recording:
            self.starts.append(start)
            if not within:
                self.leaves.append(own)
                self.cuts.append((value, own))
        if self.size == 1:  # the gradient of the sum is the sample's
            return start, own.clone() if copy else own.view_as(own)
        sources = value.sources if within else ()  # type: ignore[attr-defined]
        return start, self._share(own.clone() if copy else own.view_as(own), (*sources, start), start)

    def _share(self, value: Tensor, sources: tuple[Start, ...], start: Start | None = None) -> Tensor:
        shared = value.as_subclass(Shared)
        shared.region, shared.sources, shared.start = self, sources, start
        return shared

    def apply(self, func: Any, leaves: list[Any], spec: Any, shared: list[Shared]) -> Any:
        """Run an operation of the model on shared values, and perhaps others."""
        name = str(getattr(func, "__name__", func))
        if name in _BY_SHAPE and not isinstance(leaves[0], Shared):  # of what is shared it takes the shape or the type
            args, kwargs = tree_unflatten([self._plain(x) if isinstance(x, Shared) else x for x in leaves], spec)
            return func(*args, **kwargs)
        others = [] if self._alone else [x for x in leaves if self._is_other(x)]
        result: Any = None
        if torch.is_grad_enabled():
            if name in _EXPANSIONS:
                result = self._expand(func, leaves, spec, shared[0])
            elif others and (shape := self._meeting(name, shared, others)) is not None:
                result = self._meet(func, leaves, spec, shared, shape)
            if result is None and others:
                result = self._multiply(func, leaves, spec, shared, others)
        if result is not None:
            return result
        args, kwargs = tree_unflatten(leaves, spec)
        result = func(*args, **kwargs)
        sources = tuple(dict.fromkeys(source for x in shared for source in x.sources))
        if name == "embedding" and isinstance(leaves[1], Shared):  # rows by ids that are no sample's
            name = "__getitem__"
        if self._independent(name, others, shared, result):
            return tree_map(lambda x: self._derived(x, sources), result)
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_flatten(result)[0]):
            grad = "" if torch.is_grad_enabled() else " without gradients"
            for source in sources:
                source.obstacle = source.obstacle or f"{name}() takes it together with the samples{grad}"
        return result

    def _is_other(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or isinstance(x, Shared) or x.ndim == 0:
            return False
        return id(x) not in self.constants and id(x._base) not in self.constants  # nor a part of one: a table's rows

    def _derived(self, value: Any, sources: tuple[Start, ...]) -> Any:
        plain = isinstance(value, Tensor) and not isinstance(value, Shared)
        return self._share(value, sources) if plain and value.requires_grad else value

    def _independent(self, name: str, others: Sequence[Tensor], shared: Sequence[Shared], result: Any) -> bool:
        """Whether no sample has a part in an operation's result."""
        if not others or (name in _INDEXING and not any(x.is_floating_point() for x in others)):
            return True
        if name not in _ELEMENTWISE or any(x.requires_grad for x in others):
            return False
        return isinstance(result, Tensor) and result.shape == broadcast(shared)

    def _groups(self, shape: Sequence[int], value: Tensor) -> bool:
        """Whether a result of this shape holds the value once or several times for each sample."""
        first = shape[0] if shape else 0
        return first >= self.size and first % self.size == 0 and (value.ndim < len(shape) or value.shape[0] == 1)

    def _lead(self, shape: Sequence[int], value: Tensor) -> int:
        """Over how many of a result's first dimensions, which tell the samples apart, the value is spread; else 0."""
        return int(self._groups(shape, value))

    def _meeting(self, name: str, shared: list[Shared], others: list[Tensor]) -> Sequence[int] | None:
        """The shape up to which an operation broadcasts its arguments, if it does."""
        if name in _ELEMENTWISE:
            return broadcast([*shared, *others])
        if name == "scaled_dot_product_attention" and len(others) > 2:  # what is shared is added to the scores
            return others[0].shape
        if name in ("matmul", "__matmul__") and shared[0].ndim > 2 and others[0].ndim > 1:
            return (*broadcast([x[..., 0, 0] for x in (shared[0], others[0])]), 1, 1)
        return None

    def _meet(self, func: Any, leaves: list[Any], spec: Any, shared: list[Shared], shape: Sequence[int]) -> Any:
        leads = [self._lead(shape, value) for value in shared]
        if not all(leads):
            return None
        copies = {}
        for value, lead in zip(shared, leads, strict=True):
            aligned = (1,) * (len(shape) - value.ndim) + value.shape
            start = self._leaf(value)
            copies[id(value)] = start.reshape(aligned).expand(*shape[:lead], *aligned[lead:])
            self._catch(value, start, copies[id(value)])
        args, kwargs = tree_unflatten([copies.get(id(x), x) for x in leaves], spec)
        return func(*args, **kwargs)

    def _expand(self, func: Any, leaves: list[Any], spec: Any, value: Shared) -> Tensor | None:
        if leaves[0] is not value:
            return None
        start = self._leaf(value)
        args, kwargs = tree_unflatten([start, *leaves[1:]], spec)
        copies: Tensor = func(*args, **kwargs)
        if self._second:  # (1, 1, D) -> (1, B, D): what attention adds to the keys and the values
            if value.shape[:2] != (1, 1) or copies.shape[:2] != (1, self.size):
                return None
            first = copies.transpose(0, 1)
            self._catch(value, start, first)
            return first.transpose(0, 1)
        aligned = (1,) * (copies.ndim - value.ndim) + value.shape
        if value.ndim == copies.ndim > 0 and value.shape[0] > 1:  # one after the other: (B·k·first, …)
            if len(copies) % (self.size * len(value)) or value.shape[1:] != copies.shape[1:]:
                return None
            self._catch(value, start, copies)
            return copies
        fits = all(size in (1, found) for size, found in zip(aligned[1:], copies.shape[1:], strict=True))
        if not self._groups(copies.shape, value) or not fits:
            return None
        self._catch(value, start, copies)
        return copies

    def _leaf(self, value: Shared) -> Tensor:
        """The value cut off from what it was computed from: that part of the graph is run through per sample."""
        leaf = value.as_subclass(Tensor).detach().requires_grad_()
        self.cuts.append((value.as_subclass(Tensor), leaf))
        return leaf

    def see(self, output: Tensor) -> None:
        """Note how fine the gradients are that come by way of ``output``."""
        self.is_coarse = self.is_coarse or output.dtype in (torch.float16, torch.bfloat16)

    def _catch(self, value: Shared, start: Tensor, copies: Tensor) -> None:
        """Let the gradients of ``copies`` (B·k, …), made from ``start``, arrive at the value."""
        if not self.recording:
            return
        self.see(copies)
        self.leaves.append(start)
        border = self._borders.setdefault(id(value), _Border(value))
        size, shape = self.size, tuple(value.shape)
        aligned = (1,) * (copies.ndim - value.ndim) + shape
        for source in value.sources:
            source.loose = True
            self.patterns.add((source.parameters, "spread", copies.ndim, len(copies) // size))

        lengthwise = copies.ndim == value.ndim > 0 and shape[0] > 1

        def arrived(grads: Tensor) -> None:
            if self._closed:
                return
            grads = grads.detach()
            if lengthwise:
                grads = wide(grads.reshape(size, -1, *shape)).sum(1)
            elif len(grads) > size:
                grads = wide(grads.reshape(size, -1, *grads.shape[1:])).sum(1)
            axes = enumerate(aligned[1:], 1)
            spread = [] if lengthwise else [axis for axis, n in axes if n == 1 and grads.shape[axis] != 1]
            border.add((grads.sum(spread, keepdim=True) if spread else grads).reshape(size, *shape))

        copies.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _multiply(
        self, func: Any, leaves: list[Any], spec: Any, shared: list[Shared], others: list[Tensor]
    ) -> Tensor | None:
        """x Wᵀ + b, rows of W, a convolution, …: a value that is used as a layer's weight."""
        args, kwargs = tree_unflatten(leaves, spec)
        if (given := products.arguments(func, args, kwargs)) is None:
            return None
        weights = {key: value for key, value in given.items() if isinstance(value, Shared)}
        plain = {key: self._plain(value) if isinstance(value, Tensor) else value for key, value in given.items()}
        found = products.gradients(func, plain, products.Lead(self._arrange, self._batched))
        if found is None or len(weights) != len(shared) or not weights.keys() <= found.keys():
            return None
        cut = self._leaf if self.in_training else self._plain
        args, kwargs = tree_unflatten([cut(x) if isinstance(x, Shared) else x for x in leaves], spec)
        output: Tensor = func(*args, **kwargs)
        if self.in_training and self.recording and not any(x.requires_grad for x in others):
            self.edges.append(edge_of(output))
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            output = leaf.clone()
            if self.recording:
                self.leaves.append(leaf)
        if self.recording:
            self._catch_product(weights, found, others, output)
        return output

    def _catch_product(
        self, weights: dict[str, Shared], found: products.Gradients, inputs: Sequence[Tensor], output: Tensor
    ) -> None:
        self.see(output)
        versions = [x._version for x in inputs]
        for value in weights.values():
            for source in value.sources:
                self.patterns.add((source.parameters, "product", *(coincidences(x.shape, self.size) for x in inputs)))
                if value.start is source and len(value.sources) == 1:
                    source.uses += 1
                else:
                    source.loose = True

        def arrived(grads: Tensor) -> None:
            if self._closed:
                return
            if any(x._version != before for x, before in zip(inputs, versions, strict=True)):
                what = next(iter(weights.values())).sources[0].what
                raise RuntimeError(f"{what}: what it multiplies was modified in place after it was used")
            for key, value in weights.items():
                self._give(value, self._term(found[key], grads.detach(), value.shape))

        on_gradient(output, arrived)

    def _term(self, of: Callable[[Tensor], Term], grads: Tensor, shape: Sequence[int]) -> Term:
        """A weight's gradient, from its formula."""
        return of(grads)

    def _give(self, value: Shared, term: Term) -> None:
        """A weight's gradient from one use."""
        if value.start is not None and len(value.sources) == 1:
            value.start.take(term)
            return
        self._borders.setdefault(id(value), _Border(value)).take(term)

    def _arrange(self, lead: Sequence[int]) -> products.Arrange | None:
        """How dimensions of which one is the batch's become (B, T)."""
        n, size = len(lead), self.size
        if self._second:
            if n == 2 and lead[1] == size:
                return lambda x: x.transpose(0, 1)
            if n == 1 and lead[0] % size == 0:
                return lambda x: x.reshape(-1, size, *x.shape[1:]).transpose(0, 1)
            return None
        if n and (lead[0] == size or (n == 1 and self.all_positions(lead[0]))):
            return lambda x: x.reshape(size, -1, *x.shape[n:])
        return None

    def _batched(self, inputs: Tensor) -> bool:
        return not self._second and inputs.shape[0] == self.size

    def all_positions(self, length: int) -> bool:
        return self.positions is not None and length == self.size * self.positions

    def _plain(self, value: Tensor) -> Tensor:
        return value.detach() if type(value) is Tensor else value.as_subclass(Tensor).detach()

    def finish(self, arrived: Sequence[Tensor | None]) -> None:
        """Fill in every start's ``grads``.

        Args:
            arrived: the gradients that autograd itself found for ``leaves``.

        Raises:
            RuntimeError: a gradient came on a way that was not followed.
        """
        ordinary = {id(leaf): grads for leaf, grads in zip(self.leaves, arrived, strict=True)}
        if self.size == 1:
            self._finish_one(ordinary)
            return
        for start in self.starts:
            found = ordinary.get(id(start.value))
            # Those with an obstacle have been dropped.
            if start.obstacle is None and found is not None and bool((found != 0).any()):
                raise RuntimeError(untapped(start.what, "its use cannot be followed"))
        with torch._C.DisableTorchFunctionSubclass():
            for border in self._borders.values():
                self._pull_back(border)

    def reset(self) -> None:
        """Forget all gradients, for another backward pass."""
        for start in self.starts:
            start.reset()
        for border in self._borders.values():
            border.grads, border.terms = None, []

    def close(self) -> None:
        """Let go of the graph; gradients that still come are nobody's."""
        self._closed = True
        for start in self.starts:
            start.close()
        self.starts, self.leaves, self.edges, self.cuts, self._borders = [], [], [], [], {}

    def _finish_one(self, ordinary: dict[int, Tensor | None]) -> None:
        for start in self.starts:
            found = ordinary.get(id(start.value))
            start.grads = None if found is None else found[None]

    def _pull_back(self, border: _Border) -> None:
        """From the border to the starts, through what the model computed from them."""
        value = border.value
        plain = value.as_subclass(Tensor)
        if border.terms:
            for source in value.sources:
                source.terms += pulled(border.terms, plain, source.value)
        if border.grads is None:
            return
        if value.start is not None and len(value.sources) == 1:
            self._add(value.start, border.grads)
            return
        wanted = [source.value for source in value.sources]
        with torch.enable_grad():
            each = [
                torch.autograd.grad(plain, wanted, grads.to(plain.dtype), retain_graph=True, allow_unused=True)
                for grads in border.grads
            ]
        for source, grads in zip(value.sources, zip(*each, strict=True), strict=True):
            if grads[0] is not None:
                self._add(source, torch.stack(list(grads)))

    def _add(self, start: Start, grads: Tensor) -> None:
        start.grads = grads if start.grads is None else start.grads + grads


def _region(args: Any, kwargs: Any) -> Region | None:
    values = tree_flatten((args, kwargs or {}))[0]
    return next((x.region for x in values if isinstance(x, Shared) and hasattr(x, "region")), None)
