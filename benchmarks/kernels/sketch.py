"""``ops.project`` (bound by reading the vectors) and ``ops.grad_sketch`` (by reading the two factors)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

import assay
from assay.ops import grad_sketch, project
from benchmarks.case import DEVICE, Case, Target, here

Run = Callable[[Tensor], Tensor]

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


def cases() -> list[Case]:
    out = [_sparse(dim, dtype) for dtype in DTYPES for dim in (512, 4096)]
    out += [_dense(), _beside_peers()]
    return out + [_layer(*shape, dtype) for shape in LAYERS for dtype in DTYPES]


def _vectors(d: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(ROWS, d, dtype=dtype).normal_()


def _sparse(dim: int, dtype: torch.dtype, d: int = 1 << 24) -> Case:
    sketch = assay.Sparse(dim)
    return Case(
        op="project",
        shape=f"Sparse({dim}) B={ROWS} D=2^{d.bit_length() - 1}",
        dtype=dtype,
        bytes=ROWS * d * dtype.itemsize,
        flops=0,
        bound="read",
        make=lambda: (_vectors(d, dtype),),
        run=lambda x: project(x, sketch),
        rivals={"ceiling": torch.sum},
        ceiling="vectors.sum()",
        rounds=9,
    )


def _dense(dim: int = 512, d: int = 1 << 18) -> Case:
    """Bound by its products: the ceiling is the GEMM alone, with a matrix that is already there."""
    sketch = assay.Rademacher(dim)

    def eager(x: Tensor, _: Tensor) -> Tensor:
        return x @ (torch.randint(0, 2, (dim, d), dtype=torch.float32) * 2 - 1).T

    return replace(
        _sparse(dim, torch.float32, d),
        shape=f"Rademacher({dim}) B={ROWS} D=2^{d.bit_length() - 1}",
        flops=2 * ROWS * d * dim,
        bound="gemm",
        make=lambda: (_vectors(d, torch.float32), torch.randn(dim, d)),
        run=lambda x, _: project(x, sketch),
        rivals={"ceiling": lambda x, matrix: x @ matrix.T, "eager": eager},
        ceiling="the GEMM",
    )


def _beside_peers() -> Case:
    rademacher = assay.Rademacher(PEER_DIM)
    made = {name: _if_present(make) for name, make in PEERS.items()}
    runs = {name: run for name, run in made.items() if not isinstance(run, str)}
    return replace(
        _sparse(PEER_DIM, torch.float32, PEER_D),
        rivals={"ceiling": torch.sum, "assay, Rademacher": lambda x: project(x, rademacher), **runs},
        rounds=5,
        warmup=1,
        absent={name: reason for name, reason in made.items() if isinstance(reason, str)},
    )


def _traker() -> Run:
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(PEER_D, PEER_DIM, 0, ProjectionType.rademacher, torch.device("cpu"), model_id=0)
    return lambda vectors: projector.project(vectors, model_id=0)


def _dattri() -> Run:
    from dattri.func.projection import BasicProjector, ProjectionType

    projector = BasicProjector(PEER_D, PEER_DIM, 0, ProjectionType.rademacher, torch.device("cpu"))
    return lambda vectors: projector.project(vectors, ensemble_id=0)


def _bergson() -> Run:
    from bergson.collector.collector import project_global

    return lambda vectors: project_global("layer", vectors, PEER_DIM, "rademacher")


PEERS = {"traker": _traker, "dattri": _dattri, "bergson": _bergson}


def _if_present(make: Callable[[], Run]) -> Run | str:
    try:
        return make()
    except ImportError as error:
        return f"absent: {error}"


def _layer(b: int, t: int, i: int, o: int, dtype: torch.dtype) -> Case:
    sketch = assay.Kronecker(16, 16)

    def make() -> tuple[Tensor, ...]:
        sides = sketch.input_side(i).to(dtype), sketch.output_side(o).to(dtype)
        return torch.randn(b, t, i).to(dtype), torch.randn(b, t, o).to(dtype), *sides

    def eager(a: Tensor, g: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
        return torch.bmm((g.float() @ p_out.float().T).mT, a.float() @ p_in.float().T).flatten(1)

    return Case(
        op="grad_sketch",
        shape=f"Kronecker(16, 16) B={b} T={t} {i}→{o}",
        dtype=dtype,
        bytes=b * t * (i + o) * dtype.itemsize,
        flops=0,
        bound="read",
        make=make,
        run=lambda a, g, p_in, p_out: grad_sketch(a, g, sketch),
        rivals={  # the GEMMs in the factors' dtype, and rounded to it
            "ceiling": lambda a, g, p_in, p_out: (a @ p_in.T, g @ p_out.T),
            "eager": eager,
            "sums": lambda a, g, p_in, p_out: (a.sum(), g.sum()),
        },
        ceiling="A P_inᵀ, G P_outᵀ",
    )


# ---- on a GPU -------------------------------------------------------------------------------------------------------

# GPT-2's MLP, up; an 8B Llama's; a convolution's patches; a classifier's layer.
GPU_LAYERS = here(
    [(8, 1024, 768, 3072), (8, 1024, 4096, 14_336), (512, 196, 27, 64), (4096, 1, 512, 512)], [(2, 16, 24, 32)]
)
GPU_VECTORS = here([(16, 1 << 24, 512), (16, 1 << 24, 4096), (1, 1 << 26, 512)], [(3, 1000, 64)])  # (B, D, dim)


def gpu_cases() -> list[Case]:
    """The ceiling is the read of the vectors, or of the factors."""
    half, full = torch.bfloat16, torch.float32
    return [
        *(_gpu_sparse(*vectors, half) for vectors in GPU_VECTORS),
        _gpu_rademacher(*GPU_VECTORS[0], half),
        _gpu_sparse(*GPU_VECTORS[0], full),
        _gpu_rademacher(*GPU_VECTORS[0], full),
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
        target=Target("read", 0.75),
    )


def _gpu_rademacher(b: int, d: int, dim: int, dtype: torch.dtype) -> Case:
    """No rival holds the matrix: at this D it has 2³³ numbers."""
    sketch, case = assay.Rademacher(dim), _gpu_sparse(b, d, dim, dtype)
    return replace(
        case,
        shape=f"Rademacher({dim}) B={b} D={d}",
        flops=2 * b * d * dim,
        run=lambda x: project(x, sketch),
        rivals={"sum": torch.sum},
        target=Target("read", 0.25),
    )


def _gpu_layer(b: int, t: int, i: int, o: int, side: int, dtype: torch.dtype) -> Case:
    sketch = assay.Kronecker(side, side)

    @cache
    def sides() -> tuple[Tensor, Tensor]:  # when they are first needed, on the device
        return sketch.input_side(i, DEVICE).to(dtype).T, sketch.output_side(o, DEVICE).to(dtype).T

    def gemms(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        p_in, p_out = sides()
        return a @ p_in, g @ p_out

    def eager(a: Tensor, g: Tensor) -> Tensor:
        p_in, p_out = sides()
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
        rivals={"gemm": gemms, "eager": eager},
        target=Target("read", 0.85) if side <= 64 else None,
    )
