"""Distillation from hidden states against torch's divergence of stored logits in float64, on every instruction set."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import assay
from assay.ops import _distillation_backends as backends
from assay.ops import linear_distillation
from tests.ops.test_memory import peak_bytes

N, C = 40, 333
INF = math.inf


@dataclass(frozen=True)
class Models:
    """Student and teachers; what is None is left out."""

    student: tuple[Tensor, Tensor, Tensor | None]
    teachers: tuple[list[Tensor], list[Tensor], list[Tensor | None]]
    shares: list[float] | None = None

    def op(self, **options: object) -> Tensor:
        hidden, weight, bias = self.student
        th, tw, tb = self.teachers
        return linear_distillation(
            hidden, weight, th, tw, bias=bias, teacher_bias=tb, teacher_weights=self.shares, **options
        )

    def leaves(self, dtype: torch.dtype | None = None, device: str = "cpu") -> Models:
        """The same numbers, whose student asks for gradients; in ``dtype`` if there is one."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(device, dtype or x.dtype, copy=True)

        student = tuple(None if x is None else of(x).requires_grad_() for x in self.student)
        return replace(self, student=student, teachers=tuple([of(x) for x in xs] for xs in self.teachers))

    def stored(self, temperature: float = 1.0, reverse: bool = False) -> Tensor:
        """By torch, with the logits of all."""
        log_p = (logits(*self.student) / temperature).log_softmax(1)
        shares = torch.tensor(self.shares or [1.0] * len(self.teachers[0]), dtype=log_p.dtype)
        each = [(logits(*t) / temperature).log_softmax(1) for t in zip(*self.teachers, strict=True)]
        log_q = torch.stack([q + (s / shares.sum()).log() for q, s in zip(each, shares, strict=True)]).logsumexp(0)
        first, second = (log_p, log_q) if reverse else (log_q, log_p)
        return temperature**2 * F.kl_div(second, first, reduction="none", log_target=True).sum(1)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden @ weight.T + (0 if bias is None else bias)


