"""A run by several workers: units are handed out, deaths made good, parts joined; tables are those of one worker."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.footer import Footer
from assay.corpus.layout import table_path
from assay.corpus.shards import Shard
from assay.engine import staging
from assay.engine.messages import Advanced, Began, Failed, Finished, Logged, Ready, Setup, Unit
from assay.engine.parts import Part, PartsDiffer, join_parts
from assay.engine.plan import Plan, write_manifest
from assay.engine.progress import Progress
from assay.engine.shard import Share
from assay.engine.staff import Hand, Staff
from assay.engine.timing import Times
from assay.engine.units import Job, Outcome, shares
from assay.recipe.errors import EngineError
from assay.recipe.models import hashed_files

log = logging.getLogger("assay")

DIED_TWICE = "a worker died twice on it"
# So often a place is tried while others work.
_STARTS = 5
# Staged parts are given a new age so often: an hour's is what others take for an abandoned one.
_RENEW_SECONDS = 600.0


def score_with_workers(
    plan: Plan,
    sizes: Mapping[Shard, int],
    staff: Staff[Any],
    places: Sequence[str],
    threads: int,
    progress: Progress,
    times: Times,
    on_unreadable: Callable[[Shard, str], None],
) -> dict[Shard, Outcome]:
    """Score a plan's shards with a worker in each place.

    Args:
        sizes: of the shards to score, in bytes.
        staff: hires them.
        places: the device of each.
        threads: that each computes with.
        progress: starts when the first worker is ready.
        times: the workers' are added up in it.
        on_unreadable: is called as soon as that is known.

    Raises:
        EngineError: a worker cannot start, or what it scores with fails; all have ended.
    """
    _refuse_memory(plan)
    crew = _Crew(plan, sizes, staff, threads, progress, times, on_unreadable)
    with staging.staging(plan.output, staff.sees_local_files) as crew.stage:
        try:
            crew.start(places)
            crew.prepare()
            with progress:
                crew.work()
            staff.dismiss()
        finally:
            staff.end()
            crew.clear()
    return {shard: crew.outcomes[shard] for shard in plan.todo}


def _refuse_memory(plan: Plan) -> None:
    for store in (plan.output, *(corpus.store for corpus in plan.corpora.values())):
        if store.is_in_memory:
            raise CorpusError(f"{store.url}: lives in one process, where no worker sees it; score with run.devices=cpu")


@dataclass
class _Worker:
    hand: Hand
    number: int
    ready: Ready | None = None
    job: Job | None = None
    began: float = field(default_factory=time.perf_counter)


class _Crew:
    stage: Callable[[], str]

    def __init__(
        self,
        plan: Plan,
        sizes: Mapping[Shard, int],
        staff: Staff[Any],
        threads: int,
        progress: Progress,
        times: Times,
        on_unreadable: Callable[[Shard, str], None],
    ) -> None:
        self.outcomes: dict[Shard, Outcome] = {}
        self._sizes = sizes
        self._plan, self._progress, self._times, self._on_unreadable = plan, progress, times, on_unreadable
        self._staff, self._threads = staff, threads
        self._workers: list[_Worker] = []
        self._places: Sequence[str] = ()
        self._starts: dict[str, int] = {}
        self._waiting: deque[Job] = deque()
        self._ready: Ready | None = None
        self._staged: dict[Shard, dict[int, Part]] = {}
        self._renewed = time.monotonic()

    # -- the workers' lives

    def start(self, places: Sequence[str]) -> None:
        self._places = places
        for each in [self._hire(i) for i in range(len(places))]:  # all of them start before one has to listen
            self._brief(each)

    def _hire(self, number: int) -> _Worker:
        hired = _Worker(self._staff.hire(self._places[number]), number)
        self._workers.append(hired)
        return hired

    def _brief(self, hired: _Worker) -> None:
        """Tell it what it works with. By its pipe: what goes along with a new process must fit into a buffer."""
        recipe = self._plan.recipe
        fitted = {path: self._plan.corpora[path] for path in recipe.fitted_to().values()}
        setup = Setup(
            recipe.model_dump(),
            [recipe.place(i) for i in range(len(recipe.methods))],
            recipe.task,
            recipe.trust,
            self._plan.identity,
            self._plan.shortlist,
            fitted,
            hashed_files(),
            hired.hand.device,
            self._threads,
            logging.getLogger("assay").getEffectiveLevel(),
            (hired.number, len(self._places)),
            self._plan.part,
            hired.began,
        )
        hired.hand.tell(setup)

    def _bury(self, dead: _Worker) -> None:
        """Make good what a worker's death has cost."""
        self._workers.remove(dead)
        place = dead.hand.place
        how, accident = dead.hand.end_of()
        if dead.ready is None:
            self._starts[place] = self._starts.get(place, 0) + 1
            is_alone = not any(each.ready for each in self._workers)
            if not accident or (is_alone and self._starts[place] > 1):
                raise EngineError(f"the worker on {place} ended before it could start ({how}); {self._staff.advice}")
            log.warning("the worker on %s ended while it loaded the models (%s); another one starts", place, how)
        elif dead.job is not None:
            self._retry(dead.job, how)
        if self._starts.get(place, 0) >= _STARTS:
            log.warning("the worker on %s could not start %d times; the others go on without it", place, _STARTS)
        elif self._waiting or self._ready is None:
            self._brief(self._hire(dead.number))

    def _retry(self, job: Job, how: str) -> None:
        self._progress.advance(-job.rows, -job.reached * job.size)
        if job.path is not None:
            staging.remove([job.path])
        job.deaths += job.began
        job.path, job.began, job.rows, job.reached = None, False, 0, 0.0
        if job.shard in self.outcomes:
            return
        if job.deaths > 1:
            self._settle(job.shard, f"{DIED_TWICE} (the last one was {how})")
            return
        log.warning("%s: a worker died on it (%s); another one tries again", job.shard.path, how)
        self._waiting.appendleft(job)

    def clear(self) -> None:
        """Remove what is staged."""
        jobs = [each.job for each in self._workers] + list(self._waiting)
        staging.remove([job.path for job in jobs if job is not None and job.path is not None])
        staging.remove([part.path for parts in self._staged.values() for part in parts.values()])

    # -- their work

    def prepare(self) -> None:
        """Wait for the first worker to be ready, write the manifest, and make the units, the largest first."""
        while self._ready is None:
            self._listen()
        write_manifest(self._plan, self._ready.columns)
        total, workers = sum(self._sizes.values()), len(self._places)
        for shard, size in sorted(self._sizes.items(), key=lambda item: -item[1]):
            count = 1 if self._ready.gathers is None else shares(self._plan, size, total, workers)
            self._waiting += [Job(shard, size / count, Share(i, count)) for i in range(count)]

    def work(self) -> None:
        """Hand out units until every shard has its outcome."""
        self._progress.start(len(self._sizes), sum(self._sizes.values()))
        while len(self.outcomes) < len(self._sizes):
            if not self._workers:
                self._brief(self._hire(0))
            for each in self._workers:
                if each.ready and each.job is None and self._waiting:
                    self._hand_out(each, self._waiting.popleft())
            self._let_go()
            self._listen()

    def _let_go(self) -> None:
        """End those for whom no unit is left, first those who have not even started, but as many as the staff keeps:
        what they hold is wanted elsewhere, and a cluster may give their nodes back. Who dies now has a successor."""
        if self._staff.keeps is None or self._waiting:
            return
        idle = sorted((each for each in self._workers if each.job is None), key=lambda each: each.ready is not None)
        for each in idle[: max(0, len(self._workers) - self._staff.keeps)]:
            self._workers.remove(each)
            self._staff.let_go(each.hand)

    def _hand_out(self, to: _Worker, job: Job) -> None:
        job.path = self.stage() if job.share.count > 1 else None
        to.job = job
        to.hand.tell(Unit(job.shard, job.share, job.path, job.shard in self._plan.retried))

    def _listen(self) -> None:
        heard = self._staff.wait([each.hand for each in self._workers], _RENEW_SECONDS)
        for each in [w for w in self._workers if w.hand in heard]:
            message = each.hand.hear()
            if message is None:
                self._bury(each)
            else:
                self._hear(each, message)
        if time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renewed = time.monotonic()
            staging.renew([part.path for parts in self._staged.values() for part in parts.values()])

    def _hear(self, who: _Worker, message: Any) -> None:
        job = who.job
        if isinstance(message, Logged):
            # What every worker finds when it loads is said once.
            if who.ready is not None or who is self._workers[0]:
                log.log(message.level, "%s", message.text)
        elif isinstance(message, Failed):
            raise EngineError(message.reason)
        elif isinstance(message, Ready):
            who.ready, self._ready = message, self._ready or message
            self._starts[who.hand.place] = 0
            self._times.add(message.times)
        elif job is not None and isinstance(message, Began):
            job.began = True
        elif job is not None and isinstance(message, Advanced):
            self._progress.advance(message.rows, (message.share - job.reached) * job.size)
            job.rows, job.reached = job.rows + message.rows, message.share
        elif job is not None and isinstance(message, Finished):
            who.job = None
            self._times.add(message.times)
            self._finish(job, message)

    def _finish(self, job: Job, message: Finished) -> None:
        outcome = message.outcome
        if job.path is not None and (isinstance(outcome, str) or job.shard in self.outcomes):
            staging.remove([job.path])
        if job.shard in self.outcomes:  # another part of it has failed
            return
        if isinstance(outcome, str):
            self._settle(job.shard, outcome)
            return
        self._see(job.shard, outcome)
        if isinstance(outcome, Footer):
            self._settle(job.shard, (outcome, message.stored))
        else:
            parts = self._staged.setdefault(job.shard, {})
            parts[job.share.index] = outcome
            if len(parts) == job.share.count:
                self._join([parts[i] for i in range(len(parts))], job.shard, job.size * len(parts))

    def _see(self, shard: Shard, outcome: Footer | Part) -> None:
        """EngineError unless what a worker says it wrote is there."""
        if self._staff.sees_local_files:
            return
        if isinstance(outcome, Part):
            is_there = staging.is_there(outcome.path)
        else:
            is_there = self._plan.output.exists(table_path(shard))
        if not is_there:
            raise EngineError(
                f"{shard.path}: a worker wrote its table to {self._plan.output.url}, and here there is none; expected "
                "an output that every node sees, a shared folder or an object store"
            )

    def _join(self, parts: list[Part], shard: Shard, size: float) -> None:
        assert self._ready is not None
        assert self._ready.gathers is not None
        gathers, identity, columns = self._ready.gathers, self._plan.identity, self._ready.columns
        try:
            with self._times.measure("write"):
                footer = join_parts(parts, identity, columns, gathers, shard, self._plan.output)
        except ShardError as error:
            self._settle(shard, str(error))
        except PartsDiffer:
            log.info("%s: has too few samples at its beginning for several workers; one scores it", shard.path)
            self._drop(shard)
            self._progress.advance(0, -size)
            self._waiting.append(Job(shard, size))
        else:
            self._settle(shard, (footer, False))

    def _settle(self, shard: Shard, outcome: Outcome) -> None:
        """What became of a shard is known."""
        self.outcomes[shard] = outcome
        self._drop(shard)
        if isinstance(outcome, str):  # other parts of it may be waiting
            self._waiting = deque(job for job in self._waiting if job.shard != shard)
            self._on_unreadable(shard, outcome)
        self._progress.finish_shard()

    def _drop(self, shard: Shard) -> None:
        staging.remove([part.path for part in self._staged.pop(shard, {}).values()])
