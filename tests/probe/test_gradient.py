"""Terms and their sums against the gradient multiplied out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import assay
from assay.probe import Convolution, Dense, Outer, PerSampleGradient, Scatter
from assay.probe.head import Head
from assay.probe.terms import Pulled

ROWS, COLUMNS, SIZE = 5, 4, 3


def make(kind: str, length: int, seed: int, dtype: torch.dtype = torch.float64) -> Outer | Scatter | Dense:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "outer":
        return Outer(random(SIZE, length, ROWS), random(SIZE, length, COLUMNS))
    if kind == "scatter":  # few ids: they repeat within a sample
        ids = torch.randint(3, (SIZE, length), generator=generator)
        return Scatter(ids, random(SIZE, length, COLUMNS))
    return Dense(random(SIZE, ROWS, COLUMNS))


def multiplied_out(term: Outer | Scatter | Dense) -> Tensor:
    if isinstance(term, Outer):
        return torch.einsum("btr,btc->brc", term.left.double(), term.right.double())
    if isinstance(term, Scatter):
        return torch.einsum("btr,btc->brc", torch.nn.functional.one_hot(term.ids, ROWS).double(), term.grads.double())
    return term.values.double()


HALVES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["outer", "scatter", "dense"]


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 6)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_sums_of_terms_have_all_cross_terms(kinds: list[tuple[str, int]], seed: int) -> None:
    terms = [make(kind, length, seed + i) for i, (kind, length) in enumerate(kinds)]
    gradient = PerSampleGradient(torch.Size((ROWS, COLUMNS)), terms)
    expected = torch.stack([multiplied_out(term) for term in terms]).sum(0)
    direction = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(gradient.dense(), expected)
    torch.testing.assert_close(gradient.dot(direction), (expected * direction).sum((1, 2)))
    torch.testing.assert_close(gradient.sqnorm(), expected.square().sum((1, 2)))
    assert len(gradient.terms) == len({kind for kind, _ in kinds}) or "dense" in dict(kinds)


@pytest.mark.parametrize(("left", "right"), list(itertools.product(HALVES, repeat=2)))
def test_mixed_dtypes_accumulate_in_float32(left: torch.dtype, right: torch.dtype) -> None:
    outer = make("outer", 4, 0)
    assert isinstance(outer, Outer)
    terms = [Outer(outer.left.to(left), outer.right.to(right)), make("scatter", 4, 1, left)]
    gradient = PerSampleGradient(torch.Size((ROWS, COLUMNS)), terms)
    expected = torch.stack([multiplied_out(term) for term in terms]).sum(0)
    assert gradient.sqnorm().dtype == torch.float32
    torch.testing.assert_close(gradient.sqnorm().double(), expected.square().sum((1, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient.dot(torch.ones(ROWS, COLUMNS)).double(), expected.sum((1, 2)), rtol=1e-5, atol=1e-5
    )


def test_a_norm_that_almost_cancels_keeps_its_digits() -> None:
    """The embedding's part is minus the output layer's part, up to one in a thousand."""
    torch.manual_seed(0)
    right = torch.randn(SIZE, 6, COLUMNS)
    ids = torch.randint(ROWS, (SIZE, 6))
    left = torch.nn.functional.one_hot(ids, ROWS).float()
    grads = -right * (1 + 1e-3 * torch.randn(SIZE, 6, 1))
    terms = [Outer(left, right), Scatter(ids, grads)]
    expected = sum(multiplied_out(term) for term in terms)
    assert isinstance(expected, Tensor)
    found = PerSampleGradient(torch.Size((ROWS, COLUMNS)), terms).sqnorm().double()
    # float32 rounds the terms to 6e-8 of themselves: 6e-5 of what is left, twice that in the square
    torch.testing.assert_close(found, expected.square().sum((1, 2)), rtol=5e-4, atol=0)


def test_scattering_never_makes_one_hot_rows() -> None:
    """A vocabulary of 2⁴⁰ ids would not fit."""
    ids = torch.tensor([[1 << 40, 3, 1 << 40]])
    grads = torch.tensor([[[1.0, 2.0], [5.0, 0.0], [1.0, -1.0]]])
    assert Scatter(ids, grads).sqnorm().tolist() == [4.0 + 1.0 + 25.0]


def test_equal_ids_of_different_samples_stay_apart() -> None:
    gradient = Scatter(torch.tensor([[2], [2]]), torch.tensor([[[1.0]], [[3.0]]]))
    assert gradient.sqnorm().tolist() == [1.0, 9.0]


def test_parameters_of_any_shape_are_viewed_as_matrices() -> None:
    """A convolution's weight: (O, I, k, k)."""
    outer = make("outer", 3, 0)
    gradient = PerSampleGradient(torch.Size((ROWS, 2, 1, 2)), [outer])
    direction = torch.randn(ROWS, 2, 1, 2, dtype=torch.float64)
    expected = (multiplied_out(outer).reshape(SIZE, ROWS, 2, 1, 2) * direction).flatten(1).sum(1)
    torch.testing.assert_close(gradient.dot(direction), expected)
    assert gradient.dense().shape == (SIZE, ROWS, 2, 1, 2)


