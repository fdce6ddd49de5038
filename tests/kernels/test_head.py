"""The fused output layer's kernels against the unfused formulas in float64, on logits that float32 holds exactly.

Hidden states and weights lie on a coarse grid, so that every product and sum of a logit is exact: what is left is what
the kernels do with it. Without a GPU they run under Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from assay.kernels import head, head_gradient, head_launch, head_mixture, head_sweep, head_tiles
from assay.kernels._common import Launch
from assay.kernels.fields import FIELDS
from assay.kernels.head_launch import Models
from tests.kernels.test_head_philox import sign

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = (1 << len(FIELDS)) - 1
ONE_SWEEP = ("nll", "mean_nll", "expected_entropy", "agreement", "vote_entropy")  # of several models
TOLERANCE = 2e-6  # of the numeric contract in docs/architecture.md, times max(1, |value|)
SMALL = 32  # the interpreter's tile of columns


def grid(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Multiples of 1/8 up to about 3 · scale: exact in bfloat16, and so are their products' sums in float32."""
    return (8 * scale * torch.randn(*shape)).round().div(8).clamp(-8, 8).to(dtype)


def guarded(x: Tensor) -> Tensor:
    """``x`` inside a larger buffer of NaN (of wrong labels), to which any read out of bounds would go."""
    shape = [size + 2 * margin for size, margin in zip(x.shape, (3, 16), strict=False)]
    buffer = torch.full(shape, math.nan if x.is_floating_point() else 1 << 40, dtype=x.dtype, device=DEVICE)
    view = buffer[tuple(slice(m, m + size) for size, m in zip(x.shape, (3, 16), strict=False))]
    return view.copy_(x)


