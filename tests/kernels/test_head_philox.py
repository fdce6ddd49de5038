"""The generator of the sketches' signs against Random123's vectors and plain Python."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from assay.kernels import philox

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter")

VECTORS = [  # Random123's kat_vectors: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def sign(row: int, column: int, key: tuple[int, int], side: int = 0) -> int:
    """The definition: bit row % 32 of word (row // 32) % 4 of the counter (column, 0, row // 128, side)."""
    return 1 - 2 * (words((column, 0, row // 128, side), key)[row // 32 % 4] >> row % 32 & 1)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def as_int32(values: tuple[int, ...]) -> list[int]:
    return [v - (1 << 32) if v >> 31 else v for v in values]


@triton.jit
def _generate(given, out):
    at = given + tl.arange(0, 1)
    c0 = tl.load(at).to(tl.uint32, bitcast=True)
    c1 = tl.load(at + 1).to(tl.uint32, bitcast=True)
    c2 = tl.load(at + 2).to(tl.uint32, bitcast=True)
    c3 = tl.load(at + 3).to(tl.uint32, bitcast=True)
    k0 = tl.load(at + 4).to(tl.uint32, bitcast=True)
    k1 = tl.load(at + 5).to(tl.uint32, bitcast=True)
    words = philox.philox4x32(c0, c1, c2, c3, k0, k1)
    for i in tl.static_range(4):
        tl.store(out + i + tl.arange(0, 1), words[i].to(tl.int32, bitcast=True))


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert words(integers(counter), integers(key)) == integers(result)
    given = torch.tensor(as_int32(integers(counter) + integers(key)), dtype=torch.int32)
    out = torch.zeros(4, dtype=torch.int32)
    _generate[(1,)](given, out)
    assert out.tolist() == as_int32(integers(result))


@triton.jit
def _expand(words, out, count, COUNT: tl.constexpr, ROWS: tl.constexpr):
    at = tl.arange(0, COUNT)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(out + at, philox.signs(words, count, tl.arange(0, COUNT), ROWS))


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("side", [philox.OUTPUT_SIDE, philox.INPUT_SIDE])
def test_signs_follow_the_definition(rows: int, side: int) -> None:
    key, block, count = (0xDEADBEEF, 7), 3, 32
    packed = torch.zeros(max(1, rows // 32), count, dtype=torch.int32)
    k0, k1 = as_int32(key)
    philox.sign_words[(2,)](packed, count, block, side, k0, k1, WORDS=len(packed), BLOCK=16)
    out = torch.zeros(count, rows)
    _expand[(1,)](packed, out, count, COUNT=count, ROWS=rows)
    want = [[sign(128 * block + r, c, key, side) for r in range(rows)] for c in range(count)]
    assert out.tolist() == want
