"""Losses per row and their gradients, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from assay import tasks
from assay.tasks import row_losses


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("chunk", [8, 1 << 24])  # several chunks of rows, and one
def test_row_losses_and_their_gradient(
    scale: float, offset: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.losses, "_CHUNK", chunk)
    torch.manual_seed(0)
    logits = (torch.randn(6, 4) * scale + offset).requires_grad_()
    labels, weights = torch.tensor([0, 3, -100, 1, 1, 2]), torch.rand(6)
    found = row_losses(logits, labels)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((weights * found).sum(), logits)
    (truth,) = torch.autograd.grad((weights * expected).sum(), exact)
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_losses_of_half_precision_logits_are_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 50).to(dtype).requires_grad_()
    labels = torch.randint(50, (5,))
    losses = row_losses(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), labels, reduction="none"))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.dtype == dtype


def test_row_losses_keep_a_nan_in_its_row_and_ignored_rows_without_gradient() -> None:
    logits = torch.randn(3, 4)
    logits[0, 1] = logits[1, 2] = torch.nan
    logits.requires_grad_()
    losses = row_losses(logits, torch.tensor([0, -100, 2]))
    assert losses.isnan().tolist() == [True, False, False]
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.equal(gradient[1], torch.zeros(4))
    assert gradient[2].isfinite().all()


def test_row_losses_with_impossible_classes() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    losses = row_losses(logits, torch.tensor([0]))
    torch.testing.assert_close(losses.detach(), torch.tensor([1.0]).exp().add(1).log())
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_losses_and_their_gradient_are_cross_entropys(dtype: torch.dtype) -> None:
    """Offsets, impossible labels and ignored rows among them."""
    logits = (5 * torch.randn(40, 300)).to(dtype)
    logits[3] += 1000
    labels = torch.randint(300, (40,))
    logits[5, labels[5]] = -torch.inf
    logits[6, (labels[6] + 1) % 300] = -torch.inf
    labels[7] = tasks.IGNORE
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights = torch.rand(40, dtype=torch.float64)
    losses = row_losses(ours, labels)
    (losses * weights.to(losses.dtype)).sum().backward()
    want = F.cross_entropy(theirs, labels, reduction="none", ignore_index=tasks.IGNORE)
    (want * weights).sum().backward()
    torch.testing.assert_close(losses.double(), want.detach(), rtol=2e-6, atol=2e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


def test_row_losses_have_second_derivatives() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64)
    logits[1] += 1e3
    labels, weights = torch.tensor([0, 3, -100, 1, 2]), torch.rand(5, dtype=torch.float64)
    found = []
    for losses in (row_losses, lambda z, y: F.cross_entropy(z, y, reduction="none", ignore_index=tasks.IGNORE)):
        z, w = logits.clone().requires_grad_(), weights.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((w * losses(z, labels)).sum(), z, create_graph=True)
        direction = torch.arange(20, dtype=torch.float64).view(5, 4).sin()
        found.append((gradient, *torch.autograd.grad((gradient * direction).sum(), (z, w))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
