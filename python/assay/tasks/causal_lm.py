"""Next-token prediction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.tasks.base import IGNORE, Outputs, check_range, logits_of, outside_range, to_device, token_ids, token_mask
from assay.tasks.losses import row_losses, sample_losses
from assay.tasks.output_layer import OutputLayer, find_output_layer, fused, remember_changed


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

    ``fused``: losses and gradients come from ``ops.linear_cross_entropy`` in place of the output layer, so that
    no tensor of N × vocabulary is made; reading ``logits`` makes it all the same. True fuses models of
    transformers whose output layer is a plain ``nn.Linear`` with nothing after it (a soft cap, say), and runs
    others as they are; a name says which layer of another model is that ``nn.Linear``; False never fuses.
    """

    reduction: Literal["mean", "sum"] = "mean"
    fused: bool | str = True

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"CausalLM: reduction {self.reduction!r}; expected 'mean' or 'sum'")

    def size(self, batch: Any) -> int:
        return token_ids("CausalLM", batch).shape[0]

    def to(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        labels = self._next_tokens(batch)
        fused = self._fused_outputs(model, batch, labels) if self.fused else None
        if fused is not None:
            return fused
        logits = logits_of(model(**self._arguments(model, batch)))
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"CausalLM: logits of shape {tuple(logits.shape)} for input_ids of shape {tuple(labels.shape)}; "
                "expected (B, T, vocabulary)"
            )
        check_range(labels, logits.shape[2], ignore=IGNORE)
        flat = logits.flatten(0, 1)
        return self._outputs(row_losses(flat, labels.flatten()).view(labels.shape), labels, flat)

    def _fused_outputs(self, model: nn.Module, batch: Any, labels: Tensor) -> Outputs | None:
        """None if the model has no output layer that can be fused, or does anything with its logits but return them."""
        name = self.fused if isinstance(self.fused, str) else None
        layer = find_output_layer(model, name)
        if layer is None or bool(outside_range(labels, layer.out_features, ignore=IGNORE).any()):
            return None
        output = None
        with fused(layer, labels) as stand_in:
            try:
                output = logits_of(model(**self._arguments(model, batch)))
            except Exception:
                if not stand_in.changed:
                    raise
        if output is not None and stand_in.output is not None and stand_in.is_output(output):
            return self._outputs(stand_in.output.source, labels, stand_in.output_layer())
        if name is not None:
            raise ValueError(
                f"CausalLM: the model's logits are not the output of its layer {name!r}, so that it cannot be "
                "fused; pass fused=False"
            )
        remember_changed(model)
        return None

    def unfused(self) -> CausalLM:
        """The same losses from logits that are made: what a check of fused ones compares with."""
        return replace(self, fused=False)

    def _outputs(
        self, row_losses: Tensor | Callable[[], Tensor], labels: Tensor, logits: Tensor | OutputLayer
    ) -> Outputs:
        """Losses by position (B, T), 0 where nothing is predicted, or what makes them -> by sample."""

        def losses() -> Tensor:
            made = row_losses if isinstance(row_losses, Tensor) else row_losses()
            return sample_losses(made, labels, self.reduction)

        by_sample: Any = losses() if isinstance(row_losses, Tensor) else losses
        by_row: Any = row_losses
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(labels.shape[1])
        if isinstance(logits, OutputLayer):
            unmade: Any = logits.logits
            return Outputs(by_sample, unmade, labels.flatten(), rows, logits, by_row)
        return Outputs(by_sample, logits, labels.flatten(), rows, row_losses=by_row)

    def relabelled(self, batch: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
        """The label of row (b, t) is the token at t + 1."""
        ids = token_ids("CausalLM", batch)
        moved = torch.full_like(ids, IGNORE, dtype=torch.int64)
        moved[:, 1:] = labels.view(ids.shape)[:, :-1]
        return {**batch, "labels": moved}

    def by_token(self, values: Tensor, labels: Tensor, samples: int) -> Tensor:
        """Row (b, t) is about token t + 1; nothing predicts the first."""
        rows = values.masked_fill(labels == IGNORE, torch.nan).view(samples, -1)
        return F.pad(rows[:, :-1], (1, 0), value=torch.nan)

    def mask(self, batch: Any) -> Tensor:
        return token_mask("CausalLM", batch)

    def _next_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T): the token that each position has to predict, -100 where none."""
        ids, mask = token_ids("CausalLM", batch), self.mask(batch)
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
