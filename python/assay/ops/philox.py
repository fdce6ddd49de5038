"""Philox4x32-10 in plain torch: random bits that are a pure function of a key and a counter.

Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011. The native and Triton kernels hold the same ten
rounds; all give the same bits, whatever the batch, the device or the number of workers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Counters, four int64 tensors of one shape with values in [0, 2³²), and a key of two such numbers -> (..., 4).

    The result is int64 with values in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit numbers wraps in int64; its 64 bits are right all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack([c0, c1, c2, c3], -1)


def make_key(seed: int, name: str) -> tuple[int, int]:
    """A seed and a layer's name -> the key of its generator."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True) + name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
