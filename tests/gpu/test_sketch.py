"""grad_sketch and project on the GPU against float64, and their signs and buckets against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import assay
from assay.ops.sketch import Sketch, buckets
from tests.gpu.harness import (
    DTYPES,
    TOLERANCE,
    assert_same,
    assert_within,
    here,
    kernel,
    needs_memory,
    peak_bytes,
    unaligned,
)

grad_sketch, project = kernel("grad_sketch"), kernel("project")

LAYERS = [  # (B, T, I, O): why
    (1, 1, 1, 1),
    (600, 1, 512, 10),  # a classifier's layer: many samples of one position
    (3, 16, 64, 128),  # the last of few positions
    (3, 17, 63, 65),  # one more; around a block of features, from both sides
    (2, 129, 127, 257),  # nothing a multiple of anything
    (64, 196, 27, 64),  # a convolution's patches: slices of several tiles
    *here([(3, 1024, 768, 3072), (1, 8192, 768, 768)], []),  # language models' layers
]
KRONECKERS = [assay.Kronecker(16, 16, 1), assay.Kronecker(33, 5, 2, "x"), assay.Kronecker(64, 64, 3)]
LARGE = [assay.Kronecker(128, 100, 4), assay.Kronecker(130, 300, 5)]  # the largest tile, and more of it
SPARSES = [assay.Sparse(dim, 1, dim) for dim in (1, 7, 100, 512, 1000, 2048, 4096, 8192)] + [assay.Sparse(300, 3, 1)]
DENSES = [assay.Rademacher(1, 1), assay.Rademacher(130, 2, "x"), assay.Rademacher(512, 3)]
VECTORS = [(1, 1), (3, 63), (17, 65), (16, 20_000), *here([(5, 1_000_003), (40, 1 << 20)], [])]  # (B, D)


def reference(vectors: Tensor, sketch: Sketch) -> Tensor:
    """In float64; its signs and buckets are the definition."""
    with assay.backend("reference"):
        return assay.ops.project(vectors.double(), sketch)


def gradient_sketch(a: Tensor, g: Tensor, sketch: Sketch) -> tuple[Tensor, Tensor]:
    """The sketches of the whole gradients, and the gradients' norms with theirs; float64."""
    gradient = g.double().mT @ a.double()
    if isinstance(sketch, assay.Kronecker):
        left, right = sketch.output_side(g.shape[2]).double(), sketch.input_side(a.shape[2]).double()
        exact = (left.to(a.device) @ gradient @ right.to(a.device).T).flatten(1)
    else:
        exact = reference(gradient.flatten(1), sketch)
    return exact, exact.norm(dim=1, keepdim=True) + gradient.flatten(1).norm(dim=1, keepdim=True)


def factors(b: int, t: int, i: int, o: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(b, t, i, device=device).to(dtype), torch.randn(b, t, o, device=device).to(dtype)


def assert_sketch(found: Tensor, exact: Tensor, scale: Tensor, what: str) -> None:
    """Held to float32 whatever the factors' dtype: signs are exact in all of them."""
    assert_within(found, exact, exact, scale.expand_as(exact), what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "i", "o"), LAYERS)
def test_kronecker(b: int, t: int, i: int, o: int, dtype: torch.dtype, device: torch.device) -> None:
    a, g = factors(b, t, i, o, dtype, device)
    for sketch in [*KRONECKERS, *LARGE] if t in (16, 129) else KRONECKERS[:1]:  # each costs seconds of compiling
        assert_sketch(grad_sketch(a, g, sketch), *gradient_sketch(a, g, sketch), f"{sketch}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketch", [*SPARSES, assay.Sparse(100_000), *DENSES], ids=str)
def test_vectors(sketch: assay.Sparse | assay.Rademacher, dtype: torch.dtype, device: torch.device) -> None:
    for b, d in VECTORS if sketch in (SPARSES[1], SPARSES[3]) else VECTORS[:4]:  # each costs seconds of compiling
        x = torch.randn(b, d, device=device).to(dtype)
        assert_sketch(
            project(x, sketch), reference(x, sketch), x.double().norm(dim=1, keepdim=True), f"{sketch}, B={b}, D={d}"
        )


