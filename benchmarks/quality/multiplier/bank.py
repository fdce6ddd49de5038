"""What was measured of one experiment's pools, a file for each seed and selection, so that it can be run in pieces."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assay._json import dumps
from benchmarks.quality.multiplier.experiment import Sizes


@dataclass(frozen=True)
class Bank:
    """Files in a folder that is named by all that a training depends on but its code: sizes, and the seeds' text.

    Attributes:
        root: the folder of all experiments' banks.
        sizes: the experiment's.
        pools: each seed's ``Corpus.digest``.
    """

    root: Path
    sizes: Sizes
    pools: Sequence[str]

    @property
    def folder(self) -> Path:
        key = hashlib.sha256(dumps([asdict(self.sizes), *self.pools]).encode()).hexdigest()
        return self.root / f"{self.sizes.mixture}-{key[:12]}"

    def get(self, seed: int, selection: str) -> dict[str, Any] | None:
        path = self._path(seed, selection)
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def put(self, seed: int, selection: str, run: dict[str, Any]) -> None:
        path = self._path(seed, selection)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(dumps(run))
        part.replace(path)

    def whole(self, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """By selection its runs, of those of which every seed is there."""
        found = {name: [self.get(seed, name) for seed in range(len(self.pools))] for name in names}
        return {name: [run for run in runs if run] for name, runs in found.items() if all(runs)}

    def _path(self, seed: int, selection: str) -> Path:
        return self.folder / f"{selection}-{seed}.json"
