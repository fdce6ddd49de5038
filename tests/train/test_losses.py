"""Losses with which small models help large ones, against torch's on stored logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import assay
from assay.train.losses import confidence, distillation, distillation_of_logits, performance_gap_recovered, ramp

N, C, D = 12, 9, 5


def student(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, C, dtype=torch.float64).mul(3).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 2.0), (1, 2.0), (3, 1.0)])
def test_distillation_of_logits_is_torch_s_divergence(
    k: int, temperature: float, reverse: bool, dtype: torch.dtype
) -> None:
    logits, teachers, outer = student(dtype), torch.randn(k, N, C).to(dtype), torch.rand(N)
    shares = [2.0, 1.0, 1.0][:k]
    losses = distillation_of_logits(logits, teachers, teacher_weights=shares, temperature=temperature, reverse=reverse)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = logits.detach().double().requires_grad_()
    log_p = (exact / temperature).log_softmax(1)
    weights = torch.tensor(shares).double()[:, None, None] / sum(shares)
    log_q = (weights * (teachers.double() / temperature).softmax(-1)).sum(0).log()
    first, second = (log_p, log_q) if reverse else (log_q, log_p)
    want = temperature**2 * F.kl_div(second, first, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad((losses * outer).sum(), logits)
    (theirs,) = torch.autograd.grad((want * outer).sum(), exact)
    assert mine.dtype == dtype
    rounding = 5e-3 if dtype == torch.bfloat16 else 1e-5  # of the gradient, which has 8 bits
    torch.testing.assert_close(mine.double(), theirs, rtol=rounding, atol=rounding)


def test_both_distillations_agree() -> None:
    hidden, weight = torch.randn(N, D).requires_grad_(), torch.randn(C, D)
    teachers = [torch.randn(N, 3), torch.randn(N, 4)], [torch.randn(C, 3), torch.randn(C, 4)]
    stored = [h @ w.T for h, w in zip(*teachers, strict=True)]
    for reverse in (False, True):
        options = {"teacher_weights": [0.2, 0.8], "temperature": 3.0, "reverse": reverse}
        fused = distillation(hidden, weight, *teachers, **options)
        plain = distillation_of_logits(hidden @ weight.T, stored, **options)
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sum(), hidden)[0] for x in (fused, plain)), rtol=1e-5, atol=1e-5
        )


def test_impossible_classes_no_numbers_and_no_rows() -> None:
    logits, teacher = student(), torch.randn(N, C)
    with torch.no_grad():
        logits[:, 2] = -math.inf
        logits[4, 0] = math.nan
        logits[6, 1] = math.inf
        logits[8] = -math.inf
    teacher[:, [2, 5]] = -math.inf
    losses = distillation_of_logits(logits, teacher)
    numbers = torch.tensor([i not in (4, 6, 8) for i in range(N)])
    assert torch.equal(losses.isfinite(), numbers)
    assert bool(losses[~numbers].isnan().all())
    assert bool((distillation_of_logits(logits, teacher, reverse=True)[numbers] == math.inf).all())
    (gradient,) = torch.autograd.grad(losses[numbers].sum(), logits)
    assert bool((gradient[~numbers] == 0).all())
    p, q = (x.detach().softmax(1) for x in (logits, teacher))
    torch.testing.assert_close(gradient[numbers], (p - q)[numbers])
    narrow = teacher.clone()
    narrow[:, 2] = 0.0
    assert bool((distillation_of_logits(logits, narrow)[numbers] == math.inf).all())
    assert distillation_of_logits(torch.randn(0, C), torch.randn(2, 0, C)).shape == (0,)


def test_teachers_are_held_fixed_and_what_is_given_stays_as_it_was() -> None:
    logits, teacher = student(), torch.randn(N, C).requires_grad_()
    before = logits.detach().clone(), teacher.detach().clone()
    distillation_of_logits(logits, teacher).sum().backward()
    assert teacher.grad is None
    assert torch.equal(logits, before[0])
    assert torch.equal(teacher, before[1])


def test_distillation_s_errors_name_the_remedy() -> None:
    logits = torch.randn(4, 10)
    for columns, remedy in ((12, r"teacher_logits\[0\]\[:, :10\]"), (9, r"logits\[:, :9\]")):
        with pytest.raises(
            ValueError, match=rf"teacher_logits\[0\]: expected shape \(4, 10\).*slice them off: {remedy}"
        ):
            distillation_of_logits(logits, torch.randn(4, columns))
    with pytest.raises(
        ValueError, match=r"teacher_logits\[1\]: expected shape \(4, 10\) on cpu, .* got \(3, 10\) on cpu$"
    ):
        distillation_of_logits(logits, [logits, logits[:3]])
    with pytest.raises(ValueError, match="teacher_weights: expected one per model"):
        distillation_of_logits(logits, logits, teacher_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="at least one class"):
        distillation_of_logits(logits[:, :0], logits[:, :0])
    with pytest.raises(TypeError, match="reverse: expected True or False, got 1"):
        distillation_of_logits(logits, logits, reverse=1)


def test_confidence_is_cross_entropy_to_the_blended_target() -> None:
    logits, weak = student(), torch.randn(N, C).softmax(1)
    for target in (weak, torch.randint(C, (N,))):
        losses = confidence(logits, target, 0.3)
        given = F.one_hot(target, C).float() if target.dim() == 1 else target
        blended = 0.7 * given + 0.3 * F.one_hot(logits.argmax(1), C)
        exact = logits.detach().double().requires_grad_()
        want = F.cross_entropy(exact, blended.double(), reduction="none")
        torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
        outer = torch.rand(N)
        (mine,) = torch.autograd.grad((losses * outer).sum(), logits)
        (theirs,) = torch.autograd.grad((want * outer).sum(), exact)
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    labels = torch.randint(C, (N,))
    torch.testing.assert_close(confidence(logits, labels, 0), F.cross_entropy(logits, labels, reduction="none"))
    narrow = confidence(logits.detach().bfloat16(), labels, 0.5)
    assert narrow.dtype == torch.float32


def test_two_classes_are_hardened_as_often_as_the_weak_labels_say() -> None:
    margins = torch.tensor([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 1.0, 0.5])  # all of them are likelier to be of class 1
    logits = torch.stack([torch.zeros(8), margins], 1)
    weak = torch.tensor([0, 1, 0, 0, 0, 1, 1, 1])  # half

    def hardened(weak: Tensor, logits: Tensor = logits) -> list[int]:
        """With alpha = 1 the loss is −log p of the hardened prediction."""
        losses, log_p = confidence(logits, weak, 1.0), logits.log_softmax(1)
        return [int(torch.isclose(loss, row[1])) for loss, row in zip(-losses, log_p, strict=True)]

    assert hardened(weak) == [1, 1, 1, 1, 0, 0, 0, 0]  # of the three equal ones the first
    assert hardened(torch.zeros(8).long()) == [0] * 8
    assert hardened(torch.ones(8).long()) == [1] * 8
    soft = torch.tensor([[0.8, 0.2]]).expand(8, 2)  # 1.6 of 8
    assert hardened(soft) == [1, 1, 0, 0, 0, 0, 0, 0]
    losses = confidence(logits.masked_fill(torch.arange(8)[:, None] == 0, math.nan), weak, 1.0)
    assert losses.isnan().nonzero().flatten().tolist() == [0]
    assert hardened(weak[1:], logits[1:].flip(0)) == [0, 0, 1, 1, 0, 1, 1]  # 4 of 7, two of the three equal ones


def test_confidence_s_impossible_classes_and_numbers() -> None:
    logits = torch.randn(5, 3)
    logits[:, 2] = -math.inf
    logits[3, 0] = math.nan
    leaf = logits.clone().requires_grad_()
    losses = confidence(leaf, torch.tensor([0, 1, 0, 1, 2]), 0.5)
    assert bool(losses[:3].isfinite().all())
    assert bool(losses[3].isnan())
    assert losses[4] == math.inf
    (gradient,) = torch.autograd.grad(losses[:3].sum(), leaf)
    assert bool(gradient[:3].isfinite().all())


def test_confidence_s_errors() -> None:
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 2, 1])
    with pytest.raises(IndexError, match=r"weak: expected classes in \[0, 3\), got 3 in row 3"):
        confidence(logits, torch.tensor([0, 1, 2, 3]), 0.5)
    with pytest.raises(
        ValueError, match=r"weak: expected probabilities.* in row 1; of logits, softmax\(1\) makes them"
    ):
        confidence(logits, torch.tensor([[1.0, 0, 0], [2.0, -1, 0], [1.0, 0, 0], [0, 0, 1.0]]), 0.5)
    with pytest.raises(
        ValueError, match=r"weak: expected shape \(4,\) or \(4, 3\) on cpu, as logits, got \(3,\) on cpu"
    ):
        confidence(logits, labels[:3], 0.5)
    with pytest.raises(TypeError, match="weak: expected int64 classes, or probabilities of shape"):
        confidence(logits, labels.float(), 0.5)
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\], got 1.5"):
        confidence(logits, labels, 1.5)
    with pytest.raises(ValueError, match=r"torch.stack\(\[torch.zeros_like\(z\), z\], 1\) makes two"):
        confidence(logits[:, :1], labels, 0.5)


def test_the_ramp_does_not_jump() -> None:
    assert [ramp(step, 4, 0.5) for step in range(7)] == [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert ramp(0, 0, 0.5) == 0.5
    with pytest.raises(ValueError, match="step: expected an int"):
        ramp(-1, 4, 0.5)


def test_performance_gap_recovered() -> None:
    assert performance_gap_recovered(0.6, 0.6, 0.9) == 0
    assert performance_gap_recovered(0.6, 0.9, 0.9) == 1
    assert performance_gap_recovered(0.5, 0.25, 0.75) == -1  # not clipped
    assert performance_gap_recovered(torch.tensor(0.5), 1.0, 0.75) == 2
    for ceiling in (0.6, 0.5):
        with pytest.raises(ValueError, match=r"ceiling: expected more than the weak performance, 0\.6.*no gap"):
            performance_gap_recovered(0.6, 0.7, ceiling)
    for bad in (math.nan, math.inf):
        for name in ("weak", "strong", "ceiling"):
            values = {"weak": 0.1, "strong": 0.2, "ceiling": 0.3} | {name: bad}
            with pytest.raises(ValueError, match=f"{name}: expected a finite performance, got {bad}"):
                performance_gap_recovered(**values)
    with pytest.raises(TypeError, match="strong: expected a number, got None"):
        performance_gap_recovered(0.1, None, 0.3)


def test_the_losses_go_through_the_reweighter() -> None:
    """By sample, as any loss: the weights are taken of their gradients."""
    x, model = torch.randn(N, D), torch.nn.Linear(D, C)
    reference = torch.nn.Linear(D, C)
    mimic = assay.methods.GradMimic(model, reference, assay.tasks.Classification())
    reweighter = assay.train.Reweighter(model, mimic)
    teacher = torch.randn(N, C)

    def losses() -> Tensor:
        return distillation_of_logits(model(x), teacher, temperature=2.0)

    reweighter.backward(losses(), range(N))
    rows = [torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for loss in losses()]
    weights = reweighter.weights
    assert float(weights.max()) > 1.01
    torch.testing.assert_close(model.weight.grad, sum(w * row for w, row in zip(weights, rows, strict=True)) / N)
