"""Pairs of images and texts that are each other's label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.tasks.base import Outputs, describe, pair, to_device, wide
from assay.tasks.losses import row_losses


@dataclass(frozen=True)
class Contrastive:
    """Batches ``(images, texts)``: the CLIP loss, which couples the samples of a batch.

    A sample's loss is the mean of its own row (its image against all texts) and its own column (its text
    against all images) *with the other samples' embeddings held fixed*: only so does a sample have a gradient
    of its own.

    The model returns ``(image_embeds, text_embeds)``, both (B, D) as they are to be compared (CLIP normalises
    them), with the temperature's multiplier as a third item, as open_clip does; or an object with these two
    attributes, as Hugging Face does. Without a third item the multiplier is ``exp(model.logit_scale)``;
    ``scale`` replaces whatever the model says. It is called ``model(images, texts)``, or, when ``texts`` is a
    mapping (a tokenizer's output), ``model(pixel_values=images, **texts)``.
    """

    scale: float | None = None

    def size(self, batch: Any) -> int:
        return len(pair(batch, "Contrastive", "(images, texts)")[0])

    def to(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        images, texts = pair(batch, "Contrastive", "(images, texts)")
        by_name = isinstance(texts, Mapping)
        output = model(pixel_values=images, **texts) if by_name else model(images, texts)
        image, text, scale = self._embeddings(model, output)
        pairs = (image * text).sum(1, keepdim=True)
        own = torch.eye(len(image), dtype=torch.bool, device=image.device)
        rows = torch.where(own, pairs, image @ text.detach().T) * scale
        columns = torch.where(own, pairs, text @ image.detach().T) * scale
        labels = torch.arange(len(image), device=image.device)
        losses = (row_losses(rows, labels) + row_losses(columns, labels)) / 2
        return Outputs(losses.float(), rows, labels)

    def mask(self, batch: Any) -> Tensor | None:
        return None

    def _embeddings(self, model: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor | float]:
        if isinstance(output, tuple) and len(output) in (2, 3):
            image, text = output[:2]
        elif hasattr(output, "image_embeds") and hasattr(output, "text_embeds"):
            image, text = output.image_embeds, output.text_embeds
        else:
            raise TypeError(
                f"Contrastive: the model returned {describe(output)}; expected (image_embeds, text_embeds"
                "[, logit_scale]) or an object with image_embeds and text_embeds"
            )
        if image.ndim != 2 or image.shape != text.shape:
            raise ValueError(
                f"Contrastive: image_embeds of shape {tuple(image.shape)} and text_embeds of shape "
                f"{tuple(text.shape)}; expected (B, D) both"
            )
        return wide(image), wide(text), self._multiplier(model, output)

    def _multiplier(self, model: nn.Module, output: Any) -> Tensor | float:
        if self.scale is not None:
            return self.scale
        if isinstance(output, tuple) and len(output) == 3:
            scale: Tensor | float = output[2]
            return scale
        logarithm = getattr(model, "logit_scale", None)
        if not isinstance(logarithm, Tensor):
            raise ValueError(
                "Contrastive: the model returns no logit_scale and has no parameter of that name; "
                "give the multiplier: Contrastive(scale=100.0)"
            )
        return logarithm.exp()
