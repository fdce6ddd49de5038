"""The roofline table: each op's time beside the machine's own ceiling, torch eager and torch.compile."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import options, timing
from benchmarks.kernels import ensemble, gradients, head, scan, sketch

OPS = {
    "ensemble": ensemble.cases,
    "head": head.cases,
    "gradients": gradients.cases,
    "sketch": sketch.cases,
    "scan": scan.cases,
}

PEERS = ("traker", "dattri", "bergson")


def show(cases: list[dict[str, Any]]) -> None:
    table = Table(title="median ms of interleaved rounds; ratios are to the op itself")
    for heading in (
        "op",
        "shape",
        "dtype",
        "assay",
        "ceiling",
        "assay ÷ ceiling",
        "GB/s or GFLOP/s",
        "eager ÷ assay",
        "compile ÷ assay",
        "peers ÷ assay",
    ):
        table.add_column(heading, justify="left" if heading in ("op", "shape", "dtype") else "right")
    for case in cases:
        ms = {name: t.median for name, t in case["timings"].items()}

        def ratio(name: str, ms: dict[str, float] = ms) -> str:
            return f"{ms[name] / ms['assay']:.1f}×" if name in ms else "–"

        rate = case["bytes"] if case["bound"] == "memory" else case["flops"]
        table.add_row(
            case["op"],
            case["shape"],
            case["dtype"],
            f"{ms['assay']:.2f}",
            f"{ms['ceiling']:.2f} ({case['ceiling']})",
            f"{ms['assay'] / ms['ceiling']:.2f}",
            f"{rate / ms['assay'] / 1e6:.1f}",
            ratio("eager"),
            ratio("compile"),
            ", ".join(f"{name} {ratio(name)}" for name in PEERS if name in ms) or "–",
        )
        for name, reason in case.get("absent", {}).items():
            print(f"{name}: {reason}")
    Console(width=170).print(table)


def main() -> None:
    for name in options.some(__doc__, "OP", OPS):
        cases = [timing.measure(case) for case in OPS[name]()]
        show(cases)
        print("written to", timing.write(f"kernels-{name}", cases).relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
