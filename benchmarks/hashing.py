"""How fast one core hashes texts and counts what is in them: ``python -m benchmarks.hashing [--quick]``.

One thread and every second ``.py``, ``.rst`` and ``.txt`` of the installation's standard library: whole files, in parts
of a MiB of Arrow; files up to 16 KB as Python's strings, 256 to a batch; and pieces of 128 bytes, likewise. The
contract: at least 200 MB of text are hashed each second. Instruction sets in turn, and the processor's time, for others
may be there.
"""

from __future__ import annotations

import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from assay import _native
from assay.methods import BM25, DSIR, NGramClassifier, Views
from assay.ops import Terms, least_hashes, ngram_counts, ngram_hashes
from benchmarks import options
from benchmarks.timing import write

CONTRACT = 200  # MB/s
PART = 1 << 20  # bytes of Arrow that are hashed at a time
LONGEST, SHORTEST, BATCH = 16_384, 128, 256


@dataclass(frozen=True)
class Row:
    """``run`` goes through texts of so many bytes."""

    name: str
    size: int
    run: Callable[[], object]
    contract: int | None = None


def library() -> list[bytes]:
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".rst", ".txt")]
    return [path.read_bytes() for path in paths if path.is_file() and "site-packages" not in path.parts]


def parts_of(texts: Sequence[bytes]) -> list[pa.Array]:
    whole = pa.array(texts, pa.large_binary())
    sizes = [len(text) for text in texts]
    ends = [*np.searchsorted(np.cumsum(sizes), np.arange(PART, sum(sizes), PART)).tolist(), len(texts)]
    return [whole[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]


def batches_of(texts: Iterable[bytes]) -> list[list[str]]:
    strings = [text.decode(errors="replace") for text in texts]
    return [strings[i : i + BATCH] for i in range(0, len(strings), BATCH)]


def rows(texts: Sequence[bytes]) -> list[Row]:
    documents = batches_of(text[:LONGEST] for text in texts)
    whole = b"\n".join(texts)[: 1 << 22]
    pieces = batches_of(whole[i : i + SHORTEST] for i in range(0, len(whole), SHORTEST))
    found = [*_hashes(parts_of(texts)), *_counts(parts_of(texts))]
    found += _scores("files", documents, documents) + _scores("pieces", pieces, documents)
    return found


def _hashes(parts: list[pa.Array]) -> list[Row]:
    size = _bytes(parts)
    signed = partial(ngram_hashes, order=5, least=5, punctuation=True)
    runs: dict[str, Callable[[Any], object]] = {
        "hashes of words": ngram_hashes,
        "hashes of 1-2-grams": partial(ngram_hashes, order=2),
        "hashes of 1-2-grams, punctuation": partial(ngram_hashes, order=2, punctuation=True),
        "hashes of 5-grams, punctuation": signed,
        "112 least hashes of these": lambda part: least_hashes(signed(part), 112),
    }
    return [Row(name, size, partial(_each, run, parts), CONTRACT) for name, run in runs.items()]


def _counts(parts: list[pa.Array]) -> list[Row]:
    terms = Terms(ngram_hashes(parts[0]).hashes)
    features: dict[str, tuple[int | Terms, int]] = {
        f"counts of {len(terms)} terms": (terms, 1),
        "counts in 10,000 buckets": (10_000, 2),
        "counts in 2^18 buckets": (1 << 18, 2),
        "counts in 2^24 buckets": (1 << 24, 2),
    }
    return [
        Row(name, _bytes(parts), partial(_each, partial(ngram_counts, features=own, order=n, punctuation=n > 1), parts))
        for name, (own, n) in features.items()
    ]


def _scores(what: str, batches: list[list[str]], documents: list[list[str]]) -> list[Row]:
    """Methods' scores of lists of strings, without what ``assay.score`` does around them."""
    size = sum(len(text.encode()) for batch in batches for text in batch)
    target, pool = ([Views(None, raw={"text": documents[0][a:b]})] for a, b in ((0, 20), (20, 120)))
    runs: dict[str, Callable[[Any], object]] = {f"hashes of 1-2-grams, {what}": partial(ngram_hashes, order=2)}
    for kind in (BM25, DSIR, NGramClassifier):
        method = kind({"t": target}).fit(pool)
        runs[f"{method.name}, {what}"] = partial(method._values, fitted=method._fitted)
    return [Row(name, size, partial(_each, run, batches)) for name, run in runs.items()]


def _bytes(parts: Sequence[pa.Array]) -> int:
    return sum(len(text) for part in parts for text in part.to_pylist())


def _each(run: Callable[[Any], object], parts: Sequence[Any]) -> None:
    for part in parts:
        run(part)


def measure(found: Sequence[Row], isas: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """MB/s of a core by row and instruction set, every row once a round, after one that is not counted."""
    seconds: dict[tuple[str, str], list[float]] = {(row.name, isa): [] for row in found for isa in isas}
    for _ in range(rounds + 1):
        for row in found:
            for isa in isas:
                with patch.dict(os.environ, ASSAY_ISA=isa):
                    began = time.process_time()
                    row.run()
                    seconds[row.name, isa].append(time.process_time() - began)
    return [_rates(row, {isa: seconds[row.name, isa][1:] for isa in isas}) for row in found]


def _rates(row: Row, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    def rates(own: Sequence[float]) -> dict[str, float]:
        return {"median": row.size / 1e6 / statistics.median(own), "best": row.size / 1e6 / min(own)}

    return {"row": row.name, "MB": row.size / 1e6, "contract": row.contract} | {
        isa: rates(own) for isa, own in seconds.items()
    }


def show(console: Console, measured: Sequence[Mapping[str, Any]], isas: Sequence[str]) -> None:
    table = Table("MB/s of one core", *isas, "contract")
    for row in measured:
        cells = [f"{row[isa]['median']:.0f} (best {row[isa]['best']:.0f})" for isa in isas]
        table.add_row(row["row"], *cells, f"≥ {row['contract']}" if row["contract"] else "")
    console.print(table)


def main() -> None:
    quick = options.quick(__doc__)
    torch.set_num_threads(1)
    isas = [name for name, runs in _native.instruction_sets() if runs and name in ("avx2", "avx512")] or ["scalar"]
    texts = library()
    measured = measure(rows(texts[:: 16 if quick else 2]), isas, 3 if quick else 9)
    show(Console(width=120), measured, isas)
    if not quick:
        print("written to", write("hashing", measured).name)


if __name__ == "__main__":
    main()
