"""A response without its prompt: another view of a causal language model's sample, of the very same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from assay.tasks.base import IGNORE, OfTask, Outputs
from assay.tasks.causal_lm import CausalLM


@dataclass(frozen=True)
class Response(OfTask):
    """Batches of ``CausalLM`` with ``labels``, of which the model sees the response alone: the tokens with a label,
    which must follow one another behind a prompt, the tokens before them.

    The tokens are the batch's own, so that they are the same with the prompt and without, wherever a tokenizer would
    have cut them. If a sample begins with ``begin``, the token that begins every text, that stays in front, and every
    token of the response is predicted; in any other sample the first token stands where nothing predicts it.

    A sample without a prompt, without a response or with several has no label left: its loss is NaN.
    """

    task: CausalLM = field(default_factory=CausalLM)
    begin: int | None = None

    def mask(self, batch: Any) -> Tensor:
        return self.task.mask(self.alone(batch))

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        return self.task.forward(model, self.alone(batch))

    def unfused(self) -> Response:
        return replace(self, task=self.task.unfused())

    def by_token(self, values: Tensor, labels: Tensor, samples: int) -> Tensor:
        """Of the response's tokens."""
        return self.task.by_token(values, labels, samples)

    def alone(self, batch: Any) -> dict[str, Any]:
        """The batch without prompts, padded on the right.

        Raises:
            ValueError: it has no ``labels``: every token counts, so that there is no prompt.
        """
        mask = self.task.mask(batch)
        if not isinstance(batch.get("labels"), Tensor) or batch["labels"].shape != mask.shape:
            raise ValueError(
                "Response: a batch without labels of the shape of input_ids has no prompt, for every token counts; "
                "expected labels that are -100 where the prompt is (in a recipe: task.prompt_column with "
                "completion_column, or messages_column)"
            )
        counted = mask & (batch["labels"] != IGNORE)
        positions = torch.arange(mask.shape[1], device=mask.device)
        first, last, start = (_first(counted), mask.shape[1] - 1 - _first(counted.flip(1)), _first(mask))
        length = torch.where(counted.any(1), last - first + 1, 0)
        fits = (counted.sum(1) == length) & (length > 0) & (first > start)
        begins = torch.zeros_like(fits)
        if self.begin is not None:
            found = (batch["input_ids"] == self.begin) & mask & (positions < first[:, None])
            begins = fits & found.gather(1, start[:, None])[:, 0] & (found.sum(1) == 1)
        own = torch.where(fits, length + begins, 1)
        place = positions[: max(1, int(own.max()))] - begins[:, None].long()
        taken = torch.where(place < 0, start[:, None], (first[:, None] + place).clamp(max=mask.shape[1] - 1))
        held = positions[: place.shape[1]] < own[:, None]
        return self._gathered(batch, taken, held, held & (place >= 0) & fits[:, None])

    def _gathered(self, batch: Mapping[str, Any], taken: Tensor, held: Tensor, labelled: Tensor) -> dict[str, Any]:
        """What each token carries, at the positions ``taken``; the model counts them itself from where they begin."""
        shape = batch["input_ids"].shape
        found = {
            name: value.gather(1, taken) if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in batch.items()
            if name != "position_ids"
        }
        found["labels"] = found["labels"].masked_fill(~labelled, IGNORE)
        return found | {"attention_mask": held.long()}


def _first(flags: Tensor) -> Tensor:
    """(B, T) -> (B,): where the first is; 0 where none is."""
    return flags.long().argmax(1)
