"""The fused output layer against the unfused computation in float64, on every instruction set."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import assay
from assay.ops import HeadScores, _head_backends, head_scores, linear_cross_entropy, linear_ensemble_stats
from assay.ops.ensemble import FIELDS

TOLERANCE = 2e-6
SKETCH = assay.Kronecker(16, 8, seed=3, name="lm_head")


def to64(tensors: list[Tensor | None] | None) -> list[Tensor | None] | None:
    return None if tensors is None else [None if t is None else t.double() for t in tensors]


def close(name: str, got: Tensor, torch32: Tensor, exact: Tensor, scale: Tensor | float = 1.0) -> None:
    """The contract, with the worst element's error of torch in float32: sums in another order err in other elements."""
    assert got.dtype == torch.float32
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in other places than the reference"
    same = (got == exact) | exact.isnan()
    error = (got.double() - exact).abs().masked_fill(same, 0)
    theirs = (torch32.double() - exact).abs().masked_fill((torch32 == exact) | exact.isnan(), 0)
    size = exact.abs().nan_to_num(0, 0, 0).clamp(min=1) * scale
    allowed = 1.5 * theirs.max() + TOLERANCE * size if theirs.numel() else error
    assert bool((error <= allowed).all()), f"{name}: error {float(error.max()):.3g}, torch's {float(theirs.max()):.3g}"


def assert_contract(
    hidden: list[Tensor],
    weight: list[Tensor],
    labels: Tensor,
    bias: list[Tensor | None] | None = None,
    weights: list[float] | None = None,
) -> HeadScores:
    """All that head_scores gives, beside the reference in float64 and in float32."""
    directions = [torch.randn_like(w) for w in weight]
    options = {"weights": weights, "sketch": SKETCH}
    got = head_scores(hidden, weight, labels, bias=bias, directions=directions, **options)
    with assay.backend("reference"):
        exact = head_scores(to64(hidden), to64(weight), labels, bias=to64(bias), directions=to64(directions), **options)
        torch32 = head_scores(hidden, weight, labels, bias=bias, directions=directions, **options)
    for field in FIELDS[:-1]:
        close(field, getattr(got.stats, field), getattr(torch32.stats, field), getattr(exact.stats, field))
    # what a dot sums: |p − y| · |u|, at most 2 max |u|
    size = torch.stack([(h.double() @ v.double().T).abs().amax(1) for h, v in zip(hidden, directions, strict=True)])
    close("grad_dot", got.grad_dot, torch32.grad_dot, exact.grad_dot, 1 + size.nan_to_num(0, 0, 0))
    for field in ("grad_sqnorm", "left", "right"):
        close(field, getattr(got, field), getattr(torch32, field), getattr(exact, field))
    return got


def models(k: int, n: int, c: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[list, list]:
    sizes = [[64, 33, 200, 5][i % 4] for i in range(k)]
    hidden = [torch.randn(n, d).to(dtype) for d in sizes]
    return hidden, [(scale * torch.randn(c, d) / d**0.5).to(dtype) for d in sizes]


SHAPES = [  # (K, N, C): why
    (1, 1, 1),  # one class, one row
    (1, 17, 2),
    (1, 33, 1003),  # rows and classes no multiple of the lanes
    (2, 48, 100),  # whole vectors of rows, three at a time
    (3, 70, 257),  # 3 + 2 vectors of rows, one column past the narrow kernels
    (8, 5, 130),
    (1, 0, 10),  # no rows
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "n", "c"), SHAPES)
def test_random_models(isa: str, k: int, n: int, c: int, dtype: torch.dtype) -> None:
    for scale in (1.0, 6.0):
        hidden, weight = models(k, n, c, dtype, scale)
        assert_contract(hidden, weight, torch.randint(c, (n,)), weights=[1.0 + i for i in range(k)])


