"""Features that methods keep: written beside the score tables, and enough to score a shard for new targets."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields
from typing import IO, Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay._version import __version__
from assay.corpus.features import FeatureBatch, FeatureFile, FeatureSpec, FeatureWriter, open_features
from assay.corpus.footer import Identity, InputFacts, RowCounts, canonical_hash
from assay.corpus.layout import features_path
from assay.corpus.named_files import changed_file
from assay.corpus.quarantine import list_digest
from assay.corpus.shards import Shard
from assay.corpus.storage import Fingerprint, Store
from assay.methods import Column, Method
from assay.methods.base import Keeper, Kept, Need, in_table
from assay.ops import Sketch
from assay.probe import Signals
from assay.recipe.errors import EngineError
from assay.recipe.methods import MethodSpec
from assay.recipe.recipe import Recipe

log = logging.getLogger("assay")

# Stored features are widened to float32 for this many rows at a time.
ROWS = 4096
# Parameters that make scores of features, which do not depend on them.
_LATER = ("models", "model", "damping", "target_share", "weights", "within", "across", "name", "keep_features")

Scores = dict[str, npt.NDArray[Any]]
"""float32, a row per sample; of a number per token, objects: an array for each."""


class FeatureMethod(Method):
    """A method whose features are kept, as a `Method` that gives the features themselves; ``scores`` makes the rest.

    Args:
        method: the method, a ``Keeper``; only ``scores`` needs it fitted.
        spec: its part of the recipe, with ``keep_features``.
        rows: what decides which rows are samples, and what becomes of them: ``Encoder.identity``.

    Raises:
        ValueError: its name is no name of a folder.
    """

    def __init__(
        self, method: Keeper, spec: MethodSpec, recipe: Recipe, identity: Identity, rows: Mapping[str, Any]
    ) -> None:
        if not re.fullmatch(r"\w[\w.-]*", method.name):
            raise ValueError(
                f"keep_features: the name {method.name!r} cannot name a folder; use letters, digits, '_', '-' and '.'"
            )
        self.name, self.method = method.name, method
        assert spec.stored_as is not None
        kept: Sequence[Kept] = method.kept
        self.specs = [
            FeatureSpec(
                spec.method, each.size, spec.stored_as, _described(each.sketch) if each.sketch else {}, each.extra
            )
            for each in kept
        ]
        self._facts = [_facts(k, spec, recipe, identity, rows) for k in range(len(kept))]

    @property
    def columns(self) -> Sequence[Column]:
        features, extras = self._names()
        named = zip(features, self.specs, strict=True)
        return [
            *(Column(name, "none", "raw features", spec.dim) for name, spec in named),
            *(Column(name, "none", "what is kept beside the features") for name in extras),
        ]

    def needs(self) -> Mapping[str, Need]:
        return self.method.needs()

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        features, extras = self.method.raw_features(signals)
        return dict(zip([name for names in self._names() for name in names], [*features, *(extras or ())], strict=True))

    def metadata(self) -> dict[str, str]:
        return self.method.metadata()

    @property
    def left_out(self) -> Mapping[str, str]:
        """What the method could not tap while it was fitted."""
        return self.method.left_out

    def _names(self) -> tuple[list[str], list[str]]:
        """The columns of the checkpoints' features, and of what is kept beside them."""
        extras = [f"{self.name}.{spec.extra}{k}" for k, spec in enumerate(self.specs) if spec.extra]
        return [f"{self.name}.feature{k}" for k in range(len(self.specs))], extras

    def take(self, values: Scores) -> list[tuple[Tensor, Tensor | None]]:
        """Remove this method's columns from ``values`` -> each checkpoint's features and what is kept beside them."""
        features, extras = ([torch.from_numpy(values.pop(name)) for name in names] for names in self._names())
        return list(itertools.zip_longest(features, extras))

    def scores(self, batches: Sequence[FeatureBatch]) -> Scores:
        """The method's columns, from the same rows of each checkpoint's features."""
        extras = [batch.extra for batch in batches if batch.extra is not None]
        with torch.no_grad():
            scores = self.method.score_features([batch.values() for batch in batches], extras or None)
        return {name: in_table(values).numpy() for name, values in scores.items()}

    def stored_scores(self, files: Sequence[FeatureFile]) -> Scores:
        """The method's columns of a whole shard."""
        parts: list[Scores] = [{column.name: np.empty(0, np.float32) for column in self.method.columns}]
        for batches in zip(*(file.batches() for file in files), strict=True):
            starts = range(0, len(batches[0].rows), ROWS)
            parts += [self.scores([batch[start : start + ROWS] for batch in batches]) for start in starts]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def paths(self, shard: Shard) -> list[str]:
        """Where each checkpoint's features of a shard lie, relative to the scores' root."""
        return [features_path(self.name, k, shard) for k in range(len(self.specs))]

    def footer(self, k: int) -> dict[str, Any]:
        """What checkpoint k's features depend on, beside the shard."""
        return self._facts[k]


