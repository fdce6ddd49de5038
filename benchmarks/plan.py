"""What a corpus that nobody scored here would take: ``python -m benchmarks.plan [--tokens 1e12] [--gpus 64]``.

Computed, not run. Measured are, in this run, the requests and bytes of a shard on an object store of S3's kind on
loopback (tests/object_store.py), and, in benchmarks/results, the rates of an H200: its GEMM in bfloat16 and the first
sweep over the output layer. Assumed are: what share of that GEMM a model's body reaches, that nothing else is slower,
and the shape of the corpus; the table names them all.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from rich.console import Console
from rich.table import Table
from tests.object_store import BUCKET, serve

from assay.engine import run
from assay.recipe import load_recipe
from benchmarks import scale, timing

GPU = timing.RESULTS / "nvidia-h200-kernels.json"
BYTES_PER_TOKEN, TOKENS_PER_ROW, SHARD_BYTES, GPUS_PER_NODE = 4.0, 1000, 512 << 20, 8


@dataclass(frozen=True)
class Model:
    """A dense language model's body and output layer, in parameters."""

    name: str
    body: float
    width: int
    vocabulary: int

    @property
    def head(self) -> float:
        return self.width * self.vocabulary


# Of their configs; a tied embedding is the output layer.
MODELS = (Model("135M", 106e6, 576, 49152), Model("1.7B", 1.6e9, 2048, 49152), Model("8B", 7e9, 4096, 128256))


@dataclass(frozen=True)
class Store:
    """A shard's requests of an object store, those of each MiB of it beside, and the bytes of a row's scores."""

    requests_per_shard: float
    requests_per_mib: float
    bytes_per_row: float


def measured_store(root: Path) -> Store:
    """Counted: the requests of a small and of a large shard, and the size of the large one's table."""
    with serve() as (server, options):
        fsspec.config.conf["s3"] = options
        fs = fsspec.filesystem("s3")

        def scored(name: str, rows: int, shards: int = 1) -> tuple[int, int, int]:
            folder = root / name
            folder.mkdir()
            recipe = scale.make(folder, rows)
            local = folder / f"corpus-{rows}/00000.parquet"
            for i in range(shards):
                fs.put(str(local), f"{BUCKET}/{name}/{i}.parquet")
            asked = server.requests
            places = [f"corpus.path=s3://{BUCKET}/{name}", f"output=s3://{BUCKET}/scores-{name}"]
            run(load_recipe(recipe, [*places, "run.devices=cpu"]))
            table = fs.size(f"{BUCKET}/scores-{name}/0.parquet")
            return server.requests - asked, local.stat().st_size, table

        one, small, _ = scored("one", 1000)
        three, _, _ = scored("three", 1000, 3)
        large, size, table = scored("large", scale.SHARD_ROWS)
    return Store((three - one) / 2, (large - one) / ((size - small) / 2**20), table / scale.SHARD_ROWS)


def measured_rates(model: Model) -> tuple[float, float]:
    """FLOP/s of an H200: of a GEMM, and of the sweep over the output layer of this width and vocabulary."""
    found = timing.read(GPU)
    shape = f"K=1 N=8192 D={model.width} C={model.vocabulary}"
    sweeps = [
        case["flops"] / case["median"] * 1e3
        for case in found["cases"]
        if case["op"] == "linear_ensemble_stats, one sweep" and case["shape"] == shape
    ]
    return found["ceilings"]["gemm"]["bfloat16"] * 1e12, max(sweeps)


def seconds_per_token(model: Model, method: str, share: float) -> float:
    """On one GPU: 2 FLOP a parameter forward, as many backward to the layers' outputs, as many for their products with
    the direction."""
    gemm, sweep = measured_rates(model)
    passes = {"loss": 1, "mimic, last layer": 1, "mimic, all layers": 3}[method]
    heads = {"loss": 1, "mimic, last layer": 2, "mimic, all layers": 3}[method]
    return passes * 2 * model.body / (share * gemm) + heads * 2 * model.head / sweep


def plan(tokens: float, gpus: int, share: float, store: Store) -> list[dict[str, Any]]:
    size = tokens * BYTES_PER_TOKEN
    shards = size / SHARD_BYTES
    rows = tokens / TOKENS_PER_ROW
    requests = shards * (store.requests_per_shard + store.requests_per_mib * SHARD_BYTES / 2**20)
    cases = []
    for model in MODELS:
        for method in ("loss", "mimic, last layer", "mimic, all layers"):
            each = seconds_per_token(model, method, share)
            seconds = tokens * each / gpus
            shard = SHARD_BYTES / BYTES_PER_TOKEN * each
            cases.append(
                {
                    "model": model.name,
                    "method": method,
                    "hours": seconds / 3600,
                    "shards": shards,
                    "seconds_per_shard": shard,
                    "requests": requests,
                    "requests_per_second": requests / seconds,
                    "terabytes_read": size / 1e12,
                    "gigabytes_per_second": size / 1e9 / seconds,
                    "terabytes_written": rows * store.bytes_per_row / 1e12,
                    # Each GPU's shard is half done when its node is lost.
                    "gpu_minutes_lost_with_a_node": GPUS_PER_NODE * shard / 2 / 60,
                }
            )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.4, help="of the measured GEMM that a model's body reaches")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = measured_store(Path(folder))
    cases = plan(options.tokens, options.gpus, options.share, store)
    title = f"{options.tokens:.0e} tokens on {options.gpus} H200, computed; bodies at {options.share} of the GEMM"
    columns = ("model", "method", "hours", "s / shard", "requests / s", "GB / s", "TB written", "GPU min / lost node")
    table = Table(*columns, title=title)
    for c in cases:
        numbers = (f"{c['seconds_per_shard']:,.0f}", f"{c['requests_per_second']:,.1f}")
        more = (f"{c['gigabytes_per_second']:.3f}", f"{c['terabytes_written']:.2f}")
        lost = f"{c['gpu_minutes_lost_with_a_node']:,.0f}"
        table.add_row(c["model"], c["method"], f"{c['hours']:,.1f}", *numbers, *more, lost)
    Console().print(table)
    assumed = {**vars(options), "bytes_per_token": BYTES_PER_TOKEN, "tokens_per_row": TOKENS_PER_ROW}
    assumed |= {"shard_bytes": SHARD_BYTES, "gpus_per_node": GPUS_PER_NODE}
    path = timing.write("plan", [{"assumed": assumed, "measured": asdict(store)}, *cases])
    print("written to", path.relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