@pytest.mark.parametrize("c", [2, 111, 2050])
def test_hard_logits(isa: str, c: int) -> None:
    """Through the bias every distribution can be had: peaked, huge offsets, −inf, ties."""
    hidden, weight = models(2, 9, c)
    labels = torch.randint(c, (9,))
    peaked, masked = torch.zeros(c), torch.zeros(c)
    peaked[c // 2] = 40.0
    masked[1::2] = -math.inf
    for bias in (peaked, torch.full((c,), 1e4), torch.full((c,), -1e4), masked):
        assert_contract(hidden, weight, labels, [bias, None])
    tied = weight[0].clone()
    tied[1:] = tied[:1]
    got = assert_contract([hidden[0]], [tied], labels)
    assert bool((got.stats.prediction == 0).all())  # the lowest index


def test_confident_rows_keep_the_digits_of_one_minus_p(isa: str) -> None:
    """p_y = 1 − 1e-9: p − y in the label's column is −1e-9, which 1 minus a float32 sum would lose."""
    weight = torch.zeros(100, 4)
    weight[7, 0] = 1.0
    hidden = torch.zeros(3, 4)
    hidden[:, 0] = 25.0
    got = head_scores(hidden, weight, torch.full((3,), 7))
    with assay.backend("reference"):
        exact = head_scores(hidden.double(), weight.double(), torch.full((3,), 7))
    torch.testing.assert_close(got.grad_sqnorm.double(), exact.grad_sqnorm, rtol=1e-4, atol=0)


def test_ignored_rows(isa: str) -> None:
    hidden, weight = models(2, 40, 50)
    labels = torch.randint(50, (40,))
    labels[3] = labels[39] = -100
    got = assert_contract(hidden, weight, labels)
    assert bool(got.stats.entropy[[3, 39]].isnan().all())
    assert got.stats.prediction[3] == -1
    assert bool((got.grad_dot[:, [3, 39]] == 0).all())
    assert bool((got.left[:, 3] == 0).all())
    everything = torch.full((40,), 9)
    ignored = linear_ensemble_stats(hidden, weight, everything, ignore_index=9)
    assert bool(ignored.nll.isnan().all())


def test_nan_stays_in_its_row(isa: str) -> None:
    hidden, weight = models(1, 20, 30)
    hidden[0][4, 2] = math.nan
    labels = torch.randint(30, (20,))
    got = head_scores(hidden, weight, labels, directions=[torch.randn_like(weight[0])])
    assert got.stats.nll.isnan().nonzero().flatten().tolist() == [4]
    assert got.grad_dot.isnan().nonzero().tolist() == [[0, 4]]


def test_equals_ensemble_stats_of_the_logits() -> None:
    hidden, weight = models(3, 30, 500)
    labels = torch.randint(500, (30,))
    logits = [h @ w.T for h, w in zip(hidden, weight, strict=True)]
    fused, plain = linear_ensemble_stats(hidden, weight, labels), assay.ops.ensemble_stats(logits, labels)
    for field in FIELDS:
        torch.testing.assert_close(getattr(fused, field), getattr(plain, field), rtol=1e-5, atol=2e-6)


def test_gradients_equal_autograd_s_per_row() -> None:
    hidden, weight = models(1, 12, 37)
    labels, direction = torch.randint(37, (12,)), torch.randn_like(weight[0])
    got = head_scores(hidden, weight, labels, directions=[direction], sketch=SKETCH)
    for i in range(12):
        w = weight[0].double().requires_grad_()
        F.cross_entropy(w @ hidden[0][i].double(), labels[i]).backward()
        torch.testing.assert_close(got.grad_dot[0, i].double(), (w.grad * direction).sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.grad_sqnorm[0, i].double(), w.grad.square().sum(), rtol=1e-5, atol=1e-6)
        sketch = SKETCH.output_side(37).double() @ w.grad @ SKETCH.input_side(64).double().T
        outer = got.left[0, i].double()[:, None] * got.right[0, i].double()
        torch.testing.assert_close(outer, sketch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy_equals_autograd(isa: str, dtype: torch.dtype, with_bias: bool) -> None:
    hidden, weight = (x[0].to(dtype) for x in models(1, 40, 333, scale=3))
    bias = torch.randn(333).to(dtype) if with_bias else None
    labels = torch.randint(333, (40,))
    labels[[0, 17]] = -100
    scale = torch.rand(40)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    losses = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2] if with_bias else None)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (losses * scale).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    logits = exact[0] @ exact[1].T + (exact[2] if with_bias else 0)
    want = F.cross_entropy(logits, labels, reduction="none")
    (want * scale).sum().backward()
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    rounding = 5e-3 if dtype == torch.bfloat16 else 1e-5
    for leaf, target in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), target.grad, rtol=rounding, atol=rounding)
    assert bool((leaves[0].grad[0] == 0).all())


