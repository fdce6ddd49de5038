"""TRL's fused output layer, taken apart where its weight's gradients are wanted by sample."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.train.tokens import IGNORE


def has_tapped_head(model: Any, tapped: Collection[str]) -> bool:
    """Whether the weight or bias of the output layer, perhaps shared with the embedding, is among these parameters."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return False
    own = {id(parameter) for parameter in head.parameters()}
    return any(id(parameter) in own for name, parameter in model.named_parameters() if name in tapped)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """The model's output layer runs by its own ``__call__``, and logits are made, where TRL asks for it fused."""
    asked: list[tuple[Tensor, Tensor | None]] = []

    def before(_: nn.Module, args: Any, arguments: dict[str, Any]) -> Any:
        asked.clear()
        if arguments.pop("fused_lm_head", False):
            asked.append((arguments.pop("labels"), arguments.pop("shift_labels", None)))
        return args, arguments

    def after(_: nn.Module, args: Any, output: Any) -> None:
        if asked:
            for name, value in _by_token(output["logits"], *asked[0]).items():
                output[name] = value

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_token(logits: Tensor, labels: Tensor, shift_labels: Tensor | None) -> dict[str, Tensor]:
    """What the fused layer gives, 0 where the label is ignored."""
    logits, targets = (logits[:, :-1], labels[:, 1:]) if shift_labels is None else (logits, shift_labels)
    logits, targets = logits.float(), targets.to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    counted = targets != IGNORE
    with torch.no_grad():
        entropy = torch.stack([torch.special.entr(sample.softmax(-1)).sum(-1) for sample in logits])
        is_best = logits.argmax(-1) == targets
    return {
        "log_probs": -losses.view(targets.shape),
        "entropy": entropy.masked_fill(~counted, 0),
        "is_top1": is_best & counted,
        "label_mask": counted,
    }
