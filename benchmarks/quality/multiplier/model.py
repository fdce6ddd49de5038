"""The byte-level language model, and training it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.methods import AdamState
from benchmarks.quality.multiplier.corpus import LENGTH


@dataclass(frozen=True)
class Shape:
    """Of a GPT-2."""

    layers: int
    width: int
    heads: int = 4


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up over a tenth of the steps, then constant: the loss at a step does not depend on how
    many are still to come, so that steps to a loss can be compared."""

    steps: int
    batch: int = 16
    learning_rate: float = 2e-3


def language_model(shape: Shape, seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        # Nothing is dropped: one run differs from another by what it trains on.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def loss(model: nn.Module, data: Tensor) -> float:
    """Nats per byte."""
    with torch.no_grad():
        parts = [float(_loss(model, x)) * len(x) for x in data.split(64)]
    return math.fsum(parts) / len(data)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(input_ids=x).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())


def batches(data: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Without end: the data in a new order every epoch."""
    while True:
        for rows in torch.randperm(len(data), generator=generator).split(size):
            if len(rows) == min(size, len(data)):
                yield data[rows]


@dataclass(frozen=True)
class Checkpoint:
    """A copy of the model after ``step`` steps, with its loss on what was watched and the optimizer's state."""

    step: int
    loss: float
    model: nn.Module
    adam: AdamState


def train(
    model: nn.Module, data: Tensor, schedule: Schedule, seed: int, watch: Tensor, every: int
) -> tuple[list[int], list[float]]:
    """Train in place -> the steps at which the loss on ``watch`` was taken, and these losses."""
    curve = [(step, loss(model, watch)) for step, _ in _steps(model, data, schedule, seed, every)]
    return [step for step, _ in curve], [value for _, value in curve]


def checkpoints(
    model: nn.Module, data: Tensor, schedule: Schedule, seed: int, watch: Tensor, every: int
) -> list[Checkpoint]:
    """Train a copy -> its state every so many steps."""
    model = copy.deepcopy(model)
    found = []
    for step, optimizer in _steps(model, data, schedule, seed, every):
        adam = copy.deepcopy(AdamState.of(optimizer, model))
        found.append(Checkpoint(step, loss(model, watch), copy.deepcopy(model).eval(), adam))
    return found


def _steps(
    model: nn.Module, data: Tensor, schedule: Schedule, seed: int, every: int
) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """Train, pausing every so many steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.01)
    stream = batches(data, schedule.batch, torch.Generator().manual_seed(seed))
    rise = max(1, schedule.steps // 10)
    model.train()
    for step in range(1, schedule.steps + 1):
        optimizer.param_groups[0]["lr"] = schedule.learning_rate * min(1.0, step / rise)
        x = next(stream)
        optimizer.zero_grad(set_to_none=True)
        _loss(model, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0:
            yield step, optimizer
