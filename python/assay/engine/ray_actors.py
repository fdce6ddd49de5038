"""Workers as actors of a Ray cluster: an actor opens its workshop once, and writes the tables of its units itself."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from assay._lazy import require
from assay.engine.devices import limit_threads
from assay.engine.messages import Advanced, Began, Failed, Ready, Setup, Unit
from assay.engine.parts import gathered
from assay.engine.timing import Times
from assay.engine.worker import described, log_to, open_for, work
from assay.engine.workshop import settled
from assay.recipe.errors import EngineError
from assay.recipe.recipe import RaySpec

log = logging.getLogger("assay")

# What opens a hostile Parquet file in older ones runs its code.
OLDEST = (2, 57)
# After so long without a worker it is said that there is none.
_QUIET_SECONDS = 60.0
# So often it is seen whether this process's own node is still there while nobody says anything.
_LOOK_SECONDS = 10.0


class Actor:
    """What runs in the cluster. A call gives everything that there is to say, its outcome at last."""

    def __init__(self) -> None:
        os.environ["TQDM_DISABLE"] = "1"
        self._said: list[Any] = []
        self._workshop: Any = None
        self._output: Any = None
        self._settled = ExitStack()

    def open(self, setup: Setup) -> list[Any]:
        began = time.perf_counter()
        log_to(self._said.append, setup.log_level)
        try:
            limit_threads(setup.threads)
            self._workshop, self._output = open_for(setup)
            self._settled.enter_context(settled())
        except Exception as error:
            return self._all_said(Failed(described(error)))
        load = Times(load=time.perf_counter() - began)
        return self._all_said(Ready(self._workshop.columns, gathered(self._workshop), load))

    def work(self, unit: Unit) -> list[Any]:
        rows = 0

        def advance(message: Advanced) -> None:
            nonlocal rows
            rows += message.rows

        try:
            outcome = work(self._workshop, self._output, unit, advance)
        except Exception as error:
            return self._all_said(Failed(described(error)))
        return self._all_said(Advanced(rows, 1.0), outcome)

    def _all_said(self, *last: Any) -> list[Any]:
        said = [*self._said, *last]
        self._said.clear()
        return said


class RayWorker:
    """An actor as the crew sees it."""

    def __init__(self, ray: Any, place: str, device: str, actor: Any) -> None:
        self.place, self.device, self.actor = place, device, actor
        self.call: Any = None
        self.heard: deque[Any] = deque()
        self._ray = ray
        self._death: Exception | None = None

    def tell(self, message: Any) -> None:
        if isinstance(message, Setup):
            self.call = self.actor.open.remote(dataclasses.replace(message, device=self.device))
        else:
            self.heard.append(Began())  # what ends an actor from here on counts against its unit
            self.call = self.actor.work.remote(message)

    def hear(self) -> Any:
        if not self.heard:
            call, self.call = self.call, None
            try:
                self.heard.extend(self._ray.get(call))
            except self._ray.exceptions.RayError as error:
                self._death = error
                return None
        return self.heard.popleft()

    def end_of(self) -> tuple[str, bool]:
        self._ray.kill(self.actor, no_restart=True)  # a call may have failed, and the actor live
        in_our_code = isinstance(self._death, self._ray.exceptions.RayTaskError)
        error = getattr(self._death, "cause", self._death) if in_our_code else self._death
        first, *_ = [*str(error).strip().splitlines(), ""]
        return f"{type(error).__name__}: {first:.200}".rstrip(": "), not in_our_code


class RayActors:
    """Hires them, in a cluster that runs already or in one that is started here."""

    sees_local_files = False
    advice = "run.ray: expected nodes with room for it, on which assay and the models' files are as they are here"

    def __init__(self, spec: RaySpec) -> None:
        self._ray = _ray()
        self._spec = spec
        self._started = _connect(self._ray, spec)
        self._node = self._ray.get_runtime_context().get_node_id()
        self._class = self._ray.remote(max_restarts=0, num_cpus=spec.cpus, num_gpus=spec.gpus)(Actor)
        self._hired: list[RayWorker] = []
        self._works = False
        self._said = time.monotonic()

    def places(self) -> list[str]:
        """One for each worker that is asked for, or that the cluster's CPUs and GPUs make."""
        count = self._spec.workers
        if count is None:
            has, wants = self._ray.cluster_resources(), {"CPU": self._spec.cpus, "GPU": self._spec.gpus}
            count = int(min(has.get(name, 0.0) / each for name, each in wants.items() if each))
        if count < 1:
            there = self._ray.cluster_resources()
            raise EngineError(
                f"run.ray: the cluster has no room for a worker of {self._spec.cpus:g} CPUs and {self._spec.gpus:g} "
                f"GPUs; it has {there}"
            )
        return [f"Ray ({i + 1})" for i in range(count)]

    def hire(self, place: str) -> RayWorker:
        device = "cuda:0" if self._spec.gpus else "cpu"  # of the GPUs, an actor sees its own alone
        hired = RayWorker(self._ray, place, device, self._class.remote())
        self._hired.append(hired)
        return hired

    def wait(self, hands: Sequence[RayWorker], seconds: float) -> Sequence[RayWorker]:
        if ready := [hand for hand in hands if hand.heard]:
            return ready
        calls = {hand.call: hand for hand in hands if hand.call is not None}
        timeout = min(seconds, _QUIET_SECONDS, _LOOK_SECONDS)
        done, _ = self._ray.wait(list(calls), num_returns=1, timeout=timeout)
        self._works = self._works or bool(done)
        if not self._works and time.monotonic() - self._said >= _QUIET_SECONDS:
            self._said = time.monotonic()
            log.warning(
                "no worker has started yet, each wants %g CPUs and %g GPUs; free in the cluster: %s",
                *(self._spec.cpus, self._spec.gpus, self._ray.available_resources()),
            )
        if not done:
            self._refuse_lost_node()
        return [calls[call] for call in done]

    def _refuse_lost_node(self) -> None:
        """Without its own node's raylet this process would wait for ever."""
        if not any(node["Alive"] for node in self._ray.nodes() if node["NodeID"] == self._node):
            raise EngineError(
                "run.ray: the node that this process runs on has left the cluster, so that no worker can be heard; "
                "what is written stays, and the same command goes on from there"
            )

    @property
    def keeps(self) -> int:
        return self._spec.min_workers

    def let_go(self, hand: RayWorker) -> None:
        self._hired.remove(hand)
        self._ray.kill(hand.actor, no_restart=True)

    def dismiss(self) -> None:
        """They have nothing to tidy up, and end when they are killed."""

    def end(self) -> None:
        hired, self._hired = self._hired, []
        for hand in hired:
            self._ray.kill(hand.actor, no_restart=True)
        if self._started:
            self._ray.shutdown()
            self._started = False


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", "ray")
    found = tuple(int(n) for n in re.findall(r"[0-9]+", ray.__version__)[:2])
    if found < OLDEST:
        raise EngineError(f"ray {ray.__version__} is installed; expected {OLDEST[0]}.{OLDEST[1]} or newer")
    return ray


def _connect(ray: Any, spec: RaySpec) -> bool:
    """Whether there was no connection yet."""
    if ray.is_initialized():
        own = ray.get_runtime_context().gcs_address
        if spec.address not in (None, "auto", own):
            raise EngineError(f"run.ray.address: {spec.address}, and this process is connected to {own} already")
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if spec.address is None and "RAY_ADDRESS" not in os.environ:
        options["include_dashboard"] = False
    try:
        ray.init(address=spec.address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise EngineError(f"run.ray.address: {spec.address or 'a cluster of this machine'}: {text}") from error
    return True
