"""Pairs of images and texts that are each other's label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from assay.tasks.base import Outputs, describe, pair, to_device, wide
from assay.tasks.losses import row_losses

NO_GRADIENTS = (
    "Contrastive: images of differing sizes are embedded size by size, and methods that take gradients need all "
    "samples of a group in one pass; give a preprocessor with size: {height, width}"
)
"""Said to whoever takes gradients of `Pieces` with an ``order``."""


class Embedded(NamedTuple):
    """What a model makes of a batch: the images' embeddings and the texts', (B, D) each, what multiplies their products
    and, if pairs are judged one by one, what is added to that."""

    image: Tensor
    text: Tensor
    scale: Tensor | float
    bias: Tensor | float | None


@dataclass(frozen=True)
class Pieces:
    """A batch of `Contrastive` that the model embeds a part at a time, and whose samples are all compared.

    Attributes:
        parts: (images, texts) each.
        order: (B,) int64, where each sample stands among those of the parts after one another; None: as they come.
            Given where images differ in size, so that each part has those of one.
    """

    parts: Sequence[tuple[Any, Any]]
    order: Tensor | None = None


@dataclass(frozen=True)
class Contrastive:
    """Batches ``(images, texts)``: the loss of CLIP or of SigLIP, which couple the samples of a batch.

    With logits l_ij = scale · ⟨image_i, text_j⟩ + bias, a sample's loss is half of its own row (its image beside all
    texts) and half of its own column (its text beside all images), *the other samples' embeddings held fixed*: only so
    does a sample have a gradient of its own. It is

    - of a model without a ``logit_bias``, as CLIP is: (−log softmax(l_i·)_i − log softmax(l_·i)_i) / 2;
    - of one with it, as SigLIP is: −log σ(l_ii) − ½ Σ_{j≠i} (log σ(−l_ij) + log σ(−l_ji)). Each pair is judged by
      itself; one of two samples belongs to both by half.

    Either way the mean over the batch is the loss of the paper, and transformers' with ``return_loss=True``.

    The model returns ``(image_embeds, text_embeds)``, both (B, D) as they are to be compared (CLIP normalises
    them), with the temperature's multiplier as a third item and the bias as a fourth, as open_clip does; or an object
    with these two attributes, as Hugging Face does. Without a third item the multiplier is ``exp(model.logit_scale)``,
    and the bias ``model.logit_bias`` if there is one; ``scale`` replaces whatever multiplier the model says. It is
    called ``model(images, texts)``, or, when ``texts`` is a mapping (a tokenizer's output),
    ``model(pixel_values=images, **texts)``. Images that are a mapping, too, are ``model(**images, **texts)``.

    A batch that does not fit into memory, or whose images differ in size, may come as `Pieces`: the model embeds one
    after the other, and all samples are compared. That is an error where somebody asks for gradients.
    """

    scale: float | None = None

    def size(self, batch: Any) -> int:
        return sum(_length(images) for images, _ in _parts(batch))

    def to(self, batch: Any, device: torch.device) -> Any:
        if isinstance(batch, Pieces):
            order = None if batch.order is None else to_device(batch.order, device)
            return Pieces(to_device(batch.parts, device), order)
        return to_device(batch, device)

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        image, text, scale, bias = self.embed(model, batch)
        pairs = (image * text).sum(1, keepdim=True)
        own = torch.eye(len(image), dtype=torch.bool, device=image.device)
        rows = torch.where(own, pairs, image @ text.detach().T) * scale
        columns = torch.where(own, pairs, text @ image.detach().T) * scale
        labels = torch.arange(len(image), device=image.device)
        if bias is None:
            losses = (row_losses(rows, labels) + row_losses(columns, labels)) / 2
        else:
            rows, columns = rows + bias, columns + bias
            losses = (_pair_losses(rows, own) + _pair_losses(columns, own)) / 2
        return Outputs(losses.float(), rows, labels)

    def mask(self, batch: Any) -> Tensor | None:
        return None

    def embed(self, model: nn.Module, batch: Any) -> Embedded:
        """The model's embeddings of a batch."""
        if not isinstance(batch, Pieces):
            return self._embeddings(model, _run(model, *_pair(batch)))
        if torch.is_grad_enabled():
            raise ValueError(
                f"Contrastive: {self.size(batch)} samples with their gradients do not fit into memory at once, and "
                "cannot be taken in pieces; compare fewer with one another (a recipe's task.group)"
                if batch.order is None
                else NO_GRADIENTS
            )
        parts = [self._embeddings(model, _run(model, *part)) for part in batch.parts]
        image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
        if batch.order is not None:
            image, text = image[batch.order], text[batch.order]
        return parts[0]._replace(image=image, text=text)

    def _embeddings(self, model: nn.Module, output: Any) -> Embedded:
        if isinstance(output, tuple) and len(output) in (2, 3, 4):
            image, text = output[:2]
        elif hasattr(output, "image_embeds") and hasattr(output, "text_embeds"):
            image, text = output.image_embeds, output.text_embeds
        else:
            raise TypeError(
                f"Contrastive: the model returned {describe(output)}; expected (image_embeds, text_embeds"
                "[, logit_scale[, logit_bias]]) or an object with image_embeds and text_embeds"
            )
        if image.ndim != 2 or image.shape != text.shape:
            raise ValueError(
                f"Contrastive: image_embeds of shape {tuple(image.shape)} and text_embeds of shape "
                f"{tuple(text.shape)}; expected (B, D) both"
            )
        return Embedded(wide(image), wide(text), self._multiplier(model, output), _bias(model, output))

    def _multiplier(self, model: nn.Module, output: Any) -> Tensor | float:
        if self.scale is not None:
            return self.scale
        if isinstance(output, tuple) and len(output) > 2:
            scale: Tensor | float = output[2]
            return scale
        logarithm = getattr(model, "logit_scale", None)
        if not isinstance(logarithm, Tensor):
            raise ValueError(
                "Contrastive: the model returns no logit_scale and has no parameter of that name; "
                "give the multiplier: Contrastive(scale=100.0)"
            )
        return logarithm.exp()


def in_pieces(batch: Any, pieces: int) -> Pieces:
    """A batch of `Contrastive` as so many pieces of about the same number of samples; of images of differing sizes as
    more."""
    made: list[tuple[Any, Any]] = []
    parts = _parts(batch)
    size = -(-sum(_length(images) for images, _ in parts) // pieces)
    for images, texts in parts:
        starts = range(0, _length(images), size)
        made += [(_part(images, i, i + size), _part(texts, i, i + size)) for i in starts]
    return replace(batch, parts=made) if isinstance(batch, Pieces) else Pieces(made)


def judges_pairs(model: nn.Module) -> bool:
    """Whether a model's loss is SigLIP's, by its having a ``logit_bias``."""
    return getattr(model, "logit_bias", None) is not None


def _pair_losses(logits: Tensor, own: Tensor) -> Tensor:
    """(B, B) logits -> (B,), the sum of a row's binary cross entropies; ``own`` says which pairs belong together."""
    return -nn.functional.logsigmoid(torch.where(own, logits, -logits)).sum(1)


def _bias(model: nn.Module, output: Any) -> Tensor | float | None:
    if isinstance(output, tuple) and len(output) == 4:
        bias: Tensor | float | None = output[3]
        return bias
    return getattr(model, "logit_bias", None)


def _pair(batch: Any) -> tuple[Any, Any]:
    return pair(batch, "Contrastive", "(images, texts)")


def _parts(batch: Any) -> Sequence[tuple[Any, Any]]:
    return batch.parts if isinstance(batch, Pieces) else [_pair(batch)]


def _length(images: Any) -> int:
    return len(next(iter(images.values()))) if isinstance(images, Mapping) else len(images)


def _part(values: Any, start: int, end: int) -> Any:
    """Some samples of the images or the texts of a batch."""
    if isinstance(values, Mapping):
        return {name: _part(own, start, end) for name, own in values.items()}
    return values[start:end] if isinstance(values, Tensor | Sequence) else values


def _run(model: nn.Module, images: Any, texts: Any) -> Any:
    if isinstance(images, Mapping):
        return model(**images, **texts)
    return model(pixel_values=images, **texts) if isinstance(texts, Mapping) else model(images, texts)
