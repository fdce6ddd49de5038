"""Where the samples lie in a layer's input, against autograd one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from assay.probe import Probe, SqNorm, tapped_parameters
from assay.probe.layouts import arranged, possible
from assay.tasks import Classification
from tests.probe.test_products import Head, check_followed, labelled, random
from tests.probe.test_verify import Rolled, check_norms


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 3, 4), (3, 6, 4), (1, 2, 4)])
def test_transformers_layers_with_the_batch_second(shape: tuple[int, ...]) -> None:
    """What torch's layers take unless they are told otherwise."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6), 1, nn.LayerNorm(4), enable_nested_tensor=False)
    model = Head(lambda m, x: m["encoder"](x.transpose(0, 1)).transpose(0, 1), 4, encoder=encoder)
    check_followed(model, labelled(random(*shape)))


def _windows(m: nn.ModuleDict, x: Tensor) -> Tensor:
    """Two at a time, as Swin sees an image."""
    parts = x.reshape(-1, 2, 4)
    parts = m["norm"](m["layer"](parts).tanh())
    return parts.reshape(x.shape)


@pytest.mark.parametrize("layers", ["*", "layers.norm", "head"])
@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 6, 4), (4, 4, 4), (1, 4, 4)])
def test_windows_of_samples(shape: tuple[int, ...], layers: str) -> None:
    """Windows as long as the batch among them, and where no layer before them is tapped."""
    model = Head(_windows, 4, layer=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layers == "*" or name.startswith(layers))
    check_followed(model, labelled(random(*shape)))


@pytest.mark.parametrize("layers", ["*", "layers.norm"])
def test_positions_in_one_dimension_without_a_mask(layers: str) -> None:
    def flat(m: nn.ModuleDict, x: Tensor) -> Tensor:
        out: Tensor = m["norm"](m["layer"](x.flatten(0, 1)).tanh()).view(x.shape)
        return out

    model = Head(flat, 4, layer=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layers == "*" or name.startswith(layers))
    check_followed(model, labelled(random(3, 5, 4)))


class Windows(nn.Module):
    """Three layers on windows as long as the batch: by their shape, it could be the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).view(-1, len(x), 4)
        for layer in self.layers:
            h = layer(h).tanh()
        return self.head(h.reshape(x.shape).sum(1))


@pytest.mark.parametrize("seed", range(6))
def test_layers_of_which_the_same_is_known_go_together_where_numbers_are_coarse(seed: int) -> None:
    torch.manual_seed(seed)
    model, size = Windows().bfloat16(), 3 + seed
    probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in tapped_parameters(model)})
    for parts in (2, 3, 2):
        check_norms(probe, model, (torch.randn(size, parts * size, 4).bfloat16(), torch.arange(size) % 3))


def test_a_batch_in_another_order_is_an_error_in_every_layout() -> None:
    for shape in ((4, 4, 4), (4, 8, 4), (4, 3, 4)):
        with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'"):
            Probe(Rolled().double(), Classification())((random(*shape), torch.arange(4) % 3))
    assert len(tapped_parameters(Rolled())) == 6


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 5, 4), ["first"]),
        ((5, 3, 4), ["second", "shared"]),
        ((6, 5, 4), ["windows", "shared"]),
        ((6, 3, 4), ["second", "windows", "shared"]),
        ((3, 3, 4), ["first", "second", "shared"]),
        ((15, 4), ["positions", "shared"]),
        ((5, 4), ["shared"]),
        ((6, 4), ["windows", "shared"]),
    ],
)
def test_layouts_by_shape(shape: tuple[int, ...], expected: list[str]) -> None:
    x = torch.randn(shape)
    positions = len(x) == 15
    assert possible(x, x, 3, trailing=True, positions=positions, guess=True) == expected
    certain = [layout for layout in expected if layout in ("first", "positions")]
    assert possible(x, x, 3, trailing=False, positions=positions, guess=True) == [n for n in certain if n == "first"]
    grown = x.clone().requires_grad_()
    assert possible(grown, x, 3, trailing=True, positions=positions, guess=False) == certain


def test_samples_are_brought_to_the_front() -> None:
    x = torch.arange(24).reshape(4, 2, 3)
    assert torch.equal(arranged(x, "second", 2), x.transpose(0, 1))
    assert torch.equal(arranged(x, "windows", 2), x.reshape(2, 2, 2, 3))
    assert torch.equal(arranged(x.flatten(0, 1), "positions", 2), x.reshape(2, 4, 3))
    assert arranged(x, "first", 4) is x
