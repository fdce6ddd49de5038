"""Reads Arrow files with forged bytes, by the thousand: `python arrow_forgeries.py FIRST COUNT` ends with a line of
outcomes, unless one of them ends the process. (No test itself: `test_arrow_forgeries.py` runs it.)"""

from __future__ import annotations

import faulthandler
import io
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from assay.corpus.copying import copy_rows
from assay.corpus.errors import ShardError
from assay.corpus.readers import read
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store

ROWS = 60


def table() -> pa.Table:
    texts = [f"text {i} " * (i % 5) for i in range(ROWS)]
    numbers = pa.array(range(ROWS))
    halves = pa.array([i % 2 for i in range(ROWS)], pa.int8())
    columns = {
        "text": pa.array(texts),
        "large": pa.array(texts, pa.large_string()),
        "view": pa.array([3 * text for text in texts], pa.string_view()),
        "list": pa.array([[i] * (i % 4) for i in range(ROWS)], pa.list_(pa.float32())),
        "fixed": pa.array([[1.0, 2.0]] * ROWS, pa.list_(pa.float32(), 2)),
        "list_view": pa.array([[i] * (i % 4) for i in range(ROWS)], pa.list_view(pa.int32())),
        "dictionary": pa.array([texts[i % 7] for i in range(ROWS)]).dictionary_encode(),
        "struct": pa.array([{"a": text, "b": [text]} for text in texts]),
        "map": pa.array([[(text, 1)] for text in texts], pa.map_(pa.string(), pa.int32())),
        "union": pa.UnionArray.from_sparse(halves, [numbers, pa.array(texts)]),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([ROWS // 2, ROWS], pa.int32()), pa.array(["a", "b"])),
        "time": pa.array(list(range(ROWS)), pa.time32("s")),
    }
    return pa.table(columns)


def written(is_file: bool, codec: str | None) -> bytes:
    sink = io.BytesIO()
    create = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with create(sink, table().schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table(), max_chunksize=25)
    return sink.getvalue()


def forged(content: bytes, seed: int) -> bytes:
    """The file with one to four bytes, 32-bit or 64-bit numbers replaced."""
    rng = random.Random(seed)
    forged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        width = rng.choice([1, 4, 4, 8])
        place = rng.randrange(len(content) // width) * width
        limit = 1 << (8 * width - 1)
        near = int.from_bytes(content[place : place + width], "little", signed=True)
        number = rng.choice([-1, 0, limit - 1, -limit, near + 1, near - 1, -near, rng.randrange(limit)])
        forged[place : place + width] = (number % (2 * limit)).to_bytes(width, "little")
    return bytes(forged)


def outcome(shard, columns: list[str], target: Store) -> str:
    try:
        rows = sum(chunk.length for chunk in read(shard, columns))
        copy_rows(shard, np.arange(rows) % 2 == 0, target)
    except ShardError:
        return "unreadable"
    return "read"


def main(first: int, count: int) -> None:
    faulthandler.enable()
    originals = [written(is_file, codec) for is_file in (True, False) for codec in (None, "lz4")]
    columns = table().schema.names
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Store.at(f"{folder}/out")
        for seed in range(first, first + count):
            path = Path(folder, "a.arrow")
            path.write_bytes(forged(originals[seed % len(originals)], seed))
            (shard,) = find_shards(str(path)).shards
            outcomes[outcome(shard, columns, target)] += 1
    print(dict(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
