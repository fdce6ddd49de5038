"""``ops.project`` (bound by reading the vectors) and ``ops.grad_sketch`` (by reading the two factors)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import assay
from assay.ops import grad_sketch, project
from benchmarks.gpu.case import DEVICE, Case, here
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


# ---- on a GPU -------------------------------------------------------------------------------------------------------

# GPT-2's MLP, up; an 8B Llama's; a convolution's patches; a classifier's layer.
GPU_LAYERS = here(
    [(8, 1024, 768, 3072), (8, 1024, 4096, 14_336), (512, 196, 27, 64), (4096, 1, 512, 512)], [(2, 16, 24, 32)]
)
GPU_VECTORS = here([(16, 1 << 24, 512), (16, 1 << 24, 4096), (1, 1 << 26, 512)], [(3, 1000, 64)])  # (B, D, dim)


def gpu_cases() -> list[Case]:
    """The contract sets no target: the ceiling is the read of the vectors, or of the factors."""
    half, full = torch.bfloat16, torch.float32
    return [
        *(_gpu_sparse(*vectors, half) for vectors in GPU_VECTORS),
        _gpu_sparse(*GPU_VECTORS[0], full),
        *(_gpu_dense(*GPU_VECTORS[0], dtype) for dtype in (full, half)),
        *(_gpu_layer(*layer, 16, half) for layer in GPU_LAYERS),
        *(_gpu_layer(*GPU_LAYERS[0], side, half) for side in (64, 128)),
        _gpu_layer(*GPU_LAYERS[0], 16, full),
    ]


def _gpu_sparse(b: int, d: int, dim: int, dtype: torch.dtype) -> Case:
    sketch = assay.Sparse(dim)

    def reference(x: Tensor) -> Tensor:
        with assay.backend("reference"):
            return project(x, sketch)

    return Case(
        op="project",
        shape=f"Sparse({dim}) B={b} D={d}",
        dtype=dtype,
        bytes=dtype.itemsize * b * d + 4 * b * dim,
        flops=b * d,
        bound="read",
        make=lambda: (torch.empty(b, d, device=DEVICE, dtype=dtype).normal_(),),
        run=lambda x: project(x, sketch),
        rivals={"sum": torch.sum, "eager": reference},
    )


def _gpu_dense(b: int, d: int, dim: int, dtype: torch.dtype) -> Case:
    """No rival holds the matrix: at this D it has 2³³ numbers."""
    sketch = assay.Rademacher(dim)
    return Case(
        op="project",
        shape=f"Rademacher({dim}) B={b} D={d}",
        dtype=dtype,
        bytes=dtype.itemsize * b * d + 4 * b * dim,
        flops=2 * b * d * dim,
        bound="read",
        make=lambda: (torch.empty(b, d, device=DEVICE, dtype=dtype).normal_(),),
        run=lambda x: project(x, sketch),
        rivals={"sum": torch.sum},
    )


def _gpu_layer(b: int, t: int, i: int, o: int, side: int, dtype: torch.dtype) -> Case:
    sketch = assay.Kronecker(side, side)
    p_in, p_out = (p.to(dtype).T for p in (sketch.input_side(i, DEVICE), sketch.output_side(o, DEVICE)))

    def eager(a: Tensor, g: Tensor) -> Tensor:
        return torch.bmm((g.float() @ p_out.float()).mT, a.float() @ p_in.float()).flatten(1)

    return Case(
        op="grad_sketch",
        shape=f"Kronecker({side}, {side}) B={b} T={t} {i}→{o}",
        dtype=dtype,
        bytes=dtype.itemsize * b * t * (i + o) + 4 * b * side * side,
        flops=2 * b * t * side * (i + o + side),
        bound="read",
        make=lambda: tuple(torch.randn(b, t, n, device=DEVICE).to(dtype) for n in (i, o)),
        run=lambda a, g: grad_sketch(a, g, sketch),
        rivals={"gemm": lambda a, g: (a @ p_in, g @ p_out), "eager": eager},
    )
