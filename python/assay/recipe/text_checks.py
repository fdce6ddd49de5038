"""What scoring takes for granted of models that read a whole text: that its logits do not depend on its neighbours.

Encoders may see padding, classifiers of decoders look for a text's last token by the padding token, others for the
token that ends a text: all are tried out on a few texts when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from assay.recipe.errors import EngineError
from assay.recipe.library_calls import refusing
from assay.recipe.trials import differ, text_outputs
from assay.tasks.special_tokens import special_token

Row = tuple[int, int, Sequence[int]]
Sampler = Callable[[Sequence[Row]], dict[str, Tensor]]
"""Rows (draw, number of tokens, tokens at the beginning) -> a batch as in scoring."""

_SHORT, _LONG = "gold", "A vein of gold runs north for two miles before it thins out."
_LENGTH = 16
_MULTIPLY_ADDS = 2e10


def padding_token(model: nn.Module) -> int:
    """What a model's texts are padded with: its config's ``pad_token_id``, or 0 where a mask says what counts."""
    return special_token(model, "pad_token_id").number or 0


def check_padding(key: str, model: nn.Module, collate: Callable[[Sequence[str]], Mapping[str, Tensor]]) -> None:
    """Run ``model`` (called ``key`` in errors) on a short and a long text, alone and together, as ``collate`` makes
    batches of texts: ``input_ids`` and ``attention_mask``, (B, T), and what else the model takes.

    Raises:
        EngineError: it cannot be run on them, or a text's logits, (C,) or one row per token, differ.
    """

    def logits(texts: Sequence[str]) -> list[Tensor]:
        batch = collate(texts)
        with refusing(f"{key}: cannot be run on texts; its config may be at fault"):
            return text_outputs(model, batch)

    alone = [logits([text])[0] for text in (_SHORT, _LONG)]
    together = logits([_SHORT, _LONG])
    if any(len(one) != len(other) or differ(one, other) for one, other in zip(alone, together, strict=True)):
        raise EngineError(
            f"{key}: a text in a batch with a longer one gets other logits than alone, so that its scores would depend "
            "on the batch (the model sees padding, or its pad_token_id is not what it was trained with)"
        )


def check_longest(key: str, model: nn.Module, sample: Sampler, max_length: int) -> None:
    """EngineError unless ``model`` (called ``key``) reads texts of ``max_length`` tokens, and a shorter one beside them
    as it does alone. Not tried out where it would take long."""
    if max_length * sum(p.numel() for p in model.parameters()) > _MULTIPLY_ADDS:
        return
    short = (1, min(_LENGTH, max_length), ())
    what = f"{key}: cannot be run on texts of {max_length} tokens; set task.max_length to what it can"
    with refusing(what):
        alone, *_ = text_outputs(model, sample([short]))
        beside, *_ = text_outputs(model, sample([short, (2, max_length, ())]))
    if differ(alone, beside):
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
        alone = [text_outputs(model, sample([row]))[0] for row in rows]
        together = text_outputs(model, sample(rows))
    except Exception:  # of the model's own classes; that it can be run on one end each has been seen
        return True
    return any(differ(a, b) for a, b in zip(alone, together, strict=True))
