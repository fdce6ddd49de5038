"""`assay score`."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.terminal import INCOMPLETE, OK, Overrides, RecipeFile, Trust, fail, log_to_stderr, say

if TYPE_CHECKING:
    from assay.engine.progress import Progress


def score(
    recipe: RecipeFile,
    overrides: Overrides = None,
    trust: Trust = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Replace tables that another recipe or model made.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry-quarantined", help="Score shards with quarantined rows again, whole.")
    ] = False,
    shard: Annotated[
        str,
        typer.Option("--shard", metavar="I/N", help="Take every N-th shard from the I-th on, I from 1 to N."),
    ] = "1/1",
    devices: Annotated[
        str | None,
        typer.Option(metavar="DEVICES", help="Where to run: auto, cpu, or a worker each on cuda:0,cuda:1 or cpu,cpu."),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="Workers of this machine, or actors of a Ray cluster.")
    ] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and the recipe.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between progress lines off a terminal.")] = 10.0,
) -> int:
    """Score a corpus: one table per shard. Running it again does only what is missing."""
    log_to_stderr(quiet)
    limit_threads()
    from assay.corpus.layout import table_path
    from assay.engine import find_devices, next_plan, run
    from assay.recipe import load_recipe

    part = _part(shard)
    named = [] if devices is None else [f"run.devices={devices}"]
    loaded = load_recipe(recipe, [*(overrides or ()), *named], trust or ())
    if dry_run:
        if engine == "local":
            say(f"devices: {', '.join(map(str, find_devices(loaded.run.devices)))}")
        plan = next_plan(loaded, part, rescore, retry)
        say(f"{len(plan.todo)} shards to score ({len(plan.stale)} of them again), {plan.done.shards} done")
        for todo in plan.todo:
            say(f"  {todo.path} -> {plan.output.full(table_path(todo))}")
        for line in loaded.to_yaml().splitlines():
            say(line)
        return OK
    shown = progress_of(quiet, interval)
    summary = run(loaded, part=part, rescore=rescore, retry=retry, progress=shown, engine=engine)
    if not quiet:
        for line in summary.lines():
            say(line)
        for key, text in sorted(summary.warnings.items()):
            say(f"{key}: {text}")
        say(f"scores: {loaded.output}")
    if summary.waits_for:
        fail("the shortlist is made when every shard is retrieved from", INCOMPLETE)
    elif not summary.clean:
        fail(f"not everything was scored; see {loaded.output}/quarantine", INCOMPLETE)
    return OK if summary.clean else INCOMPLETE


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard {text}: expected I/N with 1 ≤ I ≤ N, such as 1/8")
    return int(match[1]), int(match[2])


def progress_of(quiet: bool, interval: float) -> Progress:
    """A bar on a terminal, lines in a log."""
    from assay.engine.progress import BarProgress, LogProgress, Progress

    if quiet:
        return Progress()
    return BarProgress() if sys.stderr.isatty() else LogProgress(interval)


def limit_threads() -> None:
    """To ASSAY_NUM_THREADS, where that is set."""
    threads = os.environ.get("ASSAY_NUM_THREADS")
    if threads:
        import torch

        if not threads.isdecimal() or int(threads) < 1:
            raise ValueError(f"ASSAY_NUM_THREADS={threads}: expected a positive number")
        torch.set_num_threads(int(threads))
