"""Pairs of embeddings: a sample's own part of the loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.tasks import Contrastive
from assay.tasks.contrastive import Pieces, in_pieces
from tests.tasks.models import Fixed


def clip_loss(image: Tensor, text: Tensor, scale: float) -> Tensor:
    similarity = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(similarity, labels) + F.cross_entropy(similarity.T, labels)) / 2


def test_contrastive_losses_average_to_the_clip_loss() -> None:
    image, text = F.normalize(torch.randn(4, 3), dim=1), F.normalize(torch.randn(4, 3), dim=1)
    outputs = Contrastive().forward(Fixed((image, text, 9.0)), (torch.zeros(4, 1), torch.zeros(4, 1)))
    torch.testing.assert_close(outputs.losses.mean(), clip_loss(image, text, 9.0))
    torch.testing.assert_close(outputs.logits, 9 * image @ text.T)
    assert outputs.labels.tolist() == [0, 1, 2, 3]


def test_contrastive_sample_gradients_reach_only_the_samples_own_embeddings() -> None:
    image, text = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    losses = Contrastive(scale=2.0).forward(Fixed((image, text)), (image, text)).losses
    for gradient in torch.autograd.grad(losses[1], [image, text]):
        assert gradient[1].abs().min() > 0
        assert gradient[[0, 2, 3]].eq(0).all()


def test_contrastive_scale_comes_from_the_model() -> None:
    image, text = torch.randn(2, 3), torch.randn(2, 3)
    batch = torch.zeros(2, 1), {"input_ids": torch.zeros(2, 1)}
    model = Fixed(SimpleNamespace(image_embeds=image, text_embeds=text))
    with pytest.raises(ValueError, match=r"Contrastive\(scale=100\.0\)"):
        Contrastive().forward(model, batch)
    model.logit_scale = nn.Parameter(torch.tensor(9.0).log())
    torch.testing.assert_close(Contrastive().forward(model, batch).losses.mean(), clip_loss(image, text, 9.0))
    assert set(model.called) == {"pixel_values", "input_ids"}
    torch.testing.assert_close(Contrastive(2.0).forward(model, batch).losses.mean(), clip_loss(image, text, 2.0))


def test_contrastive_errors_say_what_was_found() -> None:
    batch = torch.zeros(2, 1), torch.zeros(2, 1)
    with pytest.raises(TypeError, match="returned a Tensor"):
        Contrastive().forward(Fixed(torch.zeros(2, 3)), batch)
    with pytest.raises(ValueError, match=r"\(2, 3\) and text_embeds of shape \(3, 3\)"):
        Contrastive().forward(Fixed((torch.zeros(2, 3), torch.zeros(3, 3), 1.0)), batch)


class Towers(nn.Module):
    """Takes images and token ids by name, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, 3), nn.Embedding(7, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.sizes: list[int] = []

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.sizes.append(len(pixel_values))
        text = (self.text(input_ids) * attention_mask[..., None]).sum(1)
        return SimpleNamespace(image_embeds=self.image(pixel_values), text_embeds=text)


def test_pieces_are_embedded_one_by_one_and_compared_together() -> None:
    model, task = Towers(), Contrastive()
    texts = {"input_ids": torch.randint(0, 7, (7, 4)), "attention_mask": torch.ones(7, 4)}
    batch = torch.randn(7, 5), texts
    with torch.no_grad():
        whole = task.forward(model, batch)
        for pieces, sizes in ((2, [4, 3]), (3, [3, 3, 1]), (7, [1] * 7)):
            model.sizes.clear()
            parts = task.to(in_pieces(batch, pieces), torch.device("cpu"))
            assert task.size(parts) == 7
            found = task.forward(model, parts)
            assert model.sizes == sizes
            torch.testing.assert_close(found.losses, whole.losses)
            torch.testing.assert_close(found.logits, whole.logits)
        apart = Pieces([rows_of(batch, [1, 4]), rows_of(batch, [0, 2, 3, 5, 6])], torch.tensor([2, 0, 3, 4, 1, 5, 6]))
        torch.testing.assert_close(task.forward(model, apart).losses, whole.losses)
        model.sizes.clear()
        torch.testing.assert_close(task.forward(model, in_pieces(apart, 3)).losses, whole.losses)
        assert model.sizes == [2, 3, 2]
    with pytest.raises(ValueError, match=r"7 samples with their gradients do not fit into memory.*task\.group"):
        task.forward(model, in_pieces(batch, 2))
    with pytest.raises(ValueError, match=r"differing sizes.*give a preprocessor"):
        task.forward(model, apart)


def rows_of(batch: tuple[Tensor, dict[str, Tensor]], rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    return batch[0][rows], {name: values[rows] for name, values in batch[1].items()}


def test_a_logit_bias_makes_the_loss_that_of_siglip() -> None:
    """Wherever it comes from; the samples' losses average to that of the paper."""
    image, text = F.normalize(torch.randn(4, 3), dim=1), F.normalize(torch.randn(4, 3), dim=1)
    logits = 9 * text @ image.T - 2
    expected = -F.logsigmoid((2 * torch.eye(4) - 1) * logits).sum() / 4
    empty = torch.zeros(4, 1), torch.zeros(4, 1)
    outputs = Contrastive().forward(Fixed((image, text, 9.0, torch.tensor(-2.0))), empty)
    torch.testing.assert_close(outputs.losses.mean(), expected)
    torch.testing.assert_close(outputs.logits, logits.T)
    model = Fixed((image, text))
    model.logit_scale, model.logit_bias = nn.Parameter(torch.tensor([9.0]).log()), nn.Parameter(torch.tensor([-2.0]))
    torch.testing.assert_close(Contrastive().forward(model, empty).losses, outputs.losses)
    plain = Contrastive().forward(Fixed((image, text, 9.0, None)), empty)
    torch.testing.assert_close(plain.losses.mean(), clip_loss(image, text, 9.0))
