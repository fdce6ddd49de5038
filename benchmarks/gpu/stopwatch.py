"""Medians of CUDA-graph replays, over buffers that the L2 cache cannot hold, variant by variant in turn.

Why so (QuACK's lessons, among others): events around launches on an empty stream time the gaps between launches; one
buffer over and over is read from L2; a variant measured a minute after its rival meets another clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.case import DEVICE, REHEARSAL, Case, tensor_bytes
from benchmarks.timing import Timing, summary

L2_TIMES = 3  # buffers together hold this many times the L2 cache
REPLAY_MS = 0.3  # at least, so that a launch's own few microseconds do not count
MOST_LAUNCHES = 64
MIN_ROUNDS, MAX_ROUNDS = 7, 25
SLEEP_CYCLES = 1_000_000  # about half a millisecond in which the host gets ahead of the GPU

Call = Callable[[], Any]


class Replay:
    """Some launches of one variant, as a CUDA graph where it can be captured."""

    def __init__(self, calls: Sequence[Call], pool: Any) -> None:
        """``calls``: the same on every buffer. ``pool``: graph memory, shared since replays never overlap."""
        self.captured = not REHEARSAL
        for call in calls:  # compiles kernels, opens libraries; errors surface here
            call()
        if REHEARSAL:
            self.launches, self.run = len(calls), lambda: [call() for call in calls]
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph's pool cannot take what the allocator keeps from these calls
        self.launches = _enough_launches(calls)
        sequence = [calls[i % len(calls)] for i in range(self.launches)]
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                for call in sequence:
                    call()
            self.run: Call = graph.replay
        except RuntimeError as error:  # it synchronises, say; timed with its launch gaps, and marked
            if isinstance(error, torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize()
            self.captured = False
            self.run = lambda: [call() for call in sequence]


def _enough_launches(calls: Sequence[Call]) -> int:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    calls[0]()
    end.record()
    torch.cuda.synchronize()
    wanted = max(len(calls), min(MOST_LAUNCHES, math.ceil(REPLAY_MS / start.elapsed_time(end))))
    return -(-wanted // len(calls)) * len(calls)  # every buffer equally often


def buffers(case: Case) -> list[tuple[Any, ...]]:
    """As many sets of inputs, all of them different, as together leave the L2 cache behind."""
    first = case.make()
    if REHEARSAL:
        return [first, case.make()]
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    count = min(MOST_LAUNCHES, math.ceil(L2_TIMES * cache / tensor_bytes(first)))
    return [first, *(case.make() for _ in range(count - 1))]


def interleave(variants: Mapping[str, Replay], seconds: float) -> tuple[dict[str, Timing], int | None]:
    """Milliseconds per launch of each variant, and the SM clock (MHz) at the end, under load."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    clock, stop = None, time.monotonic() + seconds
    for i in range(1 + MAX_ROUNDS):
        elapsed, clock = _round_on_cpu(variants) if REHEARSAL else _round_on_gpu(variants)
        if i:  # the first is for warming up
            for name, ms in elapsed.items():
                samples[name].append(ms / variants[name].launches)
        if i >= MIN_ROUNDS and time.monotonic() > stop:
            break
    return {name: summary(values) for name, values in samples.items()}, clock


def _round_on_gpu(variants: Mapping[str, Replay]) -> tuple[dict[str, float], int | None]:
    torch.cuda._sleep(SLEEP_CYCLES)
    events = {}
    for name, variant in variants.items():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        variant.run()
        end.record()
        events[name] = start, end
    clock = _sm_clock()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}, clock


def _round_on_cpu(variants: Mapping[str, Replay]) -> tuple[dict[str, float], None]:
    elapsed = {}
    for name, variant in variants.items():
        start = time.perf_counter()
        variant.run()
        elapsed[name] = 1e3 * (time.perf_counter() - start)
    return elapsed, None


def _sm_clock() -> int | None:
    try:
        return torch.cuda.clock_rate()
    except Exception:  # no nvidia-ml-py, or NVML refuses: the clock is a remark, not the measurement
        return None


def peak_bytes(run: Call) -> int | None:
    """The most memory that ``run`` holds at a time, its results included; None in a rehearsal."""
    if REHEARSAL:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
