"""Are the tokens of the most excess loss worth more than all? ``python -m benchmarks.quality.tokens [--quick]``.

The multiplier's mixture of real text in pieces of 128 bytes, and its language models of bytes (a layer, 64 wide). A
base is trained on some of the mixture, and goes on with the rest on the mean loss of 60 % of each batch's tokens: those
whose loss exceeds most that of a reference, which is the base tuned on 256 trusted pieces (Rho-1, 2404.07965). Beside
it: all tokens; all, with the trusted pieces among them; as many at random, of the highest loss, of the most excess over
the base itself; and as much in whole pieces. As many steps for each, three seeds that draw everything anew. Nats per
byte of held-out text, and the share of what is kept that is of the kind that was planted:

- domain: docstrings of the standard library are 8 % of the mixture, and trusted are docstrings of other modules.
- noise: in half of the pieces a span of 48 bytes is random characters; trusted pieces and held-out ones have none.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from assay.train import token_weights
from benchmarks import options
from benchmarks.quality.multiplier import corpus
from benchmarks.quality.multiplier.model import Schedule, Shape, batches, language_model, loss, train
from benchmarks.quality.worth import Numbers, experiment

SEEDS = 3
FOR_BASE, POOL, TRUSTED, HELD_OUT = 800, 1600, 256, 200  # pieces
SHAPE, KEEP = Shape(layers=1, width=64), 0.6
BATCH, RATE = 16, 1e-3
SPAN, NOISY = 48, 0.5  # bytes, share of the pieces

Pick = Callable[[Tensor, Tensor], Tensor]
"""Tokens' losses under the model, and the pieces that they are of -> weights, (B, T − 1)."""


@dataclass(frozen=True)
class Steps:
    """How long the base, the reference and each of the others are trained."""

    base: int = 150
    reference: int = 50
    others: int = 100


@dataclass(frozen=True)
class World:
    """One seed's data and models.

    Attributes:
        pool, trusted: (N, T) int64, bytes.
        planted: (N, T) bool, which of the pool's bytes are of the kind that was planted.
        held_out: by name, (N, T).
    """

    pool: Tensor
    planted: Tensor
    trusted: Tensor
    held_out: Mapping[str, Tensor]
    base: nn.Module
    reference: nn.Module


def make_world(
    first: Tensor,
    pool: tuple[Tensor, Tensor],
    trusted: Tensor,
    held_out: Mapping[str, Tensor],
    shape: Shape,
    steps: Steps,
    seed: int,
) -> World:
    """The base is trained on ``first``, and tuned on what is trusted."""
    base, watch = language_model(shape, seed), trusted[:1]
    train(base, first, Schedule(steps.base, BATCH, 2 * RATE), seed, watch, steps.base)
    reference = copy.deepcopy(base)
    train(reference, trusted, Schedule(steps.reference, BATCH, RATE), seed, watch, steps.reference)
    return World(*pool, trusted, held_out, base.eval(), reference.eval())


def token_losses(model: nn.Module, x: Tensor) -> Tensor:
    """(B, T − 1), nats."""
    logits = model(input_ids=x).logits[:, :-1]
    return nn.functional.cross_entropy(logits.mT, x[:, 1:], reduction="none")


def picks(world: World, seed: int) -> dict[str, Pick]:
    chance = torch.Generator().manual_seed(seed)

    def best(values: Tensor) -> Tensor:
        return token_weights(values, torch.zeros_like(values), KEEP)

    def excess(losses: Tensor, x: Tensor) -> Tensor:
        return losses - token_losses(world.reference, x)

    return {
        "Rho-1": lambda losses, x: token_weights(losses, token_losses(world.reference, x), KEEP),
        "all tokens (control)": lambda losses, x: torch.ones_like(losses),
        "random tokens (control)": lambda losses, x: best(torch.rand(losses.shape, generator=chance)),
        "highest loss (control)": lambda losses, x: best(losses),
        "excess over the base (control)": lambda losses, x: best(losses - token_losses(world.base, x)),
        "whole pieces (control)": lambda losses, x: best(excess(losses, x).mean(1, keepdim=True).expand_as(losses)),
    }


def go_on(base: nn.Module, data: tuple[Tensor, Tensor], pick: Pick, steps: int, seed: int) -> tuple[nn.Module, float]:
    """The base after so many more steps on what is picked, and the share of that which was planted."""
    model, shares = copy.deepcopy(base).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    pool, planted = data
    for rows in islice(batches(torch.arange(len(pool)), BATCH, torch.Generator().manual_seed(seed)), steps):
        losses = token_losses(model, pool[rows])
        with torch.no_grad():
            weights = pick(losses, pool[rows])
        optimizer.zero_grad()
        (losses * weights).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shares.append(float(weights[planted[rows][:, 1:]].sum() / weights.sum()))
    return model.eval(), statistics.fmean(shares)


def compared(world: World, steps: Steps, seed: int) -> Numbers:
    """Held-out losses of all, and what was planted of what they were trained on."""

    def judged(model: nn.Module) -> dict[str, float]:
        return {name: loss(model, x) for name, x in world.held_out.items()}

    numbers = {}
    for name, pick in picks(world, seed).items():
        model, share = go_on(world.base, (world.pool, world.planted), pick, steps.others, seed)
        numbers[name] = {**judged(model), "planted": share}
    everything = torch.cat([world.pool, world.trusted])
    every, none = picks(world, seed)["all tokens (control)"], torch.zeros_like(everything, dtype=torch.bool)
    model, _ = go_on(world.base, (everything, none), every, steps.others, seed)
    numbers["all tokens, trusted pieces too (control)"] = judged(model)
    return numbers | {"the base": judged(world.base), "the reference": judged(world.reference)}


def domain(seed: int) -> Numbers:
    data = corpus.build(FOR_BASE + POOL + HELD_OUT, TRUSTED, 16, HELD_OUT, seed)
    first, pool, mixture = data.pool.split([FOR_BASE, POOL, HELD_OUT])
    own = torch.from_numpy(data.of_domain)[FOR_BASE : FOR_BASE + POOL, None].expand_as(pool)
    held_out = {"docstrings": data.test, "mixture": mixture}
    steps = Steps()
    return compared(make_world(first, (pool, own), data.target, held_out, SHAPE, steps, seed), steps, seed)


def noise(seed: int) -> Numbers:
    data = corpus.build(FOR_BASE + POOL + HELD_OUT + TRUSTED, 16, 16, 16, seed)
    first, pool, mixture, trusted = data.pool.split([FOR_BASE, POOL, HELD_OUT, TRUSTED])
    generator = torch.Generator().manual_seed(seed)
    (first, _), planted = spoilt(first, generator), spoilt(pool, generator)
    steps = Steps()
    return compared(make_world(first, planted, trusted, {"mixture": mixture}, SHAPE, steps, seed), steps, seed)


def spoilt(pieces: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The pieces with random characters in a span of some of them, and which bytes these are."""
    count, length = pieces.shape
    starts = torch.randint(length - SPAN + 1, (count, 1), generator=generator)
    starts[torch.rand(count, generator=generator) >= NOISY] = length
    places = torch.arange(length)
    inside = (places >= starts) & (places < starts + SPAN)
    return torch.where(inside, torch.randint(32, 127, pieces.shape, generator=generator), pieces), inside


def main() -> None:
    experiment("tokens", {"domain": (domain, SEEDS), "noise": (noise, SEEDS)}, options.quick(__doc__))


if __name__ == "__main__":
    main()
