"""The bank: what trainings gave, kept in files, so that a new method is judged in a minute.

A folder per key, and the key is made of everything that a training depends on: start, order, data, queries, optimiser.
Files appear whole or not at all, and carry the key: one that came from elsewhere is refused. A retraining is kept under
the rows that it dropped, whichever method asked for it; a method's scores under its label, so that rows which are
measured one by one are judged beside each other.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from assay._json import dumps
from benchmarks.quality.leaderboard.forks import Done

Rows = tuple[int, ...]
"""Rows dropped, ascending."""
LOOP = 1  # the number of the truth's training loop: another one's retrainings are not these
SAME = 1e-3  # in a loss: what one training may differ from itself by, run among others


class Bank:
    """What one board's trainings gave.

    Args:
        root: the folder that holds all boards' banks.
        facts: what they depend on, in words or hashes; ``board`` names the folder.
    """

    def __init__(self, root: Path, facts: Mapping[str, str]) -> None:
        self.facts = {**facts, "loop": str(LOOP)}
        self.key = hashlib.sha256(dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self.folder = root / f"{facts['board']}-{self.key[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._losses: dict[Rows, NDArray[np.float64]] | None = None

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Those kept under a name, or made now and kept.

        Raises:
            ValueError: the file is no such file, or another bank's.
        """
        if (found := self.get(name)) is None:
            self.put(name, make())
            found = self.get(name)
            assert found is not None
        return found

    def get(self, name: str) -> dict[str, Tensor] | None:
        """Those kept under a name, if there are some.

        Raises:
            ValueError: the file is no such file, or another bank's.
        """
        path = self._path(name)
        return self._load(path) if path.exists() else None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep these under a name, in the place of what was there."""
        self._save(self._path(name), tensors)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '_')}.safetensors"

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({n: t.contiguous() for n, t in tensors.items()}, part, {"key": self.key, **self.facts})
        part.replace(path)

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                if said.get("key") != self.key:
                    differs = [name for name, fact in self.facts.items() if said.get(name) != fact] or ["the key"]
                    raise ValueError(
                        f"{path}: holds what another board's trainings gave: {', '.join(differs)} found "
                        f"{said.get(differs[0])!r}, expected {self.facts.get(differs[0], self.key)!r}; delete the file"
                    )
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete the file") from error

    # ---- Scores

    def scores(self, label: str) -> Done | None:
        """What a method gave when it was measured last, (N, Q), and what it took; None: it never was."""
        if (found := self.get(f"scores of {label}")) is None:
            return None
        seconds, megabytes = found["took"].tolist()
        return Done(found["scores"].numpy(), None, seconds, None if math.isnan(megabytes) else megabytes)

    def keep_scores(self, label: str, done: Done) -> None:
        took = torch.tensor([done.seconds, math.nan if done.megabytes is None else done.megabytes]).double()
        self.put(f"scores of {label}", {"scores": torch.from_numpy(done.value), "took": took})

    # ---- Retrainings

    @property
    def known(self) -> dict[Rows, NDArray[np.float64]]:
        """The queries' losses by the rows dropped."""
        if self._losses is None:
            path, self._losses = self.folder / "retrainings.safetensors", {}
            if path.exists():
                kept = self._load(path)
                for rows, losses in zip(kept["rows"].tolist(), kept["losses"].numpy(), strict=True):
                    self._losses[tuple(r for r in rows if r >= 0)] = losses
        return self._losses

    def missing(self, wanted: Iterable[Rows]) -> list[Rows]:
        """Those not kept, each once."""
        return [rows for rows in dict.fromkeys(wanted) if rows not in self.known]

    def sample(self) -> Rows | None:
        """One of the retrainings kept, another with every size of the bank."""
        kept = sorted(self.known)
        return kept[(7919 * len(kept)) % len(kept)] if kept else None

    def check(self, rows: Rows, losses: NDArray[np.float64]) -> None:
        """That a retraining made again gives what was kept.

        Raises:
            ValueError: it does not: the bank is another training loop's, or was altered.
        """
        if not (off := float(np.abs(self.known[rows] - losses).max())) < SAME:
            raise ValueError(
                f"{self.folder}: the retraining without rows {list(rows)[:5]} kept there differs by {off:.3g} from the "
                "same made now: the bank is stale; delete the folder"
            )

    def keep(self, found: Mapping[Rows, NDArray[np.float64]]) -> None:
        """Add retrainings, and write all."""
        if not found:
            return
        known = self.known
        known.update(found)
        most = max(map(len, known))
        rows = torch.tensor([(*r, *[-1] * (most - len(r))) for r in known], dtype=torch.int32).reshape(len(known), most)
        losses = torch.from_numpy(np.stack(list(known.values())))
        self._save(self.folder / "retrainings.safetensors", {"rows": rows, "losses": losses})