def test_every_entry_is_the_definition_s(device: torch.device) -> None:
    """Sums of single ones are exact: every bucket and sign, and every sign of a Kronecker sketch, to the last bit."""
    d = here(3000, 300)
    for sketch in (*SPARSES[1:], *DENSES):
        assert_same(
            project(torch.eye(d, device=device), sketch).cpu(),
            reference(torch.eye(d), sketch).float().cpu(),
            f"{sketch}",
        )
    o, i = 70, 40
    g, a = torch.eye(o, device=device).repeat_interleave(i, 0), torch.eye(i, device=device).repeat(o, 1)
    for kron in (assay.Kronecker(16, 64, 7, "x"), assay.Kronecker(256, 16, 8)):
        found = grad_sketch(a, g, kron).view(o, i, kron.rows, kron.cols).cpu().sign()
        left, right = kron.output_side(o).sign(), kron.input_side(i).sign()
        assert_same(found, torch.einsum("ro,ci->oirc", left, right), f"{kron}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_sketches_of_layers(dtype: torch.dtype, device: torch.device) -> None:
    """A gradient multiplied out in tiles."""
    a, g = factors(3, 9, 600, here(1000, 50), dtype, device)
    for sketch in (assay.Sparse(512, seed=1), assay.Sparse(300, 2, seed=2), assay.Sparse(8193), assay.Rademacher(40)):
        found, (exact, scale) = grad_sketch(a, g, sketch), gradient_sketch(a, g, sketch)
        assert bool(((found - exact).abs() <= 5e-6 * scale).all()), sketch  # the gradient itself is float32
    mixed = grad_sketch(a, g.float(), KRONECKERS[0])
    assert_sketch(mixed, *gradient_sketch(a, g.float(), KRONECKERS[0]), "mixed types")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_s_bits_are_its_own(dtype: torch.dtype, device: torch.device) -> None:
    """Whatever its neighbours, and every time."""
    a, g = factors(20, here(700, 1), 530, 70, dtype, device)
    x = torch.randn(20, 60_000, device=device).to(dtype)
    for kron in (KRONECKERS[0], LARGE[0]):
        found = grad_sketch(a, g, kron)
        for rows in (slice(0, 20), slice(3, 4), slice(5, 18)):
            assert_same(grad_sketch(a[rows], g[rows], kron), found[rows], f"{kron}, {rows}")
    for sketch in (*SPARSES, *DENSES):
        found = project(x, sketch)
        for rows in (slice(0, 20), slice(3, 4), slice(5, 18)):
            assert_same(project(x[rows], sketch), found[rows], f"{sketch}, {rows}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, device: torch.device) -> None:
    wide_a, wide_g = torch.randn(4, 24, 140, device=device).to(dtype), torch.randn(24, 4, 260, device=device).to(dtype)
    a, g = wide_a[:, ::2, ::2], wide_g.transpose(0, 1)[:, ::2, 1::2]
    kron, sparse = KRONECKERS[0], SPARSES[3]
    want = grad_sketch(a.contiguous(), g.contiguous(), kron)
    scale = gradient_sketch(a, g, kron)[1]
    assert bool(((grad_sketch(a, g, kron) - want).abs() <= 2 * TOLERANCE * scale).all())
    off = [unaligned(x.contiguous()) for x in (a, g)]
    assert bool(((grad_sketch(*off, kron) - want).abs() <= 2 * TOLERANCE * scale).all())
    assert_same(grad_sketch(a[:, 0], g[:, 0], kron), grad_sketch(a[:, :1], g[:, :1], kron), "two dimensions are T = 1")
    x = torch.randn(5, 3000, device=device).to(dtype)
    want = project(x, sparse)
    assert_same(project(x.T.contiguous().T, sparse), want, "columns that are not adjacent")
    assert_same(project(unaligned(x), sparse), want, "unaligned")
    assert_same(project(x[:1].expand(3, -1), sparse), want[:1].expand(3, -1), "an expanded row")


def test_empty_and_not_finite(device: torch.device) -> None:
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
        assert grad_sketch(*factors(*shape, torch.float32, device), KRONECKERS[1]).tolist() == [[0.0] * 165] * shape[0]
    for b, d in ((0, 5), (2, 0)):
        assert project(torch.ones(b, d, device=device), SPARSES[1]).tolist() == [[0.0] * 7] * b
    a, g = factors(3, 5, 40, 30, torch.float32, device)
    x = torch.randn(3, 500, device=device)
    want = grad_sketch(a, g, KRONECKERS[0]), project(x, SPARSES[3])
    a[1, 2, 3] = x[1, 77] = torch.inf
    found = grad_sketch(a, g, KRONECKERS[0]), project(x, SPARSES[3])
    for got, all_finite in zip(found, want, strict=True):
        assert_same(got[::2], all_finite[::2], "neighbours of what is not finite")
        assert not bool(got[1].isfinite().all())


def test_nothing_of_the_gradient_s_size_is_held(device: torch.device) -> None:
    a, g = factors(8, here(1024, 32), here(2048, 32), here(2048, 32), torch.bfloat16, device)
    assert 0 < peak_bytes(lambda: grad_sketch(a, g, KRONECKERS[2])) <= a.nbytes / 4
    x = torch.randn(16, here(1 << 23, 1 << 10), device=device)
    assert 0 < peak_bytes(lambda: project(x, SPARSES[3])) <= here(x.nbytes / 4, 1 << 30)


@pytest.mark.parametrize(("b", "d"), here([(3, 2**30), (2**12, 2**20)], [(3, 2**10)]))
def test_beyond_int32(b: int, d: int, device: torch.device) -> None:
    """More than 2³¹ elements; the last row against its own projection and, in part, float64."""
    needs_memory(12)
    x = torch.empty(b, d, dtype=torch.bfloat16, device=device).normal_()
    assert here(x.numel(), 2**32) > 2**31
    sketch = SPARSES[3]
    found = project(x, sketch)
    assert_same(project(x[-1:].clone(), sketch), found[-1:], "the last row alone")
    x[-1, : d - 2**10] = 0
    exact = expected_tail(x[-1, -(2**10) :].double().cpu(), d - 2**10, sketch)
    assert_sketch(project(x[-1:], sketch), exact.to(device), exact.norm().to(device), "the last coordinates")


def expected_tail(values: Tensor, first: int, sketch: assay.Sparse) -> Tensor:
    """By the definition of the entries, (1, dim): of coordinates that begin at ``first``."""
    at, sign = buckets(len(values), sketch.dim, 1, sketch.key, first=first)
    return torch.zeros(1, sketch.dim, dtype=torch.float64).index_add_(1, at[:, 0], (values * sign[:, 0])[None])
