"""Small networks' gradients by autograd, and what runs a method over a pool of samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.methods import EKFAC
from assay.methods.influence import Influence

POOL = 60
EXACT = assay.Kronecker(64, 64)  # larger than any layer here: nothing is projected


def gradients(model: nn.Module, x: Tensor, y: Tensor, margin: bool = False) -> Tensor:
    """Per-sample gradients of −loss's sign: of the loss, or of the negative margin; one backward pass a sample."""
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]).double(), y[i : i + 1])
        if margin:
            loss = loss + torch.log(-torch.expm1(-loss))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    return torch.stack(rows)


def probabilities(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).double().softmax(1)[torch.arange(len(x)), y].detach()


def run(method: Influence | EKFAC, pool: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    method.fit([pool])
    table = assay.score([pool], [method])
    return {name: torch.tensor(table[name].to_pylist()).double() for name in table.column_names[2:]}


def split(model: nn.Module, flat: Tensor) -> list[Tensor]:
    sizes = [p.numel() for p in model.parameters()]
    return [g.reshape(len(flat), *p.shape) for g, p in zip(flat.split(sizes, 1), model.parameters(), strict=True)]
