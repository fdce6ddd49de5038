"""Can the distance to real data tell which simulated transitions to trust? ``python -m
benchmarks.quality.ood_filter``.

Model-based reinforcement learning as in 2410.12160, in small: a pendulum (the equations of Gym's `Pendulum-v1`,
written out here, so that every simulated transition's true outcome is known), of which ``REAL`` transitions of a
random policy are had, round after round more. A dynamics model, a small network from (cos, sin, speed, torque) to the
change of the state, learns them anew each round; rollouts of ``LENGTH`` steps branch off from real states under
random torques, partly larger than any in the real data, as those of a policy that has moved on are. Per round, over
all steps of the rollouts, by error in units of the real steps' spread:

- rank correlation with the true error, and AUROC of the worst tenth, of the distance to the nearest real (state,
  action) (``OODFilter`` on the model's own input), of the disagreement of five networks (MBPO's way), of the step's
  number in its rollout and of a random order;
- the mean error of what is kept at the same share by each, the share being what the schedule trusts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import assay
from assay._json import dumps
from assay.methods import OODFilter
from assay.tasks import Regression
from benchmarks import options
from benchmarks.timing import RESULTS, machine

SEEDS, ROUNDS, REAL, LENGTH, ROLLOUTS, MODELS, STEPS = 3, 5, 200, 10, 60, 5, 700
REAL_TORQUE, SIMULATED_TORQUE = 1.0, 2.0
SCHEDULE = ((1, 0.5), (ROUNDS, 0.95))
Numbers = npt.NDArray[np.float64]


def step(state: Numbers, torque: Numbers) -> Numbers:
    """(n, 2) of angle and speed, (n,) -> the next state: gravity 10, mass 1, length 1, 0.05 s."""
    angle, speed = state.T
    speed = np.clip(speed + (15.0 * np.sin(angle) + 3.0 * torque) * 0.05, -8, 8)
    return np.stack([(angle + speed * 0.05 + np.pi) % (2 * np.pi) - np.pi, speed], 1)


def inputs(state: Numbers, torque: Numbers) -> Tensor:
    angle, speed = state.T
    columns = np.stack([np.cos(angle), np.sin(angle), speed, torque], 1)
    return torch.tensor(columns, dtype=torch.float32)


def change(state: Numbers, after: Numbers) -> Tensor:
    """What the model predicts: the change of angle, around the circle, and of speed."""
    moved = after - state
    moved[:, 0] = (moved[:, 0] + np.pi) % (2 * np.pi) - np.pi
    return torch.tensor(moved, dtype=torch.float32)


def real_steps(count: int, rng: np.random.Generator) -> tuple[Numbers, Numbers]:
    """States and torques of a random policy that starts near the bottom, ten steps an episode."""
    states, torques = [], []
    for _ in range(count // 10):
        state = np.stack([np.pi + rng.normal(0, 0.5, 1), rng.normal(0, 0.5, 1)], 1)
        for _ in range(10):
            torque = rng.uniform(-REAL_TORQUE, REAL_TORQUE, 1)
            states.append(state)
            torques.append(torque)
            state = step(state, torque)
    return np.concatenate(states), np.concatenate(torques)


class Scaled(nn.Module):
    """A network between standardised inputs and outputs."""

    def __init__(self, x: Tensor, y: Tensor, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 48), nn.Linear(48, 2)
        self.numbers = [x.mean(0), x.std(0), y.mean(0), y.std(0)]

    def forward(self, x: Tensor) -> Tensor:
        centre, spread, mean, scale = self.numbers
        out: Tensor = self.last(torch.tanh(self.first((x - centre) / spread))) * scale + mean
        return out


def train(x: Tensor, y: Tensor, seed: int) -> Scaled:
    net, generator = Scaled(x, y, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        ((net(x[rows]) - y[rows]) / y.std(0)).square().mean().backward()
        optimizer.step()
    return net


def rollouts(net: nn.Module, starts: Numbers, rng: np.random.Generator) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """States, torques, simulated next states, and each step's number in its rollout."""
    state, parts = starts, []
    for number in range(LENGTH):
        torque = rng.uniform(-SIMULATED_TORQUE, SIMULATED_TORQUE, len(state))
        with torch.no_grad():
            after = state + net(inputs(state, torque)).double().numpy()
        after[:, 0] = (after[:, 0] + np.pi) % (2 * np.pi) - np.pi
        after[:, 1] = np.clip(after[:, 1], -8, 8)
        parts.append((state, torque, after, np.full(len(state), float(number))))
        state = after
    states, torques, afters, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    return states, torques, afters, numbers


