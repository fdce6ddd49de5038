"""Recurrent layers one step after the other, so that each step's products of samples and weights are seen.

torch's own take all steps in one operation. What is computed here is the same, with sums rounded in another order: its
equations are those of torch's documentation of RNN, LSTM (with projections, 1402.1128) and GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

State = tuple[Tensor, ...]
"""What a step leaves to the next, (B, H) each: the output, and LSTM's memory."""


@dataclass(frozen=True)
class Weights:
    """Of one layer in one direction, or of a cell: of its inputs, of its state, and of LSTM's projection."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, suffix: str = "") -> Weights:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        found: list[Any] = [getattr(module, name + suffix, None) for name in names]
        return cls(*found)

    def step(self, kind: str, of_input: Tensor, state: State) -> State:
        """The next state.

        Args:
            kind: of the layer, as torch calls it: its mode.
            of_input: W_ih x + b_ih, (B, gates).
        """
        h, *memory = state
        of_state = F.linear(h, self.hh, self.bias_hh)
        if kind == "GRU":
            reset, update, new = of_input.chunk(3, -1)
            of_reset, of_update, of_new = of_state.chunk(3, -1)
            update = (update + of_update).sigmoid()
            new = (new + (reset + of_reset).sigmoid() * of_new).tanh()
            return (new + update * (h - new),)
        if kind == "LSTM":
            enter, forget, new, leave = (of_input + of_state).chunk(4, -1)
            kept = forget.sigmoid() * memory[0] + enter.sigmoid() * new.tanh()
            h = leave.sigmoid() * kept.tanh()
            return (h if self.hr is None else F.linear(h, self.hr)), kept
        total = of_input + of_state
        return (total.relu() if kind == "RNN_RELU" else total.tanh(),)


def stepwise(module: nn.Module) -> Callable[..., Any] | None:
    """What can stand for the module's ``forward``, with its arguments and results; None: it is no recurrent layer, or
    somebody has put a ``forward`` of their own in that place."""
    if "forward" in vars(module):
        return None
    if type(module) in (nn.RNN, nn.LSTM, nn.GRU):
        return partial(_run, module)
    return partial(_step, module) if type(module) in _CELLS else None


_CELLS: dict[type[nn.Module], Callable[[Any], str]] = {
    nn.RNNCell: lambda module: f"RNN_{module.nonlinearity.upper()}",
    nn.LSTMCell: lambda module: "LSTM",
    nn.GRUCell: lambda module: "GRU",
}


def _step(module: Any, input: Tensor, hx: Any = None) -> Any:
    """A cell: (B, I) or (I,)."""
    kind, weights = _CELLS[type(module)](module), Weights.of(module)
    x = input if input.ndim > 1 else input[None]
    given = () if hx is None else hx if kind == "LSTM" else (hx,)
    zeros = (x.new_zeros(len(x), module.hidden_size),) * (1 + (kind == "LSTM"))
    state = tuple(h.reshape(len(x), -1) for h in given) or zeros
    found = weights.step(kind, F.linear(x, weights.ih, weights.bias_ih), state)
    found = tuple(h.reshape(*input.shape[:-1], -1) for h in found)
    return found if kind == "LSTM" else found[0]


def _run(module: Any, input: Tensor | PackedSequence, hx: Any = None) -> Any:
    """Layers over a sequence: (B, T, I), (T, B, I), (T, I), or packed."""
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input, batch_first=True)
        real = torch.arange(x.shape[1])[None] < lengths[:, None]
        y, last = _layers(module, x, _states(module, x, hx), real.to(x.device)[..., None])
        return _packed(y, lengths, input), last if module.mode == "LSTM" else last[0]
    alone = input.ndim == 2
    x = input[None] if alone else input if module.batch_first else input.transpose(0, 1)
    if alone and hx is not None:
        hx = tuple(h[:, None] for h in hx) if module.mode == "LSTM" else hx[:, None]
    y, last = _layers(module, x, _states(module, x, hx), None)
    y = y[0] if alone else y if module.batch_first else y.transpose(0, 1)
    last = tuple(h[:, 0] for h in last) if alone else last
    return y, last if module.mode == "LSTM" else last[0]


def _packed(y: Tensor, lengths: Tensor, like: PackedSequence) -> PackedSequence:
    """(B, T, H) in the samples' order -> as the input lay."""
    order = like.sorted_indices
    if order is not None:
        y, lengths = y[order], lengths[order.to(lengths.device)]
    return like._replace(data=pack_padded_sequence(y, lengths, batch_first=True).data)


def _states(module: Any, x: Tensor, hx: Any) -> State:
    """Each (layers · directions, B, H)."""
    if hx is not None:
        return tuple(hx) if module.mode == "LSTM" else (hx,)
    count = module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + (module.mode == "LSTM")]
    return tuple(x.new_zeros(count, len(x), size) for size in sizes)


def _layers(module: Any, x: Tensor, states: State, real: Tensor | None) -> tuple[Tensor, State]:
    """(B, T, I) -> (B, T, directions · H), and the last states as in ``states``.

    ``real``: (B, T, 1) of sequences that end before T, or begin after 0 where they are read from the end.
    """
    last: list[State] = []
    for layer in range(module.num_layers):
        sides = []
        for suffix in ["", "_reverse"][: 1 + module.bidirectional]:
            weights, state = Weights.of(module, f"_l{layer}{suffix}"), tuple(h[len(last)] for h in states)
            outputs, state = _direction(module.mode, x, state, weights, real, suffix != "")
            sides.append(outputs)
            last.append(state)
        x = torch.cat(sides, 2) if len(sides) > 1 else sides[0]
        if module.dropout and module.training and layer < module.num_layers - 1:
            x = F.dropout(x, module.dropout)
    return x, tuple(torch.stack(each) for each in zip(*last, strict=True))


def _direction(
    kind: str, x: Tensor, state: State, weights: Weights, real: Tensor | None, backwards: bool
) -> tuple[Tensor, State]:
    of_input = F.linear(x, weights.ih, weights.bias_ih)
    places: Sequence[int] = range(x.shape[1])
    outputs = list(of_input.unbind(1))
    for t in reversed(places) if backwards else places:
        new = weights.step(kind, of_input[:, t], state)
        state = new if real is None else tuple(torch.where(real[:, t], a, b) for a, b in zip(new, state, strict=True))
        outputs[t] = state[0]
    return torch.stack(outputs, 1), state
