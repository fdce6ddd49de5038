"""Recurrent layers, step by step: torch's own results, and torch.func's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import assay
from assay.methods import GraNd
from assay.probe import Probe, SqNorm, quiet, tapped_parameters
from assay.probe.recurrent import stepwise
from assay.tasks import Classification
from tests.probe.probe_oracle import Collect, check_probe, check_training, close

LENGTHS = torch.tensor([3, 5, 1, 4])
SIZE, TIMES = len(LENGTHS), int(LENGTHS.max())
Make = Callable[..., nn.Module]
KINDS: dict[str, Make] = {
    "rnn": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "projected": lambda *args, **options: nn.LSTM(*args, proj_size=2, **options),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "both ways": {"bidirectional": True},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
CELLS: dict[str, Make] = {
    "rnn": nn.RNNCell,
    "relu": lambda *args, **options: nn.RNNCell(*args, nonlinearity="relu", **options),
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
}


def cross_entropy(run: Any, batch: Any) -> Tensor:
    return F.cross_entropy(run(*batch[:-1]), batch[-1], reduction="none")


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, PackedSequence):
        return [found.data, found.batch_sizes]
    return [found] if isinstance(found, Tensor) else [x for part in found for x in flat(part)]


def same(own: Any, found: Any) -> None:
    for a, b in zip(flat(own), flat(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)


def states(layer: Any, *batch: int) -> Any:
    count = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)
    found = tuple(torch.randn(count, *batch, size).double() for size in sizes)
    return found if layer.mode == "LSTM" else found[0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_torchs(kind: str, options: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](3, 4, **OPTIONS[options]).double()
    forward, x = stepwise(layer), torch.randn(SIZE, TIMES, 3).double()
    assert forward is not None
    laid = x if layer.batch_first else x.transpose(0, 1)
    hx = states(layer, SIZE)
    same(layer(laid), forward(laid))
    same(layer(laid, hx), forward(laid, hx=hx))
    same(layer(x[0]), forward(x[0]))
    for order in (None, LENGTHS.sort(descending=True).values):
        packed = pack_padded_sequence(x, LENGTHS if order is None else order, True, enforce_sorted=order is not None)
        for given in (None, hx):
            own, found = layer(packed, given), forward(packed, given)
            same(own, found)
            same(pad_packed_sequence(own[0]), pad_packed_sequence(found[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_a_batch_may_have_states(kind: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](3, 4, num_layers=2).double()
    forward, x, hx = stepwise(layer), torch.randn(TIMES, 3).double(), states(layer)
    assert forward is not None
    same(layer(x, hx), forward(x, hx))


@pytest.mark.parametrize("kind", CELLS)
def test_a_cells_results_are_torchs(kind: str) -> None:
    torch.manual_seed(0)
    cell, x, h = CELLS[kind](3, 4).double(), torch.randn(SIZE, 3).double(), torch.randn(2, SIZE, 4).double()
    forward, hx = stepwise(cell), tuple(h) if kind == "lstm" else h[0]
    assert forward is not None
    same(cell(x), forward(x))
    same(cell(x, hx), forward(x, hx))
    same(cell(x[0]), forward(x[0]))


def test_between_layers_as_much_is_dropped_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, num_layers=2, dropout=1.0).double()
    forward, x = stepwise(layer), torch.randn(TIMES, SIZE, 3).double()
    assert forward is not None
    same(layer(x), forward(x))
    same(layer.eval()(x), forward(x))


def test_where_it_stays_in_training_mode_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where cuDNN has no backward pass otherwise."""
    monkeypatch.setattr(quiet, "_trains_alone", lambda module: isinstance(module, nn.GRU))
    layer, x = nn.GRU(3, 4, num_layers=2, dropout=0.5).double(), torch.randn(TIMES, SIZE, 3).double()
    expected = layer.eval()(x)
    for was_training in (True, False):
        layer.train(was_training)
        with quiet.undisturbed(layer):
            forward = stepwise(layer)
            assert layer.training
            assert forward is not None
            same(expected, layer(x))
            same(expected, forward(x))
        assert (layer.training, layer.dropout) == (was_training, 0.5)