@dataclass
class Layer:
    """K output layers and their inputs, as the launchers take them."""

    hidden: list[Tensor]
    weight: list[Tensor]
    bias: list[Tensor | None]
    labels: Tensor | None
    share: list[float] = field(default_factory=list)
    ignore_index: int = -100

    def __post_init__(self) -> None:
        self.share = self.share or [1 / len(self.hidden)] * len(self.hidden)
        self.hidden, self.weight = [guarded(h) for h in self.hidden], [guarded(w) for w in self.weight]
        self.bias = [None if b is None else guarded(b) for b in self.bias]
        self.labels = None if self.labels is None else guarded(self.labels)

    def statistics(self, fields: Sequence[str] = FIELDS) -> tuple[Tensor, Tensor]:
        mask = sum(1 << FIELDS.index(f) for f in fields)
        return head.statistics(self.hidden, self.weight, self.bias, self.labels, self.share, self.ignore_index, mask)

    def scores(
        self, directions: list[Tensor] | None = None, rows: int | None = None, keys: list[tuple[int, int]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        assert self.labels is not None
        directions = [guarded(v) for v in directions] if directions else None
        return head.scores(
            self.hidden,
            self.weight,
            self.bias,
            self.labels,
            self.share,
            self.ignore_index,
            ALL,
            directions,
            keys or [(k, 1) for k in range(len(self.hidden))],
            rows,
        )

    def logits(self) -> list[Tensor]:
        """Float64, unfused, on the CPU."""
        pairs = zip(self.hidden, self.weight, self.bias, strict=True)
        return [h.cpu().double() @ w.cpu().double().T + (0 if b is None else b.cpu().double()) for h, w, b in pairs]


def layer(
    k: int,
    n: int,
    c: int,
    *,
    d: int = 20,
    widths: Sequence[int] = (),
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """K random output layers of width ``d``, or of ``widths``, with labels."""
    widths = widths or [d] * k
    return Layer(
        [grid(n, d, dtype=dtype) for d in widths],
        [grid(c, d, dtype=dtype, scale=0.5) for d in widths],
        [grid(c, dtype=dtype) if bias else None for _ in widths],
        torch.randint(c, (n,)),
    )


def oracle(logits: Sequence[Tensor], labels: Tensor | None, share: Sequence[float], ignore_index: int = -100) -> Tensor:
    """The eleven fields row by row, in the logits' own precision and from their definitions: (11, N)."""
    rows = [
        _one_row([z[i] for z in logits], None if labels is None else int(labels[i]), share, ignore_index)
        for i in range(len(logits[0]))
    ]
    return torch.tensor(rows, dtype=torch.float64).T


def _one_row(z: list[Tensor], y: int | None, share: Sequence[float], ignore_index: int) -> list[float]:
    if y == ignore_index or any(bool(x.isnan().any() | (x == math.inf).any() | (x == -math.inf).all()) for x in z):
        return [math.nan] * 10 + [-1]
    models = list(zip(share, z, [x.log_softmax(0) for x in z], strict=True))
    mix = sum(w * log_p.exp() for w, _, log_p in models)
    assert isinstance(mix, Tensor)
    votes = [int((x == x.max()).nonzero()[0]) for x in z]

    def expectation(p: Tensor, of: Tensor) -> Tensor:
        return torch.where(p > 0, p * of, torch.zeros_like(p)).sum()

    values: dict[str, float | Tensor] = dict.fromkeys(FIELDS, math.nan)
    values["entropy"] = -expectation(mix, mix.log())
    values["expected_entropy"] = -sum(w * expectation(log_p.exp(), log_p) for w, _, log_p in models)
    kl = sum(w * expectation(log_p.exp(), log_p - mix.log()) for w, _, log_p in models)
    values["mutual_information"] = max(0.0, float(kl))
    values["confidence"] = mix.max()
    support = [sum(w for w, other in zip(share, votes, strict=True) if other == vote) for vote in votes]
    values["vote_entropy"] = -sum(w * math.log(min(1, s)) for w, s in zip(share, support, strict=True) if w > 0)
    values["prediction"] = votes[0] if len(z) == 1 else int((mix == mix.max()).nonzero()[0])
    if y is not None:
        others = torch.cat([mix[:y], mix[y + 1 :]])
        values["nll"] = -torch.stack([math.log(w) + log_p[y] for w, _, log_p in models if w > 0]).logsumexp(0)
        values["mean_nll"] = -sum(w * log_p[y] for w, _, log_p in models if w > 0)
        values["margin"] = mix[y] - (others.max() if len(others) else 0)
        values["agreement"] = sum(w for w, vote in zip(share, votes, strict=True) if vote == y)
        values["el2n"] = (others.sum() ** 2 + (others**2).sum()).sqrt()
    return [float(values[f]) for f in FIELDS]


def assert_contract(given: Layer) -> Tensor:
    """|result − f64| ≤ max(|torch in float32 − f64|, 2e-6 · max(1, |f64|)) everywhere, and NaN where f64 has NaN."""
    stats, prediction = given.statistics()
    got = torch.cat([stats.double(), prediction[None].double()]).cpu()
    labels = None if given.labels is None else given.labels.cpu()
    want = oracle(given.logits(), labels, given.share, given.ignore_index)
    torch32 = oracle([z.float() for z in given.logits()], labels, given.share, given.ignore_index)
    for i, name in enumerate(FIELDS):
        assert torch.equal(got[i].isnan(), want[i].isnan()), f"{name}: NaN in other rows than the oracle"
        error = (got[i] - want[i]).abs().masked_fill((got[i] == want[i]) | want[i].isnan(), 0)
        allowed = TOLERANCE * want[i].nan_to_num(0, 0, 0).abs().clamp(min=1)
        allowed = torch.maximum(allowed, (torch32[i] - want[i]).abs().nan_to_num(0, 0, 0))
        worst = int((error - allowed).argmax())
        assert bool((error <= allowed).all()), (
            f"{name}: row {worst} is {got[i, worst]}, exact {want[i, worst]}, allowed error {allowed[worst]}"
        )
    return stats


# ---- statistics


@pytest.mark.parametrize(
    ("k", "n", "c"),
    [
        (1, 17, 33),  # one row into a second block, one column into a second tile
        (1, 1, 64),  # one row; the last tile is full
        (1, 5, 1),  # one class: margin +1
        (1, 5, 2),
        (2, 3, 1),
        (3, 7, 75),
    ],
)
def test_random_rows(k: int, n: int, c: int) -> None:
    given = layer(k, n, c)
    assert_contract(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_contract(layer(2, 5, 40, dtype=dtype))


@pytest.mark.parametrize("k", range(1, 9))
def test_models_of_different_width(k: int) -> None:
    given = layer(k, 4, 40, widths=[1 + 7 * i for i in range(k)])
    given.share = [(1.0 + i) / sum(range(1, k + 1)) for i in range(k)]
    given.bias[0] = None  # the others have one
    stats = assert_contract(given)
    information = stats[FIELDS.index("mutual_information")]
    assert bool((information >= 0).all())
    assert bool((information <= math.log(k) + 1e-6).all())


def test_padded_columns_do_not_count() -> None:
    """Logits far below 0: a padded column that counted as 0 would take all of the probability."""
    given = layer(2, 6, SMALL + 3)
    for b in given.bias:
        assert b is not None
        b -= 60
        b[SMALL + 1] += 30
    assert_contract(given)


@pytest.mark.slow
def test_many_slices() -> None:
    """The vocabulary in two slices at least, the labels in either, and a tie for the largest logit across both."""
    c = 2 * 6 * head_tiles.COLUMNS_PER_WORD + 50
    given = layer(2, 2, c, d=4)
    assert head_tiles.slices(c, head_tiles.INTERPRETED.more, 6)[0] >= 2
    assert given.labels is not None
    given.labels.copy_(torch.tensor([c - 1, 0]))
    for w, b in zip(given.weight, given.bias, strict=True):
        assert b is not None
        w[[7, c - 3]], b[[7, c - 3]] = w[7].clone(), 12.0
    assert_contract(given)
    assert given.statistics(["prediction"])[1].tolist() == [7, 7]
    alone = Layer(given.hidden[:1], given.weight[:1], given.bias[:1], given.labels)
    assert alone.statistics(["prediction"])[1].tolist() == [7, 7]


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_common_offset(offset: float) -> None:
    given = layer(2, 6, 45)
    for b in given.bias:
        assert b is not None
        b += offset
    assert_contract(given)


def test_confident_rows() -> None:
    given = layer(2, 8, 40)
    for h in given.hidden:
        h *= 8
    assert_contract(given)


@pytest.mark.parametrize("k", [1, 2])
def test_impossible_columns(k: int) -> None:
    """−inf by way of the bias: scattered, over a whole tile, and everywhere but in one column."""
    for possible in (slice(0, None, 2), slice(SMALL, None), slice(SMALL + 2, SMALL + 3)):
        given = layer(k, 5, SMALL + 7)
        for b in given.bias:
            assert b is not None
            keep = b[possible].clone()
            b.fill_(-math.inf)
            b[possible] = keep
        assert given.labels is not None
        given.labels[0] = 1  # impossible in all three: infinite losses
        stats = assert_contract(given)
        assert stats[FIELDS.index("nll"), 0] == math.inf


def test_nothing_possible_is_undefined() -> None:
    given = layer(2, 3, 40)
    assert given.bias[1] is not None
    given.bias[1].fill_(-math.inf)
    stats = assert_contract(given)
    assert bool(stats.isnan().all())


def test_impossible_label_in_one_model() -> None:
    given = layer(2, 3, 10)
    assert given.labels is not None
    assert given.bias[0] is not None
    given.labels.fill_(4)
    given.bias[0][4] = -math.inf
    assert_contract(given)
    given.share = [0.0, 1.0]  # 0 · inf must not be NaN
    assert_contract(given)


@pytest.mark.parametrize("k", [1, 2])
def test_ties_go_to_the_lowest_index(k: int) -> None:
    given = layer(k, 9, SMALL + 8)
    for w, b in zip(given.weight, given.bias, strict=True):
        assert b is not None
        w[3], b[3] = w[1], b[1]
        w[SMALL + 1 :], b[SMALL + 1 :] = w[1], b[1] + 100  # the largest, in a later tile
        w[SMALL - 2 : SMALL], b[SMALL - 2 : SMALL] = w[SMALL + 1], b[SMALL + 1]  # and in an earlier one
    assert given.labels is not None
    given.labels[:3] = torch.tensor([SMALL + 1, SMALL - 2, SMALL - 1])  # a label is compared apart from the others
    stats = assert_contract(given)
    assert given.statistics()[1].tolist() == [SMALL - 2] * 9
    assert stats[FIELDS.index("agreement"), :3].tolist() == [0, 1, 0]


def test_ignored_rows() -> None:
    """In a block with others, a whole block of them, and by a label that is a class."""
    given = layer(2, 35, 40)
    assert given.labels is not None
    given.labels[1] = given.labels[16:32] = -100
    given.hidden[0][1] = math.nan
    stats = assert_contract(given)
    assert bool(stats[:, 16:32].isnan().all())
    given = layer(1, 5, 6)
    given.ignore_index = 2
    given.labels = torch.tensor([2, 1, 0, 2, 5], device=DEVICE)
    assert_contract(given)


def test_without_labels() -> None:
    given = layer(2, 5, 40)
    given.labels = None
    assert_contract(given)


@pytest.mark.parametrize("k", [1, 2])
def test_undefined_rows_are_alone(k: int) -> None:
    given = layer(k, 5, 40)
    clean, _ = given.statistics()
    given.hidden[-1][1, 2] = math.nan
    given.hidden[-1][3] = math.inf
    stats, prediction = given.statistics()
    assert bool(stats[:, [1, 3]].isnan().all())
    assert prediction[[1, 3]].tolist() == [-1, -1]
    assert torch.equal(stats[:, [0, 2, 4]], clean[:, [0, 2, 4]])
    bias = given.bias[-1]
    assert bias is not None
    bias[39] = math.inf  # beside it the padded columns, which are copies of this one
    assert bool(given.statistics()[0].isnan().all())


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """Addresses around every buffer of the launchers; an interpreted load from any of them fails."""
    found: list[range] = []
    kept = []  # or the addresses would be another buffer's
    if DEVICE != "cpu":
        return found

    def empty(models: Models, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size, margin = math.prod(shape), 512
        buffer = torch.empty(margin + size + margin, dtype=dtype)
        start, item = buffer.data_ptr(), buffer.element_size()
        kept.append(buffer)
        found.append(range(start, start + margin * item))
        found.append(range(start + (margin + size) * item, start + len(buffer) * item))
        return buffer[margin : margin + size].view(shape)

    load = InterpreterBuilder.create_masked_load

    def fenced_load(builder: object, pointers: Any, mask: Any, *rest: Any) -> object:
        at = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data)]
        assert not any(((at >= fence.start) & (at < fence.stop)).any() for fence in found), "a load out of bounds"
        return load(builder, pointers, mask, *rest)

    monkeypatch.setattr(Models, "empty", empty)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", fenced_load)
    return found


@pytest.mark.parametrize("k", [1, 2])
def test_a_label_that_is_no_class_makes_its_row_undefined(k: int, fences: list[range]) -> None:
    """As in a captured CUDA graph, where nothing has checked the labels."""
    given, v = layer(k, 6, 40, d=5), [grid(40, 5) for _ in range(k)]
    assert given.labels is not None
    given.labels[5] = -100

    def everything() -> list[Tensor]:
        """Rows first."""
        stats, prediction, dot, sqnorm, left = given.scores(v, 16)
        assert dot is not None
        assert left is not None
        loss, gradient = head.losses(given.hidden[0], given.weight[0], given.bias[0], given.labels, -100, True)
        assert gradient is not None
        found = [stats.T, prediction, dot.T, sqnorm.T, left.transpose(0, 1), loss, gradient]
        return found + [given.statistics([name])[0][FIELDS.index(name)] for name in ("entropy", "vote_entropy")]

    clean = everything()
    wrong, right = [0, 2, 3], [1, 4, 5]
    given.labels[wrong] = torch.tensor([47, -1, 1 << 33], device=DEVICE)
    for i, (before, after) in enumerate(zip(clean, everything(), strict=True)):
        assert bool((after[wrong].isnan() if after.is_floating_point() else after[wrong] == -1).all()), i
        assert torch.equal(before[right].nan_to_num(7.5), after[right].nan_to_num(7.5)), i
    assert bool(fences) == (DEVICE == "cpu")


def test_same_bits_alone_and_again() -> None:
    given = layer(2, 19, 70)
    assert given.labels is not None
    batch, prediction = given.statistics()
    again, _ = given.statistics()
    assert torch.equal(batch, again)
    for row in (0, 17):
        rows = slice(row, row + 1)
        alone = Layer([h[rows] for h in given.hidden], given.weight, given.bias, given.labels[rows])
        stats, choice = alone.statistics()
        assert torch.equal(stats[:, 0], batch[:, row])
        assert torch.equal(choice[0], prediction[row])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    names: list[str] = []
    run = Launch.run

    def note(launch: Launch, tensor: Tensor) -> None:
        names.append(launch.kernel.fn.__name__)
        run(launch, tensor)

    monkeypatch.setattr(Launch, "run", note)
    return names


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_field_alone_reads_no_scratch_that_its_sweeps_left(k: int, labelled: bool) -> None:
    """tests/kernels/scratch.py would notice. The second block of rows is ignored, and no sweep writes it."""
    given = layer(k, 20, 40, d=5)
    assert given.labels is not None
    given.labels[16:] = -100
    if not labelled:
        given.labels = None
    whole, best = given.statistics()
    for i, name in enumerate(FIELDS):
        stats, prediction = given.statistics([name])
        got, want = (prediction, best) if name == "prediction" else (stats[i], whole[i])
        assert torch.equal(got.double().nan_to_num(-7.5), want.double().nan_to_num(-7.5)), name


def test_only_the_mixture_takes_a_second_sweep(launched: list[str]) -> None:
    one, two = layer(1, 3, 40), layer(2, 3, 40)
    whole, _ = two.statistics()
    assert launched.count("mix") == 1
    for name in FIELDS:
        launched.clear()
        stats, prediction = two.statistics([name])
        assert ("mix" in launched) == (name not in ONE_SWEEP), name
        for i, other in enumerate(FIELDS[:-1]):
            assert torch.equal(stats[i], whole[i]) if other == name else bool(stats[i].isnan().all())
        assert bool((prediction >= 0).all()) == (name == "prediction")
    launched.clear()
    one.statistics()
    two.labels = None
    two.statistics([*ONE_SWEEP, "margin", "el2n"])  # label fields without labels
    assert "mix" not in launched
    assert launched.count("sweep") == 3


# ---- gradients


def residuals(given: Layer) -> Tensor:
    """(K, N, C) float64: p − onehot(y), 0 in ignored rows."""
    assert given.labels is not None
    labels = given.labels.cpu()
    found = []
    for z in given.logits():
        r = z.softmax(1)
        r[torch.arange(len(r)), labels.clamp(0, z.shape[1] - 1)] -= 1
        found.append(r.masked_fill((labels == given.ignore_index)[:, None], 0))
    return torch.stack(found)


def assert_near(got: Tensor | None, want: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got is not None
    assert got.dtype == torch.float32
    error = (got.double().cpu() - want).abs()
    assert bool((error <= tolerance * want.abs().clamp(min=1)).all()), f"worst error {error.max()}"


@pytest.mark.parametrize("rows", [5, 16, 40])
def test_scores(rows: int) -> None:
    given = layer(2, 19, 75, widths=[20, 9])
    assert given.labels is not None
    given.labels[2] = -100
    directions = [grid(75, 20, scale=0.5), grid(75, 9, scale=0.5)]
    keys = [(7, 0), (0xFFFFFFFF, 0x80000000)]
    stats, prediction, dot, sqnorm, left = given.scores(directions, rows, keys)
    want = residuals(given)
    u = [h.cpu().double() @ v.double().T for h, v in zip(given.hidden, directions, strict=True)]
    assert_near(dot, torch.stack([(r * x).sum(1) for r, x in zip(want, u, strict=True)]))
    assert_near(sqnorm, (want**2).sum(2))
    signs = torch.tensor([[[sign(r, c, key) for c in range(75)] for r in range(rows)] for key in keys])
    assert_near(left, torch.einsum("knc,krc->knr", want, signs.double()) / math.sqrt(rows))
    for x in (dot, sqnorm, left):
        assert x is not None
        assert bool((x[:, 2] == 0).all())
    plain, choice = given.statistics()
    torch.testing.assert_close(stats, plain, rtol=0, atol=1e-6, equal_nan=True)
    assert torch.equal(prediction, choice)


def test_sketch_of_more_rows_than_one_counter(launched: list[str]) -> None:
    given = layer(1, 3, 40)
    _, _, dot, sqnorm, left = given.scores(rows=130)
    assert dot is None
    assert launched.count("sweep") == 2
    signs = torch.tensor([[sign(r, c, (0, 1)) for c in range(40)] for r in range(130)])
    assert_near(left, residuals(given) @ signs.double().T / math.sqrt(130))
    assert_near(sqnorm, (residuals(given) ** 2).sum(2))


def test_half_precision_scores() -> None:
    given = layer(1, 5, 40, dtype=torch.bfloat16)
    v = grid(40, 20, scale=0.5)
    for direction in (v.bfloat16(), v):  # in its own dtype, and widened
        _, _, dot, _, left = given.scores([direction], 16)
        assert_near(dot, (residuals(given) * (given.hidden[0].cpu().double() @ v.double().T)).sum(2))
        signs = torch.tensor([[sign(r, c, (0, 1)) for c in range(40)] for r in range(16)])
        assert_near(left, residuals(given) @ signs.double().T / 4)


def test_scores_without_direction_and_sketch() -> None:
    given = layer(1, 5, 40)
    _, _, dot, sqnorm, left = given.scores()
    assert dot is None
    assert left is None
    assert_near(sqnorm, (residuals(given) ** 2).sum(2))


def test_confident_rows_keep_their_small_gradients() -> None:
    """1 − p_y is about 1e-8, below float32's step at 1: it must not come out of a difference."""
    given = layer(1, 4, 40, d=4)
    assert given.labels is not None
    assert given.bias[0] is not None
    given.labels.fill_(3)
    given.bias[0][3] = 24
    given.weight[0][3] = 0
    _, _, dot, sqnorm, left = given.scores([grid(40, 4) + 4], rows=16)
    want = residuals(given)
    assert float(want.abs().max()) < 1e-7
    torch.testing.assert_close(sqnorm.double().cpu(), (want**2).sum(2), rtol=1e-5, atol=0)
    assert left is not None
    signs = torch.tensor([[sign(r, c, (0, 1)) for c in range(40)] for r in range(16)]).double()
    torch.testing.assert_close(left.double().cpu(), want @ signs.T / 4, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert dot is not None
    assert float(dot.abs().max()) > 0


@pytest.mark.parametrize(("n", "c", "d", "bias"), [(19, 75, 40, True), (3, 40, 1, False), (2, 1, 5, True)])
def test_losses(n: int, c: int, d: int, bias: bool) -> None:
    given = layer(1, n, c, d=d, bias=bias)
    assert given.labels is not None
    given.labels[1] = -100
    labels = given.labels.cpu()
    h = given.hidden[0].cpu().double().requires_grad_()
    b = given.bias[0]
    z = h @ given.weight[0].cpu().double().T + (0 if b is None else b.cpu().double())
    want = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    want.sum().backward()
    nll, gradient = head.losses(given.hidden[0], given.weight[0], b, given.labels, -100, True)
    assert h.grad is not None
    assert_near(nll, want.detach())
    assert_near(gradient, h.grad)
    assert gradient is not None
    assert bool((gradient[1] == 0).all())
    alone, nothing = head.losses(given.hidden[0], given.weight[0], b, given.labels, -100, False)
    assert torch.equal(alone, nll)
    assert nothing is None


@pytest.mark.slow
def test_gradient_in_panels_chunks_and_splits(launched: list[str]) -> None:
    """Two panels of rows, a chunk of four splits and a short one, a block of ignored rows that hold NaN."""
    tile = head_tiles.INTERPRETED.logits
    n, c = 2 * head_launch.PANEL_BLOCKS * tile.m, head_launch.CHUNK_TILES * tile.n + 5
    given = layer(1, n, c, d=5)
    assert given.labels is not None
    given.labels[32:48] = -100
    given.hidden[0][32:48] = math.nan
    nll, gradient = head.losses(given.hidden[0], given.weight[0], given.bias[0], given.labels, -100, True)
    if DEVICE == "cpu":
        assert [launched.count(name) for name in ("residual", "accumulate", "add_splits")] == [4, 4, 2]
    want = residuals(given)[0]
    want[32:48] = 0
    assert_near(gradient, want @ given.weight[0].cpu().double())
    assert bool((nll[32:48] == 0).all())
    _, alone = head.losses(given.hidden[0][5:6], given.weight[0], given.bias[0], given.labels[5:6], -100, True)
    assert gradient is not None
    assert alone is not None
    assert torch.equal(alone[0], gradient[5])


def gradient_launches(n: int, c: int, d: int) -> list[Launch]:
    """In bfloat16 on an H100."""
    hidden, weight = (torch.empty(m, d, dtype=torch.bfloat16, device="meta") for m in (n, c))
    models = Models.of([hidden], [weight], None, torch.empty(n, dtype=torch.int64, device="meta"), -100)
    with mock.patch.object(head_tiles, "generation", return_value=9):
        into = torch.empty(n, d, device="meta")
        return list(head_launch.into_network(models, models.merged(), into))


@pytest.mark.parametrize(("c", "d"), [(49_152, 576), (128_256, 2048), (1000, 64), (50_257, 768)])
def test_a_rows_gradient_is_summed_in_an_order_of_the_layer_alone(c: int, d: int) -> None:
    """Chunks and splits are the same for one row, for a panel and for eight."""
    found = set()
    for n in (1, 1024, 5000, 8192, 100_000):
        launches = [x.arguments for x in gradient_launches(n, c, d) if x.kernel is head_gradient.accumulate]
        panel = [x for x in launches if x["row_begin"] == 0]
        found.add(tuple((x["c_begin"], x["c_end"], x["splits"], x["split"]) for x in panel))
    assert len(found) == 1


@pytest.mark.parametrize(("c", "d"), [(49_152, 576), (49_152, 960), (128_256, 768), (128_256, 2048), (32_000, 4096)])
def test_the_gradients_launches_fill_a_gpu_in_little_memory(c: int, d: int) -> None:
    n = 8192
    launches = gradient_launches(n, c, d)
    programs = [x.grid[0] for x in launches if x.kernel is head_gradient.accumulate]
    assert min(programs) >= 0.7 * head_launch.FILL  # 40 of 132 in one case, before there were splits
    pieces = [x.arguments[name] for x in launches for name in ("residual", "partial") if name in x.arguments]
    held = {id(x): x.numel() * x.element_size() for x in pieces if x is not None}
    assert sum(held.values()) <= 0.011 * n * c * 2 + 0.3 * n * d * 4  # of the logits, and of the result


# ---- addresses and shapes


@pytest.mark.parametrize(
    ("n", "c", "widths", "bias"),
    [
        (17, 40, [20], True),
        (1, SMALL + 1, [36, 36], True),
        (5, 75, [4, 4], False),
        (3, 40, [20, 4], False),
    ],
)
def test_descriptors_and_addresses_load_the_same(
    n: int, c: int, widths: list[int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, directions = layer(len(widths), n, c, widths=widths, bias=bias), [grid(c, d) for d in widths]
    assert head_tiles.described_tiles([*given.hidden, *given.weight]) is not None
    described = [*given.statistics(), *given.scores(directions, 16)]
    monkeypatch.setattr(head_tiles, "described_tiles", lambda operands: None)
    for got, want in zip([*given.statistics(), *given.scores(directions, 16)], described, strict=True):
        assert got is not None
        assert want is not None
        assert torch.equal(got.double().nan_to_num(-7.5), want.double().nan_to_num(-7.5))


@pytest.mark.parametrize(("widths", "described"), [([4, 4], True), ([4, 8], True), ([4, 4, 4], False), ([4, 5], False)])
def test_the_second_sweep_takes_descriptors_of_two_models(
    widths: list[int], described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[dict[str, Any]] = []
    monkeypatch.setattr(Launch, "run", lambda launch, _: taken.append(dict(launch.arguments)))
    layer(len(widths), 3, 40, widths=widths).statistics()
    (mix,) = [arguments for arguments in taken if "hidden_0" in arguments]
    for name in ("hidden_0", "weight_0", "hidden_1", "weight_1"):
        assert (mix[name] is not None) == described
    assert (mix["hidden"] is None) == described
    assert mix["TOGETHER"] == (widths == [4, 4])


def test_what_descriptors_cannot_load_is_loaded_by_addresses() -> None:
    x = torch.zeros(8, 64)
    assert head_tiles.described_tiles([x, x[:, :5], x[::2]]) is not None
    apart = x.as_strided((1, 4), (1 << 40, 1))
    for wrong in (x[:, 1:], x[:0], x.as_strided((8, 5), (62, 1)), x.half(), apart):
        assert head_tiles.described_tiles([x, wrong]) is None
    assert head_tiles.described_tiles([x.as_strided((8, 64), (4, 1))]) is None  # rows that overlap


def test_a_label_in_every_column() -> None:
    """Each of a tile's columns in turn is the label's, the last tile's too."""
    given = layer(1, SMALL + 9, SMALL + 9, d=4)
    given.labels = torch.arange(SMALL + 9, device=DEVICE)
    assert_contract(given)


def test_offsets_beyond_int32() -> None:
    """Rows 2²⁹ elements apart: the fifth is past 2³¹. The memory between them is never touched."""
    rows, stride, d = 5, 1 << 29, 8
    storage = torch.empty((rows - 1) * stride + 64, dtype=torch.float16, device=DEVICE)
    hidden, weight = (storage.as_strided((rows, d), (stride, 1), offset) for offset in (0, 32))
    for x in (hidden, weight):
        x.copy_(grid(rows, d, dtype=torch.float16))
    given = layer(1, rows, rows, d=d, dtype=torch.float16)
    given.hidden, given.weight = [hidden], [weight]
    assert_contract(given)
    assert given.labels is not None
    _, gradient = head.losses(hidden, weight, given.bias[0], given.labels, -100, True)
    assert_near(gradient, residuals(given)[0] @ weight.cpu().double(), TOLERANCE if DEVICE == "cpu" else 1e-3)


def test_no_rows() -> None:
    given = layer(2, 0, 40)
    stats, prediction = given.statistics()
    assert stats.shape == (10, 0)
    assert prediction.shape == (0,)
    _, _, dot, sqnorm, left = given.scores([grid(40, 20), grid(40, 20)], 16)
    assert [x.shape for x in (dot, sqnorm, left) if x is not None] == [(2, 0), (2, 0), (2, 0, 16)]


@pytest.mark.parametrize("classes", [1, 127, 128, 129, 2400, 32_000, 128_256, 262_144])
def test_slices_cover_the_vocabulary_in_little_memory(classes: int) -> None:
    for tile in {tiles.logits for tiles in head_tiles.HALF_TILES.values()}:
        for words in (6, 7 + 16):
            count, per_slice = head_tiles.slices(classes, tile, words)
            assert (count - 1) * per_slice * tile.n < classes <= count * per_slice * tile.n
            assert 1 <= count <= head_tiles.MAX_SLICES
            if count > 1:
                assert count * words * 4 <= 0.01 * classes * 2  # of the logits in bfloat16
    assert head_sweep.STATE.value + 1 <= 6  # the words above: the state and the maximum's index


def sweeps(generation: int, dtype: torch.dtype, size: int, count: int, fields: int = ALL) -> list[Launch]:
    """The sweeps of labelled models without a bias."""
    hidden, weight = (torch.empty(m, size, dtype=dtype, device="meta") for m in (64, 32_000))
    labels = torch.empty(64, dtype=torch.int64, device="meta")
    models = Models.of([hidden] * count, [weight] * count, None, labels, -100)
    with mock.patch.object(head_tiles, "generation", return_value=generation):
        launches = list(head.plan_statistics(models, [1 / count] * count, fields, *models.statistics()))
    return [x for x in launches if x.kernel in (head_sweep.sweep, head_mixture.mix)]


def test_a_labelled_sweep_that_keeps_more_than_the_loss_takes_more_warps_on_ampere() -> None:
    """Eight spill; what Hopper takes, and ragged rows, is what it was."""

    def tile(generation: int, size: int, *fields: str) -> tuple[int, int, int, int]:
        mask = sum(1 << FIELDS.index(name) for name in fields) or ALL
        (launch,) = sweeps(generation, torch.bfloat16, size, 1, mask)
        return launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"], launch.num_warps, launch.registers

    assert tile(8, 1024, "nll") == (128, 128, 8, 255)
    assert [tile(8, 1024, *x) for x in (("entropy",), ("el2n",), ("agreement",), ())] == [(128, 128, 16, 128)] * 4
    assert [tile(g, 1024) for g in (9, 10)] == [(128, 256, 8, 255), (128, 128, 8, 255)]
    assert [tile(g, 1023) for g in (8, 9, 10)] == [(64, 64, 8, 255)] * 3


@pytest.mark.parametrize(
    ("generation", "dtype", "size", "order"),
    [
        (8, torch.bfloat16, 1024, False),
        (9, torch.bfloat16, 1023, False),
        (10, torch.bfloat16, 1023, True),
        (12, torch.float16, 1024, True),
        (9, torch.float32, 1024, True),
    ],
)
def test_which_axis_of_a_tile_is_summed_first(generation: int, dtype: torch.dtype, size: int, order: bool) -> None:
    """The last where a thread may hold no two numbers of the first: on Blackwell, and without matrix units."""
    launches = sweeps(generation, dtype, size, 2)
    assert [x.kernel for x in launches] == [head_sweep.sweep, head_sweep.sweep, head_mixture.mix]
    assert [x.arguments["LAST_FIRST"] for x in launches] == [order] * 3


def test_blackwells_matrix_units_take_no_tile_of_fewer_rows() -> None:
    x = torch.empty(1, device="meta")
    with mock.patch.object(head_tiles, "generation", return_value=10):
        tiles = head_tiles.RAGGED_HALF_TILES
        assert [head_tiles.last_first(tile, x, False) for tile in (tiles.more, tiles.wide)] == [True, False]
