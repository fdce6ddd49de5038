"""Bytes that strangers control, mutated: ``python -m tests.fuzz [KIND …] --seconds 60``, with atheris installed.

Of whatever bytes, each reader gives rows or values, or raises the error that it documents, in bounded time and memory.
`tests/test_fuzz.py` tries a few mutations of each kind in CI; here libFuzzer looks for those that reach new code.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from assay.corpus.errors import BadRow, CorpusError, ShardError
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.recipe.errors import EngineError

ROWS = [{"id": str(i), "text": f"text {i} ü", "x": [i * 0.5, -1.0], "s": {"a": i}, "label": i % 3} for i in range(9)]


@dataclass(frozen=True)
class Kind:
    """What is read, from which valid contents mutations start, and what may be raised."""

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]
    may_raise: tuple[type[Exception], ...]


def _shard(name: str) -> Callable[[bytes, Path], object]:
    def rows(content: bytes, folder: Path) -> None:
        path = folder / name
        path.write_bytes(content)
        (shard,) = find_shards(str(path)).shards
        for column in list(columns_of(shard))[:8]:
            for chunk in read(shard, [column]):
                assert all(len(values) == chunk.length for values in chunk.columns.values())

    return rows


def _written(write: Callable[[pa.Table, io.BytesIO], object]) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        sink = io.BytesIO()
        write(pa.Table.from_pylist(ROWS), sink)
        return [sink.getvalue()]

    return seeds


def _arrow(table: pa.Table, sink: io.BytesIO, stream: bool = False) -> None:
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)


def _npy() -> list[bytes]:
    sink = io.BytesIO()
    np.save(sink, np.arange(12, dtype=np.float32).reshape(4, 3))
    return [sink.getvalue()]


def _csv() -> list[bytes]:
    return [b'id,text\n1,"a ""b"", c"\n2,\xc3\xbc\n3,\n', b"id\ttext\n1\ta\n"]


def _lines() -> list[bytes]:
    return ["".join(json.dumps(row) + "\n" for row in ROWS).encode()]


def _tar() -> list[bytes]:
    from tests.corpus.test_webdataset import archive, sample

    return [archive([member for i in range(2) for member in sample(i)])]


def _tensors() -> list[bytes]:
    return [save({"x": torch.arange(12.0).reshape(4, 3), "y": torch.tensor([1, 2, 0, 1])}, {"format": "pt"})]


def _gguf() -> list[bytes]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32("llama.block_count", 1)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_tensor("token_embd.weight", np.zeros((2, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [Path(path).read_bytes()]


def _read_gguf(content: bytes, folder: Path) -> None:
    from assay.recipe.gguf_header import read_gguf

    path = folder / "a.gguf"
    path.write_bytes(content)
    read_gguf(str(path))


def _images() -> list[bytes]:
    from PIL import Image

    picture, found = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), []
    for form in ("TIFF", "PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM"):
        sink = io.BytesIO()
        picture.save(sink, form)
        found.append(sink.getvalue())
    return found


def _read_image(content: bytes, folder: Path) -> None:
    from assay.corpus.images import ImageLimits, decode_image

    decode_image("image", content, ImageLimits(pixels=1 << 16))


def _scores() -> list[bytes]:
    from assay.corpus.tables import METADATA_KEY

    table = pa.table({"row": [0, 1], "id": ["a", "b"], "loss": pa.array([1.0, 2.0], pa.float32())})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: b'{"rows": {"scored": 2}}'}), sink)
    return [sink.getvalue()]


def _read_scores(content: bytes, folder: Path) -> None:
    from assay.corpus.score_files import open_score_file, table_schema

    (folder / "a.parquet").write_bytes(content)
    store = Store.at(str(folder))
    if open_score_file(store, "a.parquet"):
        table_schema(store, "a.parquet")


def _features() -> list[bytes]:
    from tests.corpus.test_features import write

    with tempfile.TemporaryDirectory() as folder:
        write(Store.at(folder), "a.arrow", torch.arange(12.0).reshape(4, 3))
        return [(Path(folder) / "a.arrow").read_bytes()]


def _read_features(content: bytes, folder: Path) -> None:
    from assay.corpus.features import open_features

    (folder / "a.arrow").write_bytes(content)
    for batch in open_features(Store.at(str(folder)), "a.arrow").batches():  # type: ignore[union-attr]
        assert batch.features.shape[0] == len(batch.rows) == len(batch.ids.to_pylist())


def _recipe() -> list[bytes]:
    from tests.small_project import make_project

    with tempfile.TemporaryDirectory() as folder:
        whole = make_project(Path(folder)).path.read_bytes()
    return [whole, whole.replace(b"samples: 16", b"samples: 2001-01-02"), whole.replace(b"id", b"[[[[[" * 9)]


def _read_recipe(content: bytes, folder: Path) -> None:
    from assay.recipe import load_recipe
    from tests.small_project import make_project

    if not (folder / "data").exists():
        make_project(folder)
    (folder / "recipe.yaml").write_bytes(content)
    load_recipe(folder / "recipe.yaml")


OF_SHARDS = (ShardError, CorpusError, BadRow)
KINDS: dict[str, Kind] = {
    "parquet": Kind(_written(lambda table, sink: pq.write_table(table, sink)), _shard("a.parquet"), OF_SHARDS),
    "arrow": Kind(_written(_arrow), _shard("a.arrow"), OF_SHARDS),
    "arrow-stream": Kind(_written(lambda table, sink: _arrow(table, sink, True)), _shard("a.arrow"), OF_SHARDS),
    "feather": Kind(_written(pyarrow.feather.write_feather), _shard("a.feather"), OF_SHARDS),
    "json-lines": Kind(_lines, _shard("a.jsonl"), OF_SHARDS),
    "csv": Kind(_csv, _shard("a.csv"), OF_SHARDS),
    "npy": Kind(_npy, _shard("a.npy"), OF_SHARDS),
    "tar": Kind(_tar, _shard("a.tar"), OF_SHARDS),
    "safetensors": Kind(_tensors, _shard("a.safetensors"), OF_SHARDS),
    "gguf": Kind(_gguf, _read_gguf, (EngineError,)),
    "image": Kind(_images, _read_image, (BadRow,)),
    "score-table": Kind(_scores, _read_scores, (CorpusError,)),
    "features": Kind(_features, _read_features, (CorpusError,)),
    "recipe": Kind(_recipe, _read_recipe, (EngineError,)),
}


def attempt(kind: Kind, content: bytes, folder: Path) -> bool:
    """Whether it could be read; an error that is not documented is raised."""
    try:
        kind.read(content, folder)
    except kind.may_raise:
        return False
    return True


def mutations(seeds: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Bytes flipped, cut, doubled, set to extremes, and exchanged between places."""
    rng = random.Random(seed)
    for _ in range(count):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.randrange(len(content) + 1)
            size = rng.choice((1, 1, 2, 4, 8, 64))
            new = rng.choice((rng.randbytes(size), b"\xff" * size, b"\0" * size, b"", bytes(content[:size]) * 2))
            content[place : place + (size if rng.random() < 0.8 else 0)] = new
        yield bytes(content)