class Last(nn.Module):
    """Sequences by their last state, and their outputs' sum."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        width = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            outputs, last = self.layer(packed)
            padded, _ = pad_packed_sequence(outputs, batch_first=True)
        else:
            outputs, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
            padded = outputs if self.layer.batch_first else outputs.transpose(0, 1)
        h = last[0] if isinstance(last, tuple) else last
        sides = h[-(1 + self.layer.bidirectional) :].transpose(0, 1).flatten(1)
        return self.head(sides.tanh() + padded.sum(1).tanh())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, options: str) -> None:
    torch.manual_seed(0)
    model = Last(KINDS[kind](3, 4, **OPTIONS[options])).double()
    batch = torch.randn(SIZE, TIMES, 3).double(), torch.arange(SIZE) % 3
    check_probe(model, Classification(), batch, cross_entropy, forward_mode=False)


def test_as_many_steps_as_samples() -> None:
    torch.manual_seed(0)
    model = Last(nn.LSTM(3, 4)).double()
    batch = torch.randn(SIZE, SIZE, 3).double(), torch.arange(SIZE) % 3
    check_probe(model, Classification(), batch, cross_entropy, forward_mode=False)


class Lengths(nn.Module):
    """Lengths are made of the inputs: a sequence ends where only zeros follow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, (x != 0).any(2).sum(1).cpu())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_sequences_of_many_lengths(kind: str) -> None:
    torch.manual_seed(0)
    model = Lengths(Last(KINDS[kind](3, 4, num_layers=2, bidirectional=True))).double()
    x = torch.randn(SIZE, TIMES, 3).double() * (torch.arange(TIMES) < LENGTHS[:, None])[..., None]
    y, names, found = torch.arange(SIZE) % 3, tapped_parameters(model), Collect(tapped_parameters(model))
    Probe(model, Classification(), factors=(), reductions={"all": found})((x, y))
    losses, own = cross_entropy(model, (x, y)), list(model.parameters())  # torch.func cannot follow packed sequences
    each = [torch.autograd.grad(loss, own, retain_graph=True) for loss in losses]
    expected = {name: torch.stack(gradients) for name, gradients in zip(names, zip(*each, strict=True), strict=True)}
    for name, gradients in expected.items():
        close(found.dense[name], gradients, 1e-10, name)
    check_training(model, (x, y), cross_entropy, expected, 1e-10, ("all", "half"))


class Cells(nn.Module):
    """A cell over a sequence, from a learnt state on."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(4, 3)
        self.begin = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin.expand(len(x), -1)
        state: Any = (h, h.tanh()) if isinstance(self.cell, nn.LSTMCell) else h
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_cells(kind: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(SIZE, 6, 3).double(), torch.arange(SIZE) % 3
    check_probe(Cells(CELLS[kind](3, 4)).double(), Classification(), batch, cross_entropy, forward_mode=False)


def test_the_layer_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = Last(nn.LSTM(3, 4))
    x, y = torch.randn(SIZE, TIMES, 3), torch.arange(SIZE) % 3
    before = model(x)
    names = [name for name in tapped_parameters(model) if name.startswith("layer")]
    assert len(names) == 4
    table = assay.score([(x, y)], [GraNd(model, Classification())])
    assert np.isfinite(table["grand"].to_numpy()).all()
    assert "forward" not in vars(model.layer)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model.layer.weight_hh_l0.zero_()
    assert not torch.equal(model(x), before), "torch's own list of the weights is not the parameters any more"


def test_somebody_elses_forward_is_not_replaced() -> None:
    layer: Any = nn.LSTM(3, 4)
    layer.forward = lambda x: nn.LSTM.forward(layer, 2 * x)
    with pytest.raises(ValueError, match=r"layer 'layer' \(LSTM\) cannot be tapped exactly"):
        tapped_parameters(Last(layer))


class Astray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x)[0].mean(1))
        return logits


def test_steps_along_the_batch_are_refused() -> None:
    """As of a layer that was meant to be ``batch_first``: the samples are its steps."""
    model = Astray()
    norms = {"all": SqNorm(tapped_parameters(model))}
    for size in (SIZE, TIMES):
        batch = torch.randn(size, TIMES, 3), torch.arange(size) % 3
        with pytest.raises(RuntimeError, match="layer"):
            Probe(model, Classification(), factors=(), reductions=norms)(batch)
