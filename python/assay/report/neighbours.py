"""Rows that are nearly the same by the features that a run kept: the cosine of each of some rows with its nearest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from assay.corpus.errors import CorpusError
from assay.corpus.features import FeatureFile, open_features
from assay.corpus.layout import features_path
from assay.corpus.scores_folder import Scores, State
from assay.report.drawing import MOST_ROWS, Part, parts_to_read

QUERIES = 256
LEVELS = (0.99, 0.95, 0.9, 0.8)
CLOSEST = 24
_MOST_METHODS = 3
_ROWS = 4096


@dataclass(frozen=True)
class Neighbours:
    """How near rows are to others.

    Attributes:
        method: whose features they are.
        rows: that were compared with; ``all_rows`` says whether these are all that have scores.
        drawn: rows, drawn uniformly from these, whose nearest other row was looked for.
        near: by cosine, how many of the drawn ones have another row at least that near.
        closest: pairs of different rows, the nearest first: cosine and both places, counted over all scored rows.
    """

    method: str
    rows: int
    all_rows: bool
    drawn: int
    near: Mapping[float, int]
    closest: Sequence[tuple[float, int, int]]


def find_neighbours(scores: Scores, seed: int = 0) -> list[Neighbours]:
    """For the methods that keep features, those of their first checkpoint. Rows without features are left out."""
    folder = scores.store.full("features")
    if not scores.store.fs.isdir(folder):
        return []
    names = sorted(os.path.basename(path.rstrip("/")) for path in scores.store.fs.ls(folder, detail=False))
    found = (_neighbours(scores, name, seed) for name in names[:_MOST_METHODS])
    return [its for its in found if its is not None]


def _neighbours(scores: Scores, method: str, seed: int) -> Neighbours | None:
    parts = parts_to_read(scores, MOST_ROWS, seed)
    try:
        files = [(part, file) for part in parts if (file := _features_of(scores, method, part)) is not None]
        sizes = {file.spec.dim for _, file in files}
        if len(sizes) != 1:
            return None
        rows = sum(part.count for part, _ in files)
        drawn = np.sort(np.random.default_rng(seed).choice(rows, min(rows, QUERIES), replace=False))
        queries = torch.cat([its[_inside(drawn, start, len(its))] for start, _, its in _batches(files)])
        cosines, places, own = _nearest(files, queries, drawn)
    except CorpusError:  # not features of assay, or damaged: the scores do not depend on them any more
        return None
    total = sum(status.table.scored for status in scores.of(State.DONE) if status.table)
    near = {level: int((cosines >= level).sum()) for level in LEVELS}
    order = np.argsort(-cosines, kind="stable")
    pairs = {tuple(sorted((int(own[i]), int(places[i])))): float(cosines[i]) for i in order if cosines[i] >= LEVELS[-1]}
    closest = [(cosine, first, second) for (first, second), cosine in list(pairs.items())[:CLOSEST]]
    return Neighbours(method, rows, rows == total, len(drawn), near, closest)


def _features_of(scores: Scores, method: str, part: Part) -> FeatureFile | None:
    """None unless there are features of just the rows that have scores, and of the shard as it was scored."""
    file = open_features(scores.store, features_path(method, 0, part.shard))
    if file is None or file.rows != part.scored:
        return None
    its = file.metadata.get("input")
    found = part.shard.fingerprint()
    if not isinstance(its, Mapping) or its.get("size") != found.size:
        return None
    return file if all(its.get(key) in (None, value) for key, value in vars(found).items()) else None


def _batches(files: Sequence[tuple[Part, FeatureFile]]) -> Iterator[tuple[int, int, Tensor]]:
    """How many rows lie before these among those compared, and among all that have scores; and their directions."""
    start = 0
    for part, file in files:
        place, left = part.start, part.count
        for batch in file.batches():
            for first in range(0, min(len(batch.rows), left), _ROWS):
                values = batch[first : min(first + _ROWS, left)].values().float()
                yield start, place, torch.nn.functional.normalize(values, dim=1, eps=1e-30)
                start, place = start + len(values), place + len(values)
            left -= min(len(batch.rows), left)


def _inside(drawn: np.ndarray, start: int, count: int) -> Tensor:
    first, last = np.searchsorted(drawn, [start, start + count])
    return torch.from_numpy(drawn[first:last] - start)


def _nearest(
    files: Sequence[tuple[Part, FeatureFile]], queries: Tensor, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each drawn row the greatest cosine with another, that one's place, and its own. A row of zeros, or without
    numbers, is near to none."""
    best = torch.full((len(queries),), -1.0)
    places, own = torch.zeros(len(queries), dtype=torch.int64), torch.zeros(len(queries), dtype=torch.int64)
    for start, place, directions in _batches(files):
        cosines = torch.nan_to_num(queries @ directions.T, nan=-1.0)
        here = _inside(drawn, start, len(directions))
        mine = torch.arange(len(queries))[slice(*np.searchsorted(drawn, [start, start + len(directions)]))]
        cosines[mine, here] = -1.0
        own[mine] = here + place
        values, indices = cosines.max(dim=1)
        better = values > best
        best, places = torch.where(better, values, best), torch.where(better, indices + place, places)
    return best.clamp(max=1.0).numpy(), places.numpy(), own.numpy()
