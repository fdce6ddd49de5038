"""The gradient of a weight that the model computes from a parameter, as the parameter's."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from assay.probe.terms import Convolution, Outer, Pulled, Scatter, Term


def pulled(terms: Sequence[Term], value: Tensor, source: Tensor) -> list[Term]:
    """Terms of ``value``'s gradient -> of ``source``'s, from which a graph leads to it.

    A transpose, some rows and other shapes of a matrix stay outer products.
    """
    moved = [_viewed(term, value, source) for term in terms] if _shares_memory(value, source) else [None]
    found = [term for term in moved if term is not None]
    return found if len(found) == len(moved) else [Pulled(terms, value, source)]


def _shares_memory(value: Tensor, source: Tensor) -> bool:
    same = value.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() and value.dtype == source.dtype
    return same and source.is_contiguous() and value.numel() > 0


def _viewed(term: Term, value: Tensor, source: Tensor) -> Term | None:
    start = value.storage_offset() - source.storage_offset()
    if value.ndim == source.ndim == 2 and start == 0 and value.stride() == source.stride()[::-1] != source.stride():
        whole = isinstance(term, Outer) and value.shape == source.shape[::-1]
        return Outer(term.right, term.left) if whole and isinstance(term, Outer) else None
    if not value.is_contiguous():
        return None
    if value.shape[1:] == source.shape[1:]:
        return _rows(term, start // source[0].numel(), len(value), len(source))
    if value.numel() == source.numel() and value.shape[0] == source.shape[0]:
        term = term.outer() if isinstance(term, Convolution) else term
        return term if isinstance(term, Outer) else None
    return None


def _rows(term: Term, first: int, count: int, total: int) -> Term | None:
    """The gradient of the rows from ``first`` on."""
    if count == total:
        return term
    if isinstance(term, Scatter):
        return Scatter(term.ids + first, term.grads)
    if isinstance(term, Outer) and term.left.shape[-1] == count:
        return Outer(F.pad(term.left, (first, total - first - count)), term.right)
    return None
