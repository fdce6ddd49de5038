"""What was scored in training: a row per sample and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from assay.methods import Column

# Ids wait as objects until they are so many; as an array they take a fifth of the memory.
WAITING = 1 << 16


class Journal:
    """Rows of id, step, scores and weight, in the order in which they came.

    Args:
        columns: the scores.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = {column.name: column for column in columns}
        self._ids: list[pa.Array] = []
        self._waiting: list[str | None] = []
        self._steps: list[npt.NDArray[Any]] = []
        self._values: dict[str, list[npt.NDArray[Any]]] = {}

    def add(self, ids: Sequence[str] | None, step: int, values: Mapping[str, Tensor]) -> None:
        """A batch's scores and weights, (B,) each; NaN where another batch has a score that this one has not."""
        size, before = len(next(iter(values.values()))), sum(map(len, self._steps))
        self._waiting += list(ids) if ids is not None else [None] * size
        if len(self._waiting) >= WAITING:
            self._ids, self._waiting = [*self._ids, pa.array(self._waiting, pa.string())], []
        self._steps.append(np.full(size, step, dtype=np.int64))
        for name in values:
            if name not in self._values:
                self._values[name] = [_unknown(before)]
        for name, parts in self._values.items():
            known = name in values
            # a copy, that keeps no tensor of the step's
            parts.append(values[name].detach().float().cpu().numpy().copy() if known else _unknown(size))

    @property
    def has_ids(self) -> bool | None:
        """Whether rows have ids; None: there are none yet."""
        last = self._waiting[-1:] or (self._ids[-1][-1:].to_pylist() if self._ids else [])
        return last[0] is not None if last else None

    def table(self) -> pa.Table:
        """``id`` (string), ``step`` (int64), a float32 column per score, ``weight`` (float32)."""
        fields = [pa.field("id", pa.string()), pa.field("step", pa.int64())]
        order = [*(name for name in self._columns if name in self._values)]
        order += [name for name in self._values if name not in self._columns]
        for name in order:
            column = self._columns.get(name)
            said = {} if column is None else {"keep": column.keep, "description": column.description}
            fields.append(pa.field(name, pa.float32(), metadata=said))
        ids = pa.chunked_array([*self._ids, pa.array(self._waiting, pa.string())])
        steps = np.concatenate(self._steps) if self._steps else np.empty(0, np.int64)
        values = [np.concatenate(self._values[name]) for name in order]
        return pa.Table.from_arrays([ids, pa.array(steps), *map(pa.array, values)], schema=pa.schema(fields))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and text: what ``torch.load(weights_only=True)`` takes."""
        sink = pa.BufferOutputStream()
        table = self.table()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return {"rows": torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        table = pa.ipc.open_stream(pa.py_buffer(state["rows"].numpy().tobytes())).read_all()
        self._ids, self._waiting = [chunk for chunk in table["id"].chunks if len(chunk)], []
        self._steps = [table["step"].to_numpy()]
        self._values = {name: [table[name].to_numpy()] for name in table.column_names[2:]}


def _unknown(size: int) -> npt.NDArray[Any]:
    return np.full(size, np.nan, dtype=np.float32)
