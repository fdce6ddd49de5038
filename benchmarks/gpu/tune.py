"""Which constants of the kernels are fastest on this card: variants of a case in the same rounds.

    python -m benchmarks.gpu.tune warm I N      compiles every N-th variant from the I-th on, into Triton's cache
    python -m benchmarks.gpu.tune FILE [PART]   measures those whose names have PART; JSON lines into FILE

A variant is constants of the kernels with other values. What is fastest, and by how much, is printed and kept.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from assay._json import dumps
from assay.kernels import dot, head_launch, head_tiles, rademacher, scan, sketch, sketch_fused, sqnorm
from assay.kernels._common import Tile
from assay.ops import _sparse
from benchmarks import options
from benchmarks.case import Case
from benchmarks.gpu import measure
from benchmarks.gpu.compiling import compile_only
from benchmarks.gpu.stopwatch import Replay, buffers, interleave

SECONDS = 0.25
Values = Mapping[tuple[Any, str], Any]  # (module, constant) -> value


@dataclass(frozen=True)
class Variants:
    """Cases by a part of their names, and what is tried on each."""

    case: str
    values: Mapping[str, Values]


def hopper(module: Any, **changed: Any) -> Values:
    """Tiles of a table by generation, Hopper's with some of them changed."""
    table = module.HALF_TILES
    return {(module, "HALF_TILES"): {**table, 9: dataclasses.replace(table[9], **changed)}}


def described(**changed: Tile) -> Values:
    table = head_tiles.DESCRIBED_TILES
    return {(head_tiles, "DESCRIBED_TILES"): {**table, 9: dataclasses.replace(table[9], **changed)}}


def gram(tile: sqnorm.Gram) -> Values:
    return {(sqnorm, "HALF_GRAMS"): {**sqnorm.HALF_GRAMS, 9: (*sqnorm.HALF_GRAMS[9][:-1], tile)}}


def products(tile: sqnorm.Product) -> Values:
    table = sqnorm.HALF_PRODUCTS
    return {(sqnorm, "HALF_PRODUCTS"): {**table, 9: dataclasses.replace(table[9], large=tile, long=tile)}}


def never(*_: Any) -> bool:
    return False


