"""ensemble_stats on the GPU against float64, around every width at which the kernel changes its plan."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from assay.ops.ensemble import FIELDS, LABEL_FIELDS
from tests.gpu.harness import (
    DTYPES,
    FLOAT_FIELDS,
    assert_same,
    assert_stats,
    distributions,
    here,
    kernel,
    needs_memory,
    row,
    unaligned,
)

ensemble_stats = kernel("ensemble_stats")

# Classifiers' widths; the vocabularies of Llama 2, GPT-2, Llama 3, Qwen and Gemma.
NAMED = (10, 100, 111, 1000, 32_000, 50_257, 128_256, 151_936, 262_144)
# The limits of csrc/cuda/ensemble_plan.h: the bytes that a block keeps of a K × C row, as float32, by blocks per row.
KEPT_BYTES = {1: 72 << 10, 2: 72 << 10, 4: 72 << 10, 8: 72 << 10, 16: 110 << 10}
CHUNK_BYTES = 2048  # of a row's logits, per warp: plans change at its multiples
WIDEST = here(262_145, 4_200)


def widths(k: int, itemsize: int) -> list[int]:
    """Both sides of every width at which a kernel may change its plan, and the widths that there are."""
    chunk = CHUNK_BYTES // itemsize
    kept = [blocks * size // (4 * k) // chunk for blocks, size in KEPT_BYTES.items()]  # in chunks
    edges = [2**i for i in range(19)] + [chunk * (n + step) for n in kept for step in (-1, 0, 1)]
    around = {edge + step for edge in edges for step in (-1, 0, 1)}
    return sorted(c for c in around.union(NAMED) if 1 <= c <= WIDEST)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", here([1, 2, 3, 4, 5, 6, 7, 8, 33], [1, 3]))
def test_every_width(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Three rows: one as models have them, one peaked, one with a large offset. 33 models: too many for arguments."""
    weights = [1.0 + i for i in range(k)]
    for c in widths(k, dtype.itemsize):
        rows = torch.randn(k, 3, c, device=device)
        rows[:, 0] *= 3
        rows[:, 1] = -20
        rows[:, 1, c - 1 - c // 3] = 20
        rows[:, 2] -= 1e4
        z, labels = list(rows.to(dtype)), torch.randint(c, (3,), device=device)
        assert_stats(ensemble_stats(z, labels, weights=weights), z, labels, weights, what=f"C={c}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", here([1, 2, 10, 111, 1000, 4099, 32_000, 262_144], [1, 2, 111, 1025]))
def test_distributions(c: int, dtype: torch.dtype, device: torch.device) -> None:
    labels = torch.randint(c, (6,), device=device)
    for name, rows in distributions(6, c, device).items():
        z = rows.to(dtype)
        for models in ([z], [z, z.roll(1, 0)], [z, z.clone(), z.flip(1)]):
            got = ensemble_stats(models, labels)
            assert_stats(got, models, labels, what=f"{name}, K={len(models)}")
            defined = ~got.entropy.isnan()
            assert bool((got.mutual_information[defined] >= 0).all()), name
        twins = ensemble_stats([z, z.clone()]).mutual_information
        assert bool((twins[~twins.isnan()].abs() <= 1e-6).all()), f"{name}: equal models disagree by {twins}"


@pytest.mark.parametrize("n", [0, 1, 99, 989])
@pytest.mark.parametrize("c", here([2, 10, 100, 1000, 4096, 50_257], [10, 600]))
def test_numbers_of_rows(n: int, c: int, device: torch.device) -> None:
    """A last block that is not full, ignored rows in it, other ignore indices, no labels."""
    z = [torch.randn(n, c, device=device).bfloat16() for _ in range(2)]
    labels = torch.randint(c, (n,), device=device)
    full = ensemble_stats(z, labels)
    assert_stats(full, z, labels, what="all rows")
    for ignore_index in (-100, c + 7, -1):
        ignored = labels.clone()
        ignored[::3] = ignore_index
        got, seen = ensemble_stats(z, ignored, ignore_index=ignore_index), ignored != ignore_index
        for field in FLOAT_FIELDS:
            value = getattr(got, field)
            assert bool(value[~seen].isnan().all()), f"{field}: an ignored row has a value"
            assert_same(value[seen], getattr(full, field)[seen], f"{field}, ignore_index={ignore_index}")
        assert bool((got.prediction[~seen] == -1).all())
    unlabelled = ensemble_stats(z)
    for field in FIELDS:
        value = getattr(unlabelled, field)
        if field in LABEL_FIELDS:
            assert bool(value.isnan().all()), f"{field} without labels"
        else:
            assert_same(value, getattr(full, field), f"{field} without labels")


def test_more_rows_than_a_launch_takes(device: torch.device) -> None:
    """Their sums are kept in 64 MiB; rows on both sides of where a launch ends are those of a call of their own."""
    n, c = here((900_000, 257), (50, 257))
    needs_memory(3)
    z = torch.randn(2, n, c, device=device, dtype=torch.bfloat16)
    labels = torch.randint(c, (n,), device=device)
    got = ensemble_stats(z, labels)
    for begin in range(0, n, max(1, n // 20)):
        few = slice(begin, begin + 2)
        want = ensemble_stats(z[:, few], labels[few])
        for field in FIELDS:
            assert_same(getattr(got, field)[few], getattr(want, field), f"rows from {begin}, {field}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", here([10, 100, 1000, 32_000, 128_256], [10, 1000]))
def test_any_strides(c: int, dtype: torch.dtype, device: torch.device) -> None:
    labels = torch.randint(c, (12,), device=device)
    big = torch.randn(3, 24, 2 * c, device=device).to(dtype)
    columns_apart = torch.randn(c, 12, device=device).to(dtype).T
    views = [big[0, ::2, :c], big[1, ::2, ::2], columns_apart, unaligned(big[2, :12, :c].contiguous())]
    want = ensemble_stats([v.contiguous() for v in views], labels)
    assert_same(ensemble_stats(views, labels), want, "a list of views")
    for i, view in enumerate(views):
        assert_same(ensemble_stats([view]), ensemble_stats([view.contiguous()]), f"view {i} alone")
    stacked = torch.stack([v.contiguous() for v in views])
    assert_same(ensemble_stats(stacked, labels), want, "one tensor (K, N, C)")
    assert_same(
        ensemble_stats(stacked.transpose(0, 1).contiguous().transpose(0, 1), labels), want, "K strides inside N"
    )
    one = ensemble_stats(big[0, :1, :c].expand(5, c))  # row stride 0
    assert_same(one.entropy, one.entropy[:1].expand(5), "an expanded row")
    twice = ensemble_stats(big[:1, :4, :c].expand(2, 4, c))  # model stride 0
    assert_same(twice, ensemble_stats(big[:1, :4, :c].repeat(2, 1, 1)), "an expanded model")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", here([7, 100, 1500, 40_000, 200_000], [7, 1500]))
def test_undefined_rows_are_alone(c: int, dtype: torch.dtype, device: torch.device) -> None:
    clean = torch.randn(2, 8, c, device=device).to(dtype)
    labels = torch.randint(c, (8,), device=device)
    want = ensemble_stats(clean, labels)
    z = clean.clone()
    z[0, 1, c // 2] = math.nan
    z[1, 3, c - 1] = math.inf
    z[0, 5] = -math.inf
    got = ensemble_stats(z, labels)
    bad = torch.tensor([False, True, False, True, False, True, False, False], device=device)
    for field in FLOAT_FIELDS:
        value = getattr(got, field)
        assert torch.equal(value.isnan(), bad), field
        assert_same(value[~bad], getattr(want, field)[~bad], f"{field}: a neighbour's NaN changed the row")
    assert bool((got.prediction[bad] == -1).all())


@pytest.mark.parametrize("c", here([6, 90, 1111, 65_537, 262_144], [6, 1111]))
def test_ties_and_impossible_labels(c: int, device: torch.device) -> None:
    z = torch.zeros(2, 4, c, device=device)
    z[:, 1, c // 2 :] = 3.0
    z[:, 2, [1, c - 1]] = 2.0
    got = ensemble_stats(z, torch.zeros(4, dtype=torch.int64, device=device))
    assert got.prediction.tolist() == [0, c // 2, 1, 0]
    assert got.agreement.tolist() == [1.0, 0.0, 0.0, 1.0]
    z = torch.randn(4, c, device=device)
    z[:, 3] = -math.inf
    labels = torch.full((4,), 3, device=device)
    one = ensemble_stats([z], labels)
    assert one.nll.tolist() == one.mean_nll.tolist() == [math.inf] * 4
    pair = [z, torch.randn(4, c, device=device)]
    assert_stats(ensemble_stats(pair, labels), pair, labels, what="possible in one model")
    assert_stats(ensemble_stats(pair, labels, weights=[0, 1]), pair, labels, [0, 1], what="weight 0 of infinity")


@pytest.mark.parametrize("c", here([12, 900, 50_257, 262_144], [12, 900]))
def test_fields_one_by_one(c: int, device: torch.device) -> None:
    for k in (1, 3):
        z, labels = torch.randn(k, 9, c, device=device), torch.randint(c, (9,), device=device)
        full = ensemble_stats(z, labels)
        for field in FIELDS:
            only = ensemble_stats(z, labels, fields=[field])
            assert_same(getattr(only, field), getattr(full, field), f"K={k}, {field}")
            assert [f for f in FIELDS if getattr(only, f) is not None] == [field]


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("c", here([10, 100, 1000, 32_000, 128_256, 262_144], [10, 1000]))
def test_same_bits_every_run_and_alone(c: int, k: int, device: torch.device) -> None:
    z = (3 * torch.randn(k, 33, c, device=device)).bfloat16()
    labels = torch.randint(c, (33,), device=device)
    first = ensemble_stats(z, labels)
    for _ in range(here(20, 3)):
        assert_same(ensemble_stats(z, labels), first, "another run")
    for i in (0, 17, 32):
        alone = ensemble_stats(z[:, i : i + 1], labels[i : i + 1])
        assert_same(alone, row(first, i), f"row {i} alone")


@pytest.mark.parametrize("strided", [False, True], ids=["many rows", "models far apart"])
def test_beyond_int32(strided: bool, device: torch.device) -> None:
    """More than 2³¹ elements: in one model, and from one model to the next. The last rows equal themselves alone."""
    needs_memory(12)
    n, c = here((8_200, 262_144), (40, 700))
    logits = torch.empty(2 if strided else 1, n, c, dtype=torch.bfloat16, device=device).normal_()
    labels = torch.randint(c, (n,), device=device)
    assert here(logits[0].numel(), 2**32) > 2**31
    whole = ensemble_stats(logits, labels)
    for i in (0, n // 2, n - 1):
        rows: list[Tensor] = [z[i : i + 1].clone() for z in logits]
        alone = ensemble_stats(rows, labels[i : i + 1])
        assert_same(alone, row(whole, i), f"row {i}")
        assert_stats(alone, rows, labels[i : i + 1], what=f"row {i}")
