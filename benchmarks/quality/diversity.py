"""What is it worth to choose by how rows lie to one another? ``python -m benchmarks.quality.diversity [--quick]``.

scikit-learn's digits, standardised pixels as features, 1,300 in the pool, 397 to test on; three seeds draw everything
anew. What rows are worth is the accuracy of a logistic regression on them.

- semdedup: 130 of the digits are there five times more with a little noise. How many rows are kept, how many digits
  they are of, and what they are worth; in clusters and without; beside as many random rows, and all.
- pruning, 10 % of the labels wrong: a tenth by CCS and D2, by EL2N of a small network early in its training; beside the
  hardest and the easiest by the same score, random rows, and random rows without the hardest.
- s2l: a tenth, alike from each of 20 clusters of the trajectories of a smaller network's losses; beside as many from
  each of 20 clusters of the features themselves, and random rows; of right labels, and 10 % of them wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

import assay
from assay import select
from assay.methods import Dynamics
from assay.tasks import Classification
from assay.train.trajectories import loss_trajectories, select_by_trajectory
from benchmarks import options
from benchmarks.quality.online.classification import mislabelled
from benchmarks.quality.worth import Data, Numbers, Rows, accuracy, digits, experiment, of_draws

POOL, COPIED, TIMES = 1300, 130, 5
COSINE, NOISE = 0.999, 0.02
WRONG, AMOUNT, CLUSTERS = 0.1, 0.1, 20


def semdedup(seed: int) -> Numbers:
    x, y = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    which = torch.cat([torch.arange(POOL), torch.arange(COPIED).repeat(TIMES)])
    data, test = (x[which], y[which]), (x[POOL + 100 :], y[POOL + 100 :])
    data[0][POOL:] += NOISE * torch.randn(COPIED * TIMES, 64, generator=generator)
    features = data[0].numpy()

    def judged(rows: Rows) -> dict[str, float]:
        own = len(which[rows].unique())
        return {
            "rows": int(rows.sum()),
            "digits": own,
            "copies": int(rows.sum()) - own,
            "worth": accuracy(data, rows, test),
        }

    kept = select.semdedup(features, COSINE, seed=seed).mask
    numbers = {"semdedup": judged(kept), "without clusters": judged(select.semdedup(features, COSINE, clusters=1).mask)}
    table, count = pa.table({"row": which.numpy()}), int(kept.sum())
    numbers["as many at random (control)"] = of_draws(lambda own: select.random(table, count, own).mask, judged, seed)
    return {**numbers, "all (control)": judged(np.ones(len(which), bool))}


def difficulty(x: Tensor, given: Tensor, seed: int, width: int, every: int, times: int) -> list[pa.Table]:
    """What ``Dynamics`` makes of all samples after each so many steps of training on them."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer, found = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    for step in range(1, every * times + 1):
        rows = torch.randint(len(x), (50,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), given[rows]).backward()
        optimizer.step()
        if step % every == 0:
            found.append(assay.score([(x, given)], [Dynamics(net, Classification())]))
    return found


def noisy(seed: int, share: float) -> tuple[Data, Tensor, Data]:
    """The pool with the labels that it is given, which of them are wrong, and the test's digits."""
    x, y = digits(seed)
    torch.manual_seed(seed)
    given, wrong = mislabelled(y[:POOL], 10, share)
    return (x[:POOL], given), wrong, (x[POOL + 100 :], y[POOL + 100 :])


def pruning(seed: int) -> Numbers:
    data, wrong, test = noisy(seed, WRONG)
    early = difficulty(*data, seed, 32, 26, 5)  # of five epochs
    score = np.mean([table["el2n"].to_numpy() for table in early], axis=0)
    table, features = pa.table({"el2n": score}), data[0].numpy()
    ways: dict[str, Callable[[int], Rows]] = {
        "CCS, hardest 10 % dropped": lambda own: select.ccs(table, "el2n", AMOUNT, own, hard="high", drop=0.1).mask,
        "CCS, hardest 30 % dropped": lambda own: select.ccs(table, "el2n", AMOUNT, own, hard="high", drop=0.3).mask,
        "random of all but the hardest 30 % (control)": lambda own: _without_hardest(score, 0.3, own),
        "random (control)": lambda own: select.random(table, AMOUNT, own).mask,
    }

    def judged(rows: Rows) -> dict[str, float]:
        return {"worth": accuracy(data, rows, test), "wrong": float(wrong.numpy()[rows].mean())}

    numbers = {name: of_draws(way, judged, seed) for name, way in ways.items()}
    for end, most, keep in (("hard", "hardest", "high"), ("easy", "easiest", "low")):
        numbers[f"D2, {end} end"] = judged(select.d2(table, "el2n", AMOUNT, features, keep=keep).mask)  # type: ignore[arg-type]
        numbers[f"the {most} (control)"] = judged(select.top(table, "el2n", AMOUNT, keep).mask)  # type: ignore[arg-type]
    return numbers


def _without_hardest(score: np.ndarray, share: float, seed: int) -> Rows:
    left = np.argsort(score, kind="stable")[: round((1 - share) * len(score))]
    drawn = np.random.default_rng(seed).choice(left, round(AMOUNT * len(score)), replace=False)
    return np.isin(np.arange(len(score)), drawn)


def s2l(seed: int) -> Numbers:
    numbers: dict[str, Mapping[str, float]] = {}
    for share in (0.0, WRONG):
        data, wrong, test = noisy(seed, share)
        tables = [
            table.append_column("step", pa.array([step] * POOL))
            for step, table in enumerate(difficulty(*data, seed, 8, 26, 10))
        ]
        ids, curves = loss_trajectories(pa.concat_tables(tables))
        rows = {"S2L": curves, "clusters of the features (control)": data[0].numpy()}
        whole = pa.table({"id": ids})

        def judged(chosen: Rows, data: Data = data, wrong: Tensor = wrong, test: Data = test) -> dict[str, float]:
            return {"worth": accuracy(data, chosen, test), "wrong": float(wrong[chosen].float().mean())}

        for name, own in rows.items():

            def clustered(own_seed: int, own: np.ndarray = own, ids: pa.Array = ids) -> Rows:
                found = select_by_trajectory(ids, own, round(AMOUNT * POOL), clusters=CLUSTERS, seed=own_seed)
                return found["selected"].to_numpy() > 0

            numbers[f"{name}, {share:.0%} wrong"] = of_draws(clustered, judged, seed)
        random = of_draws(lambda own, whole=whole: select.random(whole, AMOUNT, own).mask, judged, seed)
        numbers[f"random (control), {share:.0%} wrong"] = random
    return numbers


def main() -> None:
    parts = {"semdedup": (semdedup, 3), "pruning": (pruning, 3), "s2l": (s2l, 3)}
    experiment("diversity", parts, options.quick(__doc__))


if __name__ == "__main__":
    main()
