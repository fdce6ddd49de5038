"""Batches without padding: the samples that trainers lay end to end in one row, and whose ids they lose."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay._lazy import require
from assay.train.collation import one_id, without

SEQ_IDX = "assay_seq_idx"
"""In a batch: (R, T) int64, the sample of each position; −1 where a position is nobody's."""
_BY_TOKEN = ("input_ids", "labels", "completion_mask", "assistant_masks")  # of TRL's versions


def flattens(collator: Any) -> bool:
    """Whether a collator of transformers or TRL makes one row of all samples."""
    names = [kind.__name__ for kind in type(collator).__mro__]
    return bool(getattr(collator, "padding_free", False)) or any("WithFlattening" in name for name in names)


@dataclass(frozen=True)
class Flattened:
    """Collates into one row, and adds the samples' ids to the batch, and which sample each position belongs to.

    A feature is a sample, or several that were packed, whose lengths are its ``seq_lengths``; its ids are then one per
    token or one per sample.
    """

    collator: Any
    column: str | None

    def __call__(self, features: Sequence[Any]) -> Any:
        lengths = [_lengths(feature) for feature in features]
        ids = [] if self.column is None else [_ids(*of, self.column) for of in zip(features, lengths, strict=True)]
        batch = self.collator(features if self.column is None else without(features, self.column))
        if not isinstance(batch, MutableMapping):
            raise TypeError(f"the collator gives a {type(batch).__name__}; expected a mapping, to put the ids into")
        batch[SEQ_IDX] = _seq_idx([n for own in lengths for n in own], batch)
        if self.column is not None:
            batch[self.column] = [name for own in ids for name in own]
        return batch


def _lengths(feature: Any) -> list[int]:
    if not isinstance(feature, Mapping) or "input_ids" not in feature:
        raise ValueError("a training sample has no 'input_ids'; expected tokens, of which a row can be made")
    total, own = len(feature["input_ids"]), feature.get("seq_lengths")
    lengths = [total] if own is None else [int(n) for n in own]
    if sum(lengths) != total or min(lengths, default=0) < 1:
        raise ValueError(f"a packed row of {total} tokens has samples of {lengths}; expected lengths that add up to it")
    return lengths


def _seq_idx(lengths: Sequence[int], batch: Mapping[str, Any]) -> Tensor:
    """Of samples that lie end to end in one row, which padding may end."""
    shape, total = tuple(batch["input_ids"].shape), sum(lengths)
    if len(shape) != 2 or shape[0] != 1 or shape[1] < total:
        raise ValueError(f"the collator made {shape} of samples with {total} tokens; expected one row of all")
    if "position_ids" not in batch:
        raise ValueError(
            "the collator gives no 'position_ids', without which the samples of a row see each other; expected "
            "DataCollatorWithFlattening(return_position_ids=True)"
        )
    count = torch.tensor(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), count)
    within = torch.arange(total) - torch.repeat_interleave(count.cumsum(0) - count, count)
    found = batch["position_ids"][0, :total].cpu()
    if not torch.equal(found - found[0], within):
        raise ValueError(
            "the batch's position_ids do not start anew where its samples do, so that the collator has them in another "
            "order, or cut; expected all tokens of one sample after the other"
        )
    return torch.nn.functional.pad(owner, (0, shape[1] - total), value=-1)[None]


def _ids(feature: Mapping[str, Any], lengths: Sequence[int], column: str) -> list[str]:
    """One per sample of a feature."""
    values = feature.get(column)
    if not isinstance(values, list | torch.Tensor) or (isinstance(values, torch.Tensor) and values.ndim == 0):
        if len(lengths) == 1:
            return [one_id(feature, column)]
        raise ValueError(
            f"id_column: {column!r} of a packed row is {values!r:.80}; expected an id per token, or one for each of "
            f"its {len(lengths)} samples"
        )
    if len(values) == sum(lengths):
        starts = list(itertools.accumulate(lengths, initial=0))[:-1]
        for start, n in zip(starts, lengths, strict=True):
            own = values[start : start + n]
            if any(value != own[0] for value in own):
                raise ValueError(f"id_column: a packed sample of {n} tokens has ids of several; expected one each")
        values = [values[start] for start in starts]
    if len(values) != len(lengths):
        raise ValueError(
            f"id_column: a packed row of {len(lengths)} samples has {len(values)} ids; expected one per token or sample"
        )
    return [one_id({column: value}, column) for value in values]


def pack_with_ids(dataset: Any, column: str, args: Any) -> Any:
    """What TRL's packing makes of tokenized samples, with each token's id beside it.

    Args:
        dataset: with ``input_ids``, ``labels`` and the column.
        args: the trainer's, whose packing is by whole samples.
    """
    pack = require("trl", "train").pack_dataset
    names = dataset.column_names
    if names is None or not hasattr(dataset, "__len__"):
        raise ValueError(
            "ReweightMixin: packing loses the ids of an iterable data set; load it whole, pack it yourself with a "
            f"column {column!r} of an id per token, or pass id_column=None"
        )
    if args.max_length is None:
        raise ValueError("ReweightMixin: packing=True without max_length; expected the length of a row")
    kept = [name for name in _BY_TOKEN if name in names]
    numbered = dataset.map(_by_token, fn_kwargs={"column": column}, num_proc=args.dataset_num_proc)
    shuffles = getattr(args, "shuffle_dataset", False)
    packed = pack(numbered.select_columns([*kept, column]), args.max_length, args.packing_strategy)
    return packed.shuffle(seed=args.seed) if shuffles else packed


def _by_token(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {column: [row[column]] * len(row["input_ids"])}
