"""Running a model on a few samples when it is loaded, to see what scoring takes for granted of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from assay.recipe.library_calls import quietly
from assay.tasks.base import call, logits_of, to_device

_TOLERANCE = 1e-4  # of the largest logit, in float32: rounding is below 1e-5, what is looked for above 1e-3
_ROUNDINGS = 8  # in types of fewer bits, that many of their steps: rounding adds up over the layers to about two


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter lies."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; which of its modules were in training is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def right_padded(rows: Sequence[Tensor], padding: int = 0) -> dict[str, Tensor]:
    """Token ids of several texts as a batch of `CausalLM`; where the mask is 0, the tokens are ``padding``."""
    ids = torch.full((len(rows), max(map(len, rows))), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def text_outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Each text's outputs, (C,) or those of its own tokens."""
    with quietly(), in_eval_mode(model), torch.no_grad():
        outputs = logits_of(call(model, to_device(batch, device_of(model))))
    own = batch["attention_mask"].to(outputs.device) != 0
    return [row[mask] if outputs.ndim > 2 else row for row, mask in zip(outputs, own, strict=True)]


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether logits of the same shape differ by more than rounding."""
    finite, tolerance = one.isfinite(), max(_TOLERANCE, _ROUNDINGS * torch.finfo(one.dtype).eps)
    if not torch.equal(finite, other.isfinite()):
        return True
    one, other = one[finite].double(), other[finite].double()
    return bool(((one - other).abs() > tolerance * one.abs().max()).any()) if len(one) else False
