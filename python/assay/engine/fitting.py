"""Fits that a run's workers make together: what a part gives is left in the output, and whoever finds it takes it.

Nobody waits, and nobody hands out parts: a worker makes those that it does not find, its own share first. Whoever dies,
the others, or the next run, go on from what is there; a part that two make at once is the same twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from assay._version import __version__
from assay.corpus.footer import canonical_hash
from assay.corpus.layout import FITS, quarantine_path, table_path
from assay.corpus.storage import Store
from assay.engine.plan import Plan
from assay.methods.parts import State

log = logging.getLogger("assay")

# A state that takes longer to write and read than to make again is not left: a model's curvature may be gigabytes.
_BYTES_PER_SECOND, _ALWAYS_BYTES = 200e6, 1 << 20


@dataclass
class Together:
    """Where a run's workers leave what parts gave.

    Attributes:
        store: the run's output.
        key: of all that fits follow from.
        device: where this worker computes.
        turn: this one's number, and how many there are.
    """

    store: Store
    key: str
    device: torch.device
    turn: tuple[int, int]
    _fit: str = ""
    _passes: int = field(default=0, repr=False)

    @classmethod
    def of(cls, plan: Plan, device: torch.device, turn: tuple[int, int]) -> Together:
        identity, (part, parts), (place, places) = plan.identity, plan.part, turn
        facts = [identity.recipe, identity.models, identity.corpora, plan.recipe.batch.model_dump()]
        key = canonical_hash([*facts, __version__, torch.__version__, device.type]).removeprefix("sha256:")[:16]
        return cls(plan.output, key, device, ((part - 1) * places + place, parts * places))

    def begin(self, fit: str) -> None:
        """Another fit begins, of this name; its passes are counted."""
        self._fit, self._passes = fit, 0

    def states(
        self, count: int, make: Callable[[int], State], given: State, *, always: bool = False
    ) -> Iterator[State]:
        """The states of so many parts, in their order.

        ``always``: leave each, however little time it took: others may not have what this worker makes it of.
        """
        self._passes += 1
        if count == 1:  # who would look for it might as well make it
            yield make(0)
            return
        name = f"{FITS}/{self.key}/{self._fit}-{self._passes}-{_digest(given)}"
        paths = [f"{name}-{i + 1}-of-{count}.pt" for i in range(count)]
        made: dict[int, State] = {}
        for i in self._order(count) if self.turn[1] > 1 else ():
            if not self.store.exists(paths[i]):
                state, is_left = self._made(paths[i], partial(make, i), always)
                if not is_left:  # nor will the others be: everybody makes all of them
                    made[i] = state
                    break
        for i, path in enumerate(paths):
            if i in made:
                yield made.pop(i)
            else:
                found = self._found(path)
                yield self._made(path, partial(make, i), always)[0] if found is None else found[0]

    def _order(self, count: int) -> list[int]:
        """A share of its own first, and then the others from behind, where their own makers come to last."""
        place, places = self.turn
        own = range(count * place // places, count * (place + 1) // places)
        return [*own, *(i % count for i in range(own.start + count - 1, own.stop - 1, -1))]

    def _made(self, path: str, make: Callable[[], State], always: bool) -> tuple[State, bool]:
        """A state, and whether it was left for others."""
        began = time.perf_counter()
        state = make()
        worth = _BYTES_PER_SECOND * (time.perf_counter() - began)
        if not always and sum(tensor.nbytes for tensor in _tensors(state)) > max(worth, _ALWAYS_BYTES):
            return state, False
        with contextlib.suppress(FileNotFoundError), self.store.write(path) as file:  # ``clear`` may be at work
            torch.save(state, file)
        return state, True

    def _found(self, path: str) -> tuple[State] | None:
        """A state that is there, on this worker's device if it was on one; None if it is not, or is none."""
        places = {f"cuda:{i}": str(self.device) for i in range(64)}
        try:
            with self.store.open(path) as file:
                content = io.BytesIO(file.read())
            return (torch.load(content, map_location=places, weights_only=True),)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever torch raises for a damaged file
            log.warning("%s: is no part of a fit (%s); it is made again", self.store.full(path), type(error).__name__)
            return None


def clear(plan: Plan) -> None:
    """Remove what parts gave, once no worker will look for it: every shard of the corpus has its table or cannot be
    read, or this run was over all of them."""
    fits = Store(plan.output.fs, plan.output.full(FITS))
    if not (left := fits.files()):
        return
    if plan.part[1] > 1:
        there = set(plan.output.files())
        if not all({table_path(shard), quarantine_path(shard)} & there for shard in plan.corpus.shards):
            return
    for path in left:
        plan.output.remove(f"{FITS}/{path}")
    if fits.is_local:
        with contextlib.suppress(OSError):  # somebody leaves something just now
            fits.fs.rm(fits.root, recursive=True)


def _tensors(state: State) -> Iterator[Tensor]:
    """Those in it, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping | list | tuple):
        for each in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors(each)


def _digest(given: State) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(given):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
