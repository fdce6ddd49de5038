"""ensemble_stats against float64, on every instruction set."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import assay
from assay.ops import ensemble
from assay.ops.ensemble import FIELDS, LABEL_FIELDS, EnsembleStats, ensemble_stats

FLOAT_FIELDS = FIELDS[:-1]
TOLERANCE = 2e-6  # of the numeric contract in docs/architecture.md, times max(1, |value|)


def reference64(
    logits: list[Tensor], labels: Tensor | None, weights: list[float] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    share = ensemble.normalise(None if weights is None else torch.tensor(weights).double(), len(logits))
    stats, prediction = ensemble.reference([z.double() for z in logits], labels, share)
    return dict(zip(FLOAT_FIELDS, stats, strict=True)), prediction


def assert_contract(logits: list[Tensor], labels: Tensor | None, weights: list[float] | None = None) -> EnsembleStats:
    """|result − f64| ≤ max(|torch in float32 − f64|, 2e-6 · max(1, |f64|)) everywhere, and NaN where f64 has NaN."""
    got = ensemble_stats(logits, labels, weights=weights)
    want, _ = reference64(logits, labels, weights)
    share = ensemble.normalise(None if weights is None else torch.tensor(weights).double(), len(logits))
    torch32 = dict(zip(FLOAT_FIELDS, ensemble.reference([z.float() for z in logits], labels, share)[0], strict=True))
    for field in FLOAT_FIELDS:
        value, exact = getattr(got, field).double(), want[field]
        assert getattr(got, field).dtype == torch.float32
        assert torch.equal(value.isnan(), exact.isnan()), f"{field}: NaN in other rows than the reference"
        same = (value == exact) | exact.isnan()  # covers infinities
        error = (value - exact).abs().masked_fill(same, 0)
        allowed = torch.maximum(
            (torch32[field].double() - exact).abs().nan_to_num(0, 0, 0), TOLERANCE * exact.abs().clamp(min=1)
        )
        worst = int((error - allowed).argmax()) if len(error) else 0
        assert bool((error <= allowed).all()), (
            f"{field}: row {worst} is {value[worst]}, exact {exact[worst]}, allowed error {allowed[worst]}"
        )
    return got


SHAPES = [  # (K, N, C): why
    (1, 5, 1),  # one class: margin +1
    (1, 7, 2),  # one model
    (3, 37, 10),  # a last tile of 5 rows; fewer classes than lanes
    (8, 33, 100),  # classes no multiple of the vector
    (2, 17, 255),  # the last narrow widths
    (2, 17, 256),
    (2, 17, 257),  # the first wide width, by one column
    (5, 9, 1000),
    (3, 20, 1025),  # one column into a second AVX-512 block
    (4, 3, 4099),  # few rows: blocks are shared between threads
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "n", "c"), SHAPES)
def test_random_logits(isa: str, k: int, n: int, c: int, dtype: torch.dtype) -> None:
    labels = torch.randint(c, (n,))
    for scale in (1.0, 5.0):
        logits = [(scale * torch.randn(n, c)).to(dtype) for _ in range(k)]
        got = assert_contract(logits, labels, [1.0 + i for i in range(k)])
        if k == 1:
            assert torch.equal(got.prediction, logits[0].float().argmax(1))
            assert bool((got.mutual_information == 0).all())


def hard_rows(c: int) -> dict[str, Tensor]:
    """Distributions that catch what randn does not; each (N, c)."""
    base = torch.randn(6, c)
    peaked = torch.full((6, c), -20.0)
    peaked[torch.arange(6), torch.randint(c, (6,))] = 20.0
    late = torch.zeros(2, c)
    late[:, -1] = 90.0  # the maximum far above a block's first columns
    masked = base.clone()
    masked[:, 1::2] = -math.inf
    first_masked = base.clone()
    first_masked[:, : c - 1] = -math.inf  # only the last column is possible: whole blocks of −inf
    return {
        "flat": torch.zeros(3, c),
        "peaked": peaked,
        "late": late,
        "offset up": base + 1e4,
        "offset down": base - 1e4,
        "huge": base * 1e4,
        "tied": (base * 2).round(),
        "scattered -inf": masked,
        "blocks of -inf": first_masked,
        "lognormal": base.exp(),
        "cauchy": torch.randn(6, c) / torch.randn(6, c),
        "subnormal probabilities": torch.linspace(-103, 0, c).repeat(2, 1),
    }


@pytest.mark.parametrize("c", [2, 10, 111, 256, 2050])
@pytest.mark.parametrize("name", hard_rows(2))
def test_hard_distributions(isa: str, name: str, c: int) -> None:
    torch.manual_seed(1)
    rows = hard_rows(c)[name]
    labels = torch.randint(c, (len(rows),))
    others = hard_rows(c)[name].roll(1, 0)
    got = assert_contract([rows], labels)
    both = assert_contract([rows, others], labels)
    twins = assert_contract([rows, rows.clone()], labels)
    for stats in (got, both, twins):
        assert bool((stats.mutual_information >= 0).all())
        assert bool((stats.mean_nll >= stats.nll * (1 - 1e-5)).all())  # Jensen
    torch.testing.assert_close(twins.mutual_information, torch.zeros(len(rows)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("c", [10, 100, 300, 2050])
@pytest.mark.parametrize("size", [1e6, 1e7, 1e9, 1e10, 1e20, 1e29])
def test_logits_so_large_that_their_exponents_round(isa: str, size: float, c: int) -> None:
    """Exponents relative to a rounded product of such a maximum would overflow, or round every class to 0."""
    early, late = torch.randn(4, c) * size, torch.randn(4, c) * size
    early[:, 3] = late[:, -1] = 7 * size  # among a block's first columns, and not
    early[::2, 5] = early[::2, 3]  # a tie
    early[1::2, 5] = torch.nextafter(early[1::2, 3], torch.tensor(0.0))
    labels = torch.tensor([3, 5, c - 1, 0])
    assert_contract([early], labels)
    assert_contract([early, late], labels)


def test_neighbours_of_large_logits_keep_their_bits(isa: str) -> None:
    z = torch.randn(2, 16, 100)
    alone = ensemble_stats(z)
    z[0, 5] *= 1e12
    beside, others = ensemble_stats(z), torch.arange(16) != 5
    for field in ("entropy", "expected_entropy", "mutual_information", "confidence"):
        assert torch.equal(getattr(beside, field)[others], getattr(alone, field)[others])


def test_impossible_label_is_infinite(isa: str) -> None:
    for c in (10, 300):
        z = torch.randn(4, c)
        z[:, 3] = -math.inf
        labels = torch.full((4,), 3)
        one = ensemble_stats([z], labels)
        assert one.nll.tolist() == one.mean_nll.tolist() == [math.inf] * 4
        two = assert_contract([z, torch.randn(4, c)], labels)
        assert bool(two.nll.isfinite().all())
        assert two.mean_nll.tolist() == [math.inf] * 4
        assert_contract([z, torch.randn(4, c)], labels, [0.0, 1.0])  # 0 · inf must not be NaN


@pytest.mark.parametrize("c", [7, 100, 1500])
def test_undefined_rows_are_nan_and_alone(isa: str, c: int) -> None:
    clean = torch.randn(2, 8, c)
    labels = torch.randint(c, (8,))
    want = ensemble_stats(clean, labels)
    z = clean.clone()
    z[0, 1, c // 2] = math.nan
    z[1, 3, c - 1] = math.inf
    z[0, 5] = -math.inf
    z[1, 6, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN with every payload bit set
    got = ensemble_stats(z, labels)
    bad = torch.tensor([False, True, False, True, False, True, True, False])
    for field in FLOAT_FIELDS:
        value = getattr(got, field)
        assert torch.equal(value.isnan(), bad), field
        assert torch.equal(value[~bad], getattr(want, field)[~bad]), f"{field}: a neighbour's NaN changed the row"
    assert torch.equal(got.prediction[bad], torch.full((4,), -1))


@pytest.mark.parametrize("c", [10, 700])
def test_ignored_rows_and_missing_labels(isa: str, c: int) -> None:
    z = torch.randn(3, 20, c)
    labels = torch.randint(c, (20,))
    full, ignored = ensemble_stats(z, labels), labels.clone()
    ignored[::3] = -100
    got = ensemble_stats(z, ignored)
    seen = ignored != -100
    for field in FLOAT_FIELDS:
        assert bool(getattr(got, field)[~seen].isnan().all())
        assert torch.equal(getattr(got, field)[seen], getattr(full, field)[seen])
    assert bool((got.prediction[~seen] == -1).all())
    custom = labels.clone()
    custom[0] = 5000
    assert bool(ensemble_stats(z, custom, ignore_index=5000).nll[0].isnan())
    unlabelled = ensemble_stats(z)
    for field in FLOAT_FIELDS:
        value = getattr(unlabelled, field)
        assert bool(value.isnan().all()) if field in LABEL_FIELDS else torch.equal(value, getattr(full, field))


@pytest.mark.parametrize("c", [6, 90, 1111])
def test_ties_take_the_lowest_index(isa: str, c: int) -> None:
    z = torch.zeros(2, 4, c)
    z[:, 1, c // 2 :] = 3.0
    z[:, 2, [1, c - 1]] = 2.0
    got = ensemble_stats(z, torch.zeros(4, dtype=torch.int64))
    assert got.prediction.tolist() == [0, c // 2, 1, 0]
    assert got.agreement.tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("c", [20, 600])
def test_any_strides(isa: str, c: int) -> None:
    labels = torch.randint(c, (12,))
    big = torch.randn(3, 24, 2 * c)
    views = [
        big[0, ::2, :c],  # rows with gaps
        big[1, ::2, ::2],  # columns with gaps
        torch.randn(c, 12).T,  # columns far apart
    ]
    copies = [v.contiguous() for v in views]
    got, want = ensemble_stats(views, labels), ensemble_stats(copies, labels)
    for field in FIELDS:
        assert torch.equal(getattr(got, field), getattr(want, field)), field
    one = ensemble_stats(big[0, :1].expand(5, 2 * c))  # row stride 0
    assert len(one.entropy.unique()) == 1


def test_same_bits_for_any_thread_count_and_neighbours(isa: str) -> None:
    threads = torch.get_num_threads()
    try:
        for n, c in ((3, 40_000), (64, 3000), (64, 77)):
            z, labels = torch.randn(2, n, c), torch.randint(c, (n,))
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(ensemble_stats(z, labels))
            torch.set_num_threads(1)
            alone = [ensemble_stats(z[:, i : i + 1], labels[i : i + 1]) for i in range(n)]
            for field in FIELDS:
                values = [getattr(r, field) for r in results]
                assert torch.equal(values[0], values[1])
                assert torch.equal(values[0], values[2])
                assert torch.equal(values[0], torch.cat([getattr(a, field) for a in alone])), field
    finally:
        torch.set_num_threads(threads)


def test_fields_give_the_same_values_one_by_one(isa: str) -> None:
    for c in (12, 900):
        for k in (1, 3):
            z, labels = torch.randn(k, 9, c), torch.randint(c, (9,))
            full = ensemble_stats(z, labels)
            for field in FIELDS:
                only = ensemble_stats(z, labels, fields=[field])
                assert torch.equal(getattr(only, field), getattr(full, field)), field
                assert [f for f in FIELDS if getattr(only, f) is not None] == [field]


def test_empty_and_forms_of_input() -> None:
    empty = ensemble_stats(torch.randn(3, 0, 5), torch.empty(0, dtype=torch.int64))
    assert empty.nll.shape == (0,)
    z = torch.randn(4, 10)
    assert torch.equal(ensemble_stats(z).entropy, ensemble_stats([z]).entropy)
    mixed = ensemble_stats([z, z.bfloat16()])
    assert torch.equal(mixed.entropy, ensemble_stats([z, z.bfloat16().float()]).entropy)
    wide = ensemble_stats(z.double())
    assert wide.entropy is not None
    assert wide.entropy.dtype == torch.float64


def test_backends_agree(chosen: list[str]) -> None:
    z, labels = torch.randn(3, 50, 33), torch.randint(33, (50,))
    native = ensemble_stats(z, labels)
    with assay.backend("reference"):
        plain = ensemble_stats(z, labels)
    assert chosen == ["cpu", "reference"]
    for field in FLOAT_FIELDS:
        torch.testing.assert_close(getattr(native, field), getattr(plain, field), rtol=1e-5, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 5), n=st.integers(1, 20), c=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_properties(k: int, n: int, c: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    z, labels = 3 * torch.randn(k, n, c, generator=g), torch.randint(c, (n,), generator=g)
    s = ensemble_stats(z, labels)
    slack = 1e-5
    assert bool((s.mutual_information >= 0).all())
    assert bool((s.mutual_information <= math.log(k) + slack).all())
    assert bool((s.entropy >= s.expected_entropy - slack).all())
    assert bool((s.entropy <= math.log(c) + slack).all())
    assert bool((s.nll <= s.mean_nll + slack).all())
    assert bool(((s.margin >= -1 - slack) & (s.margin <= 1 + slack)).all())
    assert bool(((s.el2n >= 0) & (s.el2n <= math.sqrt(2) + slack)).all())
    if c == 1:
        assert s.margin.tolist() == [1.0] * n
    order = torch.randperm(k, generator=g)
    permuted = ensemble_stats(z[order], labels)
    for field in FLOAT_FIELDS:
        torch.testing.assert_close(getattr(permuted, field), getattr(s, field), rtol=1e-4, atol=1e-5)


def test_torch_compile_fullgraph() -> None:
    def f(z: Tensor, labels: Tensor) -> Tensor:
        s = ensemble_stats(z * 2, labels, weights=[1.0, 3.0], fields=("nll", "entropy"))
        assert s.nll is not None
        assert s.entropy is not None
        return s.nll + s.entropy

    z, labels = torch.randn(2, 6, 40), torch.randint(40, (6,))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, labels), f(z, labels))
    torch.library.opcheck(
        torch.ops.assay.ensemble_stats.default,
        ([z[0], z[1]], labels, None, -100, 3),
        test_utils="test_schema",
    )
    torch.library.opcheck(
        torch.ops.assay.ensemble_stats.default,
        ([z[0], z[1]], labels, None, -100, 3),
        test_utils="test_faketensor",
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ensemble_stats(torch.randn(5)), ValueError, r"logits: expected \(K, N, C\).*\(5,\)"),
        (lambda: ensemble_stats([]), ValueError, "at least one model"),
        (lambda: ensemble_stats(torch.randn(1, 3, 0)), ValueError, "at least one class"),
        (
            lambda: ensemble_stats([torch.randn(2, 3), torch.randn(2, 4)]),
            ValueError,
            r"logits\[1\].*\(2, 3\).*\(2, 4\)",
        ),
        (lambda: ensemble_stats(torch.zeros(1, 2, 3, dtype=torch.int64)), TypeError, r"logits\[0\].*int64"),
        (lambda: ensemble_stats(torch.randn(1, 2, 3), torch.zeros(2)), TypeError, "labels: expected int64"),
        (
            lambda: ensemble_stats(torch.randn(1, 2, 3), torch.zeros(3, dtype=torch.int64)),
            TypeError,
            r"shape \(2,\)",
        ),
        (
            lambda: ensemble_stats(torch.randn(1, 2, 3), torch.tensor([0, 3])),
            IndexError,
            r"\[0, 3\).*got 3 in row 1",
        ),
        (lambda: ensemble_stats(torch.randn(1, 2, 3), torch.tensor([-1, 0])), IndexError, "got -1 in row 0"),
        (lambda: ensemble_stats(torch.randn(2, 2, 3), weights=[1.0]), ValueError, r"weights.*\(2,\)"),
        (lambda: ensemble_stats(torch.randn(2, 2, 3), weights=[1.0, -1.0]), ValueError, "not negative"),
        (lambda: ensemble_stats(torch.randn(2, 2, 3), weights=[0.0, 0.0]), ValueError, "positive sum"),
        (lambda: ensemble_stats(torch.randn(2, 2, 3), fields=["nlll"]), ValueError, "unknown field 'nlll'"),
        (lambda: ensemble_stats(torch.randn(2, 2, 3), fields="nll"), TypeError, r"\['nll'\]"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cpuu'"), assay.backend("cpuu"):
        pass


def test_fields_are_those_of_the_kernels() -> None:
    assert tuple(f.name for f in dataclasses.fields(EnsembleStats)) == FIELDS
    assert set(FIELDS) > LABEL_FIELDS


def test_unknown_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"avx1024.*scalar"):
        ensemble_stats(torch.randn(1, 2, 3))
