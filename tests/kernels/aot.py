"""Triton kernels compiled ahead of time, as their launchers would have them compiled, on a machine without a GPU.

Only in a process without TRITON_INTERPRET: there triton.jit makes interpreted functions, which do not compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from assay.kernels._common import FP_FUSION, Launch
from tests.kernels.butterfly import lopsided
from tests.kernels.table import Row

CAPABILITIES = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel, in Triton's terms; attrs: {(argument index,): [["tt.divisibility", 16]]}."""

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = True
    capabilities: Sequence[int] = CAPABILITIES  # where the launcher would take it
    maxnreg: int | None = None


def case_of(
    name: str, launch: Launch, *, hot: bool = True, capabilities: Sequence[int] = CAPABILITIES, aligned: bool = True
) -> Case:
    """The specialisation that ``triton.jit`` makes of a launch; tensors count as aligned to 16 bytes, or not."""
    signature, constexprs, attrs = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr:
            kind = "constexpr"
        elif isinstance(value, torch.Tensor):
            kind, divisible = _POINTERS[value.dtype], aligned
        elif value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            kind = "constexpr"
        elif type(value) is bool:
            kind = "i1"
        elif type(value) is int:
            kind, divisible = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        elif type(value) is float:
            kind = "fp32"
        else:
            raise TypeError(f"{name}: argument {parameter.name} is a {type(value).__name__}, which no kernel takes")
        signature[parameter.name] = kind
        if kind == "constexpr":
            constexprs[parameter.name] = value
        elif divisible and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return Case(
        name,
        launch.kernel,
        signature,
        constexprs,
        attrs,
        launch.num_warps,
        launch.num_stages,
        hot,
        capabilities,
        launch.registers,
    )


def compiled(case: Case, cc: int) -> Any:
    """Triton's kernel for compute capability ``cc``; its machine code is ``.asm["cubin"]``."""
    source = ASTSource(case.fn, dict(case.signature), dict(case.constexprs), dict(case.attrs))
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": FP_FUSION,
        "maxnreg": case.maxnreg,
    }
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)


def compile_case(case: Case, cc: int) -> Row:
    """Compile for compute capability ``cc`` and read what the machine code takes."""
    code = compiled(case, cc)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"{case.name}: expected REG, STACK and LOCAL in cuobjdump's report, got {report!r}")
    return Row(
        kernel=case.name,
        target=f"sm_{cc}",
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],  # Triton has no arrays of its own: a frame is spilled registers
        stack_bytes=usage["STACK"],
        shared_bytes=code.metadata.shared,
        hot=case.hot,
        lopsided=len(lopsided(code.asm["ptx"])),
    )
