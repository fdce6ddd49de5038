"""Running a recipe over a corpus: what is done stays done, and only the rest is scored."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from assay.corpus.claim import claim
from assay.corpus.errors import ShardError
from assay.corpus.footer import Tally, canonical_hash
from assay.corpus.layout import table_path
from assay.corpus.listing import summarise_left_out
from assay.corpus.quarantine import QuarantineWriter
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.engine import staging
from assay.engine.crew import score_with_workers
from assay.engine.devices import find_devices, threads_each
from assay.engine.fitting import clear
from assay.engine.plan import (
    Plan,
    find_corpora,
    make_plan,
    refuse_changes,
    refuse_strangers,
    renew_manifest,
    standing_table,
    write_manifest,
)
from assay.engine.processes import Processes
from assay.engine.progress import Progress
from assay.engine.ray_actors import RayActors
from assay.engine.reranking import make_shortlist, missing_shards, score_unit
from assay.engine.shortlist import Shortlist
from assay.engine.timing import Times
from assay.engine.units import Outcome, sizes_of, units_at_most
from assay.engine.workshop import open_workshop, settled
from assay.recipe.errors import EngineError
from assay.recipe.methods import ShortlistSpec
from assay.recipe.recipe import Recipe

log = logging.getLogger("assay")


@dataclass
class RunSummary(Tally):
    """What a run did. Shards and rows count those that were done before, too."""

    done_before: int = 0
    scored: int = 0
    rescored: int = 0
    reused: int = 0
    """The part of ``scored`` that needed no model: its features were stored."""
    unreadable: dict[str, str] = field(default_factory=dict)
    retried: int = 0
    """Rows that were in quarantine and were tried again."""
    still_quarantined: int = 0
    """Of the shards that they are in, the rows that are in quarantine now."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What the corpus and the targets hold beside their shards and may be data, and why it is not read."""
    times: Times = field(default_factory=Times)
    workers: int = 0
    """How many scored; 0 if there was nothing left to score."""
    retrieval: RunSummary | None = None
    """Of a recipe with a shortlist: the pass that chose it."""
    shortlist: str = ""
    """Of such a recipe: how many rows it has, and by what they were chosen."""
    waits_for: int = 0
    """The shards from which the rows of a shortlist are still to be retrieved, by other runners of the recipe; none was
    scored by what scores a shortlist."""

    @property
    def clean(self) -> bool:
        """Whether every row that is there has its scores."""
        return not (self.unreadable or self.left_out or self.rows_quarantined or self.waits_for)

    def lines(self) -> list[str]:
        """The counts in words, one line each."""
        before = [f"retrieval: {line}" for line in self.retrieval.lines()] if self.retrieval else []
        before += [f"shortlist: {self.shortlist}"] if self.shortlist else []
        if self.waits_for:
            before += [f"shortlist: waits for {self.waits_for} shards that other runners score; run again afterwards"]
        reused = f", {self.reused} from stored features" if self.reused else ""
        lines = [
            *before,
            f"shards: {self.scored} scored ({self.rescored} of them again{reused}), {self.done_before} done before, "
            f"{len(self.unreadable)} unreadable",
            f"rows in {self.rows:,} = scored {self.rows_scored:,} + quarantined {self.rows_quarantined:,}",
        ]
        if self.retried:
            lines.append(f"quarantined rows tried again: {self.retried:,}; now quarantined: {self.still_quarantined:,}")
        nan = ", ".join(f"{name} {count:,}" for name, count in sorted(self.nan.items()) if count)
        lines += [f"NaN scores: {nan}{' (rows beyond the shortlist among them)' * bool(self.shortlist)}"] if nan else []
        lines += [self.times.line(self.workers)] if self.workers else []
        return lines + ([summarise_left_out(self.left_out)] if self.left_out else [])


