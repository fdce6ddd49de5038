"""Pairs of images and texts that are each other's label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    A batch that does not fit into memory may come ``in_pieces``: the model embeds one after the other, and all samples
    are compared. That saves memory where nobody asks for gradients, and is an error where somebody does.
    """

    scale: float | None = None

    def size(self, batch: Any) -> int:
        images, _ = pair(batch, "Contrastive", "(images, texts)")
        return sum(map(len, images)) if isinstance(images, tuple) else len(images)

    def to(self, batch: Any, device: torch.device) -> Any:
        return to_device(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        image, text, scale = self.embed(model, batch)
        pairs = (image * text).sum(1, keepdim=True)
        own = torch.eye(len(image), dtype=torch.bool, device=image.device)
        rows = torch.where(own, pairs, image @ text.detach().T) * scale
        columns = torch.where(own, pairs, text @ image.detach().T) * scale
        labels = torch.arange(len(image), device=image.device)
        losses = (row_losses(rows, labels) + row_losses(columns, labels)) / 2
        return Outputs(losses.float(), rows, labels)

    def mask(self, batch: Any) -> Tensor | None:
        return None

    def embed(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor | float]:
        """The images' embeddings and the texts', (B, D) each, and what multiplies their products."""
        images, texts = pair(batch, "Contrastive", "(images, texts)")
        if not isinstance(images, tuple):
            return self._embeddings(model, _run(model, images, texts))
        if torch.is_grad_enabled():
            raise ValueError(
                f"Contrastive: {self.size(batch)} samples with their gradients do not fit into memory at once, and "
                "cannot be taken in pieces; compare fewer with one another (a recipe's task.group)"
            )
        parts = [self._embeddings(model, _run(model, *piece)) for piece in zip(images, texts, strict=True)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), parts[0][2]

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


def in_pieces(batch: Any, pieces: int) -> Any:
    """A batch of `Contrastive`, (images, texts), as so many pieces of about the same number of samples."""
    images, texts = pair(batch, "Contrastive", "(images, texts)")
    size = -(-len(images) // pieces)
    starts = range(0, len(images), size)
    return tuple(images[i : i + size] for i in starts), tuple(_part(texts, i, i + size) for i in starts)


def _part(texts: Any, start: int, end: int) -> Any:
    if isinstance(texts, Mapping):
        return {name: _part(values, start, end) for name, values in texts.items()}
    return texts[start:end] if isinstance(texts, Tensor | Sequence) else texts


def _run(model: nn.Module, images: Any, texts: Any) -> Any:
    return model(pixel_values=images, **texts) if isinstance(texts, Mapping) else model(images, texts)