def variants() -> list[Variants]:
    shapes = [
        (128, 256, 8, 3),
        (128, 256, 8, 4),
        (256, 128, 8, 3),
        (128, 128, 4, 4),
        (128, 128, 8, 4),
        (128, 128, 4, 3),
    ]
    large = {f"{m}×{n} {w}w {s}s": Tile(m, n, 64, w, s) for m, n, w, s in shapes}
    groups = {f"group {g}": {(dot, "GROUP_M"): g} for g in (4, 16)}
    cuts = {f"slices of {n}": {(dot, "SLICE"): dict.fromkeys(dot.SLICE, n)} for n in (768, 1536, 2048, 1 << 20)}
    cuts["128×128 two blocks"] = hopper(dot, large=Tile(128, 128, 64, 8, 3, 128))
    whole = {n: hopper(dot, large=t) for n, t in large.items()}
    out = [Variants(f"grad_dot B=8 T=1024 {x} bf", whole | groups | cuts) for x in ("768→3072", "4096→14336")]
    folds = {f"fold {f}": {(sqnorm, "FOLDS"): dict.fromkeys(sqnorm.FOLDS, f)} for f in (128, 192, 512, 1 << 30)}
    grams = {f"gram {s}s": gram(sqnorm.Gram(128, 64, 8, s)) for s in (3, 2)}
    grams |= {f"128 from {n} programs": {(sqnorm, "LARGE_GRAMS"): n} for n in (512,)}
    grams |= {f"{n} programs look": {(sqnorm, "RECOMPUTING"): n} for n in (64, 512)}
    out += [Variants(f"grad_sqnorm B=8 T=1024 {layer} bf", folds | grams) for layer in ("768→3072", "4096→14336")]
    blocks = {
        f"product {m}×{n} k{t} {w}w {s}s": products(sqnorm.Product(m, n, t, w, s))
        for m, n, t, w, s in ((64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (128, 64, 64, 4, 3))
    }
    out += [
        Variants(f"grad_sqnorm B={shape} bf", folds | blocks) for shape in ("4 T=8192 768→768", "2 T=16384 768→3072")
    ]
    rows = {f"{g} row blocks": {(head_launch, "GROUP_M"): g} for g in (4, 16, 32)}
    narrow = {name: described(narrow=tile) for name, tile in large.items()}
    narrow["128×128 8w 4s 128r"] = described(narrow=Tile(128, 128, 64, 8, 4, registers=128))
    narrow["128×128 8w 2s 128r"] = described(narrow=Tile(128, 128, 64, 8, 2, registers=128))
    out.append(Variants("one sweep K=1 N=8192 D=576 C=49152", narrow | rows))
    broad = {name: described(broad=tile) for name, tile in large.items()}
    broad["128×128 8w 3s 128r"] = described(broad=Tile(128, 128, 64, 8, 3, registers=128))
    out.append(Variants("one sweep K=1 N=8192 D=2048 C=128256", broad | rows))
    shapes = [(128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4)]
    most = {f"{m}×{n} {w}w {s}s": described(most=Tile(m, n, k, w, s)) for m, n, k, w, s in shapes}
    out.append(Variants("head_scores, a direction and a sketch K=1 N=8192 D=576", most))
    pairs = {
        f"{t.m}×{t.n} k{t.k} {t.warps}w {t.stages}s {t.registers}r": described(pair=t)
        for t in (
            Tile(128, 128, 32, 8, 4),
            Tile(128, 128, 64, 8, 2),
            Tile(128, 64, 64, 4, 2),
            Tile(128, 64, 32, 4, 4),
            Tile(64, 128, 64, 4, 2),
            Tile(64, 64, 64, 4, 3, registers=128),
            Tile(128, 64, 64, 8, 2, registers=128),
        )
    }
    apart: dict[str, Values] = {"two loops": {(head_launch, "TOGETHER"): False}}
    out += [Variants(f"all fields K=2 N=8192 {layer}", pairs | apart) for layer in ("D=576 C=49152", "D=2048 C=128256")]
    gradient = {
        f"{m}×{n} {w}w {s}s": hopper(head_tiles, gradient=Tile(m, n, 64, w, s))
        for m, n, w, s in ((128, 128, 8, 4), (128, 256, 8, 3), (128, 128, 4, 4))
    }
    panels = {f"{n} panel blocks": {(head_launch, "PANEL_BLOCKS"): n} for n in (16, 32)}
    chunks = {f"chunks {n} %": {(head_launch, "CHUNK_PERCENT"): n} for n in (4, 16)}
    out.append(Variants("linear_cross_entropy, with its gradient N=8192 D=576", gradient | panels | chunks))
    one: dict[str, Values] = {
        f"d{d} {w}w {s}s": {
            (scan, "HALF_TILES"): (scan.Tile(1, d, w, s), *scan.HALF_TILES[1:]),
            (scan, "SHORT_ROW_TILE"): scan.Tile(1, d, w, s),
        }
        for d, w, s in ((64, 4, 3), (64, 4, 6), (32, 4, 6), (64, 4, 4), (128, 8, 3), (128, 4, 3), (128, 8, 4))
    }
    ranking: dict[str, Values] = {f"{n} programs": {(scan, "RANKING_PROGRAMS"): n} for n in (528, 1056, 2048)}
    out += [
        Variants(f"topk_scan N=4000000 d=512 M=64 mean k=100 {kind}", one | ranking) for kind in ("float16", "int8")
    ]
    out.append(Variants("topk_scan N=20000000", one | ranking))
    several: Values = {(sketch, "fuses"): never, (sketch, "SINGLE_NUMBERS"): 0}
    together: dict[str, Values] = {"several launches": several}
    together |= {f"{n} stages": {(sketch_fused, "FUSED_STAGES"): n} for n in (4, 6, 10)}
    together |= {
        "8 warps": {(sketch_fused, "FUSED_WARPS"): 8},
        "m32": {(m, "FUSED_M"): 32 for m in (sketch, sketch_fused)},
    }
    together["k128 5s"] = {
        (sketch, "HALF_TILES"): (sketch.Tile(64, 128, 32, 4, 4), *sketch.HALF_TILES[1:]),
        (sketch_fused, "FUSED_STAGES"): 5,
    }
    out += [
        Variants(f"grad_sketch Kronecker(16, 16) B={b}", together)
        for b in ("8 T=1024 768→3072 bf", "8 T=1024 4096→14336", "512 T=196")
    ]
    single: dict[str, Values] = {
        f"single m{m} {s}s": {(sketch_fused, "SINGLE_M"): m, (sketch_fused, "SINGLE_STAGES"): s}
        for m, s in ((16, 6), (16, 8), (32, 4))
    }
    out.append(Variants("grad_sketch Kronecker(16, 16) B=4096 T=1", {"several launches": several, **single}))
    cuts: dict[str, Values] = {"Triton": {(_sparse, "takes"): never}}
    cuts |= {f"{n} terms": {(_sparse, "MOST_TERMS"): n} for n in (32, 128)}
    cuts |= {f"{n} pieces": {(_sparse, "PIECES"): n} for n in (132, 264, 528)}
    out += [
        Variants(f"project Sparse({n}) {shape} bf", cuts)
        for n, shape in ((512, "B=16 D=16777216"), (4096, "B=16 D=16777216"), (512, "B=1 D=67108864"))
    ]
    dense: dict[str, Values] = {
        f"{w}w {s}s": {(rademacher, "WARPS"): w, (rademacher, "STAGES"): s} for w, s in ((4, 2), (4, 4))
    }
    dense |= {f"tile {t}": {(rademacher, "HALF_TILE"): t} for t in ((1, 256), (2, 128), (2, 64))}
    out.append(Variants("project Rademacher(512) B=16 D=16777216 bf", dense))
    return out


@contextmanager
def patched(values: Values) -> Iterator[None]:
    with ExitStack() as stack:
        for (module, name), value in values.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def chosen(part: str = "") -> Iterator[tuple[Case, Mapping[str, Values]]]:
    for v in variants():
        cases = [c for c in measure.cases() if v.case in c.name]
        if len(cases) != 1:
            raise LookupError(f"{v.case}: {len(cases)} cases have it in their names, expected one")
        if part in v.case:
            yield cases[0], {"as it is": {}, **v.values}


def time_variants(case: Case, values: Mapping[str, Values]) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    inputs, pool = buffers(case), torch.cuda.graph_pool_handle()
    replays: dict[str, Replay] = {}
    for name, value in values.items():
        with patched(value):
            try:
                replays[name] = Replay([lambda x=x: case.run(*x) for x in inputs], pool)
            except Exception as error:
                yield {"case": case.name, "variant": name, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    timings, _ = interleave(replays, SECONDS)
    own = timings["as it is"].median
    for name, timing in timings.items():
        yield {"case": case.name, "variant": name, "ms": timing.median, "share": timing.median / own}


def warm(first: int, step: int) -> None:
    every = [(case, value) for case, values in chosen() for value in values.values()]
    with compile_only():
        for case, value in every[first::step]:
            with patched(value):
                _attempt(lambda case=case: case.run(*case.make()))
            torch.cuda.empty_cache()


def _attempt(run: Callable[[], Any]) -> None:
    try:
        run()
    except Exception as error:  # a tile that does not compile, or numbers that are any
        print(type(error).__name__, str(error)[:200], file=sys.stderr)


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("words", nargs="+", metavar="warm I N | FILE [PART]")
    words = parser.parse_args().words
    measure.settle()
    if words[0] == "warm":
        warm(int(words[1]), int(words[2]))
        return
    with Path(words[0]).open("a") as file:
        for case, values in chosen(*words[1:]):
            results = sorted(time_variants(case, values), key=lambda r: r.get("ms", 1e9))
            for result in results:
                file.write(dumps(result, ensure_ascii=False) + "\n")
            file.flush()
            print(
                case.name,
                *(
                    f"  {r['variant']}: {r['share']:.3f}" if "ms" in r else f"  {r['variant']}: {r['error']}"
                    for r in results
                ),
                sep="\n",
                flush=True,
            )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
