"""project and grad_sketch against their definitions, on every instruction set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import assay
from assay.ops import _native, grad_sketch, project
from assay.ops.philox import philox4x32
from assay.ops.projection import add_reference
from assay.ops.sketch import RADEMACHER, Sketch, buckets, signs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAR = 2**33 + 5  # a coordinate whose counter needs its second word
SKETCHES = [
    assay.Sparse(7, seed=1, name="a"),  # many short slices
    assay.Sparse(512, seed=2),
    assay.Sparse(300, 3, seed=3),
    assay.Sparse(4100, 5, seed=4),
    assay.Rademacher(5, seed=5),
    assay.Rademacher(130, seed=6, name="b"),  # a second Philox block of rows
    assay.Rademacher(256, seed=7),
]
SHAPES = [  # (B, D)
    (1, 1),
    (3, 37),  # fewer than a vector of each
    (4, 1000),  # rows that go one by one
    (17, 4099),  # one row beyond the lanes, tails
    (40, 2048),  # several blocks of rows
    (2, 70001),  # more slices than pieces
]


def expected(x: Tensor, sketch: Sketch, first: int = 0) -> Tensor:
    """The projection by the definitions in ops/sketch.py, in the precision of ``x``."""
    if isinstance(sketch, assay.Rademacher):
        entries = signs(sketch.dim, x.shape[1], RADEMACHER, sketch.key, first=first).sign_().to(x.dtype)
        return x @ entries.T / sketch.dim**0.5
    assert isinstance(sketch, assay.Sparse)
    at, sign = buckets(x.shape[1], sketch.dim, sketch.nonzeros, sketch.key, first=first)
    out = x.new_zeros(len(x), sketch.dim)
    for j in range(sketch.nonzeros):
        out.index_add_(1, at[:, j], x * sign[:, j])
    return out / sketch.nonzeros**0.5


@pytest.mark.parametrize("first", [0, FAR])
@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_every_entry_is_the_definition_s(isa: str, sketch: Sketch, first: int) -> None:
    """Signs and indices to the last bit, also at coordinates beyond 2³²."""
    n, nonzeros = 67, getattr(sketch, "nonzeros", 0)
    found = torch.zeros(n, sketch.dim, dtype=torch.float64)
    _native.project(torch.eye(n), first, sketch.key, sketch.dim, nonzeros, found)
    entries = expected(torch.eye(n).double(), sketch, first) * (nonzeros or sketch.dim) ** 0.5
    assert torch.equal(found, entries.round())


def test_native_philox_has_64_bit_counters(isa: str) -> None:
    key = (0xDEADBEEF, 0x12345678)
    for first in (0, 2**32 - 9, FAR, 2**60):
        c = torch.arange(first, first + 2051)
        words = philox4x32((c & 0xFFFFFFFF, c >> 32, torch.full_like(c, 3), torch.full_like(c, 9)), key)
        assert torch.equal(_native.philox(key, first, 2051, 3, 9).long() & 0xFFFFFFFF, words)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_against_float64(isa: str, sketch: Sketch, dtype: torch.dtype) -> None:
    dense = isinstance(sketch, assay.Rademacher)  # its reference is slow
    for b, d in SHAPES[:4] if isa == "scalar" else [*SHAPES[:5], (2, 9001)] if dense else SHAPES:
        x = torch.randn(b, d).to(dtype)
        found = project(x, sketch)
        assert found.shape == (b, sketch.dim)
        assert found.dtype == torch.float32
        exact = expected(x.double(), sketch)
        plain = (expected(x.float(), sketch) - exact).abs()
        scale = x.double().norm(dim=1, keepdim=True)
        assert bool(((found - exact).abs() <= torch.maximum(plain, 2e-6 * scale)).all()), (b, d)


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_instruction_sets_agree_to_the_last_bit(isa: str, sketch: Sketch, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(21, 9001)
    found = [project(x.to(dtype), sketch) for dtype in DTYPES]
    monkeypatch.setenv("ASSAY_ISA", "scalar")
    for dtype, result in zip(DTYPES, found, strict=True):
        assert torch.equal(project(x.to(dtype), sketch), result)


@pytest.mark.parametrize("nonzeros", [64, 65, 300])
def test_instruction_sets_agree_on_many_nonzeros(isa: str, nonzeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block of hashes is as short as it gets: slices are whole blocks, and must end at the same coordinates."""
    x, sketch = torch.randn(5, 1003), assay.Sparse(37, nonzeros, seed=1)
    found = project(x, sketch)
    torch.testing.assert_close(found.double(), expected(x.double(), sketch), rtol=1e-5, atol=1e-4)
    monkeypatch.setenv("ASSAY_ISA", "scalar")
    assert torch.equal(project(x, sketch), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_batch_threads_and_strides_do_not_change_a_bit(
    sketch: Sketch, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(71, 30001).to(dtype)
    found = project(x, sketch)
    assert torch.equal(project(x.clone(), sketch), found), "two runs"
    for rows in (slice(0, 1), slice(3, 7), slice(5, 22), slice(66, 71)):
        assert torch.equal(project(x[rows], sketch), found[rows]), rows
    assert torch.equal(project(x.T.contiguous().T, sketch), found), "columns that are not adjacent"
    assert torch.equal(project(torch.stack([x, x], 1)[:, 0], sketch), found), "rows that are not adjacent"
    monkeypatch.setenv("ASSAY_NUM_THREADS", "1")
    assert torch.equal(project(x, sketch), found), "one thread"


@pytest.mark.parametrize("sketch", [SKETCHES[3], SKETCHES[5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_s_rows_do_not_depend_on_others_either(
    sketch: Sketch, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 has no other; a GEMM's order of additions is a matter of all its rows."""
    monkeypatch.setattr("assay.ops.projection.REFERENCE_ENTRIES", 700 * sketch.dim)  # several chunks
    x = torch.randn(21, 3001, dtype=dtype)
    with assay.backend("reference"):
        found = project(x, sketch)
        for rows in (slice(0, 1), slice(3, 7), slice(4, 21)):
            assert torch.equal(project(x[rows], sketch), found[rows]), rows
        assert torch.equal(project(x.T.contiguous().T, sketch), found), "columns that are not adjacent"
    exact = expected(x.double(), sketch)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert bool(((found - exact).abs() <= tolerance * x.double().norm(dim=1, keepdim=True)).all())


def test_empty_and_not_finite(isa: str) -> None:
    for sketch in (*SKETCHES, assay.Mask(2, 3), assay.Mask(2, 3, assay.Sparse(4))):
        assert project(torch.empty(0, 50), sketch).shape == (0, sketch.dim)
        assert project(torch.empty(3, 0), sketch).tolist() == [[0.0] * sketch.dim] * 3
        for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
            b, t, i = shape
            found = grad_sketch(torch.randn(b, t, i), torch.randn(b, t, 5), sketch)
            assert found.tolist() == [[0.0] * sketch.dim] * b
    x = torch.randn(18, 100)
    x[3, 50] = torch.nan
    bad = project(x, assay.Rademacher(8)).isnan()
    assert bool(bad[3].all())
    assert int(bad.sum()) == 8, "a row's NaN is its own"


@pytest.mark.parametrize("sketch", [*SKETCHES, assay.Mask(4, 5), assay.Mask(4, 5, assay.Rademacher(6))], ids=str)
def test_reference_backend_and_float64(sketch: Sketch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.ops.projection.REFERENCE_ENTRIES", 100 * sketch.dim)  # several chunks
    x = torch.randn(5, 3001)
    found = project(x, sketch)
    with assay.backend("reference"):
        torch.testing.assert_close(project(x, sketch), found, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(project(x.bfloat16(), sketch), project(x.bfloat16().float(), sketch))
    exact = project(x.double(), sketch)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), found, rtol=1e-4, atol=1e-4)
    if not isinstance(sketch, assay.Mask):
        torch.testing.assert_close(exact, expected(x.double(), sketch))


def alone(code: str) -> str:
    """What a process of its own prints, with one thread: peaks of memory are a process's."""
    head = "import resource, torch, assay; from assay.ops import project; torch.set_num_threads(1)\n"
    head += "project(torch.ones(1, 50), assay.Sparse(2))\n"
    run = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


# Not getrusage(), of which a process' peak begins with its parent's.
PEAK = """
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
x = torch.ones(1, columns)
before = peak()
project(x, assay.Sparse(dim))
print(peak() - before)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")


@linux
@pytest.mark.parametrize(
    ("dim", "columns", "most"),
    [
        (1 << 16, 1 << 24, 16),  # 64 MiB: 8 pieces with sums of 512 KiB each
        (1 << 22, 1000, 112),  # 32 MiB of sums twice, 16 MiB in float32 twice
    ],
)
def test_one_row_takes_the_memory_of_one_row(dim: int, columns: int, most: int) -> None:
    assert int(alone(f"dim, columns = {dim}, {columns}" + PEAK)) <= most, "MiB"


@linux
def test_too_little_memory_is_an_error_not_a_crash() -> None:
    """Address space for the sums, but not for their copy on the way."""
    dim = 1 << 25
    print_error = f"""
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {12 * dim},) * 2)
try:
    project(torch.ones(1, 50), assay.Sparse({dim}))
except MemoryError as error:
    print(error)
"""
    found = alone(print_error)
    assert found.startswith(f"project: could not allocate {8 * dim} bytes for the sums of 1 rows with dim={dim}; take")


def test_reference_coordinates_are_64_bit() -> None:
    for sketch, nonzeros in ((assay.Sparse(30, 2), 2), (assay.Rademacher(9), 0)):
        sums = torch.zeros(67, sketch.dim, dtype=torch.float64)
        add_reference(torch.eye(67), FAR, sketch.key, sketch.dim, nonzeros, sums)
        native = torch.zeros_like(sums)
        _native.project(torch.eye(67), FAR, sketch.key, sketch.dim, nonzeros, native)
        assert torch.equal(sums, native)


# ---- gradients ------------------------------------------------------------------------------------------------------

LAYERS = [  # (B, T, I, O)
    (3, 1, 5, 7),
    (2, 9, 33, 17),
    (18, 4, 64, 48),
    (2, 3, 600, 1000),  # more than one tile of the gradient
]
FOR_LAYERS: list[Sketch] = [
    assay.Kronecker(16, 8, seed=1, name="x"),
    assay.Kronecker(70, 3, seed=1),  # more rows than features, or than a vector
    assay.Sparse(100, 2, seed=1),
    assay.Rademacher(40, seed=1),
]


def gradient_sketch(a: Tensor, g: Tensor, sketch: Sketch) -> Tensor:
    """The same from the whole gradient, in float64."""
    gradient = g.double().mT @ a.double()
    o, i = gradient.shape[1:]
    if isinstance(sketch, assay.Kronecker):
        return (sketch.output_side(o).double() @ gradient @ sketch.input_side(i).double().T).flatten(1)
    return expected(gradient.flatten(1), sketch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketch", FOR_LAYERS, ids=str)
@pytest.mark.parametrize(("b", "t", "i", "o"), LAYERS)
def test_gradients_against_float64(
    isa: str, b: int, t: int, i: int, o: int, sketch: Sketch, dtype: torch.dtype
) -> None:
    if isa == "scalar" and o == 1000:
        pytest.skip("the scalar code has seen the other layers; this one takes it seconds")
    a, g = torch.randn(b, t, i).to(dtype), torch.randn(b, t, o).to(dtype)
    found, exact = grad_sketch(a, g, sketch), gradient_sketch(a, g, sketch)
    assert found.shape == (b, sketch.dim)
    assert found.dtype == torch.float32
    scale = exact.norm(dim=1, keepdim=True) + (g.double().mT @ a.double()).flatten(1).norm(dim=1, keepdim=True)
    assert bool(((found - exact).abs() <= 2e-6 * scale).all()), float(((found - exact).abs() / scale).max())


@pytest.mark.parametrize("sketch", [*SKETCHES, assay.Mask(99, 99, assay.Sparse(30))], ids=str)
def test_a_layer_s_sketch_is_that_of_its_flat_gradient(sketch: Sketch) -> None:
    """For sketches of coordinates; a Mask larger than the layer keeps it all."""
    a, g = torch.randn(3, 6, 20), torch.randn(3, 6, 30)
    flat = project((g.mT @ a).flatten(1), getattr(sketch, "then", sketch))
    torch.testing.assert_close(grad_sketch(a, g, sketch), flat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sketch", FOR_LAYERS, ids=str)
def test_batch_and_threads_do_not_change_a_layer_s_bits(
    isa: str, sketch: Sketch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position, so that no product of torch's sums anything: its order is not ours to promise."""
    a, g = torch.randn(20, 1, 600), torch.randn(20, 1, 500)
    found = grad_sketch(a, g, sketch)
    assert torch.equal(grad_sketch(a[4:5], g[4:5], sketch), found[4:5])
    assert torch.equal(grad_sketch(a[:, 0], g[:, 0], sketch), found)
    monkeypatch.setenv("ASSAY_NUM_THREADS", "1")
    monkeypatch.setattr("assay.ops.layer_sketch.TILE_BYTES", 1)
    assert torch.equal(grad_sketch(a, g, sketch), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(isa: str, dtype: torch.dtype) -> None:
    """The kept block of the gradient, scaled; zeros in the places of features that a layer does not have."""
    a, g = torch.randn(3, 6, 20).to(dtype), torch.randn(3, 6, 30).to(dtype)
    gradient = g.double().mT @ a.double()
    found = grad_sketch(a, g, assay.Mask(12, 5, seed=3)).view(3, 12, 5) / (30 / 12 * 20 / 5) ** 0.5
    for b in range(3):
        values = gradient[b].flatten()
        nearest = (found[b].double()[..., None] - values).abs().argmin(-1)
        rows, cols = nearest // 20, nearest % 20
        assert torch.equal(rows, rows[:, :1].expand(12, 5))
        assert bool((rows[1:, 0] > rows[:-1, 0]).all())
        assert torch.equal(cols, cols[:1].expand(12, 5))
        assert bool((cols[0, 1:] > cols[0, :-1]).all())
        torch.testing.assert_close(found[b].double(), values[nearest], rtol=1e-5, atol=1e-5)
    padded = grad_sketch(a, g, assay.Mask(40, 25, seed=3)).view(3, 40, 25)
    torch.testing.assert_close(padded[:, :30, :20].double(), gradient, rtol=1e-5, atol=1e-5)
    assert not padded[:, 30:].any()
    assert not padded[:, :, 20:].any()


def test_masked_vectors(isa: str) -> None:
    x = torch.arange(1.0, 1001.0).expand(2, -1)
    kept = project(x, assay.Mask(3, 4, seed=1)) / (1000 / 12) ** 0.5
    assert kept.shape == (2, 12)
    assert bool((kept[0].round().diff() > 0).all())
    assert torch.equal(kept[0], kept[1])
    assert project(x[:, :5], assay.Mask(3, 4)).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0] + [0.0] * 7] * 2


def test_two_dimensional_mixed_and_strided(isa: str) -> None:
    a, g = torch.randn(4, 6, 20), torch.randn(4, 6, 24)
    wide_a, wide_g = torch.randn(4, 12, 40), torch.randn(12, 4, 48).transpose(0, 1)
    va, vg = wide_a[:, ::2, ::2], wide_g[:, ::2, 1::2]
    for sketch in (*FOR_LAYERS, assay.Mask(9, 8)):
        mixed = grad_sketch(a, g.bfloat16(), sketch)
        torch.testing.assert_close(mixed, grad_sketch(a, g.bfloat16().float(), sketch), rtol=1e-6, atol=1e-5)
        contiguous = grad_sketch(va.contiguous(), vg.contiguous(), sketch)
        torch.testing.assert_close(grad_sketch(va, vg, sketch), contiguous, rtol=1e-6, atol=1e-5)


def test_reference_backend_and_float64_of_gradients() -> None:
    a, g = torch.randn(3, 8, 19), torch.randn(3, 8, 10)
    for sketch in FOR_LAYERS:
        found = grad_sketch(a, g, sketch)
        with assay.backend("reference"):
            torch.testing.assert_close(grad_sketch(a, g, sketch), found, rtol=1e-4, atol=1e-4)
        exact = grad_sketch(a.double(), g, sketch)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact, gradient_sketch(a, g, sketch))


def test_torch_compile_fullgraph() -> None:
    a, g, x = torch.randn(3, 8, 9), torch.randn(3, 8, 10), torch.randn(3, 200)
    flat = [assay.Sparse(8), assay.Rademacher(8), assay.Mask(2, 4), assay.Mask(20, 20, assay.Sparse(8))]

    def f(a: Tensor, g: Tensor, x: Tensor) -> list[Tensor]:
        gradients = [grad_sketch(a, g * 2, s) for s in (*flat, assay_kronecker, masked_kronecker)]
        return gradients + [project(x * 2, s) for s in flat]

    assay_kronecker = assay.Kronecker(2, 4)
    masked_kronecker = assay.Mask(3, 4, assay_kronecker)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(a, g, x), f(a, g, x), strict=True):
        assert torch.equal(found, expected)
    key, ops = [1, 2], torch.ops.assay
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(ops.project.default, (x, key, 8, 1), test_utils=test)
        torch.library.opcheck(ops.grad_sketch.default, (a, g, key, 8, 0), test_utils=test)
        torch.library.opcheck(ops.grad_sketch_kronecker.default, (a, g, key, 3, 4), test_utils=test)
        torch.library.opcheck(ops.keep.default, (x, 5, 6, key), test_utils=test)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: project(torch.zeros(3, 4, dtype=torch.int64), assay.Sparse(2)), "vectors: expected float32, .*int64"),
        (lambda: project(torch.zeros(3), assay.Sparse(2)), r"vectors: expected two dimensions, \(B, D\), got .*\(3,\)"),
        (lambda: project(torch.zeros(3, 4), assay.Kronecker(2, 2)), r"Kronecker\(.*use ops.grad_sketch"),
        (lambda: project(torch.zeros(3, 4), 7), "sketch: expected Kronecker, Sparse, Rademacher or Mask, got int"),
        (lambda: grad_sketch(torch.zeros(3, 4), torch.zeros(3, 4), 7), "sketch: expected Kronecker"),
        (lambda: grad_sketch(torch.zeros(3, 4), torch.zeros(2, 4), assay.Sparse(2)), "grads: expected the leading"),
        (
            lambda: project(torch.zeros(16, 4), assay.Rademacher(2**30)),
            "the sums of 16 rows take 128.0 GiB, more than 8 GiB; take a smaller dim or fewer rows",
        ),
        (
            lambda: grad_sketch(torch.zeros(16, 4), torch.zeros(16, 4), assay.Sparse(2**31 - 1)),
            "the sums of 16 rows take 256.0 GiB",
        ),
        (
            lambda: grad_sketch(torch.zeros(1, 4), torch.zeros(1, 50_000), assay.Kronecker(65_536, 2)),
            "65536 × 50000 signs of one side take 12.2 GiB, more than 1 GiB; take fewer rows and cols",
        ),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call: Callable[[], object], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()