def test_only_what_is_asked_for() -> None:
    hidden, weight = models(2, 8, 20)
    stats = linear_ensemble_stats(hidden, weight, fields=["entropy", "prediction"])
    assert stats.nll is None
    assert stats.entropy is not None
    plain = head_scores(hidden, weight, torch.zeros(8).long(), fields=())
    assert (plain.grad_dot, plain.left, plain.right, plain.stats.nll) == (None, None, None, None)


def test_rows_do_not_depend_on_their_neighbours(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = models(2, 50, 300)
    labels = torch.randint(300, (50,))
    direction = [torch.randn_like(w) for w in weight]
    whole = head_scores(hidden, weight, labels, directions=direction)
    alone = head_scores([h[7:8] for h in hidden], weight, labels[7:8], directions=direction)
    monkeypatch.setattr(_head_backends, "SCRATCH_BYTES", 20_000)  # blocks of a few rows
    monkeypatch.setenv("ASSAY_NUM_THREADS", "1")
    small = head_scores(hidden, weight, labels, directions=direction)
    for field in FIELDS:
        assert torch.equal(getattr(whole.stats, field)[7:8], getattr(alone.stats, field))
        assert torch.equal(getattr(whole.stats, field), getattr(small.stats, field))
    assert torch.equal(whole.grad_dot[:, 7:8], alone.grad_dot)
    assert torch.equal(whole.grad_dot, small.grad_dot)


def test_the_triton_backend_agrees() -> None:
    """Through the op, under the interpreter where there is no GPU; tests/kernels looks closer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight = models(2, 9, 150)
    hidden, weight = [h.to(device) for h in hidden], [w.to(device) for w in weight]
    labels, bias = torch.randint(150, (9,), device=device), [None, torch.randn(150, device=device)]
    labels[5] = -100
    options = {"bias": bias, "directions": [torch.randn_like(w) for w in weight], "sketch": SKETCH}

    def everything() -> dict[str, Tensor]:
        scores = head_scores(hidden, weight, labels, **options)
        stats = linear_ensemble_stats(hidden, weight, labels, bias=bias)
        leaf = hidden[0].clone().requires_grad_()
        losses = linear_cross_entropy(leaf, weight[0], labels)
        losses.sum().backward()
        found = {"loss": losses.detach(), "gradient": leaf.grad, **vars(stats)}
        return found | {f: getattr(scores, f) for f in ("grad_dot", "grad_sqnorm", "left", "right")}

    with assay.backend("triton"):
        kernels = everything()
    with assay.backend("reference"):
        plain = everything()
    for name, value in plain.items():
        torch.testing.assert_close(kernels[name], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def test_strides_stacks_and_mixed_dtypes() -> None:
    hidden, weight = torch.randn(2, 64, 30), torch.randn(2, 64, 90)
    labels = torch.randint(90, (30,))
    transposed = linear_ensemble_stats(hidden.mT, weight.mT, labels, bias=torch.zeros(2, 90))
    plain = linear_ensemble_stats(hidden.mT.contiguous(), weight.mT.contiguous(), labels)
    assert torch.equal(transposed.nll, plain.nll)
    one = linear_ensemble_stats(hidden[0].T, weight[0].T, labels, bias=torch.zeros(90))
    mixed = linear_ensemble_stats(
        [hidden[0].T, hidden[0].T.bfloat16()], [weight[0].T, weight[0].T.bfloat16().float()], labels, weights=[1, 0]
    )
    torch.testing.assert_close(mixed.nll, one.nll)


def test_compiles_whole() -> None:
    hidden, weight = models(1, 12, 30)
    labels = torch.randint(30, (12,))

    def f(h: Tensor, w: Tensor) -> Tensor:
        return 2 * head_scores(h, w, labels, directions=w).grad_dot + linear_ensemble_stats(h, w, labels).nll

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden[0], weight[0]), f(hidden[0], weight[0]))


def test_a_second_derivative_is_refused_and_not_0() -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3]))
    for loss in (losses.sum(), losses.square().sum()):
        with pytest.raises(RuntimeError, match="linear_cross_entropy: has no second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True, retain_graph=True)


def test_the_loss_and_its_gradients_compile_whole() -> None:
    def f(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(2 * h, w, labels).sum()

    hidden, weight = models(1, 12, 30)
    labels = torch.randint(30, (12,))
    gradients = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [x[0].clone().requires_grad_() for x in (hidden, weight)]
        gradients.append(torch.autograd.grad(run(*leaves), leaves))
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_row_that_does_not_count_adds_nothing_to_gradients() -> None:
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 4), (9, 4), (9,)))
    labels, outer = torch.tensor([0, 3, 8, 2, 1]), torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5])
    with torch.no_grad():
        hidden[1, 2] = math.nan
        hidden[3] = math.inf
    torch.autograd.backward(linear_cross_entropy(hidden, weight, labels, bias=bias), outer)
    kept = outer != 0
    plain = [x.detach().clone().requires_grad_() for x in (hidden[kept], weight, bias)]
    F.cross_entropy(F.linear(*plain), labels[kept], reduction="none").mul(outer[kept]).sum().backward()
    torch.testing.assert_close(hidden.grad[kept], plain[0].grad)
    assert bool((hidden.grad[~kept] == 0).all())
    torch.testing.assert_close(weight.grad, plain[1].grad)
    torch.testing.assert_close(bias.grad, plain[2].grad)


def test_memory_stays_far_below_the_logits() -> None:
    """Two models' logits would take 536 MB; the op takes less than 64."""
    code = """
import torch
from assay.ops import linear_ensemble_stats
def field(name): return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
hidden, weight, labels = torch.randn(2, 1024, 32), torch.randn(2, 65536, 32), torch.randint(65536, (1024,))
linear_ensemble_stats(hidden[:, :16], weight, labels[:16])
open("/proc/self/clear_refs", "w").write("5")
before = field("VmRSS")
linear_ensemble_stats(hidden, weight, labels)
print(field("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr:
        pytest.skip("this kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 64 * 1024, f"{int(run.stdout) / 1024:.0f} MB"


def test_errors_name_what_is_wrong() -> None:
    h, w, y = torch.randn(4, 8), torch.randn(10, 8), torch.zeros(4).long()
    with pytest.raises(ValueError, match=r"weight\[0\]: expected shape \(10, 8\).*got \(10, 7\)"):
        linear_ensemble_stats(h, w[:, :7], y)
    with pytest.raises(ValueError, match="one matrix per model, 2, got 1"):
        linear_ensemble_stats([h, h], [w], y)
    with pytest.raises(ValueError, match=r"directions\[0\]: expected shape \(10, 8\)"):
        head_scores(h, w, y, directions=w[:5])
    with pytest.raises(ValueError, match="bias: expected one per model, 1, got 2"):
        head_scores(h, w, y, bias=torch.zeros(2, 10))
    with pytest.raises(TypeError, match="expected float32, bfloat16 or float16, got"):
        linear_ensemble_stats(h.long(), w, y)
    with pytest.raises(IndexError, match="got 10 in row 1"):
        head_scores(h, w, torch.tensor([0, 10, 0, 0]))
    with pytest.raises(ValueError, match="expected at least one class"):
        linear_ensemble_stats(h, w[:0], y)