def models(k: int, dtype: torch.dtype = torch.float32, bias: bool = False, n: int = N, c: int = C) -> Models:
    def one(d: int, with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = 2 * torch.randn(c, d) / d**0.5
        return torch.randn(n, d).to(dtype), weight.to(dtype), torch.randn(c).to(dtype) if with_bias else None

    teachers = [one(d, bias and d != 5) for d in (17, 5, 64)[:k]]
    return Models(one(33, bias), tuple(map(list, zip(*teachers, strict=True))), [1.0, 2.0, 0.5][:k])


CASES = [  # K, T, reverse, bias
    (1, 1.0, False, False),
    (3, 2.0, False, True),
    (1, 2.0, True, True),
    (3, 1.0, True, False),
]


def gradients(losses: Tensor, leaves: Sequence[Tensor | None], outer: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((losses * outer).sum(), [x for x in leaves if x is not None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("k", "temperature", "reverse", "bias"), CASES)
def test_values_and_gradients_are_those_of_stored_logits(
    isa: str, k: int, temperature: float, reverse: bool, bias: bool, dtype: torch.dtype
) -> None:
    some, outer = models(k, dtype, bias).leaves(), torch.rand(N)
    got = some.op(temperature=temperature, reverse=reverse)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = some.leaves(torch.float64)
    want = exact.stored(temperature, reverse)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    rounding = 5e-3 if dtype == torch.bfloat16 else 1e-5  # a gradient in bfloat16 has 8 bits
    theirs = gradients(want, exact.student, outer.double())
    for mine, their, leaf in zip(gradients(got, some.student, outer), theirs, some.student, strict=False):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(mine.double(), their, rtol=rounding, atol=rounding)


def test_the_plain_backend_agrees() -> None:
    """What a GPU runs, on one if there is: blocks in plain torch, whose 16-bit weights are widened in pieces."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        some, outer = models(3, dtype, True).leaves(), torch.rand(N)
        there = some.leaves(device=device)
        native = some.op(temperature=2.0)
        with assay.backend("auto" if device == "cuda" else "reference"):
            plain = there.op(temperature=2.0)
            theirs = gradients(plain, there.student, outer.to(device))
        torch.testing.assert_close(native, plain.cpu(), rtol=1e-5, atol=1e-5)
        for mine, their in zip(gradients(native, some.student, outer), theirs, strict=True):
            torch.testing.assert_close(mine.float(), their.cpu().float(), rtol=rounding, atol=1e-5)


def test_a_teacher_equal_to_the_student_gives_nothing() -> None:
    hidden, weight, _ = models(1).student
    for reverse in (False, True):
        leaf = hidden.clone().requires_grad_()
        losses = linear_distillation(leaf, weight, [hidden, hidden], [weight, weight], reverse=reverse)
        losses.sum().backward()
        assert bool((losses >= 0).all())
        assert float(losses.detach().max()) < 1e-6
        assert float(leaf.grad.abs().max()) < 1e-6


def excluding(some: Models, student: Sequence[int] = (), teacher: Sequence[int] = (), k: int = 0) -> Models:
    """The classes that are impossible get −inf through the bias."""
    biases = [torch.zeros(C), torch.zeros(C)]
    for bias, classes in zip(biases, (student, teacher), strict=True):
        bias[list(classes)] = -INF
    th, tw, tb = some.teachers
    tb = [biases[1] if i == k else b for i, b in enumerate(tb)]
    return replace(some, student=(*some.student[:2], biases[0]), teachers=(th, tw, tb))


def test_impossible_classes(isa: str) -> None:
    """0 · log 0 = 0: finite where the first distribution excludes more than the second, +inf the other way round."""
    both, more = [3, 4, 200], [3, 4, 200, 7]
    for k in (1, 3):
        some = models(k)
        every = excluding(some, both, more) if k == 1 else excluding(some, [], more)
        for reverse in (False, True):
            excluded = every if not reverse else excluding(some, more, both) if k == 1 else excluding(some, more)
            leaves = excluded.leaves()
            losses = leaves.op(reverse=reverse)
            assert bool(losses.isfinite().all()), (k, reverse)
            grown = gradients(losses, leaves.student, torch.ones(N))
            assert all(bool(g.isfinite().all()) for g in grown)
            # the same numbers without −inf: a logit so low that exp makes 0 of it
            low = replace(excluded, student=tuple(x.clamp(min=-1e4) for x in excluded.student))
            low = replace(
                low, teachers=(*low.teachers[:2], [None if b is None else b.clamp(min=-1e4) for b in low.teachers[2]])
            )
            same = low.leaves(torch.float64)
            want = same.stored(reverse=reverse)
            torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
            for mine, their in zip(grown, gradients(want, same.student, torch.ones(N).double()), strict=True):
                torch.testing.assert_close(mine.double(), their, rtol=1e-5, atol=1e-5)
    one = models(1)
    assert bool((excluding(one, student=[5]).op() == INF).all())
    assert bool((excluding(one, teacher=[5]).op(reverse=True) == INF).all())
    assert bool(excluding(models(3), teacher=[5]).op(reverse=True).isfinite().all())  # the others allow it
    # a teacher's e^-200 is 0 in float32, and yet not impossible
    slim = excluding(one, student=[5])
    slim.teachers[2][0] = torch.zeros(C).index_fill_(0, torch.tensor([5]), -200.0)
    assert bool((slim.op() == INF).all())


def test_huge_and_peaked_logits(isa: str) -> None:
    some = models(2)
    for shift in (torch.full((C,), 1e4), torch.full((C,), -1e4), 60 * F.one_hot(torch.tensor(9), C).float()):
        for reverse in (False, True):
            shifted = replace(some, student=(*some.student[:2], shift))
            want = shifted.leaves(torch.float64).stored(reverse=reverse).detach()
            with assay.backend("reference"):
                torch32 = shifted.op(reverse=reverse)
            error, theirs = (shifted.op(reverse=reverse) - want).abs(), (torch32 - want).abs()
            assert bool((error <= 1.5 * theirs.max() + 2e-6 * want.clamp(min=1)).all())


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_that_is_no_number_stays_alone(bad: float, reverse: bool) -> None:
    for whose in ("student", "teacher"):
        some = models(2)
        (some.student[0] if whose == "student" else some.teachers[0][1])[4, 2] = bad
        leaves = some.leaves()
        losses = leaves.op(reverse=reverse)
        assert losses.isnan().nonzero().flatten().tolist() == [4]
        outer = torch.rand(N).index_fill_(0, torch.tensor([4]), 0)
        masked = gradients(losses[outer > 0], leaves.student, outer[outer > 0])
        rows = torch.arange(N) != 4
        th, tw, tb = some.teachers
        others = replace(
            some, student=(some.student[0][rows], *some.student[1:]), teachers=([h[rows] for h in th], tw, tb)
        )
        clean = others.leaves(torch.float64)
        want = gradients(clean.stored(reverse=reverse), clean.student, outer[rows].double())
        torch.testing.assert_close(masked[1].double(), want[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(masked[0][rows].double(), want[0], rtol=1e-5, atol=1e-5)
        assert bool((masked[0][4] == 0).all())
        alone = gradients(leaves.op(reverse=reverse), leaves.student[:1], torch.ones(N))[0]
        assert alone.isnan().any(1).nonzero().flatten().tolist() == [4]


def test_rows_do_not_depend_on_their_neighbours(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some = models(3)

    def rows(which: slice) -> Tensor:
        th, tw, tb = some.teachers
        part = replace(some, student=(some.student[0][which], *some.student[1:]))
        return replace(part, teachers=([h[which] for h in th], tw, tb)).op()

    whole, alone = rows(slice(None)), rows(slice(7, 8))
    monkeypatch.setattr(backends, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(backends, "CPU_PIECE", 1000)
    monkeypatch.setenv("ASSAY_NUM_THREADS", "1")
    small = rows(slice(None))
    assert torch.equal(whole[7:8], alone)
    assert torch.equal(whole, small)


def test_tiles_of_the_weight_s_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    some, outer = models(2, bias=True).leaves(), torch.rand(N)
    whole = gradients(some.op(reverse=True), some.student, outer)
    monkeypatch.setattr(backends, "TILE_BYTES", 100_000)
    monkeypatch.setattr(backends, "MAX_ROWS", 16)
    for mine, their in zip(gradients(some.op(reverse=True), some.student, outer), whole, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)


def test_no_rows_one_class_and_a_teacher_without_a_share() -> None:
    none = models(2, n=0, bias=True).leaves()
    losses = none.op()
    assert losses.shape == (0,)
    assert [g.shape for g in gradients(losses, none.student, torch.ones(0))] == [(0, 33), (C, 33), (C,)]
    single = models(1, c=1)
    assert bool((single.op() == 0).all())
    some = models(3)
    some.teachers[0][0][:] = math.nan
    first = replace(some, shares=[0.0, 2.0, 0.5]).leaves()
    others = replace(some, teachers=tuple(x[1:] for x in some.teachers), shares=[2.0, 0.5]).leaves()
    losses, want = first.op(), others.op()
    assert torch.equal(losses, want)
    for mine, their in zip(
        *(gradients(x, m.student, torch.ones(N)) for x, m in ((losses, first), (want, others))), strict=True
    ):
        assert torch.equal(mine, their)


def test_strides_stacks_and_mixed_dtypes() -> None:
    hidden, weight, teacher, vocabulary = (
        torch.randn(8, N),
        torch.randn(8, C),
        torch.randn(2, 8, N),
        torch.randn(2, 8, C),
    )
    got = linear_distillation(hidden.T, weight.T, teacher.mT, vocabulary.mT, teacher_bias=torch.zeros(2, C))
    plain = [x.mT.contiguous() for x in (hidden, weight, teacher, vocabulary)]
    assert torch.equal(got, linear_distillation(*plain))
    one = linear_distillation(plain[0], plain[1], plain[2][0], plain[3][0])
    mixed = linear_distillation(plain[0], plain[1], [plain[2][0].double().float()], [plain[3][0]])
    assert torch.equal(one, mixed)
    narrow = plain[2][0].bfloat16()
    torch.testing.assert_close(
        linear_distillation(plain[0], plain[1], narrow, plain[3][0]),
        linear_distillation(plain[0], plain[1], narrow.float(), plain[3][0]),
    )


def test_only_the_student_is_differentiated_and_only_once() -> None:
    some = models(1).leaves()
    teachers = [x[0].requires_grad_() for x in some.teachers[:2]]
    hidden, weight, _ = some.student
    losses = linear_distillation(hidden, weight, *teachers)
    for loss in (losses.sum(), losses.square().sum()):
        with pytest.raises(RuntimeError, match="linear_distillation: has no second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True, retain_graph=True)
    losses = linear_distillation(hidden, weight, *teachers)
    losses.sum().backward()
    assert teachers[0].grad is None
    with torch.no_grad():
        assert not linear_distillation(hidden, weight, *teachers).requires_grad
    assert not linear_distillation(hidden.detach(), weight.detach(), *teachers).requires_grad


def test_the_loss_and_its_gradients_compile_whole() -> None:
    some = models(2)

    def f(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_distillation(2 * hidden, weight, *some.teachers[:2], temperature=2.0, reverse=True).sum()

    found = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in some.student[:2]]
        found.append(torch.autograd.grad(run(*leaves), leaves))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_errors_name_the_remedy() -> None:
    h, w, t, v = torch.randn(4, 8), torch.randn(10, 8), torch.randn(4, 3), torch.randn(12, 3)
    with pytest.raises(
        ValueError, match=r"teacher_weight\[0\]: expected the 10 classes .* got 12.*teacher_weight\[0\]\[:10\]"
    ):
        linear_distillation(h, w, t, v)
    with pytest.raises(
        ValueError, match=r"teacher_weight\[0\]: expected the 10 classes .* got 9; .* off: weight\[:9\]"
    ):
        linear_distillation(h, w, t, v[:9])
    with pytest.raises(ValueError, match=r"teacher_hidden\[0\]: expected shape \(4, 3\) on cpu, got \(3, 3\)"):
        linear_distillation(h, w, t[:3], v[:10])
    with pytest.raises(ValueError, match="teacher_bias: expected one per model, 1, got 2"):
        linear_distillation(h, w, t, v[:10], teacher_bias=torch.zeros(2, 10))
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got 0"):
        linear_distillation(h, w, t, v[:10], temperature=0)


def test_scratch_is_bounded() -> None:
    """The allocator's own count: of the logits of three models, 4 MB each, a part in forward and backward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "SCRATCH_BYTES", 1 << 18)
        patch.setattr(backends, "TILE_BYTES", 1 << 18)
        patch.setattr(backends, "CPU_PIECE", 1 << 13)
        some = models(2, n=128, c=8192).leaves()
        held = peak_bytes(lambda: some.op(temperature=2.0).detach())
        assert held < 500_000, f"{held:,}"  # beside the gradient in hidden, which waits

        def both() -> list[Tensor]:
            return gradients(some.op(), some.student, torch.ones(128))

        assert peak_bytes(both) < 500_000


@pytest.mark.slow
def test_memory_stays_far_below_the_logits() -> None:
    """At V = 128k and 4,096 rows the student's logits take 2.1 GB, and forward and backward less than 2 % of that.

    Beside inputs and results, among them the gradient in the hidden states; of the process as the kernel sees it.
    """
    code = """
import torch
from assay.ops import linear_distillation
def field(name): return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
N, V = 4096, 131072
hidden, weight = torch.randn(N, 16).requires_grad_(), torch.randn(V, 16).requires_grad_()
teachers = [torch.randn(N, 8), torch.randn(N, 4)], [torch.randn(V, 8), torch.randn(V, 4)]
linear_distillation(hidden[:16], weight, [t[:16] for t in teachers[0]], teachers[1]).sum().backward()
hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
open("/proc/self/clear_refs", "w").write("5")
before = field("VmRSS")
linear_distillation(hidden, weight, *teachers).sum().backward()
print(field("VmHWM") - before - (hidden.nbytes + weight.nbytes) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr:
        pytest.skip("this kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    share = int(run.stdout) * 1024 / (4 * 4096 * 131072)
    assert share < 0.02, f"{share:.2%}, {int(run.stdout) / 1024:.0f} MB"