def _facts(k: int, spec: MethodSpec, recipe: Recipe, identity: Identity, rows: Mapping[str, Any]) -> dict[str, Any]:
    name = list(spec.models_used().values())[k]
    method = {key: value for key, value in spec.identity().items() if key not in _LATER}
    if method.get("optimizers"):
        method["optimizers"] = method["optimizers"][k]
    facts = {
        "task": recipe.task.model_dump(),
        "rows": rows,
        "id_column": recipe.corpus.id_column,
        "model": recipe.models[name].identity(),
        "method": method,
        "seed": recipe.seed,
    }
    return {
        "recipe": facts,
        "recipe_hash": canonical_hash(facts),
        "models": {name: identity.models[name]},
        "seed": recipe.seed,
    }


def _described(sketch: Sketch) -> dict[str, Any]:
    """A sketch as plain JSON."""
    values = {f.name: getattr(sketch, f.name) for f in fields(sketch)}
    kinds = get_args(Sketch)
    return {"kind": type(sketch).__name__} | {
        n: _described(v) if isinstance(v, kinds) else v for n, v in values.items()
    }


class FeatureWriters:
    """Writes one shard's features, of every method that keeps them; their scores are those of what is stored."""

    def __init__(
        self, feature_methods: Collection[FeatureMethod], shard: Shard, spool: Callable[[], IO[bytes]]
    ) -> None:
        self._feature_methods, self._shard = feature_methods, shard
        self._writers = {
            method.name: [FeatureWriter(spec, spool()) for spec in method.specs] for method in feature_methods
        }
        self.bytes_per_row = sum(4 * spec.dim for method in feature_methods for spec in method.specs)

    def add(self, rows: Sequence[int], ids: Sequence[str], values: Scores) -> Scores:
        """Store what of ``values`` are features -> scores in their place."""
        scores = dict(values)
        for method in self._feature_methods:
            writers = self._writers[method.name]
            try:
                pairs = zip(writers, method.take(scores), strict=True)
                batches = [writer.add(rows, ids, features, extra) for writer, (features, extra) in pairs]
            except ValueError as error:
                raise EngineError(f"{self._shard.path}: {method.name}: keep_features: {error}") from error
            scores |= method.scores(batches)
        return scores

    def save(self, output: Store, facts: InputFacts, counts: RowCounts) -> None:
        """Write the files; the shard's list of quarantined rows must have been written before."""
        shard = {
            "format": 1,
            "version": __version__,
            "input": facts.model_dump(exclude_none=True),
            "rows": counts.model_dump(),
            "quarantine": list_digest(output, self._shard),
        }
        for method in self._feature_methods:
            for k, (writer, path) in enumerate(zip(self._writers[method.name], method.paths(self._shard), strict=True)):
                writer.save(output, path, shard | method.footer(k))


def open_stored(
    feature_methods: Collection[FeatureMethod], shard: Shard, fingerprint: Fingerprint, output: Store
) -> dict[str, list[FeatureFile]] | None:
    """Each method's features of a shard, by checkpoint; None unless all are there and are what a run would store now.

    The list of quarantined rows must be the one that was written with them: it is what they do not hold.
    A CorpusError if a file is no feature file: storing features would destroy it.
    """
    known = {
        "input": {"path": shard.path, **fingerprint.to_json()},
        "quarantine": list_digest(output, shard),
    }
    found: dict[str, list[FeatureFile]] = {}
    usable = True
    for method in feature_methods:
        for k, (spec, path) in enumerate(zip(method.specs, method.paths(shard), strict=True)):
            file = open_features(output, path)
            if file is None:
                usable = False
            elif differences := file.differences(known | method.footer(k) | {"features": asdict(spec)}):
                log.info("%s: not used, but made again: %s", path, differences[0])
                usable = False
            elif changed := changed_file(output, shard, InputFacts(**file.metadata["input"]).files):
                log.info("%s: not used, but made again: %s", path, changed)
                usable = False
            else:
                found.setdefault(method.name, []).append(file)
    return found if usable else None
