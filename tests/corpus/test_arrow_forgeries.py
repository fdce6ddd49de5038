"""Arrow files whose offsets, indices and lengths lie: an unreadable shard, never the end of the process."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from assay.corpus.errors import ShardError
from assay.corpus.readers import read
from assay.corpus.shards import find_shards


@pytest.mark.slow
def test_no_forged_byte_ends_the_process():
    program = Path(__file__).with_name("arrow_forgeries.py")
    run = subprocess.run([sys.executable, program, "0", "400"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    outcomes = ast.literal_eval(run.stdout)
    assert sum(outcomes.values()) == 400
    assert min(outcomes["unreadable"], outcomes["read"]) > 50  # the forgeries are neither all harmless nor all crude


TEXTS = pa.array(["abcd", "efg", "hijklm"])
LISTS = pa.array([[5], [6, 7], [8, 9, 5]], pa.list_(pa.int32()))
LIST_VIEWS = pa.array([[5], [6, 7], [8, 9, 5]], pa.list_view(pa.int32()))
LONG = pa.array(["a" * 40, "b" * 41], pa.string_view())
CODED = pa.DictionaryArray.from_arrays(pa.array([0, 2, 1], pa.int32()), TEXTS)
FORGERIES = {
    "offset out of range": (TEXTS, [0, 4, 7, 13], [0, 4, 7, 1 << 30]),
    "offset negative": (TEXTS, [0, 4, 7, 13], [0, -4, 7, 13]),
    "offsets descending": (TEXTS, [0, 4, 7, 13], [0, 7, 4, 13]),
    "list out of range": (LISTS, [0, 1, 3, 6], [0, 1, 3, 1 << 30]),
    "list descending": (LISTS, [0, 1, 3, 6], [0, 3, 1, 6]),
    "list view out of range": (LIST_VIEWS, [1, 2, 3], [1, 2, 1 << 30]),
    "view out of its buffer": (LONG, [41, 0x62626262, 0, 40], [41, 0x62626262, 0, 1 << 30]),
    "view of no buffer": (LONG, [41, 0x62626262, 0, 40], [41, 0x62626262, 7, 40]),
    "index out of range": (CODED, [0, 2, 1], [0, 7, 1]),
    "index negative": (CODED, [0, 2, 1], [0, -7, 1]),
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("create", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_lie_about_places_is_an_unreadable_shard(tmp_path, name, create):
    array, true, false = FORGERIES[name]
    sink = io.BytesIO()
    schema = pa.schema([("x", array.type)])
    with create(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([array], schema=schema))
    true, false = (np.array(numbers, np.int32).tobytes() for numbers in (true, false))
    assert true in sink.getvalue()
    for content in (sink.getvalue(), sink.getvalue().replace(true, false)):
        (tmp_path / "a.arrow").write_bytes(content)
        (shard,) = find_shards(str(tmp_path)).shards
        if true in content:
            assert sum(chunk.length for chunk in read(shard, ["x"])) == len(array)
        else:
            with pytest.raises(ShardError):
                list(read(shard, ["x"]))
