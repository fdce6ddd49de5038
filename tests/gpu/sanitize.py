"""Every op once per path of its kernel, at sizes that compute-sanitizer has time for: ``python -m tests.gpu.sanitize``.

``--out-of-bounds`` reads past an allocation instead: a sanitizer that stays silent about that is not working.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import assay
from tests.gpu.harness import REHEARSAL, kernel

DEVICE = "cpu" if REHEARSAL else "cuda"


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Made on the CPU, so that only the ops' own kernels are instrumented."""
    return torch.randn(*shape).to(dtype).to(DEVICE)


def labels(n: int, c: int) -> Tensor:
    return torch.randint(c, (n,)).to(DEVICE)


def everything() -> Iterator[tuple[str, Any]]:
    """(what, result) of each path."""
    ensemble_stats = kernel("ensemble_stats")
    # Many rows per block; a row per block; a row in shared memory; in a cluster; in L2; odd widths, unaligned rows.
    for k, c in ((3, 10), (2, 111), (5, 1000), (2, 4099), (1, 50_257), (1, 262_144), (5, 40_001), (8, 200_003)):
        dtype = torch.float32 if c % 2 else torch.bfloat16
        yield f"ensemble_stats K={k} C={c}", ensemble_stats(random(k, 3, c, dtype=dtype), labels(3, c))
    linear, scores = kernel("linear_ensemble_stats"), kernel("head_scores")
    for dtype in (torch.float32, torch.bfloat16):
        h, w, b = random(2, 17, 40, dtype=dtype), random(2, 1001, 40, dtype=dtype), random(2, 1001, dtype=dtype)
        y = labels(17, 1001)
        yield f"linear_ensemble_stats {dtype}, one sweep", linear(h, w, y, fields=["nll", "expected_entropy"])
        yield f"linear_ensemble_stats {dtype}, two sweeps", linear(h, w, y, bias=b)
        yield f"head_scores {dtype}", scores(h, w, y, bias=b, directions=w, sketch=assay.Kronecker(16, 16))
        for t, i, o in ((1, 70, 33), (67, 130, 65), (300, 40, 24)):  # one position; the Gram plan; the product plan
            a, g, v = (random(*s, dtype=dtype) for s in ((2, t, i), (2, t, o), (o, i)))
            yield f"grad_dot {dtype} T={t}", kernel("grad_dot")(a, g, v)
            yield f"grad_sqnorm {dtype} T={t}", kernel("grad_sqnorm")(a, g)
            for side in (16, 70):
                yield f"grad_sketch {dtype} T={t} {side}", kernel("grad_sketch")(a, g, assay.Kronecker(side, 20))
        for sketch in (assay.Sparse(7), assay.Sparse(300, 3), assay.Sparse(8000), assay.Rademacher(130)):
            yield f"project {dtype} {sketch}", kernel("project")(random(18, 1001, dtype=dtype), sketch)
    features, scales = torch.randint(-127, 128, (300, 77), dtype=torch.int8).to(DEVICE), random(300)
    for m, k in ((1, 10), (3, 10), (40, 10), (3, 200)):  # one query; a tile of them; two passes; ranked by torch
        for reduce in ("max", "none"):
            scan = kernel("topk_scan")
            yield f"topk_scan M={m} k={k} {reduce}", scan(random(300, 77), random(m, 77), k, reduce=reduce)[0]
            yield f"topk_scan int8 M={m}", scan(features, random(m, 77), k, reduce=reduce, scales=scales)[0]


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


def main() -> None:
    torch.manual_seed(0)
    if "--out-of-bounds" in sys.argv:
        read_out_of_bounds()
        return
    for what, result in everything():
        for x in tensors(result):
            if not bool(x.cpu().isfinite().all()):
                raise SystemExit(f"{what}: a result that is not finite")
        print(what, flush=True)


if __name__ == "__main__":
    main()
