"""The fused output layer's launches, recorded from the launchers themselves: every tile of every table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from assay.kernels import head, head_tiles
from assay.kernels._common import Launch
from assay.kernels.fields import FIELDS
from assay.kernels.head_launch import Models
from tests.kernels.aot import CAPABILITIES, Case, case_of

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
ALL = (1 << len(FIELDS)) - 1
N, C = 2048, 32000


def record(generation: int, plan: Callable[[], Iterable[Launch]]) -> list[Launch]:
    """The launches of a plan for a GPU generation; meta tensors will do."""
    with mock.patch.object(head_tiles, "generation", return_value=generation):
        return list(plan())


def compiled(name: str, launch: Launch, cc: int) -> Case:
    """``case_of`` for a launch with descriptors, or tuples, whose elements are specialised one by one."""
    tuples = {name: value for name, value in launch.arguments.items() if isinstance(value, tuple | TensorDescriptor)}
    hot = launch.kernel.fn.__name__ in ("sweep", "mix", "residual", "accumulate")
    plain = replace(launch, arguments={**launch.arguments, **dict.fromkeys(tuples)})
    case = case_of(name, plain, hot=hot, capabilities=(cc,))
    signature: dict[str, Any] = dict(case.signature)
    constexprs: dict[Any, Any] = {k: v for k, v in case.constexprs.items() if k not in tuples}
    attrs = dict(case.attrs)
    for index, parameter in enumerate(launch.kernel.params):
        values = tuples.get(parameter.name, ())
        if isinstance(values, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{element(values.base)[0][1:]}{values.block_shape}>"
            continue
        elements = [element(value) for value in values]
        if elements:
            signature[parameter.name] = tuple(kind for kind, _ in elements)
            constexprs |= {(index, i): v for i, v in enumerate(values) if elements[i][0] == "constexpr"}
            attrs |= {(index, i): [["tt.divisibility", 16]] for i, (_, even) in enumerate(elements) if even}
    return replace(case, signature=signature, constexprs=constexprs, attrs=attrs)


def element(value: object) -> tuple[str, bool]:
    """Type and divisibility by 16 of a tuple's element."""
    if isinstance(value, torch.Tensor):
        return {BF16: "*bf16", FP16: "*fp16", F32: "*fp32"}[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    if type(value) is not int:
        raise TypeError(f"expected a tensor, a float or an int, got {value!r}")
    return ("constexpr", False) if value == 1 else ("i32", value % 16 == 0)


def plans(dtype: torch.dtype, size: int) -> Iterator[tuple[str, Callable[[], Iterable[Launch]]]]:
    """One plan per tile and combination of flags that a tile must hold without spilling."""

    def tensors(count: int, rows: int, width: int) -> list[torch.Tensor]:
        more = 64 if width % 64 == 0 else 16
        return [torch.empty(rows, width + more * k, dtype=dtype, device="meta") for k in range(count)]

    labels = torch.empty(N, dtype=torch.int64, device="meta")
    hidden, weight, directions = tensors(3, N, size), tensors(3, C, size), tensors(2, C, size)
    bias: list[torch.Tensor | None] = [torch.empty(C, dtype=dtype, device="meta") for _ in hidden]
    one, two = slice(0, 1), slice(0, 2)

    def statistics(models: slice, fields: int = ALL, bare: bool = False) -> Callable[[], Iterable[Launch]]:
        biases, given = (None, None) if bare else (bias[models], labels)
        layers = Models.of(hidden[models], weight[models], biases, given, -100)
        share = [0.25] * len(hidden[models])
        return lambda: head.plan_statistics(layers, share, fields, *layers.statistics())

    def scores(
        layers: Models, along: Sequence[torch.Tensor] | None, rows: int | None
    ) -> Callable[[], Iterable[Launch]]:
        shape = (len(layers.hidden), layers.rows)
        dot = None if along is None else layers.empty(*shape)
        left = None if rows is None else layers.empty(*shape, rows)
        out = (*layers.statistics(), dot, layers.empty(*shape), left)
        return lambda: head.plan_scores(layers, [0.5] * shape[0], ALL, along, [(1, 2)] * shape[0], out)

    def losses(bare: bool) -> Callable[[], Iterable[Launch]]:
        layers = Models.of(hidden[one], weight[one], None if bare else bias[one], labels, -100)
        into = torch.empty(N, hidden[0].shape[1], device="meta")
        return lambda: head.plan_losses(layers, layers.merged(), into)

    yield "statistics", statistics(one)
    yield "nll", statistics(one, 1)
    yield "mixture", statistics(two)
    layers = Models.of(hidden[one], weight[one], bias[one], labels, -100)
    yield "direction", scores(layers, directions[one], None)
    for rows in (16, 32, 64, 128):
        yield f"sketch{rows}", scores(layers, None, rows)
        yield f"direction+sketch{rows}", scores(layers, directions[one], rows)
    if size == 1024 and dtype == BF16:  # types mixed: widened on load
        wide = [w.float() for w in weight]
        mixed = Models.of(hidden[one], wide[one], bias[one], labels, -100)
        yield "mixed", scores(mixed, directions[one], 16)
    unbiased = Models.of(hidden[one], weight[one], None, labels, -100)
    for rows in (16, 32):
        yield f"bare direction+sketch{rows}", scores(unbiased, directions[one], rows)
    both = Models.of(hidden[two], weight[two], None, labels, -100)
    lone = Models.of(hidden[one], weight[one], None, labels, -100)
    yield "unbiased statistics", lambda: head.plan_statistics(lone, [1.0], ALL, *lone.statistics())
    yield "unbiased mixture", lambda: head.plan_statistics(both, [0.5, 0.5], ALL, *both.statistics())
    alike = Models.of([hidden[0]] * 2, [weight[0]] * 2, None, labels, -100)
    yield "mixture of one size", lambda: head.plan_statistics(alike, [0.5, 0.5], ALL, *alike.statistics())
    yield "mixture of three", statistics(slice(0, 3))  # by addresses
    three = Models.of(hidden, weight, None, labels, -100)
    yield "unbiased mixture of three", lambda: head.plan_statistics(three, [0.25] * 3, ALL, *three.statistics())
    yield "losses", losses(bare=False)
    yield "bare mixture", statistics(two, bare=True)
    yield "bare losses", losses(bare=True)
    if size == 1023:  # sizes of 1 are constants to the compiler
        small = [[x[:1, :1] for x in xs[:2]] for xs in (hidden, weight, directions)]
        yield "single", scores(Models.of(small[0], small[1], None, labels[:1], -100), small[2], 5)


# Which plans, for which type and width: whole steps; a last step that is not; rows that start at any address.
HEAVY = ("statistics", "mixture", "direction+sketch32", "direction+sketch128", "losses")
CHOSEN: dict[tuple[torch.dtype, int], Sequence[str] | None] = {  # None: all of them
    (BF16, 1024): None,
    (BF16, 2048): ("losses",),  # whose chunks are not split
    (BF16, 576): ("statistics", "unbiased statistics", "bare mixture", "mixture of one size", "bare losses"),
    (BF16, 1040): ("statistics", "direction+sketch128"),
    (BF16, 1023): (*HEAVY, "single"),
    (FP16, 1024): ("statistics", "direction+sketch16"),  # bfloat16's code but for the instruction's name
    (F32, 1024): HEAVY,
    (F32, 1023): HEAVY,
}


def cases() -> list[Case]:
    found = {}
    for cc in CAPABILITIES:
        for (dtype, size), chosen in CHOSEN.items():
            for what, plan in plans(dtype, size):
                if chosen is not None and what not in chosen:
                    continue
                for launch in record(cc // 10, plan):
                    kernel = launch.kernel.fn.__name__
                    name = f"head.{kernel} {str(dtype).removeprefix('torch.')} D={size} {what}"
                    case = compiled(name, launch, cc)
                    same = (kernel, cc, *(repr(x) for x in (case.signature, case.constexprs, case.attrs)))
                    found.setdefault(same, case)
    return list(found.values())
