"""Philox and the Kronecker sketch: bits that follow from (seed, name, coordinate) alone."""

from __future__ import annotations

import pytest
import torch

import assay
from assay.ops.philox import make_key, philox4x32

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


def test_errors() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        assay.Kronecker(0, 4)
    with pytest.raises(ValueError, match="seed: expected a 64-bit integer"):
        assay.Kronecker(4, 4, seed=2**63)