def one_round(states: Numbers, torques: Numbers, round_: int, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    x, y = inputs(states, torques), change(states, step(states, torques))
    nets = [train(x, y, 100 * seed + k) for k in range(MODELS)]
    simulated, used, after, number = rollouts(nets[0], states[rng.integers(len(states), size=ROLLOUTS)], rng)
    own = inputs(simulated, used)
    wrong = (change(simulated, after) - change(simulated, step(simulated, used))) / y.std(0)
    error = wrong.square().sum(1).sqrt().double().numpy()
    method = OODFilter(nets[0], Regression(), {"real": [(x, y)]}, at="first").fit()
    table = assay.score([(own, torch.zeros(len(own), 2))], [method])
    with torch.no_grad():
        spread = (torch.stack([net(own) for net in nets]) / y.std(0)).std(0).square().sum(1).numpy()
    orders = {
        "distance to real": table["ood_distance"].to_numpy(),
        "disagreement of five networks": spread,
        "step of the rollout (control)": number,
        "random (control)": rng.random(len(error)),
    }
    kept = assay.select.trust(table, "ood_distance_rank", round_, SCHEDULE).mask
    worst = error >= np.quantile(error, 0.9)
    errors = {key: float(error[np.argsort(by, kind="stable")[: kept.sum()]].mean()) for key, by in orders.items()}
    return {
        "kept": float(kept.mean()),
        "error of all": float(error.mean()),
        "rank correlation with the error": {key: float(spearmanr(by, error).statistic) for key, by in orders.items()},
        "AUROC of the worst tenth": {key: float(roc_auc_score(worst, by)) for key, by in orders.items()},
        "error of as many kept": errors,
    }


def one_seed(seed: int) -> list[dict[str, Any]]:
    rng, states, torques, found = np.random.default_rng(seed), np.empty((0, 2)), np.empty(0), []
    for round_ in range(1, ROUNDS + 1):
        more = real_steps(REAL, rng)
        states, torques = np.concatenate([states, more[0]]), np.concatenate([torques, more[1]])
        found.append(one_round(states, torques, round_, seed, rng))
    return found


def main() -> None:
    options.parser(__doc__).parse_args()
    began, console = time.perf_counter(), Console(width=120)
    runs = [one_seed(seed) for seed in range(SEEDS)]
    for part in ("rank correlation with the error", "AUROC of the worst tenth", "error of as many kept"):
        table = Table(title=f"{part}, mean of {SEEDS} seeds")
        for name in ("round", "kept", "all", *runs[0][0][part]):
            table.add_column(name)
        for i in range(ROUNDS):
            cells = [statistics.fmean(run[i][key] for run in runs) for key in ("kept", "error of all")]
            cells += [statistics.fmean(run[i][part][key] for run in runs) for key in runs[0][0][part]]
            table.add_row(str(i + 1), *(f"{cell:.3f}" for cell in cells))
        console.print(table)
    settings = {"seeds": SEEDS, "rounds": ROUNDS, "real_per_round": REAL, "rollouts": ROLLOUTS, "length": LENGTH}
    found = {**machine(), **settings, "schedule": SCHEDULE, "seconds": time.perf_counter() - began, "runs": runs}
    (RESULTS / "quality-ood-filter.json").write_text(dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