def _explore(name: str, seconds: int, corpus: Path) -> None:
    """libFuzzer on one kind, until the time is over or something is found. It ends the process."""
    import atheris

    with atheris.instrument_imports(include=["assay.corpus", "assay.recipe"]):
        kind = KINDS[name]
        seeds = kind.seeds()
    for i, content in enumerate(seeds):
        (corpus / f"seed-{i}").write_bytes(content)
    folder = Path(tempfile.mkdtemp())
    options = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=3000",
        "-max_len=65536",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda content: attempt(kind, content, folder) and None)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all of them, if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="of each kind")
    parser.add_argument("--in-process", metavar="CORPUS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        _explore(options.kinds[0], options.seconds, Path(options.in_process))
    failed = []
    for name in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as corpus:
            command = [
                sys.executable,
                "-m",
                "tests.fuzz",
                name,
                f"--seconds={options.seconds}",
                f"--in-process={corpus}",
            ]
            ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        tried = [line for line in ran.stdout.splitlines() if "number_of_executed_units" in line]
        count = tried[0].split()[-1] if tried else "nobody knows how many"
        print(f"{name}: {count} tried, {'FAILED' if ran.returncode else 'none amiss'}", flush=True)
        if ran.returncode:
            failed.append(name)
            print(ran.stdout[-4000:])
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
