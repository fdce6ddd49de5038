"""Are copies and near copies found? ``python -m benchmarks.quality.duplicates [--quick]``.

Files of a Python installation (docstrings, sources, headers, read-mes …), each at most 16 KB, and after them edited
copies of some: blanks and case alone, or a share of the words replaced by words of other files. `assay score` makes the
signatures, ``curate.find_duplicates`` compares them. Of each kind of copy: how many are found (``copies`` above 0, or
``similarity`` of .8 and more), what share of 5-grams it really has in common with its original (Jaccard, of the sets,
counted out), and how far the estimate is off. The control is the files themselves, of which none is twice: of those
that are flagged, the real similarity to the most similar file before them, counted out.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from assay._json import dumps
from assay.curate import find_duplicates
from assay.engine import run
from assay.ops import ngram_hashes
from assay.recipe import load_recipe
from benchmarks import options
from benchmarks.quality.texts import documents
from benchmarks.timing import RESULTS, machine

SHARES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
NEAR = 0.8
SHORTEST = 60  # words


def edited(text: str, share: float, words: Sequence[str], rng: np.random.Generator) -> str:
    """Each word replaced with this probability, and other blanks between them."""
    own = text.upper().split() if share == 0 else text.split()
    for i in np.flatnonzero(rng.random(len(own)) < share):
        own[i] = words[rng.integers(len(words))]
    return "\n".join(own)


def grams(texts: Sequence[str]) -> list[set[int]]:
    found = ngram_hashes(texts, 5, least=5, punctuation=True)
    return [set(found.hashes[a:b].tolist()) for a, b in zip(found.offsets, found.offsets[1:], strict=False)]


def jaccard(a: set[int], b: set[int]) -> float:
    both = len(a & b)
    return both / max(1, len(a) + len(b) - both)


def scored(folder: Path, texts: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """By shard the rows of what is found, and the seconds that both steps took."""
    (folder / "data").mkdir()
    for name, own in texts.items():
        lines = [dumps({"text": text}) for text in own]
        (folder / f"data/{name}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {"version": 1, "corpus": {"path": "data"}, "task": {"kind": "text"}, "output": "scores"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"methods": [{"method": "minhash"}]}))
    began = time.perf_counter()
    run(load_recipe(str(folder / "recipe.yaml")))
    find_duplicates(str(folder / "scores"), str(folder / "found"))
    took = time.perf_counter() - began
    return {name: pq.read_table(folder / f"found/{name}.parquet").to_pylist() for name in texts}, took


def experiment(size: int, copies: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    files = [text for text in documents(seed, size)[0] if len(text.split()) >= SHORTEST]
    files = [files[i] for i in rng.permutation(len(files))]
    words = " ".join(files).split()
    chosen = rng.choice(len(files), copies, replace=False)
    shards = {f"b-{share}": [edited(files[i], share, words, rng) for i in chosen] for share in SHARES}
    with tempfile.TemporaryDirectory() as folder:
        found, took = scored(Path(folder), {"a": files, **shards})
    originals = grams(files)
    kinds = {}
    for share in SHARES:
        rows, own = found[f"b-{share}"], grams(shards[f"b-{share}"])
        real = [max(jaccard(mine, originals[i]), 0) for mine, i in zip(own, chosen, strict=True)]
        hit = [row["copies"] > 0 or row["similarity"] >= NEAR for row in rows]
        off = [abs(row["similarity"] - j) for row, j in zip(rows, real, strict=True) if row["similarity"] > 0]
        kinds[f"{share:.1%} of the words"] = {
            "real similarity": statistics.mean(real),
            "found": statistics.mean(hit),
            "copies": statistics.mean(row["copies"] > 0 for row in rows),
            "off": statistics.mean(off) if off else float("nan"),
        }
    flagged = [i for i, row in enumerate(found["a"]) if row["copies"] > 0 or row["similarity"] >= NEAR]
    nearest = [max((jaccard(originals[i], other) for other in originals[:i]), default=0.0) for i in flagged]
    control = {"files": len(files), "flagged": len(flagged), "real similarity of the flagged": sorted(nearest)}
    mb = sum(len(text.encode()) for own in ([files], shards.values()) for text in [t for ts in own for t in ts]) / 1e6
    return {"copies of each kind": copies, "kinds": kinds, "control": control, "MB": mb, "seconds": took}


def main() -> None:
    quick = options.quick(__doc__)
    result = experiment(*((600, 20) if quick else (6000, 200)))
    table = Table("replaced", "real similarity", "found", "copies", "estimate off by")
    for name, row in result["kinds"].items():
        table.add_row(name, *(f"{row[key]:.3f}" for key in ("real similarity", "found", "copies", "off")))
    console = Console()
    console.print(table)
    console.print({key: value for key, value in result.items() if key != "kinds"})
    if not quick:
        (RESULTS / "quality-duplicates.json").write_text(dumps(machine() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
