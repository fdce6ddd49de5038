"""States of a run in reverse order from few checkpoints: the binomial schedule of Griewank and Walther (Revolve)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from assay.retrain.magic_optimizers import State


class Store(Protocol):
    """States by the number of steps made."""

    def steps(self) -> list[int]:
        """Those that are kept, ascending."""
        ...

    def put(self, step: int, state: State, digests: Tensor) -> None: ...

    def get(self, step: int) -> State: ...

    def drop(self, step: int) -> None: ...


class InMemory:
    """States in the memory that they were made in."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def steps(self) -> list[int]:
        return sorted(self._states)

    def put(self, step: int, state: State, digests: Tensor) -> None:
        self._states[step] = state

    def get(self, step: int) -> State:
        return self._states[step]

    def drop(self, step: int) -> None:
        del self._states[step]


class Replay:
    """Gives the states of a run from the last to the first, and makes again what it has not kept.

    The state before the first step is always at hand; ``checkpoints`` others are kept. A state that was made before
    must come out with the same bits, or the run is not deterministic, and its derivative would be of no run at all.

    Args:
        start: the state before the first step.
        advance: (state, step) -> the state after the step.
        checkpoints: the number of states in ``store`` at a time, at least 1.
        store: states that are there already are used.
        digests: (T + 1,) int64, of every state that was made before, 0 of others; filled in here.
    """

    def __init__(
        self,
        start: Callable[[], State],
        advance: Callable[[State, int], State],
        checkpoints: int,
        store: Store,
        digests: Tensor,
    ) -> None:
        self._start, self._advance, self._most = start, advance, checkpoints
        self._store, self._digests = store, digests
        self.made = 0  # steps

    def state(self, step: int) -> State:
        """The state after ``step`` steps; later ones are forgotten.

        Raises:
            RuntimeError: a state that came out otherwise than before.
        """
        for later in self._store.steps():
            if later > step:
                self._store.drop(later)
        kept = self._store.steps()
        at = kept[-1] if kept else 0
        state, room = self._store.get(at) if at else self._start(), self._most - len(kept)
        if at:
            self._compare(at, state)
        while at < step:
            stop = at + first_piece(step - at + 1, room + 1)
            while at < stop:
                state = self._advance(state, at)
                at, self.made = at + 1, self.made + 1
                self._compare(at, state)
            if at < step and room:
                self._store.put(at, state, self._digests)
                room -= 1
        return state

    def check_beginning(self, steps: int) -> None:
        """Make the first steps again, where they were made before: whether this is still the same run.

        Raises:
            RuntimeError: it is not.
        """
        state = self._start()
        for step in range(steps):
            if not int(self._digests[step + 1]):
                break
            state = self._advance(state, step)
            self._compare(step + 1, state)

    def _compare(self, step: int, state: State) -> None:
        found, known = digest(state), int(self._digests[step])
        if known not in (0, found):
            raise RuntimeError(
                f"step {step - 1} was replayed to other numbers than before: something in the run is random or not "
                "deterministic (torch.use_deterministic_algorithms names it), or, where it was resumed, another "
                "machine, version, number of threads, model or loss than before; a derivative would be of no run at all"
            )
        self._digests[step] = found


def digest(state: State) -> int:
    """A number of the state's bits, never 0."""
    total = 1
    for place, part in enumerate(state):
        words = part.contiguous().view(torch.int64 if part.element_size() == 8 else torch.int32)
        total += (2 * place + 1) * int(words.sum(dtype=torch.int64))
    return ((total + (1 << 62)) % (1 << 63)) - (1 << 62) or 1


def first_piece(states: int, room: int) -> int:
    """How many steps to go before the next state is kept (or is the last), for the fewest steps in all.

    Args:
        states: that are wanted in reverse, beginning with the one at hand, l.
        room: states that may be kept, the one at hand among them, s.
    """
    if states < 3 or room < 2:
        return states - 1
    r = _repeats(states, room)
    # Any m works with C(s+r−2, s) ≤ m ≤ C(s+r−1, s) and C(s+r−2, s−1) ≤ l − m ≤ C(s+r−1, s−1): the longest does.
    return max(1, min(math.comb(room + r - 1, room), states - math.comb(room + r - 2, room - 1)))


def replayed_steps(steps: int, checkpoints: int) -> int:
    """The steps that a run of ``steps`` makes in all, the first time and again, to give its states in reverse."""
    states, room = steps + 1, checkpoints + 1
    r = _repeats(states, room)
    return r * states - math.comb(room + r, r - 1)


def _repeats(states: int, room: int) -> int:
    """The least r with C(s + r, s) ≥ l: how often a step is made at most."""
    r = 1
    while math.comb(room + r, room) < states:
        r += 1
    return r
