"""How many training steps does a selection save? ``python -m benchmarks.quality.multiplier``.

A small byte-level language model is trained on a fifth of a mixture of real text, chosen by each method for a target
domain that is 8 % of it. The goal is the loss on that domain's held-out files with which a random fifth ends; the table
says after how many steps each selection gets there. ``--mixture packages`` is another pool with another domain, on
which nothing was chosen. ``--quick`` is a small version. What was measured is kept in a bank, for ``--only`` to add to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import options, timing
from benchmarks.quality.multiplier import corpus, selections
from benchmarks.quality.multiplier.bank import Bank
from benchmarks.quality.multiplier.experiment import MIXTURES, QUICK, Sizes, prepare, retrain, summary

Runs = dict[str, list[dict[str, Any]]]


def run(sizes: Sizes, bank: Bank, workers: int, names: Sequence[str]) -> None:
    """Measure each of the selections with every seed, in ``workers`` processes of one thread each, into the bank."""
    console, seeds = Console(), range(len(bank.pools))
    commit = timing.machine()["commit"]
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as processes:
        start = time.perf_counter()
        prepared = list(processes.map(prepare, [sizes] * len(seeds), seeds, [names] * len(seeds)))
        console.print(f"{len(seeds)} pools scored in {time.perf_counter() - start:.0f} s")
        jobs = [(seed, name, prepared[seed].scored[name]) for name in names for seed in seeds]
        results = processes.map(
            retrain, [sizes] * len(jobs), [seed for seed, _, _ in jobs], [scored.scores for _, _, scored in jobs]
        )
        for (seed, name, scored), result in zip(jobs, results, strict=True):
            seconds = {"scoring_seconds": scored.seconds, "warm_up_seconds": prepared[seed].warm_up_seconds}
            bank.put(seed, name, {**result, **seconds, "commit": commit})
            console.print(f"{name}, seed {seed}: {result['losses'][-1]:.4f} nats per byte at the end")


def show(rows: list[dict[str, Any]], sizes: Sizes, seeds: int) -> None:
    title = f"steps to the loss of {sizes.steps} steps on a random {sizes.fraction:.0%}; medians of {seeds} seeds"
    table = Table(title=title)
    for heading in ("selection", "steps", "range", "× fewer", "final loss", "range", "of the domain", "scoring s"):
        table.add_column(heading, justify="left" if heading == "selection" else "right")
    for row in rows:
        final, steps = row["final_loss"], row["range"]
        table.add_row(
            row["selection"],
            str(row["median_steps"] or "never"),
            f"{steps[0]}–{steps[1]}" if steps else "not all",
            f"{row['multiplier']:.2f}" if row["multiplier"] else "–",
            f"{final['median']:.3f}",
            f"{final['range'][0]:.3f}–{final['range'][1]:.3f}",
            f"{row['domain_share']:.0%}",
            f"{row['scoring_seconds']:.0f}",
        )
    Console(width=110).print(table)


def plot(runs: Runs, rows: list[Mapping[str, Any]], path: Path) -> None:
    """Median loss curves, and steps to the goal with their range over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    order = sorted(rows, key=lambda row: row["median_steps"] or float("inf"))
    colours = {row["selection"]: f"C{i}" for i, row in enumerate(order)} | {"random": "black"}
    for row in order:
        name = row["selection"]
        median = torch.tensor([r["losses"] for r in runs[name]]).median(0).values
        style = "--" if name in ("random", "domain labels (oracle)") else "-"
        left.plot(runs[name][0]["steps"], median, style, color=colours[name], label=name, linewidth=1.4)
    goal = torch.tensor([r["losses"][-1] for r in runs["random"]]).median()
    left.axhline(float(goal), color="grey", linewidth=0.8)
    left.set(xlabel="training steps", ylabel="test loss on the target domain, nats per byte")
    left.legend(fontsize=8)
    budget = runs["random"][0]["steps"][-1]
    for place, row in enumerate(reversed(order)):
        reached = [s for s in row["steps"] if s is not None]
        right.barh(place, row["median_steps"] or budget, color=colours[row["selection"]], alpha=0.75)
        if reached:
            right.plot([min(reached), max(reached)], [place, place], color="black", linewidth=1)
        right.text(8, place, f"{row['median_steps'] or 'never'}", va="center", fontsize=8, color="white")
    right.axvline(budget / 2, color="grey", linestyle=":", linewidth=1)
    right.set_yticks(range(len(order)), [row["selection"] for row in reversed(order)])
    right.set(xlabel="steps to the loss that random's selection ends with (dotted: half)", xlim=(0, budget * 1.02))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the sizes that the test suite runs")
    parser.add_argument("--mixture", choices=list(MIXTURES), default="library")
    some = f"measure some of {', '.join(selections.NAMES)}, and random if it was not; the others are the bank's"
    parser.add_argument("--only", nargs="+", choices=selections.NAMES, default=[], metavar="SELECTION", help=some)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bank", type=Path, default=options.cache("multiplier"), help="where runs are kept")
    arguments = parser.parse_args()
    sizes, seeds = replace(QUICK if arguments.quick else Sizes(), mixture=arguments.mixture), arguments.seeds
    bank = Bank(arguments.bank, sizes, [sizes.corpus(seed).digest for seed in range(seeds)])
    needed = {*arguments.only} | ({"random"} - bank.whole(["random"]).keys())
    names = [name for name in selections.NAMES if not arguments.only or name in needed]
    run(sizes, bank, arguments.workers, names)
    runs = bank.whole(selections.NAMES)
    rows = summary(runs)
    show(rows, sizes, seeds)
    case = {
        "sizes": asdict(sizes),
        "seeds": seeds,
        "bytes_per_piece": corpus.LENGTH,
        "shares_of_the_pool": dict(MIXTURES[sizes.mixture].shares),
        "summary": rows,
        "runs": runs,
    }
    parts = ["multiplier"] + ["quick"] * arguments.quick + [sizes.mixture] * (sizes.mixture != "library")
    path = timing.write("-".join(parts), [case])
    print("written to", path.name)
    try:
        plot(runs, rows, path.with_suffix(".png"))
    except ImportError:
        print("no figure: it needs matplotlib (`pip install matplotlib`)")


if __name__ == "__main__":
    main()
