"""Every op and dtype at a few shapes against float64, one op to a process: ``python -m tests.gpu.smoke OP``.

The first thing to know of a card: which ops are right on it at all. The tests beside this file say how right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import assay
from tests.gpu.harness import DTYPES, assert_stats, assert_within, backend, here
from tests.gpu.settings import REHEARSAL
from tests.gpu.worker import OK, End, serve

DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
KRONECKER, SPARSE, RADEMACHER = assay.Kronecker(16, 16, 1), assay.Sparse(512, 1, 2), assay.Rademacher(40, 3)
LOSS_TOLERANCE = 4.0  # roundings of the inputs' dtype, of a gradient as a whole

Check = Callable[[torch.dtype, tuple[int, ...]], None]


@dataclass(frozen=True)
class Smoke:
    """A check and the shapes that it takes: one with nothing a multiple of anything, one as models have them."""

    check: Check
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[torch.dtype] = tuple(DTYPES)


def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * std).to(dtype)


def ensemble_stats(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    k, n, c = shape
    z, y = normal(k, n, c, dtype=dtype, std=3), torch.randint(c, (n,), device=DEVICE)
    with backend("ensemble_stats"):
        got = assay.ops.ensemble_stats(z, y)
    assert_stats(got, list(z), y, what="ensemble_stats")


# ---- the output layer -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """K output layers, their labels, and the logits that an op must not store."""

    hidden: list[Tensor]
    weight: list[Tensor]
    labels: Tensor

    def logits(self, dtype: torch.dtype | None) -> list[Tensor]:
        return [
            h.to(dtype or h.dtype) @ w.to(dtype or w.dtype).T for h, w in zip(self.hidden, self.weight, strict=True)
        ]

    @property
    def rounding(self) -> Tensor:
        """(N,): a logit rounds at the magnitude of its D products."""
        pairs = zip(self.hidden, self.weight, strict=True)
        return torch.stack([h.double().norm(dim=1) * w.double().norm(dim=1).max() for h, w in pairs]).amax(0)


def head(dtype: torch.dtype, shape: tuple[int, ...]) -> Head:
    k, n, d, c = shape
    hidden = [normal(n, d, dtype=dtype) for _ in range(k)]
    weight = [normal(c, d, dtype=dtype, std=3 / d**0.5) for _ in range(k)]
    return Head(hidden, weight, torch.randint(c, (n,), device=DEVICE))


def linear_ensemble_stats(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = head(dtype, shape)
    for fields in (("nll", "mean_nll"), None):
        with backend("linear_ensemble_stats"):
            got = assay.ops.linear_ensemble_stats(x.hidden, x.weight, x.labels, fields=fields)
        exact, plain = x.logits(torch.float64), x.logits(None)
        assert_stats(got, exact, x.labels, plain=plain, rounding=x.rounding, what=f"fields={fields or 'all'}")


def head_scores(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = head(dtype, shape)
    c = len(x.weight[0])
    directions = [torch.randn_like(w) for w in x.weight]
    with backend("head_scores"):
        got = assay.ops.head_scores(x.hidden, x.weight, x.labels, directions=directions, sketch=KRONECKER)
    exact, plain = x.logits(torch.float64), x.logits(None)
    assert_stats(got.stats, exact, x.labels, plain=plain, rounding=x.rounding, what="stats")
    onehot = torch.nn.functional.one_hot(x.labels, c).double()
    left = KRONECKER.output_side(c).to(DEVICE).double()
    for k, (h, v) in enumerate(zip(x.hidden, directions, strict=True)):
        residuals = [z[k].double().softmax(-1) - onehot for z in (exact, plain)]
        reach = x.rounding.clamp(min=1)
        right = KRONECKER.input_side(h.shape[1]).to(DEVICE)
        h, v, norm = h.double(), v.double(), h.double().norm(dim=1)
        norms = [r.square().sum(1) * norm**2 for r in residuals]
        dots = [(r * (h @ v.T)).sum(1) for r in residuals]
        assert_within(got.grad_sqnorm[k], *norms, norm**2 * reach, f"grad_sqnorm, model {k}")
        assert_within(got.grad_dot[k], *dots, norm * v.norm(dim=1).max() * reach, f"grad_dot, model {k}")
        assert_within(got.left[k], *(r @ left.T for r in residuals), reach[:, None], f"left, model {k}")
        products = h @ right.double().T, (h.float() @ right.T).double()
        assert_within(got.right[k], *products, norm[:, None], f"right, model {k}")


def linear_cross_entropy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The losses, and both gradients as wholes: they are made in the inputs' dtype. The weight's has no kernel."""
    x = head(dtype, shape)
    h, w = (t[0].clone().requires_grad_() for t in (x.hidden, x.weight))
    with backend("linear_cross_entropy"):
        losses = assay.ops.linear_cross_entropy(h, w.detach(), x.labels)
        share = torch.rand_like(losses)
        losses.backward(share)
    (assay.ops.linear_cross_entropy(h.detach(), w, x.labels) * share).sum().backward()
    exact, plain = (losses_of(z[0], x.labels) for z in (x.logits(torch.float64), x.logits(None)))
    assert_within(losses.detach(), exact, plain, x.rounding.clamp(min=1), "losses")
    wide = [t[0].double().requires_grad_() for t in (x.hidden, x.weight)]
    losses_of(wide[0] @ wide[1].T, x.labels).backward(share.double())
    for name, found, reference in zip(("hidden", "weight"), (h.grad, w.grad), (t.grad for t in wide), strict=True):
        assert found is not None
        assert reference is not None
        error = float((found.double() - reference).norm() / reference.norm())
        allowed = LOSS_TOLERANCE * max(torch.finfo(dtype).eps, 2e-6)
        assert error <= allowed, f"gradient of {name}: off by {error:.2g} of its norm, allowed {allowed:.2g}"


