"""Philox and the sketches: bits that follow from (seed, name, coordinate) alone; inner products that are kept."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter, OrderedDict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import assay
from assay.ops import _native, grad_sketch, project
from assay.ops.masking import _draw_native, _draw_reference, smallest
from assay.ops.philox import make_key, philox4x32
from assay.ops.sketch import MASK_FLAT, MASK_INPUT, MASK_OUTPUT, Sketch, buckets, cached, signs

# Random123's known answers: (counter, key, result).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    assert philox4x32((c0, c1, c2, c3), key)[0].tolist() == list(result)


def test_signs_are_pinned() -> None:
    """Stored sketches must stay readable: these bits may never change."""
    sketch = assay.Kronecker(3, 2, seed=7, name="lm_head")
    assert sketch.key == make_key(7, "lm_head")
    assert sketch.dim == 6
    words = philox4x32(
        (torch.arange(5), torch.zeros(5).long(), torch.zeros(5).long(), torch.zeros(5).long()), sketch.key
    )
    for r in range(3):
        expected = [1 - 2 * (int(words[c, 0]) >> r & 1) for c in range(5)]
        assert (sketch.output_side(5)[r] * 3**0.5).round().tolist() == expected
    bits = (assay.Kronecker(1, 1, seed=0).output_side(32)[0] < 0).long()
    assert int((bits << torch.arange(32)).sum()) == 1644460401


def test_signs_do_not_depend_on_the_sketch_s_size_or_the_layer_s() -> None:
    small, large = assay.Kronecker(16, 8, seed=1), assay.Kronecker(200, 8, seed=1)
    assert torch.equal(small.output_side(50) > 0, large.output_side(99)[:16, :50] > 0)
    assert not torch.equal(large.output_side(50)[:72], large.output_side(50)[128:])  # a second Philox block


def test_names_sides_and_seeds_are_independent() -> None:
    a = assay.Kronecker(64, 64, seed=1)
    others = [a.named("x").output_side(512), a.input_side(512), assay.Kronecker(64, 64, seed=2).output_side(512)]
    for other in others:
        agreement = float((a.output_side(512).sign() == other.sign()).float().mean())
        assert abs(agreement - 0.5) < 4 * 0.5 / (64 * 512) ** 0.5


def test_unbiased_inner_products() -> None:
    """E⟨P_out x P_inᵀ, P_out y P_inᵀ⟩ = ⟨x, y⟩, within 4 standard errors over 200 seeds."""
    x, y = torch.randn(2, 12, 9).double().unbind(0)
    y = y + 0.5 * x
    found = []
    for seed in range(200):
        s = assay.Kronecker(4, 4, seed=seed)
        left, right = s.output_side(12).double(), s.input_side(9).double()
        found.append(float(((left @ x @ right.T) * (left @ y @ right.T)).sum()))
    estimates = torch.tensor(found)
    assert abs(float(estimates.mean() - (x * y).sum())) < 4 * float(estimates.std()) / 200**0.5


# ---- what is stored with them must stay readable -------------------------------------------------------------------

VECTORS = (torch.arange(1, 2 * 600 + 1).reshape(2, 600) % 97 - 48).float()  # exact sums


def test_projections_are_pinned(isa: str) -> None:
    """Golden values: these may never change."""
    sparse = project(VECTORS, assay.Sparse(4, seed=7, name="lm_head"))
    assert sparse.tolist() == [[34.0, 3.0, -83.0, -125.0], [265.0, 495.0, 672.0, 223.0]]
    several = project(VECTORS, assay.Sparse(4, 3, seed=7, name="lm_head")) * 3**0.5
    assert several.round().tolist() == [[-888.0, 660.0, 635.0, 416.0], [-919.0, 427.0, -808.0, 1609.0]]
    dense = project(VECTORS, assay.Rademacher(130, seed=7, name="lm_head")) * 130**0.5
    assert dense[:, -4:].round().tolist() == [[-335.0, 353.0, 863.0, 235.0], [333.0, 15.0, -473.0, -97.0]]
    masked = project(VECTORS, assay.Mask(2, 2, seed=7, name="lm_head")) / 150**0.5
    assert masked.round().tolist() == [[4.0, 31.0, -47.0, 16.0], [22.0, -48.0, -29.0, 34.0]]


def test_sparse_entries_are_as_defined() -> None:
    sketch = assay.Sparse(1000, 3, seed=1, name="x")
    at, sign = buckets(50, 1000, 3, sketch.key)
    for c, j in ((0, 0), (0, 2), (1, 0), (33, 1), (49, 2)):
        u = 3 * c + j
        counter = tuple(torch.tensor(v) for v in (u // 4, 0, 0, 2))
        w = int(philox4x32(counter, sketch.key)[u % 4])  # type: ignore[arg-type]
        assert int(at[c, j]) == (w >> 1) * 1000 // 2**31
        assert int(sign[c, j]) == (-1 if w % 2 else 1)


def test_masks_keep_the_smallest_words_and_lower_indices_on_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.ops.masking.CHUNK", 8)
    words = torch.tensor([5, 3, 9, 3, 7, 3, 0, 9, 5, 5, 3, 1, 9, 0, 3, 5, 5])

    def draw(first: int, n: int, side: int, key: tuple[int, int], device: torch.device) -> Tensor:
        return words[first : first + n]

    for count in range(1, 18):
        expected = sorted(sorted(range(17), key=lambda i: (int(words[i]), i))[:count])
        assert smallest(count, 17, 4, (0, 0), torch.device("cpu"), draw).tolist() == expected


def test_masks_draw_the_same_everywhere(isa: str) -> None:
    key, cpu = make_key(3, "x"), torch.device("cpu")
    for side in (MASK_OUTPUT, MASK_INPUT, MASK_FLAT):
        for first in (0, 2**32 - 7, 2**40 + 1):
            native, plain = (draw(first, 50, side, key, cpu) for draw in (_draw_native, _draw_reference))
            assert torch.equal(native, plain)


def test_signs_go_on_where_they_left_off() -> None:
    key = make_key(0, "")
    assert torch.equal(signs(140, 60, 3, key)[:, 23:], signs(140, 37, 3, key, first=23))
    for whole, part in zip(buckets(60, 99, 3, key), buckets(37, 99, 3, key, first=23), strict=True):
        assert torch.equal(whole[23:], part)


# ---- what they are for ---------------------------------------------------------------------------------------------


def layer(rank: int = 40) -> tuple[Tensor, Tensor]:
    """Factors of two samples' gradients, (128, 160) of full rank, that have something in common."""
    a, g = torch.randn(2, rank, 160), torch.randn(2, rank, 128)
    return a + 0.7 * a[:1], g + 0.7 * g[:1]


