"""linear_ensemble_stats and head_scores on the GPU against float64 on logits that are multiplied out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import assay
from assay.ops.ensemble import FIELDS, LABEL_FIELDS
from tests.gpu.harness import (
    DTYPES,
    assert_close,
    assert_same,
    assert_stats,
    assert_within,
    here,
    kernel,
    needs_memory,
    peak_bytes,
    row,
    unaligned,
)

linear_ensemble_stats, head_scores = kernel("linear_ensemble_stats"), kernel("head_scores")
linear_cross_entropy = kernel("linear_cross_entropy")

ONE_SWEEP = ("nll", "mean_nll", "agreement", "expected_entropy", "vote_entropy")
SHAPES = [  # (N, [D_k], C): why
    (1, [1], 1),  # one of everything
    (99, [8], 2),
    (17, [64, 64, 64], 111),  # a vocabulary narrower than a tile
    (64, [100], 1000),  # D no multiple of a tile
    (65, [64, 33], 4099),  # models of different widths; one row and three columns past a tile
    (5, [16] * 8, 513),  # eight models
    *here([(130, [576], 49_152), (64, [576, 960], 49_152), (33, [2048], 128_256), (16, [768], 50_257)], []),
    *here([(8, [256, 256], 151_936), (8, [256], 262_144)], []),  # the vocabularies there are
]


@dataclass
class Heads:
    """K output layers and what goes into them."""

    hidden: list[Tensor]
    weight: list[Tensor]
    bias: list[Tensor] | None
    labels: Tensor

    def _logits(self, dtype: torch.dtype | None) -> list[Tensor]:
        out = []
        for k, (h, w) in enumerate(zip(self.hidden, self.weight, strict=True)):
            # The weight piece by piece: a float64 copy of it would be its own reason to run out of memory.
            z = torch.cat([h.to(dtype or h.dtype) @ piece.to(dtype or w.dtype).T for piece in w.split(2**14)], 1)
            out.append(z if self.bias is None else z + self.bias[k].to(z.dtype))
        return out

    @property
    def exact(self) -> list[Tensor]:
        return self._logits(torch.float64)

    @property
    def plain(self) -> list[Tensor]:
        """As torch in the same dtype has them: rounded to that dtype."""
        return self._logits(None)

    @property
    def rounding(self) -> Tensor:
        """(N,): a logit is a float32 sum of D products and rounds at their magnitude, not at its own."""
        sizes = [
            h.float().norm(dim=1) * w.norm(dim=1, dtype=torch.float32).max()
            for h, w in zip(self.hidden, self.weight, strict=True)
        ]
        return torch.stack(sizes).amax(0).double()


def heads(
    n: int, dims: list[int], c: int, dtype: torch.dtype, device: torch.device, *, bias: bool = False, size: float = 3.0
) -> Heads:
    """Logits of standard deviation ``size``, as language models have about 3."""
    return Heads(
        [torch.randn(n, d, device=device).to(dtype) for d in dims],
        [(torch.randn(c, d, device=device) * (size / d**0.5)).to(dtype) for d in dims],
        [torch.randn(c, device=device).to(dtype) for _ in dims] if bias else None,
        torch.randint(c, (n,), device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dims", "c"), SHAPES)
def test_statistics(n: int, dims: list[int], c: int, dtype: torch.dtype, device: torch.device) -> None:
    """One model without a bias, several with: each combination costs seconds of compiling."""
    weights = [1.0 + k for k in range(len(dims))]
    x = heads(n, dims, c, dtype, device, bias=len(dims) > 1)
    for fields in (ONE_SWEEP, None):
        got = linear_ensemble_stats(x.hidden, x.weight, x.labels, bias=x.bias, weights=weights, fields=fields)
        assert [f for f in FIELDS if getattr(got, f) is not None] == [f for f in FIELDS if f in (fields or FIELDS)]
        what = f"fields={fields or 'all'}"
        assert_stats(got, x.exact, x.labels, weights, plain=x.plain, rounding=x.rounding, what=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", here([1, 63, 129, 1001, 50_257], [1, 63, 129]))
def test_padding_of_the_vocabulary(c: int, dtype: torch.dtype, device: torch.device) -> None:
    """All logits far below 0, one or all of them possible: a column padded without a mask would be e⁰ among e⁻²⁰⁰."""
    for size in (0.1, 8.0):
        x = heads(33, [48, 48], c, dtype, device, size=size)
        x.bias = [torch.full((c,), -200.0, device=device).to(dtype) for _ in x.hidden]
        x.bias[1][c // 2] = 0
        got = linear_ensemble_stats(x.hidden, x.weight, x.labels, bias=x.bias)
        assert_stats(got, x.exact, x.labels, plain=x.plain, rounding=x.rounding + 200, what=f"size {size}")
    x.bias = [torch.randn(c, device=device).to(dtype) for _ in x.hidden]
    for b in x.bias:
        b[1::2] = -torch.inf
    got = linear_ensemble_stats(x.hidden, x.weight, x.labels, bias=x.bias)
    assert_stats(got, x.exact, x.labels, plain=x.plain, rounding=x.rounding, what="half of the classes impossible")


def test_labels_and_forms_of_input(device: torch.device) -> None:
    x = heads(40, [64, 64], 777, torch.bfloat16, device)
    full = linear_ensemble_stats(x.hidden, x.weight, x.labels)
    ignored = x.labels.clone()
    ignored[::3] = 5000
    got, seen = linear_ensemble_stats(x.hidden, x.weight, ignored, ignore_index=5000), ignored != 5000
    unlabelled = linear_ensemble_stats(x.hidden, x.weight)
    for field in FIELDS[:-1]:
        assert bool(getattr(got, field)[~seen].isnan().all()), field
        assert_same(getattr(got, field)[seen], getattr(full, field)[seen], field)
        if field in LABEL_FIELDS:
            assert bool(getattr(unlabelled, field).isnan().all()), field
        else:
            assert_close(getattr(unlabelled, field), getattr(full, field), field)
    stacked = linear_ensemble_stats(torch.stack(x.hidden), torch.stack(x.weight), x.labels)
    assert_same(stacked, full, "tensors (K, N, D) and (K, C, D)")
    empty = linear_ensemble_stats([h[:0] for h in x.hidden], x.weight, x.labels[:0])
    assert empty.nll.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, device: torch.device) -> None:
    x = heads(24, [96], 500, dtype, device)
    want = head_scores(x.hidden, x.weight, x.labels, directions=x.weight)
    views = {
        "transposed weight": (x.hidden[0], x.weight[0].T.contiguous().T),
        "slices": (torch.cat([x.hidden[0]] * 2, 1)[:, :96], x.weight[0].repeat_interleave(2, 0)[::2]),
        "every second": (x.hidden[0].repeat_interleave(2, 1)[:, ::2], x.weight[0].repeat_interleave(2, 1)[:, ::2]),
        "unaligned": (unaligned(x.hidden[0]), unaligned(x.weight[0])),
    }
    for name, (h, w) in views.items():
        assert_close(head_scores([h], [w], x.labels, directions=[w]), want, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dims", "c"), SHAPES)
def test_head_scores(n: int, dims: list[int], c: int, dtype: torch.dtype, device: torch.device) -> None:
    x = heads(n, dims, c, dtype, device, bias=len(dims) > 1)
    directions = [torch.randn(c, d, device=device).to(dtype) for d in dims]
    sketch = assay.Kronecker(16, 8, seed=3)
    labels = x.labels.clone()
    labels[n // 2] = -100 if n > 1 else labels[0]
    got = head_scores(x.hidden, x.weight, labels, bias=x.bias, directions=directions, sketch=sketch)
    assert_stats(got.stats, x.exact, labels, plain=x.plain, rounding=x.rounding, what="head_scores")
    seen = (labels != -100).double()[:, None]
    projection = sketch.output_side(c).to(device)  # (16, C), made on the CPU: the kernel must draw the same signs
    for k, d in enumerate(dims):
        h, v = x.hidden[k].double(), directions[k].double()
        onehot = torch.nn.functional.one_hot(x.labels, c)
        residuals = [(z[k].double().softmax(-1) - onehot) * seen for z in (x.exact, x.plain)]  # p − y, (N, C)
        reach = x.rounding.clamp(min=1)  # how far the logits' rounding carries into p

        def check(field: str, function: object, scale: Tensor, k: int = k, residuals: list[Tensor] = residuals) -> None:
            exact, plain = (function(r) for r in residuals)  # type: ignore[operator]
            assert_within(getattr(got, field)[k], exact, plain, scale, f"{field}, model {k}")

        norm = h.norm(dim=1)
        check("grad_sqnorm", lambda r, h=h: r.square().sum(1) * h.square().sum(1), norm**2 * reach)
        check("grad_dot", lambda r, h=h, v=v: (r * (h @ v.T)).sum(1), norm * v.norm(dim=1).max() * reach)
        check("left", lambda r: r @ projection.double().T, reach[:, None])
        right = h @ sketch.input_side(d).to(device).double().T
        plain = (x.hidden[k].float() @ sketch.input_side(d).to(device).T).double()
        assert_within(got.right[k], right, plain, norm[:, None], f"right, model {k}")


def test_head_scores_only_what_is_asked(device: torch.device) -> None:
    x = heads(20, [32], 300, torch.float32, device)
    bare = head_scores(x.hidden, x.weight, x.labels)
    assert bare.grad_dot is None
    assert bare.left is None
    assert bare.right is None
    full = head_scores(x.hidden, x.weight, x.labels, directions=x.weight, sketch=assay.Kronecker(5, 3))
    assert_close(full, bare, "with more beside it")


@pytest.mark.parametrize(("dims", "c"), here([([576], 49_152), ([256, 128], 128_256)], [([32], 500), ([24, 16], 700)]))
def test_same_bits_every_run_and_alone(dims: list[int], c: int, device: torch.device) -> None:
    x = heads(70, dims, c, torch.bfloat16, device)
    sketch = assay.Kronecker(16, 16)

    def run(rows: slice = slice(None)) -> object:
        return head_scores([h[rows] for h in x.hidden], x.weight, x.labels[rows], directions=x.weight, sketch=sketch)

    first = run()
    for _ in range(here(20, 3)):
        assert_same(run(), first, "another run")
    for i in here((0, 31, 69), ()):  # the CPU's GEMM blocks rows together
        alone, together = run(slice(i, i + 1)), row(first, i)
        for field in ("stats", "grad_sqnorm", "grad_dot", "left"):  # `right` is torch's GEMM
            assert_same(getattr(alone, field), getattr(together, field), f"row {i} alone, {field}")


@pytest.mark.parametrize("k", [1, 2])
def test_memory_stays_under_a_hundredth_of_the_logits(k: int, device: torch.device) -> None:
    needs_memory(16)
    n, d, c = here((8192, 2048, 128_256), (64, 32, 500))
    x = heads(n, [d] * k, c, torch.bfloat16, device)
    logits = k * n * c * 2  # bytes, had they been stored
    runs = {
        "one sweep": lambda: linear_ensemble_stats(x.hidden, x.weight, x.labels, fields=ONE_SWEEP),
        "all fields": lambda: linear_ensemble_stats(x.hidden, x.weight, x.labels),
        "head_scores": lambda: head_scores(
            x.hidden, x.weight, x.labels, directions=x.weight, sketch=assay.Kronecker(16, 16)
        ),
    }
    for name, run in runs.items():
        peak = peak_bytes(run)
        assert 0 < peak <= logits / 100, f"{name}: {peak:,} bytes beside {logits:,} of logits"


def losses(x: Heads, labels: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Each row's loss, and the gradient of their sum in the hidden states, rounded to their dtype."""
    leaf = x.hidden[0][rows].detach().requires_grad_()
    bias = None if x.bias is None else x.bias[0]
    loss = linear_cross_entropy(leaf, x.weight[0], labels[rows], bias=bias)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "c"), [(n, dims[0], c) for n, dims, c in SHAPES if c > 1])
