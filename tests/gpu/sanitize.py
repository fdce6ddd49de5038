"""An op once per path of its kernel, at sizes that compute-sanitizer has time for: ``python -m tests.gpu.sanitize OP``.

``--out-of-bounds`` reads past an allocation instead: a sanitizer that stays silent about that is not working.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import assay
from tests.gpu.harness import backend, kernel
from tests.gpu.settings import REHEARSAL

DEVICE = "cpu" if REHEARSAL else "cuda"


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Made on the CPU, so that only the ops' own kernels are instrumented."""
    return torch.randn(*shape).to(dtype).to(DEVICE)


def labels(n: int, c: int) -> Tensor:
    return torch.randint(c, (n,)).to(DEVICE)


Paths = Iterator[tuple[str, Any]]  # what, and its result
HALF_AND_FULL = (torch.float32, torch.bfloat16)


def ensemble_stats() -> Paths:
    """Many rows per block; a row per block; in shared memory; in a cluster; in L2; odd widths, unaligned rows."""
    for k, c in ((3, 10), (2, 111), (5, 1000), (2, 4099), (1, 50_257), (1, 262_144), (5, 40_001), (8, 200_003)):
        dtype = torch.float32 if c % 2 else torch.bfloat16
        yield f"K={k} C={c}", kernel("ensemble_stats")(random(k, 3, c, dtype=dtype), labels(3, c))


def head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = random(2, 1001, dtype=dtype)
    return random(2, 17, 40, dtype=dtype), random(2, 1001, 40, dtype=dtype), bias, labels(17, 1001)


def linear_ensemble_stats() -> Paths:
    linear = kernel("linear_ensemble_stats")
    for dtype in HALF_AND_FULL:
        h, w, b, y = head(dtype)
        yield f"{dtype}, one sweep", linear(h, w, y, fields=["nll", "expected_entropy"])
        yield f"{dtype}, two sweeps", linear(h, w, y, bias=b)


def head_scores() -> Paths:
    for dtype in HALF_AND_FULL:
        h, w, b, y = head(dtype)
        yield f"{dtype}", kernel("head_scores")(h, w, y, bias=b, directions=w, sketch=assay.Kronecker(16, 16))


def linear_cross_entropy() -> Paths:
    for dtype in HALF_AND_FULL:
        h, w, b, y = head(dtype)
        hidden = h[0].requires_grad_()
        with backend("linear_cross_entropy"):
            losses = assay.ops.linear_cross_entropy(hidden, w[0], y, bias=b[0])
            losses.sum().backward()
        yield f"{dtype}, losses", losses.detach()
        yield f"{dtype}, gradient of hidden", hidden.grad


def layers() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """One position; the Gram plan; the product plan."""
    for dtype in HALF_AND_FULL:
        for t, i, o in ((1, 70, 33), (67, 130, 65), (300, 40, 24)):
            a, g, v = (random(*shape, dtype=dtype) for shape in ((2, t, i), (2, t, o), (o, i)))
            yield f"{dtype} T={t}", a, g, v


def grad_dot() -> Paths:
    for what, a, g, v in layers():
        yield what, kernel("grad_dot")(a, g, v)


def grad_sqnorm() -> Paths:
    for what, a, g, _ in layers():
        yield what, kernel("grad_sqnorm")(a, g)


def grad_sketch() -> Paths:
    for what, a, g, _ in layers():
        for side in (16, 70):
            yield f"{what} {side}", kernel("grad_sketch")(a, g, assay.Kronecker(side, 20))


def project() -> Paths:
    for dtype in HALF_AND_FULL:
        for sketch in (assay.Sparse(7), assay.Sparse(300, 3), assay.Sparse(8000), assay.Rademacher(130)):
            yield f"{dtype} {sketch}", kernel("project")(random(18, 1001, dtype=dtype), sketch)


def topk_scan() -> Paths:
    """One query; a tile of them; two passes; ranked by torch."""
    features, scales = torch.randint(-127, 128, (300, 77), dtype=torch.int8).to(DEVICE), random(300)
    scan = kernel("topk_scan")
    for m, k in ((1, 10), (3, 10), (40, 10), (3, 200)):
        for reduce in ("max", "none"):
            yield f"M={m} k={k} {reduce}", scan(random(300, 77), random(m, 77), k, reduce=reduce)[0]
            yield f"int8 M={m} k={k} {reduce}", scan(features, random(m, 77), k, reduce=reduce, scales=scales)[0]


OPS: dict[str, Callable[[], Paths]] = {
    path.__name__: path
    for path in (
        ensemble_stats,
        linear_ensemble_stats,
        head_scores,
        linear_cross_entropy,
        grad_dot,
        grad_sqnorm,
        grad_sketch,
        project,
        topk_scan,
    )
}


def tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif result is not None:
        for value in vars(result).values():
            yield from tensors(value)


def read_out_of_bounds() -> None:
    """Past the end by 512 elements, within the driver's page: no crash, but memcheck must see it."""
    if REHEARSAL:
        raise SystemExit("a rehearsal reads nothing out of bounds")
    from tests.gpu.out_of_bounds import copy_kernel

    x, out = torch.ones(512).to(DEVICE), torch.ones(1024).to(DEVICE)
    copy_kernel[(1,)](x, out, BLOCK=1024)
    torch.cuda.synchronize()


def main(what: str) -> None:
    torch.manual_seed(0)
    if what == "--out-of-bounds":
        read_out_of_bounds()
        return
    for path, result in OPS[what]():
        for x in tensors(result):
            if not bool(x.cpu().isfinite().all()):
                raise SystemExit(f"{what} {path}: a result that is not finite")
        print(what, path, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
