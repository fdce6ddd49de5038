"""What scoring asks of a model of whole texts beyond ``padding_checks``, tried out on a few random tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from assay.recipe.causal_checks import differ, in_eval_mode
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.tasks.base import call, logits_of, to_device

Row = tuple[int, int, Sequence[int]]
Sampler = Callable[[Sequence[Row]], dict[str, Tensor]]
"""Rows (draw, number of tokens, tokens at the beginning) -> a batch as in scoring."""

_LENGTH = 16
_MULTIPLY_ADDS = 2e10


def check_longest(key: str, model: nn.Module, sample: Sampler, max_length: int) -> None:
    """EngineError unless ``model`` (called ``key``) reads texts of ``max_length`` tokens, and a shorter one beside them
    as it does alone. Not tried out where it would take long."""
    if max_length * sum(p.numel() for p in model.parameters()) > _MULTIPLY_ADDS:
        return
    short = (1, min(_LENGTH, max_length), ())
    what = f"{key}: cannot be run on texts of {max_length} tokens; set task.max_length to what it can"
    with refusing(what):
        same = not differ(_outputs(model, sample, [short])[0], _outputs(model, sample, [short, (2, max_length, ())])[0])
    if not same:
        raise EngineError(
            f"{key}: a text gets other outputs beside one of {max_length} tokens than alone; set task.max_length lower"
        )


def looks_for_end(model: nn.Module, sample: Sampler, max_length: int, end: int | None) -> bool:
    """Whether the model finds a text's end by the token ``end``, so that one more in a text matters to its neighbours.

    Some then cannot be run at all on texts with different numbers of it.
    """
    length = min(_LENGTH, max_length)
    if end is None or length < 4:
        return False
    rows: list[Row] = [(1, length, ()), (2, length, (end,))]
    try:
        alone = [_outputs(model, sample, [row])[0] for row in rows]
        together = _outputs(model, sample, rows)
    except Exception:  # of the model's own classes; that it can be run on one end each has been seen
        return True
    return any(differ(a, b) for a, b in zip(alone, together, strict=True))


def _outputs(model: nn.Module, sample: Sampler, rows: Sequence[Row]) -> list[Tensor]:
    """Each row's outputs, (C,) or those of its own tokens."""
    batch = sample(rows)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with quietly(), in_eval_mode(model), torch.no_grad():
        outputs = logits_of(call(model, to_device(batch, device)))
    own = batch["attention_mask"].to(outputs.device) != 0
    return [row[mask] if outputs.ndim > 2 else row for row, mask in zip(outputs, own, strict=True)]
