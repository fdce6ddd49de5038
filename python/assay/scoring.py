"""``assay.score``: batches and methods in, a score table out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from assay.corpus.tables import make_table
from assay.methods import Column, Method, Scorer


def score(
    batches: Iterable[Any],
    methods: Sequence[Method],
    *,
    ids: Iterable[Any] | None = None,
    verify: bool = True,
) -> pa.Table:
    """Score every sample of some batches with several methods in one pass.

    Args:
        batches: what the methods' task takes: (x, y) for Classification and Regression, a dict of input_ids,
            attention_mask and optionally labels for CausalLM, (images, texts) for Contrastive; or a ``methods.Views``
            of it, where a method wants raw columns or another view of the samples.
        methods: ``assay.methods.Ensemble(...)``, ``assay.methods.GradMimic(...)``, ...
        ids: one per sample, in the order of the batches, as texts or numbers; None: row numbers.
        verify: let the probes check themselves against autograd on the first batch.

    Returns:
        Table with ``row`` (int64), ``id`` (string) and one float32 column per score (of lists where the method gives
        several numbers per sample, or one per token); each score's field metadata says which end to keep.

    Raises:
        ValueError: ids and samples differ in number, or two methods give a column of the same name.
    """
    scorer = Scorer(methods, verify=verify)
    parts = [scorer(batch) for batch in batches]
    scores = {c.name: _concatenate([part[c.name] for part in parts], c) for c in scorer.columns}
    count = len(next(iter(scores.values()))) if scores else 0
    # Of a tensor its number: str would make "tensor(0)" of it.
    names = [str(i.item() if isinstance(i, Tensor) else i) for i in (ids if ids is not None else range(count))]
    if len(names) != count:
        raise ValueError(f"ids: expected one per sample, {count}, got {len(names)}")
    return make_table(np.arange(count), names, scores, scorer.columns, {"methods": scorer.metadata()})


def _concatenate(parts: list[Tensor], column: Column) -> np.ndarray[Any, Any]:
    if not parts:
        return np.empty((0,) if column.width == 1 else (0, column.width or 0), dtype=np.float32)
    if column.width is None:  # batches differ in their number of tokens
        longest = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=torch.nan) for part in parts]
    return torch.cat(parts).numpy()
