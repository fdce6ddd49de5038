"""grad_dot and grad_sqnorm against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import assay
from assay.ops import grad_dot, grad_sqnorm
from assay.ops.sqnorm import gram_is_cheaper

SHAPES = [  # (B, T, I, O)
    (4, 1, 5, 7),  # one position
    (3, 9, 33, 17),  # odd everything: Gram plan
    (2, 300, 8, 6),  # product plan, several samples per tile
    (5, 64, 128, 3),
    (2, 700, 40, 900),  # more positions than a Gram tile
    (1, 1100, 640, 640),  # Gram plan over several tiles
    (2, 3, 1, 1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(b: int, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, t, i).to(dtype), torch.randn(b, t, o).to(dtype), torch.randn(o, i).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "i", "o"), SHAPES)
def test_against_float64(isa: str, b: int, t: int, i: int, o: int, dtype: torch.dtype) -> None:
    a, g, v = factors(b, t, i, o, dtype)
    gradient = g.double().mT @ a.double()  # (B, O, I)
    dot, sqnorm = grad_dot(a, g, v), grad_sqnorm(a, g)
    assert dot.dtype == sqnorm.dtype == torch.float32
    want = (gradient * v.double()).sum((1, 2))
    scale = gradient.flatten(1).norm(dim=1) * v.double().norm()
    assert bool(((dot - want).abs() <= 2e-6 * scale).all()), (dot - want).abs() / scale
    torch.testing.assert_close(sqnorm.double(), gradient.square().sum((1, 2)), rtol=2e-6, atol=0)


def test_the_shapes_above_reach_both_plans() -> None:
    plans = {gram_is_cheaper(t, i, o) for _, t, i, o in SHAPES if t > 1}
    assert plans == {True, False}
    assert gram_is_cheaper(4095 // 2, 4096, 4096)  # at I = O = 4,096 tiles make it about T < 4,096
    assert not gram_is_cheaper(4096, 4096, 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cancelling_tokens_keep_their_norm(isa: str, dtype: torch.dtype) -> None:
    """Opacus 1.6 returns exactly 0 for such a batch in bfloat16: a negative Gram sum behind a clamp."""
    b, t, i, o = 3, 64, 256, 256
    a, g, _ = factors(b, t, i, o, dtype)
    a[:, 1::2] = a[:, ::2]
    g[:, 1::2] = -g[:, ::2]  # every token is undone by the next ...
    g[:, 1] *= 1 + 2**-6  # ... but one, almost
    exact = (g.double().mT @ a.double()).square().sum((1, 2))
    terms = a.double().square().sum((1, 2)) * g.double().square().sum((1, 2))
    assert bool((exact < 1e-3 * terms / t).all()), "the batch does not cancel"
    assert gram_is_cheaper(t, i, o)
    torch.testing.assert_close(grad_sqnorm(a, g).double(), exact, rtol=1e-4, atol=0)


def test_two_dimensional_mixed_and_strided(isa: str) -> None:
    a, g, v = factors(4, 6, 10, 12, torch.float32)
    flat = grad_dot(a[:, 0], g[:, 0], v)
    assert torch.equal(flat, grad_dot(a[:, :1], g[:, :1], v))
    assert torch.equal(grad_sqnorm(a[:, 0], g[:, 0]), grad_sqnorm(a[:, :1], g[:, :1]))
    mixed = grad_dot(a, g.bfloat16(), v)
    assert torch.equal(mixed, grad_dot(a, g.bfloat16().float(), v))
    assert torch.equal(grad_sqnorm(a, g.bfloat16()), grad_sqnorm(a, g.bfloat16().float()))
    wide_a, wide_g = torch.randn(4, 12, 20), torch.randn(12, 4, 24).transpose(0, 1)
    va, vg = wide_a[:, ::2, ::2], wide_g[:, ::2, 1::2]
    vt = torch.randn(10, 12).T
    assert torch.equal(grad_dot(va, vg, vt), grad_dot(va.contiguous(), vg.contiguous(), vt))
    torch.testing.assert_close(grad_sqnorm(va, vg), grad_sqnorm(va.contiguous(), vg.contiguous()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    a, g, v = factors(*shape, torch.float32)
    assert grad_dot(a, g, v).tolist() == [0.0] * shape[0]
    assert grad_sqnorm(a, g).tolist() == [0.0] * shape[0]


def test_sums_and_norms_are_consistent(isa: str) -> None:
    a, g, _ = factors(3, 20, 30, 40, torch.float32)
    for b in range(3):
        gradient = g[b].T @ a[b]
        torch.testing.assert_close(grad_dot(a, g, gradient)[b], grad_sqnorm(a, g)[b], rtol=1e-5, atol=0)


def test_reference_backend_and_float64() -> None:
    a, g, v = factors(3, 8, 9, 10, torch.float32)
    with assay.backend("reference"):
        plain = grad_dot(a, g, v), grad_sqnorm(a, g)
    torch.testing.assert_close(grad_dot(a, g, v), plain[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_sqnorm(a, g), plain[1], rtol=1e-5, atol=0)
    exact = grad_dot(a.double(), g, v)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, (g.double().mT @ a.double() * v.double()).sum((1, 2)))


def test_torch_compile_fullgraph() -> None:
    a, g, v = factors(3, 8, 9, 10, torch.float32)

    def f(a: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return grad_dot(a, g, v * 2) + grad_sqnorm(a, g)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, g, v), f(a, g, v))
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(torch.ops.assay.grad_dot.default, (a, g, v), test_utils=test)
        torch.library.opcheck(torch.ops.assay.grad_sqnorm.default, (a, g), test_utils=test)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: grad_dot(torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(4, 5)),
            r"direction.*\(5, 4\).*\(4, 5\)",
        ),
        (
            lambda: grad_dot(torch.randn(2, 3, 4), torch.randn(2, 2, 5), torch.randn(5, 4)),
            r"grads.*\(2, 3\).*\(2, 2\)",
        ),
        (lambda: grad_sqnorm(torch.randn(4), torch.randn(4)), r"inputs: expected \(B, T, features\)"),
        (
            lambda: grad_sqnorm(torch.zeros(2, 2, dtype=torch.int64), torch.randn(2, 2)),
            "inputs: expected float32, bfloat16 or float16, got torch.int64",
        ),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call: object, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()  # type: ignore[operator]
