"""IFD, the difficulty of following an instruction: how much less surprising a response is behind its prompt.

Li et al., *Superfiltering: Weak-to-Strong Data Filtering for Fast Instruction-Tuning* (2402.00530), after *From
Quantity to Quality* (2308.12032).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.probe import Signals
from assay.tasks import IGNORE, CausalLM, Response
from assay.tasks.special_tokens import special_token


class IFD(Method):
    """exp(ℓ(y|x)) / exp(ℓ(y)), ℓ being the mean loss of a response's tokens, with its prompt x and without it.

    Columns: ``ifd``, and the losses that it is made of, ``ifd_given`` ℓ(y|x) and ``ifd_alone`` ℓ(y), nats. The higher
    the ratio, the less the prompt tells of the response; at 1 and above it misleads: such samples are dropped
    (``--where "ifd < 1"``), and the highest of the rest are kept.

    Both means are over the same tokens: all of the response's if the sample begins with the token that begins every
    text for the model (its text config's ``bos_token_id``, nowhere else in the prompt), which stays in front of the
    response alone; else all but the first, for nothing predicts that one without a prompt. Which it is, or why there is
    none, is in the metadata. NaN where there is no prompt, no response of so many tokens, or several.

    Args:
        model: a causal language model; a small one will do, says the paper.
        task: of batches whose ``labels`` are -100 where the prompt is.
        name: the first column, and what the others begin with.

    Raises:
        ValueError: another task.
    """

    needs_prompts: ClassVar[bool] = True

    def __init__(self, model: nn.Module, task: CausalLM, *, name: str = "ifd") -> None:
        if not isinstance(task, CausalLM):
            raise ValueError(
                f"IFD: is about prompts and responses, and the task is {type(task).__name__}; expected tasks.CausalLM "
                "(in a recipe, task.kind: causal_lm)"
            )
        self.name, self.model, self.task = name, model, task

    @property
    def columns(self) -> Sequence[Column]:
        ratio = "exp(ℓ(y|x) − ℓ(y)): high is worth more, but at 1 and above the prompt misleads: drop those"
        return (
            Column(self.name, "high", ratio),
            Column(f"{self.name}_given", "none", "ℓ(y|x): mean loss of the response behind its prompt, nats"),
            Column(f"{self.name}_alone", "none", "ℓ(y): the same without the prompt, nats"),
        )

    def needs(self) -> Mapping[str, Need]:
        begin = special_token(self.model, "bos_token_id").number
        return {"given": Need(self.model, self.task), "alone": Need(self.model, Response(self.task, begin))}

    def metadata(self) -> dict[str, str]:
        found = special_token(self.model, "bos_token_id")
        return {"begin": found.why_none or str(found.number)}

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        alone, counted = _losses(signals["alone"])
        given, predicted = _losses(signals["given"])
        tokens, more = counted.sum(1), predicted.sum(1) - counted.sum(1)
        # The one more that a prompt predicts is the response's first token.
        first = predicted.long().argmax(1, keepdim=True)
        same = given.sum(1) - torch.where(more == 1, given.gather(1, first)[:, 0], 0.0)
        known = (tokens > 0) & ((more == 0) | (more == 1))
        divisor = torch.where(known, tokens.double(), torch.nan)
        given_mean, alone_mean = same / divisor, alone.sum(1) / divisor
        columns = {"": (given_mean - alone_mean).exp(), "_given": given_mean, "_alone": alone_mean}
        return {f"{self.name}{which}": values.float() for which, values in columns.items()}


def _losses(signals: Signals) -> tuple[Tensor, Tensor]:
    """(B, T) both: each position's loss in float64, 0 where nothing is predicted, and where something is."""
    losses, labels = signals.row_losses, signals.labels
    assert losses is not None
    assert labels is not None
    return losses.double(), labels.view(losses.shape) != IGNORE
