"""What scoring takes for granted of models that read a whole text: that its logits do not depend on its neighbours.

Encoders may see padding, and classifiers of decoders look for a text's last token by the padding token: both are tried
out on two texts when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.recipe.causal_checks import differ, in_eval_mode
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.tasks.base import logits_of, to_device

_SHORT, _LONG = "gold", "A vein of gold runs north for two miles before it thins out."


def padding_token(model: nn.Module) -> int:
    """What a model's texts are padded with: its config's ``pad_token_id``, or 0 where a mask says what counts."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    found = setting(text() if callable(text) else config, "pad_token_id")
    return found if isinstance(found, int) and found >= 0 else 0


def setting(config: Any, key: str) -> Any:
    """What a model's config says, which of a model written in Python may be anything; None if it does not."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def check_padding(key: str, model: nn.Module, collate: Callable[[Sequence[str]], Mapping[str, Tensor]]) -> None:
    """Run ``model`` (called ``key`` in errors) on a short and a long text, alone and together, as ``collate`` makes
    batches of texts: ``input_ids`` and ``attention_mask``, (B, T), and what else the model takes.

    Raises:
        EngineError: it cannot be run on them, or a text's logits, (C,) or one row per token, differ.
    """

    def logits(texts: Sequence[str]) -> list[Tensor]:
        batch = to_device(collate(texts), next((p.device for p in model.parameters()), torch.device("cpu")))
        with torch.no_grad(), refusing(f"{key}: cannot be run on texts; its config may be at fault"):
            found = logits_of(model(**batch))
        mask = batch["attention_mask"] != 0
        return [row[own] if row.ndim > 1 else row for row, own in zip(found, mask, strict=True)]

    with quietly(), in_eval_mode(model):
        alone = [logits([text])[0] for text in (_SHORT, _LONG)]
        together = logits([_SHORT, _LONG])
    if any(len(one) != len(other) or differ(one, other) for one, other in zip(alone, together, strict=True)):
        raise EngineError(
            f"{key}: a text in a batch with a longer one gets other logits than alone, so that its scores would depend "
            "on the batch (the model sees padding, or its pad_token_id is not what it was trained with)"
        )
