"""What precision torch is allowed for float32 products, in all the ways of saying so."""

from __future__ import annotations

import pytest
import torch

NEEDS_SETTINGS = pytest.mark.skipif(
    not hasattr(torch._C, "_get_fp32_precision_getter"), reason="this torch has no settings by backend"
)
WAYS = ["in general", "the old flag", "one backend", "every backend"]
_MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def state() -> tuple[str, ...]:
    return tuple(m.fp32_precision for m in _MATMULS)


def allow(how: str) -> None:
    """TF32, or less."""
    if how == "in general":
        torch.set_float32_matmul_precision("medium")
    elif how == "the old flag":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif how == "one backend":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.fp32_precision = "tf32"


def restore() -> None:
    """What torch begins with."""
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for matmul in _MATMULS:
        matmul.fp32_precision = "none"