def run(
    recipe: Recipe,
    *,
    part: tuple[int, int] = (1, 1),
    rescore: bool = False,
    retry: bool = False,
    progress: Progress | None = None,
    engine: str = "local",
) -> RunSummary:
    """Score whatever is not scored yet, and say what became of every row.

    Args:
        retry: also every shard with rows in quarantine, whole: a row's scores may depend on its neighbours.
        engine: ``"local"``: with several devices in ``recipe.run`` a worker process on each; with one, here. ``"ray"``:
            actors of a Ray cluster, as ``recipe.run.ray`` says.
    """
    if engine not in ("local", "ray"):
        raise EngineError(f"--engine {engine}: expected local or ray")
    devices = find_devices(recipe.run.devices) if engine == "local" else []
    corpora = find_corpora(recipe)

    def scored(recipe: Recipe, shortlist: Shortlist | None = None, choice: ShortlistSpec | None = None) -> RunSummary:
        output = Store.at(recipe.output)
        with claim(output, canonical_hash([recipe.corpus.path, recipe.identity()]), shared=True):
            plan = make_plan(recipe, part, rescore, corpora, retry, shortlist, choice)
            for path in [*output.sweep(), *staging.sweep(output)]:
                log.info("removed %s, left by a run that was killed", path)
            left_out = {entry.path: entry.reason for corpus in corpora.values() for entry in corpus.left_out}
            summary = RunSummary(**vars(plan.done), done_before=plan.done.shards, left_out=left_out)
            if plan.todo:
                _score(plan, devices, summary, progress or Progress())
            else:
                renew_manifest(plan)
            clear(plan)
        return summary

    if recipe.shortlist is None:
        return scored(recipe)
    refuse_strangers(Store.at(recipe.output))  # before the first pass, which takes the time
    first = scored(recipe.retrieval(), choice=recipe.shortlist)
    retrieval = make_plan(recipe.retrieval(), rescore=rescore, corpora=corpora)
    if missing := missing_shards(retrieval):
        return replace(first, waits_for=len(missing))
    shortlist = make_shortlist(recipe.shortlist, retrieval)
    summary = scored(recipe, shortlist)
    summary.retrieval, summary.shortlist = first, f"{len(shortlist):,} rows, {shortlist.spec}; NaN beyond"
    return summary


def _score(plan: Plan, devices: Sequence[torch.device], summary: RunSummary, progress: Progress) -> None:
    """Score what is to do, on these devices or if there are none by Ray, and count it in the plan's order."""
    began, sizes = time.perf_counter(), sizes_of(plan.todo)

    def on_unreadable(shard: Shard, reason: str) -> None:
        log.error("%s: %s", shard.path, reason)
        # What is known of a shard is more than that it could not be read once more.
        if shard not in plan.retried or not standing_table(plan.output, shard):
            _quarantine_shard(plan.output, shard, reason)

    rest = (progress, summary.times, on_unreadable)
    devices = devices[: units_at_most(plan, sizes, len(devices))]
    if len(devices) == 1:
        workers, outcomes = 1, _score_here(plan, sizes, devices[0], *rest)
    elif devices:
        workers, places = len(devices), [str(device) for device in devices]
        outcomes = score_with_workers(plan, sizes, Processes(), places, threads_each(workers), *rest)
    else:
        spec = plan.recipe.run.ray
        staff = RayActors(spec)
        try:
            places = staff.places()
            places = places[: units_at_most(plan, sizes, len(places))]
            workers = len(places)
            outcomes = score_with_workers(plan, sizes, staff, places, max(1, int(spec.cpus)), *rest)
        finally:
            staff.end()
    summary.times.total, summary.workers = time.perf_counter() - began, workers
    for shard, outcome in outcomes.items():
        summary.retried += plan.retried.get(shard, 0)
        if isinstance(outcome, str):
            summary.unreadable[shard.path] = outcome
            if shard in plan.retried and (table := standing_table(plan.output, shard)):
                summary.add(table.footer)
                summary.still_quarantined += table.footer.rows.quarantined
            continue
        footer, stored = outcome
        summary.still_quarantined += footer.rows.quarantined if shard in plan.retried else 0
        summary.add(footer)
        summary.scored += 1
        summary.rescored += shard in plan.stale
        summary.reused += stored


def _score_here(
    plan: Plan,
    sizes: Mapping[Shard, int],
    device: torch.device,
    progress: Progress,
    times: Times,
    on_unreadable: Callable[[Shard, str], None],
) -> dict[Shard, Outcome]:
    """In this process; what it takes is added to ``times``."""
    with times.measure("load"):
        workshop = open_workshop(plan, device=device, turn=(0, 1))
        refuse_changes(plan)  # afterwards, as in a worker
    write_manifest(plan, workshop.columns)
    outcomes: dict[Shard, Outcome] = {}
    with progress as shown, settled():
        shown.start(len(sizes), sum(sizes.values()))
        for shard, size in sizes.items():
            reached = 0.0

            def advance(rows: int, share: float, size: int = size) -> None:
                nonlocal reached
                shown.advance(rows, (share - reached) * size)
                reached = share

            try:
                outcomes[shard] = score_unit(workshop, shard, plan.output, advance, shard in plan.retried)
            except ShardError as error:
                outcomes[shard] = str(error)
                on_unreadable(shard, str(error))
            shown.finish_shard()
    times.add(workshop.times)
    return outcomes


def _quarantine_shard(output: Store, shard: Shard, reason: str) -> None:
    output.remove(table_path(shard))  # were there one, it would speak of an input that is no more
    with tempfile.TemporaryFile() as spool:
        quarantine = QuarantineWriter(shard, spool)
        quarantine.add(None, None, reason)
        quarantine.save(output)