def test_linear_cross_entropy(n: int, d: int, c: int, dtype: torch.dtype, device: torch.device) -> None:
    x = heads(n, [d], c, dtype, device, bias=n % 2 == 0)
    labels = x.labels.clone()
    labels[n // 2] = -100 if n > 1 else labels[0]
    loss, gradient = losses(x, labels)
    seen = labels != -100
    assert bool((loss[~seen] == 0).all())
    assert bool((gradient[~seen] == 0).all())
    exact, plain = (z[0].double() for z in (x.exact, x.plain))
    weight, onehot = x.weight[0].double(), torch.nn.functional.one_hot(x.labels, c)
    reach = x.rounding.clamp(min=1)
    want, rough = (torch.nn.functional.cross_entropy(z, x.labels, reduction="none") for z in (exact, plain))
    assert_within(loss[seen], want[seen], rough[seen], torch.maximum(want, reach)[seen], "loss")
    residuals = [z.softmax(-1) - onehot for z in (exact, plain)]
    want, rough = (r @ weight for r in residuals)
    scale = (weight.norm(dim=1).max() * reach)[:, None]
    # The residuals' own rounding, to nearest, before they meet the weight on tensor cores; and the result's.
    half_step = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    step = half_step * (residuals[0].abs() @ weight.abs() + want.abs())
    error = (gradient.double() - want).abs()[seen]
    allowed = ((rough - want).abs() + 2e-6 * scale + step)[seen]
    assert bool((error <= allowed).all()), f"gradient: {float((error / allowed).max()):.2f} of what is allowed"


@pytest.mark.parametrize(("d", "c"), here([(576, 49_152), (64, 1000)], [(24, 700)]))
def test_a_rows_loss_and_gradient_are_its_own(d: int, c: int, device: torch.device) -> None:
    """In eight panels of rows as alone, and on every run."""
    n = here(8192, 300)
    x = heads(n, [d], c, torch.bfloat16, device)
    first = losses(x, x.labels)
    for _ in range(here(5, 2)):
        for a, b, what in zip(losses(x, x.labels), first, ("loss", "gradient"), strict=True):
            assert_same(a, b, f"another run, {what}")
    for i in here((0, 1023, 1024, 8191), ()):  # the CPU's GEMM blocks rows together
        for a, b, what in zip(losses(x, x.labels, slice(i, i + 1)), first, ("loss", "gradient"), strict=True):
            assert_same(a[0], b[i], f"row {i} alone, {what}")


def test_losses_in_little_memory(device: torch.device) -> None:
    """Beside the gradient, 1 % of the logits and sums of a chunk's splits, no larger than the gradient."""
    needs_memory(8)
    n, d, c = here((8192, 576, 49_152), (64, 32, 500))
    x = heads(n, [d], c, torch.bfloat16, device)
    peak = peak_bytes(lambda: losses(x, x.labels))
    assert 0 < peak <= 0.02 * n * c * 2 + 3 * n * d * 4


def test_beyond_int32(device: torch.device) -> None:
    """A weight of more than 2³¹ elements; the logits of its last columns count as much as those of the first."""
    needs_memory(24)
    n, d, c = here((16, 8192, 262_400), (4, 16, 300))
    hidden = torch.randn(n, d, device=device).bfloat16()
    weight = torch.empty(c, d, dtype=torch.bfloat16, device=device).normal_(std=3 / d**0.5)
    assert here(weight.numel(), 2**32) > 2**31
    x = Heads([hidden], [weight], None, c - 1 - torch.arange(n, device=device))
    got = head_scores(x.hidden, x.weight, x.labels, directions=x.weight)
    assert_stats(got.stats, x.exact, x.labels, plain=x.plain, rounding=x.rounding, what="statistics")
    z = x.exact[0]
    residual = z.softmax(-1) - torch.nn.functional.one_hot(x.labels, c)
    plain = x.plain[0].double()
    rough = plain.softmax(-1) - torch.nn.functional.one_hot(x.labels, c)
    scale = hidden.double().norm(dim=1) * weight.norm(dim=1, dtype=torch.float32).max().double() * x.rounding
    dot = (residual * z).sum(1)  # the weight itself as the direction: its products are the logits
    assert_within(got.grad_dot[0], dot, (rough * plain).sum(1), scale, "grad_dot")
