"""Per-sample gradient · direction, without a per-sample gradient."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.ops import _backend, _native
from assay.ops._tensors import adjacent_columns, check_like, check_tensor, wide_dtype

# Rows of the intermediate product are made this many bytes at a time, so that the multiply-reduce finds them in cache.
CHUNK_BYTES = 4 << 20
# ... but never fewer rows than keep the GEMM efficient.
MIN_ROWS = 128
# Of a 16-bit direction so much is float32 at a time, and never fewer columns than keep the GEMM efficient.
WIDEN_BYTES = 8 << 20
MIN_COLUMNS = 256


def grad_dot(inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
    """⟨Σ_t grads[b,t]ᵀ inputs[b,t], direction⟩ for every sample b.

    The per-sample gradient of y = W a is Σ_t G_tᵀ A_t, and its inner product with V is Σ_t G_t·(V A_t) (2501.06708 for
    Grad-Mimic's use of it): one GEMM and a multiply-reduce, nothing of size O×I per sample.

    Args:
        inputs: A, (B, T, I), or (B, I) for T = 1.
        grads: G, (B, T, O), or (B, O): the loss's gradient in the layer's output. Gradients of the *sum* of the
            samples' losses; a mean over the batch makes every result B times too small.
        direction: V, (O, I), shaped as the weight.
            All float32, bfloat16 or float16 (mixed is fine; float64 anywhere runs the reference), any strides. On a GPU
            a float32 direction with bfloat16 factors takes three bfloat16 products and a copy of 1.5 times its size;
            other mixtures run at float32's speed.

    Returns:
        (B,) float32 (float64 if an argument is); float32 within tiles of the product, double beyond.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together.
    """
    inputs, grads = check_factors(inputs, grads)
    check_tensor("direction", direction)
    if direction.shape != (grads.shape[2], inputs.shape[2]):
        raise ValueError(
            f"direction: expected (O, I) = ({grads.shape[2]}, {inputs.shape[2]}) as given by grads and inputs, "
            f"got {tuple(direction.shape)}"
        )
    check_like("direction", direction, tuple(direction.shape), inputs.device)
    out: Tensor = _grad_dot(inputs, grads, direction.detach())
    return out


def check_factors(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors detached, as (B, T, I) and (B, T, O), or an error that says what does not fit."""
    for name, x in (("inputs", inputs), ("grads", grads)):
        check_tensor(name, x, (2, 3), "(B, T, features) or (B, features)")
    if inputs.shape[:-1] != grads.shape[:-1]:
        raise ValueError(
            f"grads: expected the leading sizes of inputs, {tuple(inputs.shape[:-1])}, got {tuple(grads.shape[:-1])}"
        )
    if inputs.device != grads.device:
        raise ValueError(f"grads: expected the device of inputs, {inputs.device}, got {grads.device}")
    inputs, grads = inputs.detach(), grads.detach()
    return (inputs, grads) if inputs.dim() == 3 else (inputs[:, None], grads[:, None])


def reference(inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
    """The same in plain torch, in float64 if an argument is and in float32 otherwise."""
    wide = wide_dtype(inputs, grads, direction)
    return ((inputs.to(wide) @ direction.to(wide).T) * grads.to(wide)).sum((1, 2))


def _cpu(inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
    b, t, i = inputs.shape
    o = grads.shape[2]
    # A Vᵀ (rows × O) and G V (rows × I) cost the same FLOPs: take the narrower, it is what gets written and read again.
    if i <= o:
        left, right, matrix = grads, inputs, direction
    else:
        left, right, matrix = inputs, grads, direction.T
    left, right = left.reshape(b * t, -1), adjacent_columns(right.reshape(b * t, -1))
    sums = np.zeros(b * t)
    for c in range(0, matrix.shape[1], columns := _columns(matrix)):
        piece = matrix[:, c : c + columns].float()
        sums += _row_dots(left, piece, right[:, c : c + columns])
    return torch.from_numpy(sums.reshape(b, t).sum(1)).float()


def _columns(matrix: Tensor) -> int:
    """How many columns to multiply with at a time: all of a float32 matrix, and few enough of another to widen them."""
    return matrix.shape[1] if matrix.dtype == torch.float32 else max(MIN_COLUMNS, WIDEN_BYTES // (4 * len(matrix)))


def _row_dots(left: Tensor, matrix: Tensor, right: Tensor) -> NDArray[np.float64]:
    """Σ_n (left matrix)[r,n] right[r,n] for every row r; the matrix float32."""
    k, width = matrix.shape
    rows = CHUNK_BYTES // (4 * (width if left.dtype == torch.float32 else max(width, k)))  # what is widened, too
    rows, sums = max(MIN_ROWS, rows), np.zeros(len(left))
    product = torch.empty(min(rows, len(left)), width)
    for r in range(0, len(left), rows):
        piece = torch.mm(left[r : r + rows].float(), matrix, out=product[: len(left) - r])
        _native.multiply_reduce(piece, right[r : r + rows], sums[r:])
    return sums


def _triton(inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
    from assay.kernels import dot as kernel

    out: Tensor = kernel.grad_dot(inputs, grads, direction)
    return out


@_backend.op("grad_dot", reference=reference, cpu=_cpu, triton=_triton)
def _grad_dot(inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], dtype=wide_dtype(inputs, grads, direction))
