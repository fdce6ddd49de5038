"""One use of a tapped layer in a forward pass: its input and, once it has come, its output's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from assay.probe.experts import Routing
from assay.probe.formulas import Factors
from assay.probe.head import Head
from assay.probe.layouts import Layout, arranged
from assay.probe.packing import Group, Packing
from assay.probe.selection import Tap
from assay.probe.starts import Start
from assay.probe.terms import Dense, Term


@dataclass
class Call:
    """One use of a tapped layer, or of bare parameters. ``open`` counts the layer's parameters that still need it.

    A fused output layer's ``grads`` (B, T) are those of its row losses, and ``labels`` (B, T) say of which.

    Attributes:
        layout: how the samples lie in ``inputs`` and ``grads``.
        size: B.
        start: of values that all samples share.
        routing: of a mixture's experts.
        packing: of samples that lie ``"packed"``.
    """

    tap: Tap
    parameters: Mapping[str, str]
    inputs: Tensor
    version: int
    labels: Tensor | None = None
    layout: Layout = "first"
    size: int = 0
    start: Start | None = None
    routing: Routing | None = None
    packing: Packing | None = None
    open: int = 0
    grads: Tensor | None = None

    def factors(self) -> Factors:
        if self.labels is None:
            assert self.tap.rule is not None
            return self.tap.rule.factors(self.tap.module, self._inputs(), self._grads())
        residual: Any = self._head().residual
        return Factors(self.checked_inputs(), residual)

    def terms(self, local: str, group: Group | None = None) -> list[Term]:
        """The gradient of the layer's parameter ``local``: their sum, nothing where it is zero.

        ``group``: of packed samples, those whose gradients are wanted.
        """
        if self.tap.rule is None:
            assert self.start is not None
            return self.start.all_terms()
        if self.grads is None:
            return []
        if self.routing is not None:
            term = self.routing.term(self.tap.module, local, self.checked_inputs(), self.grads)
            if local.endswith("_bias"):
                return [Dense(term.dense((*self.tap.module.get_parameter(local).shape, 1)).squeeze(-1))]
            return [term]
        if self.labels is None:
            return [self.tap.rule.term(self.tap.module, local, self._inputs(group), self._grads(group))]
        head = self._head()
        return [head if local == "weight" else Dense(head.bias_gradient())]

    def dot_by_position(self, local: str, direction: Tensor, positions: int | None, in_order: set[str]) -> Tensor:
        """⟨the gradient that each position gives the layer's parameter ``local``, direction⟩, (B, positions).

        ``in_order``: layers of whose inputs (B, T, …) is known that T are the tokens. It grows.
        """
        if self.grads is not None and self.labels is not None:
            head = self._head()
            return head.dot_by_position(direction) if local == "weight" else head.bias_dot_by_position(direction)
        rule = self.tap.rule
        is_weight = self.start is not None and bool(self.start.terms)  # no token's, whatever its shape is
        is_packed = self.layout == "packed"
        if rule is None or not rule.by_position or self.grads is None or positions is None or is_weight or is_packed:
            raise ValueError(f"layer {self.tap.layer!r} ({type(self.tap.module).__name__}) has no positions of its own")
        inputs, grads = self._inputs(), self._grads()
        dots = rule.dot_by_position(self.tap.module, local, inputs, grads, direction)
        lead = inputs.shape[1:-1] if inputs.is_floating_point() else inputs.shape[1:]
        alone = len(lead) > 0 and [n for n in lead if n != 1] == [n for n in (positions,) if n != 1]
        if lead[:1] == (positions,) and (alone or positions not in lead[1:]):
            in_order.add(self.tap.layer)
        # (B, heads, T) has T heads by chance: (B, T, heads) only if it was that before.
        mine = alone or (lead[:1] == (positions,) and self.tap.layer in in_order)
        if not mine or dots.shape[1] % positions:
            raise ValueError(
                f"layer {self.tap.layer!r} ({type(self.tap.module).__name__}) ran on {tuple(inputs.shape)}, which are "
                f"not the {positions} tokens of each sample"
            )
        return dots.reshape(len(dots), positions, -1).sum(2)  # attention heads, say, at every position

    def _inputs(self, group: Group | None = None) -> Tensor:
        """(B, ...)."""
        inputs = self.checked_inputs()
        if group is not None and self.packing is not None:
            return group.rows(self.packing.flat(inputs))
        if self.start is not None:  # the same for all samples
            assert self.grads is not None
            return inputs[None].expand(len(self.grads), *inputs.shape)
        return arranged(inputs, self.layout, self.size)

    def _grads(self, group: Group | None = None) -> Tensor:
        assert self.grads is not None
        if group is not None and self.packing is not None:
            return group.rows(self.packing.flat(self.grads))
        return arranged(self.grads, self.layout, self.size)

    def _head(self) -> Head:
        assert self.labels is not None
        assert self.grads is not None
        weight, bias = self.tap.module.weight, self.tap.module.bias
        return Head(
            self.checked_inputs(),
            weight.detach(),  # type: ignore[operator]
            None if bias is None else bias.detach(),  # type: ignore[operator]
            self.labels,
            self.grads,
        )

    def checked_inputs(self) -> Tensor:
        if self.inputs._version != self.version:
            raise RuntimeError(
                f"the input of layer {self.tap.layer!r} was modified in place after the layer had used it, "
                "so that the gradient of its weight is lost; make the operation out of place"
            )
        return self.inputs

    def release(self, last: bool) -> None:
        # The graph's hooks hold this object until the whole backward pass is over.
        self.grads = None
        if self.start is not None:
            self.start.terms = []
        if last:
            self.inputs = self.inputs.new_empty(0)