def sketches(side: int, seed: int) -> dict[str, Sketch]:
    """One of each kind with side² numbers per sample."""
    k = side * side
    return {
        "kronecker": assay.Kronecker(side, side, seed),
        "sparse": assay.Sparse(k, 1, seed),
        "sparse, 4 entries": assay.Sparse(k, 4, seed),
        "rademacher": assay.Rademacher(k, seed),
        "mask": assay.Mask(side, side, None, seed),
        "mask, then sparse": assay.Mask(2 * side, 2 * side, assay.Sparse(k, 1, seed), seed),
        "mask, then kronecker": assay.Mask(2 * side, 2 * side, assay.Kronecker(side, side, seed), seed),
    }


KINDS = list(sketches(1, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_of_gradients_are_unbiased(kind: str) -> None:
    """Within 4 standard errors over 200 seeds."""
    a, g = layer()
    x, y = (g.mT @ a).double().flatten(1)
    found = []
    for seed in range(200):
        s = grad_sketch(a, g, sketches(8, seed)[kind]).double()
        found.append(float(s[0] @ s[1]))
    estimates = torch.tensor(found)
    assert abs(float(estimates.mean() - x @ y)) < 4 * float(estimates.std()) / 200**0.5


@pytest.mark.parametrize("kind", ["sparse", "sparse, 4 entries", "rademacher", "mask", "mask, then sparse"])
def test_inner_products_of_vectors_are_unbiased(kind: str) -> None:
    x = torch.randn(2, 3000)
    x[1] += 0.5 * x[0]
    products = []
    for seed in range(200):
        s = project(x, sketches(8, seed)[kind]).double()
        products.append(float(s[0] @ s[1]))
    found = torch.tensor(products)
    assert abs(float(found.mean() - x[0].double() @ x[1].double())) < 4 * float(found.std()) / 200**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_relative_error_falls_as_the_root_of_the_size(kind: str) -> None:
    """Four times the numbers, half the error, for gradients of full rank. (A Kronecker sketch of a gradient of rank one
    is a product of two projections, whose error falls as the root of one side.)"""
    a, g = layer()
    x, y = (g.mT @ a).double().flatten(1)
    errors = []
    for side in (8, 16, 32):
        relative = []
        for seed in range(100):
            s = grad_sketch(a, g, sketches(side, seed)[kind]).double()
            relative.append((s[0] @ s[1] - x @ y) / (x.norm() * y.norm()))
        errors.append(float(torch.stack(relative).square().mean().sqrt()))
    for larger, smaller in itertools.pairwise(errors):
        assert 1.5 < larger / smaller < 2.7, errors


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_are_linear(kind: str) -> None:
    """The sketch of a sum is the sum of the sketches, be it over samples or over positions."""
    a, g = layer()
    sketch = sketches(8, 5)[kind]
    both = grad_sketch(a, g, sketch)
    joined = grad_sketch(a.reshape(1, 80, 160), g.reshape(1, 80, 128), sketch)
    torch.testing.assert_close(joined[0], both.sum(0), rtol=1e-5, atol=1e-4 * float(both.abs().max()))
    torch.testing.assert_close(grad_sketch(3 * a, g, sketch), 3 * both, rtol=1e-5, atol=1e-4 * float(both.abs().max()))


# ---- as data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_seeds_change_a_sketch_and_nothing_else_does(kind: str) -> None:
    a, g = layer()
    sketch = sketches(4, 1)[kind]
    assert sketch.dim == 16
    base = grad_sketch(a, g, sketch)
    assert torch.equal(grad_sketch(a, g, pickle.loads(pickle.dumps(sketch))), base)
    assert torch.equal(grad_sketch(a, g, sketch.named("")), base)
    for other in (sketch.named("layer"), sketches(4, 2)[kind]):
        assert not torch.equal(grad_sketch(a, g, other), base)
    assert sketch.named("layer") == sketch.named("other").named("layer") != sketch


def test_a_mask_names_what_comes_after_it() -> None:
    sketch = assay.Mask(4, 5, assay.Sparse(6, seed=2)).named("layer")
    assert sketch.then == assay.Sparse(6, seed=2, name="layer")
    assert (sketch.dim, assay.Mask(4, 5).dim) == (6, 20)


def test_pairs_of_features_lie_side_by_side_in_a_row_s_lane() -> None:
    for features in (4, 5):
        x = torch.randn(3, features).bfloat16()
        packed = _native.pack_pairs(x.float())
        assert packed.dtype == torch.bfloat16
        assert packed.shape == ((features + 1) // 2, 16, 2)
        rows = packed.transpose(0, 1).flatten(1)
        assert torch.equal(rows[:3, :features], x)
        assert not rows[3:].any()
        assert not rows[:, features:].any()


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.ops.sketch.CACHE_BYTES", 1000)
    made = []

    def make() -> Tensor:
        made.append(1)
        return torch.zeros(100)  # 400 bytes: two fit

    a, b, c = (("test_cache_is_bounded", i) for i in range(3))
    for key in (a, b, a, c, a, b):
        cached(key, torch.device("cpu"), make)
    assert len(made) == 4  # a, b, c, and b again: a was used after it


class Gpu:
    """What a cache asks of a GPU, said by a test: the stream, whether it is captured, and what was done to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.waited, self.noted = 1, False, [], []
        self.device = torch.device("cpu")  # where its tensors really are
        monkeypatch.setattr("assay.ops.sketch._held", OrderedDict())
        monkeypatch.setattr("assay.ops.sketch._held_bytes", Counter())
        monkeypatch.setattr("assay.ops.sketch.CACHE_BYTES", 1000)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=0))
        monkeypatch.setattr(Tensor, "record_stream", lambda _, gpu: self.noted.append(gpu.stream))
        self.made: list[str] = []

    def synchronize(self) -> None:
        self.waited.append(self.stream)

    def ask(self, name: str, size: int = 100) -> Tensor:
        def make() -> Tensor:
            self.made.append(name)
            return torch.zeros(size)

        return cached(name, torch.device("cuda", 0), make)


def test_streams_share_what_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    first = gpu.ask("a")
    assert gpu.waited == [1]  # before anybody else can find it
    gpu.stream = 2
    assert gpu.ask("a") is first
    assert gpu.noted == [2]  # its memory outlives that stream's reading
    assert gpu.made == ["a"]
    gpu.ask("wide", 1000)  # more than may be held: made each time, and not waited for
    gpu.ask("wide", 1000)
    assert gpu.made == ["a", "wide", "wide"]
    assert gpu.waited == [1]
    assert gpu.ask("a") is first


def test_a_graph_reads_what_is_held_and_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    kept, gpu.capturing = gpu.ask("a"), True
    assert gpu.ask("a") is kept
    assert gpu.ask("new") is not gpu.ask("new")  # what a graph makes is the graph's: a replay has yet to write it
    gpu.capturing = False
    for name in "bcdb":
        gpu.ask(name)
    assert gpu.ask("a") is kept  # used longest ago, but a replay reads it
    gpu.capturing = True
    before = len(gpu.made)
    gpu.ask("b")  # 800 of 1,000 bytes would be held for good
    assert len(gpu.made) == before + 1
    assert gpu.ask("a") is kept
    assert gpu.waited == [1] * (len(gpu.made) - 3)


def test_a_layer_s_signs_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = assay.Kronecker(3, 5, seed=11, name="made once")
    drawn = []
    monkeypatch.setattr("assay.ops.sketch.signs", lambda *a: drawn.append(a) or signs(*a))
    for _ in range(3):
        left, right = sketch.output_side(7), sketch.input_side(9)
        assert torch.equal(left, signs(3, 7, 0, sketch.key))
        assert torch.equal(right, signs(5, 9, 1, sketch.key))
        left.zero_()  # the caller's own
        right.zero_()
    assert len(drawn) == 2


def test_errors() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        assay.Kronecker(0, 4)
    with pytest.raises(ValueError, match="seed: expected a 64-bit integer"):
        assay.Kronecker(4, 4, seed=2**63)
    with pytest.raises(ValueError, match="Sparse: dim must be below 2147483648, got 2147483648"):
        assay.Sparse(2**31)
    with pytest.raises(ValueError, match="Sparse: nonzeros must be at least 1, got 0"):
        assay.Sparse(8, 0)
    with pytest.raises(ValueError, match="Rademacher: dim must be at least 1, got -1"):
        assay.Rademacher(-1)
    with pytest.raises(ValueError, match="Mask: cols must be at least 1, got 0"):
        assay.Mask(4, 0)
    with pytest.raises(TypeError, match="Mask: then must be Kronecker, Sparse, Rademacher or None, got Mask"):
        assay.Mask(4, 4, assay.Mask(2, 2))  # type: ignore[arg-type]