def losses_of(z: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(z if z.dtype == torch.float64 else z.float(), y, reduction="none")


# ---- gradients, sketches, scans -------------------------------------------------------------------------------------


def factors(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    b, t, i, o = shape
    return normal(b, t, i, dtype=dtype), normal(b, t, o, dtype=dtype)


def grad_dot(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, g = factors(dtype, shape)
    v = normal(shape[3], shape[2], dtype=dtype)
    with backend("grad_dot"):
        got = assay.ops.grad_dot(a, g, v)
    gradient = g.double().mT @ a.double()
    plain = ((a @ v.T).float() * g.float()).sum((1, 2))
    scale = gradient.flatten(1).norm(dim=1) * v.double().norm()
    assert_within(got, (gradient * v.double()).sum((1, 2)), plain, scale, "grad_dot")


def grad_sqnorm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, g = factors(dtype, shape)
    with backend("grad_sqnorm"):
        got = assay.ops.grad_sqnorm(a, g)
    exact = (g.double().mT @ a.double()).square().sum((1, 2))
    assert_within(got, exact, (g.mT @ a).float().square().sum((1, 2)), exact, "grad_sqnorm")


def grad_sketch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, g = factors(dtype, shape)
    with backend("grad_sketch"):
        got = assay.ops.grad_sketch(a, g, KRONECKER)
    gradient = g.double().mT @ a.double()
    left, right = (
        side.to(DEVICE).double() for side in (KRONECKER.output_side(shape[3]), KRONECKER.input_side(shape[2]))
    )
    exact = (left.double() @ gradient @ right.double().T).flatten(1)
    scale = exact.norm(dim=1, keepdim=True) + gradient.flatten(1).norm(dim=1, keepdim=True)
    assert_within(got, exact, exact, scale.expand_as(exact), "grad_sketch")


def project(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Rademacher unforced, where no kernel takes it."""
    x = normal(*shape, dtype=dtype)
    for sketch in (SPARSE, RADEMACHER):
        with backend("project") if sketch is SPARSE else assay.backend("auto"):
            got = assay.ops.project(x, sketch)
        with assay.backend("reference"):
            exact = assay.ops.project(x.double(), sketch)
        scale = x.double().norm(dim=1, keepdim=True) * (1 if sketch is SPARSE else 5)
        assert_within(got, exact, exact, scale.expand_as(exact), str(sketch))


def scanned(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Features, queries, scales; the exact scores (M, N) and what they round at."""
    n, d, m = shape
    q, scales = torch.randn(m, d, device=DEVICE), None
    if dtype == torch.int8:
        x, scales = torch.randint(-127, 128, (n, d), dtype=dtype, device=DEVICE), torch.rand(n, device=DEVICE) / 50
    else:
        x = normal(n, d, dtype=dtype)
    wide = x.double() if scales is None else x.double() * scales.double()[:, None]
    return x, q, scales, q.double() @ wide.T, q.double().norm(dim=1)[:, None] * wide.norm(dim=1)


def scan_scores(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, q, scales, exact, size = scanned(dtype, shape)
    for reduce in ("mean", "max"):
        with backend("scan_scores"):
            got = assay.ops.scan_scores(x, q, reduce=reduce, scales=scales)
        scores = exact.mean(0) if reduce == "mean" else exact.amax(0)
        assert_within(got, scores, scores, size.amax(0), reduce)


def topk_scan(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The best are as good as the best there are; which of two close ones may follow from rounding."""
    x, q, scales, exact, size = scanned(dtype, shape)
    k = min(100, shape[0])
    with backend("topk_scan"):
        values, indices = assay.ops.topk_scan(x, q, k, reduce="max", scales=scales)
    scores, scale = exact.amax(0), float(size.max())
    assert_within(values, scores[indices], scores[indices], scale, "values of the rows that were found")
    assert_within(values, scores.topk(k).values, scores.topk(k).values, scale, "values in order")
    assert len(set(indices.tolist())) == k, "a row twice"


LAYERS = [(3, 17, 63, 65), (2, 1, 512, 300), *here([(3, 512, 768, 3072)], [])]
HEADS = [(2, 65, 33, 1001), *here([(1, 256, 576, 49_152), (2, 64, 2048, 128_256)], [])]
SCANS = [(999, 100, 1), (999, 100, 17), *here([(300_000, 512, 64)], [])]
OPS = {
    "ensemble_stats": Smoke(ensemble_stats, [(3, 17, 10), (2, 9, 1000), *here([(5, 64, 128_256)], [])]),
    "linear_ensemble_stats": Smoke(linear_ensemble_stats, HEADS),
    "head_scores": Smoke(head_scores, HEADS),
    "linear_cross_entropy": Smoke(linear_cross_entropy, [(1, *shape[1:]) for shape in HEADS]),
    "grad_dot": Smoke(grad_dot, LAYERS),
    "grad_sqnorm": Smoke(grad_sqnorm, LAYERS),
    "grad_sketch": Smoke(grad_sketch, LAYERS),
    "project": Smoke(project, [(3, 1001), (17, 20_000), *here([(16, 1 << 22)], [])]),
    "scan_scores": Smoke(scan_scores, SCANS, (*DTYPES, torch.int8)),
    "topk_scan": Smoke(topk_scan, SCANS, (*DTYPES, torch.int8)),
}


def rows(op: str) -> dict[str, Callable[[], End]]:
    """Every dtype at the first shape, then at the next."""
    smoke, found = OPS[op], {}
    for shape in smoke.shapes:
        for dtype in smoke.dtypes:

            def run(dtype: torch.dtype = dtype, shape: tuple[int, ...] = shape) -> End:
                torch.manual_seed(0)
                smoke.check(dtype, shape)
                if not REHEARSAL:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                return OK

            found[f"{op} {str(dtype).removeprefix('torch.')} {'×'.join(map(str, shape))}"] = run
    return found


if __name__ == "__main__":
    serve("smoke", rows(sys.argv[1]))
