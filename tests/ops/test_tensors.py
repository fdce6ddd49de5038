"""Hostile arguments to every public op: the right result, or a TypeError or ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import assay
from assay import ops
from tests.ops.test_autocast import tensors

N, K, C, D, B, T = 6, 2, 7, 5, 3, 4
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]

# op -> its arguments; the first letters of a tensor's name say what it is
GOOD: dict[str, dict[str, Any]] = {
    "ensemble_stats": {"logits": torch.randn(K, N, C), "labels": torch.arange(N), "weights": torch.tensor([0.3, 0.7])},
    "linear_ensemble_stats": {
        "hidden": torch.randn(K, N, D),
        "weight": torch.randn(K, C, D),
        "labels": torch.arange(N),
        "bias": torch.randn(K, C),
        "weights": torch.tensor([0.3, 0.7]),
    },
    "head_scores": {
        "hidden": torch.randn(K, N, D),
        "weight": torch.randn(K, C, D),
        "labels": torch.arange(N),
        "bias": torch.randn(K, C),
        "weights": torch.tensor([0.3, 0.7]),
        "directions": torch.randn(K, C, D),
    },
    "linear_cross_entropy": {
        "hidden": torch.randn(N, D),
        "weight": torch.randn(C, D),
        "labels": torch.arange(N),
        "bias": torch.randn(C),
    },
    "linear_distillation": {
        "hidden": torch.randn(N, D),
        "weight": torch.randn(C, D),
        "teacher_hidden": torch.randn(K, N, D),
        "teacher_weight": torch.randn(K, C, D),
        "bias": torch.randn(C),
        "teacher_bias": torch.randn(K, C),
        "teacher_weights": torch.tensor([0.3, 0.7]),
    },
    "grad_dot": {"inputs": torch.randn(B, T, D), "grads": torch.randn(B, T, C), "direction": torch.randn(C, D)},
    "grad_sqnorm": {"inputs": torch.randn(B, T, D), "grads": torch.randn(B, T, C)},
    "grad_sketch": {"inputs": torch.randn(B, T, D), "grads": torch.randn(B, T, C), "sketch": assay.Sparse(9)},
    "project": {"vectors": torch.randn(B, D), "sketch": assay.Rademacher(9)},
    "topk_scan": {"features": torch.randn(N, D), "queries": torch.randn(K, D), "k": 3},
    "scan_scores": {
        "features": torch.randint(-9, 9, (N, D), dtype=torch.int8),
        "queries": torch.randn(K, D),
        "scales": torch.rand(N),
    },
}
TENSORS = [(op, name) for op, arguments in GOOD.items() for name, x in arguments.items() if isinstance(x, Tensor)]
SHARES = ("weights", "teacher_weights")
OPTIONAL = {"bias", "directions", "teacher_bias", *SHARES}
OTHERS = {  # argument -> what is none, for every op that has it
    "sketch": [None, 3, "Sparse", assay.Sparse, torch.ones(2), [assay.Sparse(3)]],
    "ignore_index": [None, 1.5, "0", True, 2**63, -(2**63) - 1, torch.ones(2)],
    "fields": ["nll", 3, ["nll", "loss"], [3], [None], torch.ones(2)],
    "k": [None, -1, 2.0, "3", True, N + 1, 2**70, torch.ones(2)],
    "reduce": [None, "sum", 3, ["mean"], torch.ones(2)],
    "weights": ["ab", [1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, "x"], [1.0, None], [[1.0, 1.0]], 3],
    "temperature": [None, "1", True, 0, -1.0, float("nan"), float("inf"), torch.ones(2)],
    "reverse": [None, 0, "True", torch.ones(2)],
}
OTHERS["teacher_weights"] = OTHERS["weights"]


def call(op: str, **changed: Any) -> Any:
    return getattr(ops, op)(**(GOOD[op] | changed))


def refused(x: Tensor, name: str) -> Iterator[tuple[str, Any]]:
    """What no op takes in the place of ``x``."""
    if name not in OPTIONAL and name not in ("labels", "scales"):
        yield "None", None
    yield "a string", "x"
    yield "a number", 2.5
    yield "a dict", {"x": x}
    yield "no dimensions", torch.ones((), dtype=x.dtype)
    yield "too many dimensions", x[..., None, None, None]
    yield "another device", x.to("meta")
    yield "one row less", x[:-1]
    yield "no rows", x[:0]
    if name not in SHARES:
        yield "an array", x.numpy()
        yield "nested lists", x.tolist()
        yield "a list of arrays", [x.numpy()]
        yield "bool", x.bool()
        yield "int32", x.int()
        yield "sparse", x.to_sparse()
        if x.is_floating_point():
            yield "int64", x.long()
            yield "uint8", x.byte()
            yield from ((str(fp8), x.to(fp8)) for fp8 in FP8)
            yield "quantised", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        if x.dim() > 1:
            yield "one column less", x[..., :-1]
    if x.is_floating_point():
        yield "complex", x.to(torch.complex64)


RELATIONS = ("another device", "one row less", "no rows", "one column less")
# ``vectors`` and ``features`` alone say how many rows and columns there are; a gradient's factors how many columns.
FREE = {
    ("project", "vectors"): ("another device", "one row less", "no rows", "one column less"),
    ("topk_scan", "queries"): ("one row less",),
    ("scan_scores", "queries"): ("one row less",),
    ("topk_scan", "features"): ("one row less",),
    ("grad_sqnorm", "inputs"): ("one column less",),
    ("grad_sqnorm", "grads"): ("one column less",),
    ("grad_sketch", "inputs"): ("one column less",),
    ("grad_sketch", "grads"): ("one column less",),
}


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_what_is_not_taken_is_named(op: str, name: str) -> None:
    x = GOOD[op][name]
    for what, value in refused(x, name):
        if what in FREE.get((op, name), ()):
            continue
        if op == "ensemble_stats" and what == "one column less":
            value = torch.randn(K, N, 0)
        with pytest.raises((TypeError, ValueError)) as raised:
            call(op, **{name: value})
        # Of two that do not fit together either may be named.
        names = GOOD[op] if what in RELATIONS else [name]
        assert str(raised.value).startswith(tuple(names)), f"{what}: {raised.value}"
        assert len(str(raised.value)) < 300, what


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_what_is_taken_is_taken_for_what_it_is(op: str, name: str) -> None:
    x, want = GOOD[op][name], tensors(call(op))
    same = [torch.stack([x, x], -1)[..., 0]]
    if x.is_floating_point():
        same += [x.clone().requires_grad_(), torch.nn.Parameter(x.clone()), torch.complex(x, -x).conj().imag]
    if x.dim() == 3 and op in ("ensemble_stats", "linear_ensemble_stats", "head_scores", "linear_distillation"):
        same += [list(x), tuple(x), iter(x), torch.nn.ParameterList(map(torch.nn.Parameter, x))]
    if name in SHARES:
        same += [x.tolist(), x.numpy(), 8 * x]
    for value in same:
        for a, b in zip(tensors(call(op, **{name: value})), want, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-6, atol=1e-6, equal_nan=True)
    if x.is_floating_point() and name not in ("scales", "bias", "teacher_bias", *SHARES):
        wide = tensors(call(op, **{name: x.double()}))
        assert [t.dtype for t in wide if t.is_floating_point()] == [torch.float64] * sum(
            t.is_floating_point() for t in wide
        )
        for a, b in zip(wide, want, strict=True):
            torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_tensor_is_named_too(name: str) -> None:
    takers = 0
    for op in GOOD:
        defaults = getattr(ops, op).__kwdefaults__ or {}
        if name not in GOOD[op] and name not in defaults:
            continue
        takers += 1
        for value in OTHERS[name]:
            if name in defaults and value is defaults[name]:
                continue
            with pytest.raises((TypeError, ValueError)) as raised:
                call(op, **{name: value})
            assert name in str(raised.value), f"{op}, {value!r}: {raised.value}"
    assert takers


@pytest.mark.parametrize("op", ["head_scores", "linear_cross_entropy"])
def test_a_gradient_needs_labels(op: str) -> None:
    with pytest.raises(TypeError, match=r"labels: expected an int64 tensor of shape \(6,\), got NoneType"):
        call(op, labels=None)


def test_labels_outside_the_classes_are_an_index_error() -> None:
    for op in ("ensemble_stats", "linear_ensemble_stats", "head_scores", "linear_cross_entropy"):
        with pytest.raises(IndexError, match=r"labels: expected values in \[0, 7\) .* got 7 in row 5"):
            call(op, labels=torch.arange(N) + 2)


@pytest.mark.parametrize("op", GOOD)
def test_meta_tensors_give_the_shapes(op: str) -> None:
    meta = {k: v.to("meta") if isinstance(v, Tensor) and k not in SHARES else v for k, v in GOOD[op].items()}
    for a, b in zip(tensors(call(op, **meta)), tensors(call(op)), strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: assay.Kronecker("2", 3), "Kronecker: rows: expected an int, got '2'"),
        (lambda: assay.Kronecker(2, 3.0), "Kronecker: cols: expected an int, got 3.0"),
        (lambda: assay.Sparse(True), "Sparse: dim: expected an int, got True"),
        (lambda: assay.Rademacher(None), "Rademacher: dim: expected an int, got None"),
        (lambda: assay.Sparse(4, seed=1.5), "Sparse: seed: expected a 64-bit integer, got 1.5"),
        (lambda: assay.Sparse(4, name=3), "Sparse: name must be a string, got 3"),
        (lambda: assay.Mask(torch.ones(2), 2), "Mask: rows: expected an int, got tensor"),
        (lambda: assay.Mask(2, 2, then=3), "Mask: then must be Kronecker, Sparse, Rademacher or None, got int"),
    ],
)
def test_sketches_name_their_fields(make: Callable[[], object], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()
