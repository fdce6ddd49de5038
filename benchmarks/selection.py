"""Seconds and memory of `assay select` as tables grow: ``python -m benchmarks.selection [--rows 1000000 …]``.

Score tables of ten scores are written as a run would have, over a corpus that has nothing but ids and sources. Each
selection, and plain DuckDB on the same tables, is a process of its own, whose seconds (imports included) and peak
memory are the system's count. Scores are rounded to half precision: many rows tie, and ten of 10⁸ rows take 3 GB.
DuckDB sorts and writes rows; it checks no shard, gives no reasons, and keeps no order among equals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from assay._json import dumps
from assay.corpus.footer import Footer, Identity, InputFacts, RowCounts
from assay.corpus.score_files import ROW_GROUP_ROWS
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.corpus.tables import make_table
from assay.methods import Column
from benchmarks import timing

SHARD_ROWS, PART_ROWS, SCORES, SOURCES = 1_000_000, ROW_GROUP_ROWS, 10, 20
COLUMNS = [Column(f"s{i}", "high", "a number") for i in range(SCORES)]
WAYS = {
    "top half, indices": ["--by", "s0", "--top", "0.5", "--format", "indices"],
    "top half, shards": ["--by", "s0", "--top", "0.5"],
    "draw of a tenth, indices": ["--by", "s0", "--sample", "0.1", "--temperature", "1", "--format", "indices"],
    "where, then top half, indices": [
        *("--where", "s1 > 0 and s2 < quantile(s2, 0.9)", "--by", "s0", "--top", "0.5", "--format", "indices"),
    ],
}
DUCKDB = """
import duckdb, sys
folder, out, rows = sys.argv[1:]
own = duckdb.connect(config={"threads": 2, "memory_limit": "8GB", "temp_directory": out + ".spill"})
# A selection's reasons and the rows that it drops are not asked for.
own.execute(
    f"COPY (SELECT filename, row, id, s0 FROM read_parquet('{folder}/*.parquet', filename = true) "
    f"ORDER BY s0 DESC LIMIT {rows}) TO '{out}' (FORMAT parquet, COMPRESSION zstd)"
)
"""


# A process' peak is at least that of the one that started it, which must therefore be small.
STARTER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
said = process.stdout.read().splitlines()
_, status, used = os.wait4(process.pid, 0)
found = {"seconds": time.perf_counter() - began, "peak_mib": used.ru_maxrss / 1024}
code = os.waitstatus_to_exitcode(status)
print(json.dumps(found | ({"failed": f"exit status {code}: {' '.join(said[-1:])}"} if code else {})))
"""


def make(root: Path, rows: int) -> Path:
    """A corpus of so many rows, and the tables of its scores. Returns the scores folder."""
    rng, corpus, scores = np.random.default_rng(0), root / "corpus", root / "scores"
    corpus.mkdir(parents=True)
    for i, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        drawn = pa.array(rng.integers(0, SOURCES, count))
        source = pc.binary_join_element_wise("source", drawn.cast(pa.string()), "-")
        table = pa.table({"id": ids(i, np.arange(count)), "source": source})
        pq.write_table(table, corpus / f"{i:05}.parquet", compression="zstd", use_dictionary=["source"])
    identity, store = Identity(recipe={"seed": 0}, models={}), Store.at(str(scores))
    for i, shard in enumerate(find_shards(str(corpus)).shards):
        count, found = pq.read_metadata(corpus / shard.path).num_rows, shard.fingerprint()
        facts = InputFacts(path=shard.path, rows=count, size=found.size, mtime_ns=found.mtime_ns)
        footer = Footer.make(identity, facts, RowCounts(scored=count, quarantined=0), None, {}, {}).to_json()
        with store.write(shard.path) as file, contextlib.ExitStack() as stack:
            writer = None
            for start in range(0, count, PART_ROWS):
                places = np.arange(start, min(start + PART_ROWS, count))
                values = {column.name: numbers(rng, len(places)) for column in COLUMNS}
                part = make_table(places, ids(i, places), values, COLUMNS, footer)
                writer = writer or stack.enter_context(
                    pq.ParquetWriter(file, part.schema, compression="zstd", use_dictionary=False)
                )
                writer.write_table(part)
    columns = [{"name": column.name, "keep": "high"} for column in COLUMNS]
    store.write_text("manifest.json", dumps(identity.model_dump() | {"corpus": str(corpus), "columns": columns}))
    return scores


def ids(shard: int, places: npt.NDArray[np.int64]) -> pa.Array:
    return pc.binary_join_element_wise(f"doc-{shard}", pa.array(places).cast(pa.string()), "-")


def numbers(rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal(count, np.float32).astype(np.float16).astype(np.float32)


def run(command: list[str]) -> dict[str, Any]:
    """Seconds and the peak of the process' memory in MiB, or how it failed."""
    done = subprocess.run([sys.executable, "-c", STARTER, *command], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(root: Path, rows: int, only: list[str]) -> list[dict[str, Any]]:
    """Every way once at this size: what they write is large, and removed at once."""
    scores, out = make(root / str(rows), rows), root / "out"
    cases = []
    for way, options in WAYS.items():
        if only and way not in only:
            continue
        found = run([sys.executable, "-m", "assay", "select", str(scores), "--out", str(out), *options])
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        cases.append({"rows": rows, "way": way, **found, "written_mib": written / 2**20})
        shutil.rmtree(out, ignore_errors=True)
    found = run([sys.executable, "-c", DUCKDB, str(scores), str(out), str(rows // 2)])
    cases.append({"rows": rows, "way": "DuckDB, top half", **found, "written_mib": out.stat().st_size / 2**20})
    out.unlink()
    shutil.rmtree(root / str(rows))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--only", nargs="*", default=[], choices=[*WAYS], help="of assay's ways, these")
    parser.add_argument("--folder", type=Path, help="where there is room: 10⁸ rows take some 6 GB")
    options = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for rows in options.rows:
            cases += measure(Path(folder), rows, options.only)
    table = Table("rows", "way", "seconds", "peak MiB", "written MiB")
    for case in cases:
        shown = case.get("failed") or f"{case['seconds']:.1f}"
        table.add_row(
            *(f"{case['rows']:,}", case["way"], shown, f"{case['peak_mib']:,.0f}", f"{case['written_mib']:,.0f}")
        )
    Console().print(table)
    print("written to", timing.write("selection", cases).relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