SKETCHES = [
    assay.Kronecker(4, 3),
    assay.Sparse(20, 2),
    assay.Rademacher(9),
    assay.Mask(3, 4),
    assay.Mask(3, 4, assay.Sparse(5)),
    assay.Mask(90, 90),
]


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
@pytest.mark.parametrize("kind", ["outer", "tall outer", "scatter", "convolution", "grouped convolution"])
def test_a_gradient_has_one_sketch_however_it_comes(kind: str, sketch: assay.ops.Sketch) -> None:
    """Multiplied out, as an Adam step is, or in factors: the pool's side may come one way, the target's the other."""
    torch.manual_seed(0)
    if kind.endswith("outer"):
        rows = 12 if kind == "outer" else 5
        shape, term = (rows, 7), Outer(torch.randn(2, 6, rows), torch.randn(2, 6, 7))
    elif kind == "scatter":
        shape, term = (12, 7), Scatter(torch.randint(12, (2, 6)), torch.randn(2, 6, 7))
    else:
        groups = 2 if kind.startswith("grouped") else 1
        shape = (8, 6 // groups, 3)
        term = Convolution(torch.randn(2, 6, 11), torch.randn(2, 8, 9), [3], [1], [1], groups)
    gradient = PerSampleGradient(torch.Size(shape), [term])
    want = PerSampleGradient(torch.Size(shape), [Dense(gradient.dense())]).sketch(sketch)
    torch.testing.assert_close(gradient.sketch(sketch), want, rtol=1e-4, atol=1e-5)


def test_a_direction_of_another_shape_is_an_error() -> None:
    gradient = PerSampleGradient(torch.Size((ROWS, COLUMNS)), [make("outer", 3, 0)])
    with pytest.raises(ValueError, match=r"shape \(4, 5\); expected \(5, 4\)"):
        gradient.dot(torch.zeros(COLUMNS, ROWS))


def test_a_gradient_without_terms_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        PerSampleGradient(torch.Size((2,)), [])


def test_outer_and_total_of_every_kind_of_term() -> None:
    """A matrix' outer products multiply out to its gradient; the total leaves out the samples that are not finite."""
    torch.manual_seed(0)
    matrix = Outer(torch.randn(4, 5, 3), torch.randn(4, 5, 6))
    rows = Scatter(torch.randint(3, (4, 5)), torch.randn(4, 5, 6))
    conv = Convolution(torch.randn(4, 2, 6, 6), torch.randn(4, 3, 5, 5), (2, 2), (1, 1), (1, 1), 1)
    grouped = Convolution(torch.randn(4, 2, 6, 6), torch.randn(4, 4, 5, 5), (2, 2), (1, 1), (1, 1), 2)
    head = Head(torch.randn(4, 5, 6), torch.randn(3, 6), None, torch.randint(3, (4, 5)), torch.rand(4, 5))
    cases = {
        "matrix": (matrix, (3, 6), True),
        "scatter": (rows, (3, 6), False),
        "convolution": (conv, (3, 2, 2, 2), True),
        "grouped convolution": (grouped, (4, 1, 2, 2), False),
        "head": (head, (3, 6), True),
        "vector": (Dense(torch.randn(4, 6)), (6,), False),
        "scalar": (Dense(torch.randn(4)), (), False),
    }
    for name, (term, shape, is_outer) in cases.items():
        gradient = PerSampleGradient(torch.Size(shape), [term])
        outer, dense = gradient.outer(), gradient.dense()
        assert (outer is not None) == is_outer, name
        if outer is not None:
            torch.testing.assert_close(outer.dense(shape), dense, msg=name)
        total, finite = gradient.total()
        torch.testing.assert_close(total, dense.sum(0), msg=name, rtol=1e-4, atol=1e-5)
        assert finite.tolist() == [True] * 4
    broken = Outer(matrix.left.clone(), matrix.right)
    broken.left[1, 2, 0] = torch.nan
    total, finite = PerSampleGradient(torch.Size((3, 6)), [broken]).total()
    assert finite.tolist() == [True, False, True, True]
    torch.testing.assert_close(total, matrix.dense((3, 6))[finite].sum(0))
    assert PerSampleGradient(torch.Size((3, 6)), [matrix, rows]).outer() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_is_finite_where_its_numbers_are(dtype: torch.dtype) -> None:
    """Also where its square, or a factor's, is beyond the type; not where only its factors are finite."""
    large = torch.finfo(dtype).max / 8
    left, right = torch.ones(5, 2, 3, dtype=dtype), torch.ones(5, 2, 4, dtype=dtype)
    left[0] = large  # a gradient of 2 · max / 8
    left[1], right[1] = large, 1 / large
    left[2], right[2] = large, large
    left[3, 0], right[3, 1] = large, large  # one where the other is 0
    left[3, 1], right[3, 0] = 0, 0
    left[4, 0, 0], right[4] = torch.inf, 0
    outer, finite = Outer(left, right), [True, True, False, True, False]
    assert outer.finite().tolist() == outer.dense((3, 4)).isfinite().flatten(1).all(1).tolist() == finite
    assert Outer(left[:, :0], right[:, :0]).finite().all()
    one_by_one = Scatter(torch.zeros(5, 2, dtype=torch.long), right * left[..., :1])
    for term in (outer, one_by_one, Dense(outer.dense((3, 4)))):
        total, mask = PerSampleGradient(torch.Size((3, 4)), [term]).total()
        assert mask.tolist() == finite
        assert total[0, 0] == pytest.approx(2 * large + 2)


def test_a_shape_is_a_size() -> None:
    assert PerSampleGradient((3, 2), [Dense(torch.ones(4, 3, 2))]).total()[0].tolist() == [[4.0] * 2] * 3  # type: ignore[arg-type]


def test_a_direction_is_not_rounded_to_the_parameters_type() -> None:
    source = torch.randn(5, 4).bfloat16().requires_grad_()
    gradient, direction = torch.randn(3, 5, 4), torch.randn(5, 4)
    pulled = Pulled([Dense(gradient)], source.flip(0), source)
    expected = (gradient.flip(1) * direction).sum((1, 2))
    torch.testing.assert_close(pulled.dot(direction), expected, rtol=1e-5, atol=1e-5)
