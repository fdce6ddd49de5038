"""A language model as judge: what it answers to a question about the sample."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.tasks.base import Outputs, describe, logits_of, to_device, token_ids, token_mask
from assay.tasks.output_layer import find_output_layer

YES = 0
"""The label of every sample: the first of the three answers yes, no, anything else."""


@dataclass(frozen=True)
class Judge:
    """The first token of a model's answer. Batches are mappings, as ``Prompt`` makes them: ``input_ids`` and
    ``attention_mask``, (B, T), of questions that are padded on the right, and ``yes`` and ``no``, (B, n) each, the
    tokens that say so.

    Models are causal language models, which answer behind the question, or encoder–decoders of transformers, whose
    decoder answers behind its ``decoder_start_token_id``. The output layer runs for the answer's position alone where
    no gradient is asked for and it is a plain ``nn.Linear`` of transformers.

    ``logits`` are (B, 3): log-probabilities, in the model's full softmax, of an answer that begins with yes, with no,
    with anything else. A sample's loss is −log p(yes), that of ``label`` 0. A sample without a token is NaN.
    """

    def size(self, batch: Any) -> int:
        return len(token_ids("Judge", batch))

    def to(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device)

    def mask(self, batch: Any) -> Tensor:
        mask = token_mask("Judge", batch)
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(
                "Judge: attention_mask has padding before a token; expected ones and then zeros (padding on the right)"
            )
        return mask

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        mask = self.mask(batch)
        logits = self._answers(model, batch, mask)
        yes, no = (_tokens(batch, name, *logits.shape) for name in ("yes", "no"))
        if bool((torch.cat([yes, no], 1).sort(1).values.diff(dim=1) == 0).any()):
            raise ValueError("Judge: the batch's 'yes' and 'no' have a token twice; expected each once, in one of them")
        answers = _log_probabilities(logits, yes, no)
        answers = torch.where(mask.any(1)[:, None], answers, torch.nan)
        losses = -answers[:, YES]
        labels = torch.full_like(losses, YES, dtype=torch.int64)
        return Outputs(losses, answers, labels, row_losses=losses)

    def _answers(self, model: nn.Module, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """(B, C): the logits of each sample's first token of an answer."""
        ids, config = token_ids("Judge", batch), getattr(model, "config", None)
        logits: Tensor | None = None
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        if getattr(config, "is_encoder_decoder", False):
            start = getattr(config, "decoder_start_token_id", None)
            if start is None:
                raise ValueError("Judge: the model's config has no decoder_start_token_id, behind which it answers")
            arguments["decoder_input_ids"] = torch.full_like(ids[:, :1], start)
            return _checked(logits_of(model(**arguments)), len(ids), 1)[:, 0]
        last = (mask.sum(1) - 1).clamp(min=0)
        parameters = inspect.signature(model.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments = {name: value for name, value in arguments.items() if name in parameters}
        layer = None if torch.is_grad_enabled() else find_output_layer(model, None)
        with _at(layer, last) as chosen:
            try:
                logits = logits_of(model(**arguments))
            except Exception:
                if not chosen:
                    raise
        if chosen:
            if logits is not None and logits.ndim == 3 and logits.shape[:2] == (len(ids), 1):
                return logits[:, 0]
            logits = logits_of(model(**arguments))  # it does more with them than to hand them on
        assert logits is not None
        logits = _checked(logits, len(ids), None)
        if logits.shape[1] != ids.shape[1]:
            raise ValueError(
                f"Judge: logits of shape {tuple(logits.shape)} for input_ids of shape {tuple(ids.shape)}; expected "
                "(B, T, vocabulary)"
            )
        return logits[torch.arange(len(ids), device=logits.device), last]


@contextmanager
def _at(layer: nn.Linear | None, last: Tensor) -> Iterator[list[Tensor]]:
    """Let an output layer run at one position of each sample, ``last`` (B,), for as long as the block lasts.

    Gives the list of what it was called with; it stays empty where the layer is called with anything but (B, T, D), of
    which it then makes all positions' logits.
    """
    chosen: list[Tensor] = []
    if layer is None:
        yield chosen
        return

    def forward(hidden: Tensor) -> Tensor:
        if hidden.ndim == 3 and len(hidden) == len(last) and hidden.shape[1] > int(last.max()):
            hidden = hidden[torch.arange(len(last), device=hidden.device), last.to(hidden.device)][:, None]
            chosen.append(hidden)
        return nn.Linear.forward(layer, hidden)

    layer.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield chosen
    finally:
        del layer.forward


def _checked(logits: Tensor, samples: int, positions: int | None) -> Tensor:
    if logits.ndim != 3 or len(logits) != samples or positions not in (None, logits.shape[1]):
        expected = f"({samples}, {positions or 'T'}, vocabulary)"
        raise ValueError(f"Judge: logits of shape {tuple(logits.shape)}; expected {expected}")
    return logits


def _tokens(batch: Mapping[str, Any], name: str, samples: int, classes: int) -> Tensor:
    """The tokens that say ``name``, (B, n), checked."""
    tokens = batch.get(name)
    fits = isinstance(tokens, Tensor) and tokens.ndim == 2 and len(tokens) == samples and tokens.shape[1] > 0
    if not isinstance(tokens, Tensor) or not fits or tokens.is_floating_point():
        found = f"of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else describe(tokens)
        raise TypeError(f"Judge: the batch's {name!r} is {found}; expected ({samples}, n) token numbers, n at least 1")
    if int(tokens.min()) < 0 or int(tokens.max()) >= classes:
        raise ValueError(f"Judge: the batch's {name!r} has tokens outside [0, {classes}), the model's vocabulary")
    return tokens.long()


def _log_probabilities(logits: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """(B, C) -> (B, 3) log-probabilities of the two sets of tokens and of all others, summed in float64."""
    z = logits.double()
    rest = z.scatter(1, torch.cat([yes, no], 1), -torch.inf)
    sums = torch.stack([*(z.gather(1, tokens).logsumexp(1) for tokens in (yes, no)), rest.logsumexp(1)], 1)
    answers = sums - z.logsumexp(1, keepdim=True)
    return answers if logits.dtype == torch.float64 else answers.float()
