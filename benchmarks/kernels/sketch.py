"""``ops.project`` (bound by reading the vectors) and ``ops.grad_sketch`` (by reading the two factors)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import assay
from assay.ops import grad_sketch, project
from benchmarks.timing import interleave

LAYERS = [  # (B, T, I, O)
    (8, 256, 768, 3072),  # GPT-2's MLP, up
    (8, 256, 3072, 768),  # and down
    (4, 512, 4096, 4096),
    (64, 196, 27, 64),  # a convolution's patches
    (512, 1, 512, 512),  # a classifier's layer
]
DTYPES = [torch.float32, torch.bfloat16]
ROWS = 16
# The peers hold a matrix of D × 100 numbers and draw it anew for every 100 numbers of the sketch.
PEER_D, PEER_DIM = 1 << 18, 512


def cases() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    out = [sparse(dim, dtype) for dtype in DTYPES for dim in (512, 4096)]
    out += [dense(), peers()]
    return out + [layer(shape, dtype) for shape in LAYERS for dtype in DTYPES]


def sparse(dim: int, dtype: torch.dtype, d: int = 1 << 24) -> dict[str, Any]:
    vectors = torch.empty(ROWS, d, dtype=dtype).normal_()
    sketch = assay.Sparse(dim)
    timings = interleave({"assay": lambda: project(vectors, sketch), "ceiling": vectors.sum}, rounds=9)
    return _case("project", f"Sparse({dim}) B={ROWS} D=2^24", dtype, "vectors.sum()", timings, vectors.nbytes)


def dense(dim: int = 512, d: int = 1 << 18) -> dict[str, Any]:
    """Bound by its products: the ceiling is the GEMM alone, with a matrix that is already there."""
    vectors, matrix = torch.randn(ROWS, d), torch.randn(dim, d)
    sketch = assay.Rademacher(dim)

    def eager() -> Tensor:
        return vectors @ (torch.randint(0, 2, (dim, d), dtype=torch.float32) * 2 - 1).T

    timings = interleave(
        {"assay": lambda: project(vectors, sketch), "ceiling": lambda: vectors @ matrix.T, "eager": eager}, rounds=9
    )
    case = _case("project", f"Rademacher({dim}) B={ROWS} D=2^18", torch.float32, "the GEMM", timings, vectors.nbytes)
    return {**case, "bound": "compute", "flops": 2 * ROWS * d * dim}


def peers() -> dict[str, Any]:
    vectors, sketch = torch.randn(ROWS, PEER_D), assay.Sparse(PEER_DIM)
    rademacher = assay.Rademacher(PEER_DIM)
    made = {name: _if_present(make, vectors) for name, make in PEERS.items()}
    runs = {name: run for name, run in made.items() if not isinstance(run, str)}
    absent = {name: reason for name, reason in made.items() if isinstance(reason, str)}
    timings = interleave(
        {
            "assay": lambda: project(vectors, sketch),
            "ceiling": vectors.sum,
            "assay, Rademacher": lambda: project(vectors, rademacher),
            **runs,
        },
        rounds=5,
        warmup=1,
    )
    shape = f"Sparse({PEER_DIM}) B={ROWS} D=2^18"
    return {**_case("project", shape, torch.float32, "vectors.sum()", timings, vectors.nbytes), "absent": absent}


def _traker(vectors: Tensor) -> Callable[[], Tensor]:
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(PEER_D, PEER_DIM, 0, ProjectionType.rademacher, torch.device("cpu"), model_id=0)
    return lambda: projector.project(vectors, model_id=0)


def _dattri(vectors: Tensor) -> Callable[[], Tensor]:
    from dattri.func.projection import BasicProjector, ProjectionType

    projector = BasicProjector(PEER_D, PEER_DIM, 0, ProjectionType.rademacher, torch.device("cpu"))
    return lambda: projector.project(vectors, ensemble_id=0)


def _bergson(vectors: Tensor) -> Callable[[], Tensor]:
    from bergson.collector.collector import project_global

    return lambda: project_global("layer", vectors, PEER_DIM, "rademacher")


PEERS = {"traker": _traker, "dattri": _dattri, "bergson": _bergson}


def _if_present(make: Callable[[Tensor], Callable[[], Tensor]], vectors: Tensor) -> Callable[[], Tensor] | str:
    try:
        return make(vectors)
    except ImportError as error:
        return f"absent: {error}"


def layer(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    b, t, i, o = shape
    a, g = torch.randn(b, t, i).to(dtype), torch.randn(b, t, o).to(dtype)
    sketch = assay.Kronecker(16, 16)
    p_in, p_out = sketch.input_side(i).to(dtype), sketch.output_side(o).to(dtype)

    def eager() -> Tensor:
        return torch.bmm((g.float() @ p_out.float().T).mT, a.float() @ p_in.float().T).flatten(1)

    timings = interleave(
        {
            "assay": lambda: grad_sketch(a, g, sketch),
            "ceiling": lambda: (a @ p_in.T, g @ p_out.T),  # in the factors' dtype, and rounded to it
            "eager": eager,
            "sums": lambda: (a.sum(), g.sum()),
        }
    )
    name = f"Kronecker(16, 16) B={b} T={t} {i}→{o}"
    return _case("grad_sketch", name, dtype, "A P_inᵀ, G P_outᵀ", timings, a.nbytes + g.nbytes)


def _case(
    op: str, shape: str, dtype: torch.dtype, ceiling: str, timings: dict[str, Any], nbytes: int
) -> dict[str, Any]:
    return {
        "op": op,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "bound": "memory",
        "ceiling": ceiling,
        "bytes": nbytes,
        "flops": 0,
        "timings": timings,
    }
