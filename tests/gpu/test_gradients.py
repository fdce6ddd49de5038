"""grad_dot and grad_sqnorm on the GPU against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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

grad_dot, grad_sqnorm = kernel("grad_dot"), kernel("grad_sqnorm")

SHAPES = [  # (B, T, I, O): why
    (1, 1, 1, 1),
    (5, 1, 33, 17),  # one position
    (3, 2, 1, 300),  # narrower than any tile
    (3, 15, 64, 64),  # one short of a tensor core's 16
    (3, 17, 63, 65),  # around a tile of 64, from both sides
    (2, 127, 128, 128),  # around T = 2IO/(I + O): the two plans of the norm
    (2, 128, 128, 128),
    (2, 129, 128, 128),
    (2, 129, 127, 257),  # nothing a multiple of anything
    (2, 300, 8, 6),  # product plan with tiny sides
    (1, 1100, 640, 640),  # Gram plan over several tiles
    (2, 1001, 40, 900),
    (600, 1, 512, 10),  # a classifier's layer: many samples
    (64, 196, 27, 64),  # a convolution's patches
    *here([(3, 1024, 768, 3072), (2, 513, 4096, 4096), (1, 8192, 768, 768)], []),  # language models' layers
]


def factors(b: int, t: int, i: int, o: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(s, device=device).to(dtype) for s in ((b, t, i), (b, t, o), (o, i)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "i", "o"), SHAPES)
def test_against_float64(b: int, t: int, i: int, o: int, dtype: torch.dtype, device: torch.device) -> None:
    a, g, v = factors(b, t, i, o, dtype, device)
    exact = g.double().mT @ a.double()  # (B, O, I)
    plain = (g.mT @ a).float()
    plain_dot = ((a @ v.T).float() * g.float()).sum((1, 2))
    scale = exact.flatten(1).norm(dim=1) * v.double().norm()
    assert_within(grad_dot(a, g, v), (exact * v.double()).sum((1, 2)), plain_dot, scale, "grad_dot")
    norms = exact.square().sum((1, 2))
    assert_within(grad_sqnorm(a, g), norms, plain.square().sum((1, 2)), norms, "grad_sqnorm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cancelling_tokens_keep_their_norm(dtype: torch.dtype, device: torch.device) -> None:
    """Opacus 1.6 returns exactly 0 for such a batch in bfloat16: a negative Gram sum behind a clamp."""
    t, side = 64, 256
    a, g, _ = factors(3, t, side, side, dtype, device)
    a[:, 1::2] = a[:, ::2]
    g[:, 1::2] = -g[:, ::2]  # every token is undone by the next ...
    g[:, 1] *= 1 + 2**-6  # ... but one, almost
    exact = (g.double().mT @ a.double()).square().sum((1, 2))
    terms = a.double().square().sum((1, 2)) * g.double().square().sum((1, 2))
    assert bool((exact < 1e-3 * terms / t).all()), "the batch does not cancel"
    torch.testing.assert_close(grad_sqnorm(a, g).double(), exact, rtol=1e-4, atol=0)


def test_mixed_dtypes(device: torch.device) -> None:
    a, g, v = factors(3, 70, 65, 130, torch.float32, device)
    for x in DTYPES:
        for y in DTYPES:
            exact = g.to(y).double().mT @ a.to(x).double()
            plain = g.to(y).float().mT @ a.to(x).float()
            want = exact.square().sum((1, 2))
            assert_within(grad_sqnorm(a.to(x), g.to(y)), want, plain.square().sum((1, 2)), want, f"{x}, {y}")
            for w in (torch.float32, x):
                direction = v.to(w)
                dot = (exact * direction.double()).sum((1, 2))
                scale = exact.flatten(1).norm(dim=1) * direction.double().norm()
                plain_dot = (plain * direction.float()).sum((1, 2))
                assert_within(grad_dot(a.to(x), g.to(y), direction), dot, plain_dot, scale, f"{x}, {y}, {w}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, device: torch.device) -> None:
    wide_a, wide_g = torch.randn(4, 24, 140, device=device).to(dtype), torch.randn(24, 4, 260, device=device).to(dtype)
    a, g = wide_a[:, ::2, ::2], wide_g.transpose(0, 1)[:, ::2, 1::2]
    v = torch.randn(70, 130, device=device).to(dtype).T
    want = grad_dot(a.contiguous(), g.contiguous(), v.contiguous()), grad_sqnorm(a.contiguous(), g.contiguous())
    got = grad_dot(a, g, v), grad_sqnorm(a, g)
    off = [unaligned(x.contiguous()) for x in (a, g, v)]
    gradient = g.double().mT @ a.double()
    scales = gradient.flatten(1).norm(dim=1) * v.double().norm(), gradient.square().sum((1, 2))
    for x, y, scale in zip(got, want, scales, strict=True):  # another layout, another order of summation
        assert bool(((x - y).abs() <= 2 * TOLERANCE * scale).all()), (x - y).abs() / scale
    assert_same(grad_dot(*off), want[0], "grad_dot, unaligned")
    assert_same(grad_sqnorm(*off[:2]), want[1], "grad_sqnorm, unaligned")
    expanded = grad_sqnorm(a[:1].contiguous().expand(3, -1, -1), g[:1].contiguous().expand(3, -1, -1))
    assert_same(expanded, expanded[:1].expand(3), "an expanded sample")
    flat = grad_dot(a[:, 0], g[:, 0], v)
    assert_same(flat, grad_dot(a[:, :1], g[:, :1], v), "two dimensions are T = 1")


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_empty(shape: tuple[int, int, int, int], device: torch.device) -> None:
    a, g, v = factors(*shape, torch.float32, device)
    assert grad_dot(a, g, v).tolist() == [0.0] * shape[0]
    assert grad_sqnorm(a, g).tolist() == [0.0] * shape[0]


@pytest.mark.parametrize(("t", "i", "o"), here([(1, 512, 512), (1024, 768, 3072), (2048, 256, 256)], [(64, 32, 48)]))
def test_same_bits_every_run(t: int, i: int, o: int, device: torch.device) -> None:
    a, g, v = factors(4, t, i, o, torch.bfloat16, device)
    dot, sqnorm = grad_dot(a, g, v), grad_sqnorm(a, g)
    for _ in range(here(20, 3)):
        assert_same(grad_dot(a, g, v), dot, "grad_dot")
        assert_same(grad_sqnorm(a, g), sqnorm, "grad_sqnorm")


@pytest.mark.parametrize(("t", "i", "o"), here([(4096, 768, 768), (512, 4096, 4096)], [(64, 32, 32)]))
def test_intermediates_stay_on_chip(t: int, i: int, o: int, device: torch.device) -> None:
    """Neither A Vᵀ (B, T, O) and G V (B, T, I), nor a T×T or O×I matrix per sample, reaches memory."""
    a, g, v = factors(8, t, i, o, torch.bfloat16, device)
    runs = {
        "grad_dot": (lambda: grad_dot(a, g, v), t * min(i, o)),
        "grad_sqnorm": (lambda: grad_sqnorm(a, g), min(t * t, o * i)),
    }
    for name, (run, numbers) in runs.items():
        smallest = 8 * 2 * numbers  # in the inputs' dtype
        assert 0 < peak_bytes(run) <= smallest / 10, f"{name} held {peak_bytes(run):,} bytes"


@pytest.mark.parametrize(("b", "t", "i", "o"), here([(3, 2**18, 4096, 64), (530, 1024, 4096, 4096)], [(3, 64, 32, 8)]))
def test_beyond_int32(b: int, t: int, i: int, o: int, device: torch.device) -> None:
    """More than 2³¹ elements, in the product plan and in the Gram plan; the last sample against float64."""
    needs_memory(14)
    a = torch.empty(b, t, i, dtype=torch.bfloat16, device=device).normal_()
    g = torch.empty(b, t, o, dtype=torch.bfloat16, device=device).normal_()
    v = torch.randn(o, i, device=device).bfloat16()
    assert here(a.numel(), 2**32) > 2**31
    exact = torch.zeros(o, i, dtype=torch.float64, device=device)
    for x, y in zip(a[-1].split(2**14), g[-1].split(2**14), strict=True):
        exact += y.double().T @ x.double()
    plain = (g[-1].T @ a[-1]).float()
    norm, dot = exact.square().sum(), (exact * v.double()).sum()
    scale = exact.norm() * v.double().norm()
    assert_within(grad_sqnorm(a, g)[-1], norm, plain.square().sum(), norm, "grad_sqnorm")
    assert_within(grad_dot(a, g, v)[-1], dot, (plain * v.float()).sum(), scale, "grad_dot")
