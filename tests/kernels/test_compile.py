"""Every GPU kernel compiles for every target and spills nothing, and the check itself would say so."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from assay.kernels._common import Launch
from assay.kernels.dot import HALF_TILES
from tests.kernels import loop
from tests.kernels.aot import case_of
from tests.kernels.butterfly import lopsided
from tests.kernels.loop import Loop
from tests.kernels.table import WORTH, Row, check, render

ROW = Row("grad_dot large", "sm_90", 224, 0, 0, 147456, True)


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python on the arguments, without the interpreter that tests/conftest.py switches on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_without_spills() -> None:
    """``make test-long`` compiles every kernel with every tile and pair of types for every target."""
    run = compiling("-m", "tests.kernels.compile_table", "--quick")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "sm_90" in run.stdout.split()


LARGE = """
from tests.kernels import aot, cases_dot
case = next(c for c in cases_dot.cases() if c.name.endswith("bf16*bf16*bf16 large") and c.capabilities == (90,))
row = aot.compile_case(case, 90)
print(row.shared_bytes)
"""


@pytest.mark.slow
def test_both_operands_loads_are_pipelined() -> None:
    """An address that lost its alignment on the way would take less shared memory."""
    run = compiling("-c", LARGE)
    assert run.returncode == 0, run.stderr
    tile = HALF_TILES[9].large
    assert int(run.stdout) >= tile.stages * (tile.m + tile.n) * tile.k * 2


HEAVIEST = """
from tests.kernels import compile_table
work = compile_table.collect()
chosen = compile_table.heaviest(work)
print(len(work), len(chosen))
kernels = {case.fn.fn.__name__ for case, cc in work if cc == 90}
assert sorted(case.fn.fn.__name__ for case, _ in chosen) == sorted(kernels), kernels
assert {cc for _, cc in chosen} == {90}
"""


@pytest.mark.slow
def test_the_quick_table_leaves_out_no_kernel() -> None:
    run = compiling("-c", HEAVIEST)
    assert run.returncode == 0, run.stderr
    every, chosen = map(int, run.stdout.split())
    assert 20 < chosen < every / 3


SPILLING = """
from dataclasses import replace
from tests.kernels import aot, cases_dot, table
case = next(c for c in cases_dot.cases() if c.name.endswith("bf16 large") and c.capabilities == (90,))
row = aot.compile_case(replace(case, num_warps=2, maxnreg=128), 90)
print(table.render([row]), *table.check([row]), sep=chr(10))
"""


@pytest.mark.slow
def test_a_kernel_that_spills_is_caught() -> None:
    """A tile that cannot fit its registers, through the compiler and back."""
    run = compiling("-c", SPILLING)
    assert run.returncode == 0, run.stderr
    assert "bytes spilled" in run.stdout, run.stdout


def test_a_case_is_what_triton_jit_would_make_of_the_launch() -> None:
    def parameter(name: str, *, constexpr: bool = False, plain: bool = False, unaligned: bool = False) -> object:
        return SimpleNamespace(
            name=name, is_constexpr=constexpr, do_not_specialize=plain, do_not_specialize_on_alignment=unaligned
        )

    values: dict[str, object] = {"x": torch.empty(4, dtype=torch.bfloat16), "nothing": None, "one": 1, "even": 32}
    values |= {"odd": 33, "long": 2**31, "real": 0.5, "BLOCK": 64}
    parameters = [parameter(name, constexpr=name == "BLOCK") for name in values]
    for name, value in (("plain_one", 1), ("plain_even", 32)):
        values[name] = value
        parameters.append(parameter(name, plain=True))
    values["unaligned"] = 32
    parameters.append(parameter("unaligned", unaligned=True))
    launch = Launch(SimpleNamespace(params=parameters), (1,), values, 4, 3)

    case = case_of("k", launch)
    kinds = ["*bf16", "constexpr", "constexpr", "i32", "i32", "i64", "fp32", "constexpr", "i32", "i32", "i32"]
    assert list(case.signature.values()) == kinds
    assert dict(case.constexprs) == {"nothing": None, "one": 1, "BLOCK": 64}
    assert {parameters[i].name for (i,) in case.attrs} == {"x", "even", "long"}  # type: ignore[attr-defined]
    unaligned = case_of("k", launch, aligned=False)
    assert {parameters[i].name for (i,) in unaligned.attrs} == {"even", "long"}  # type: ignore[attr-defined]


def test_a_spill_or_a_stack_frame_fails_only_hot_kernels() -> None:
    assert check([ROW]) == []
    for worse in (replace(ROW, spill_bytes=8), replace(ROW, stack_bytes=16)):
        assert len(check([ROW, worse])) == 1
        assert "grad_dot large for sm_90" in check([worse])[0]
        assert check([replace(worse, hot=False)]) == []


def test_a_spill_with_a_reason_is_allowed_and_no_more() -> None:
    names = ["head.sweep bfloat16 D=1024 direction+sketch16", "head.sweep bfloat16 D=1024 unbiased mixture"]
    names += ["head.mix bfloat16 D=1024 mixture of three", "ensemble_kernel<bf16, kept, one sweep>"]
    for name, worth in zip(names, WORTH, strict=True):
        row = Row(name, worth.target, 255, worth.bytes, worth.bytes, 0, True)
        assert check([row]) == []
        for worse in (
            replace(row, spill_bytes=worth.bytes + 8),
            replace(row, target="sm_80"),
            replace(row, kernel="x"),
        ):
            assert len(check([worse])) == 1


EXCHANGED = """\
 mul.f32 %r3, %r1, %r2;
 mov.b32 %r4, %r3;
 shfl.sync.bfly.b32 %r5|%p1, %r4, 1, 31, -1;
 fma.rn.f32 %r6, %r2, %r1, %r5;
 fma.rn.f32 %r7, %r1, %r8, %r5;
 add.f32 %r9, %r3, %r5;
"""


def test_a_sum_between_threads_that_fuses_one_sides_product_is_caught() -> None:
    """The kernels themselves: every row of the quick table."""
    assert lopsided(EXCHANGED) == ["fma.rn.f32 %r6, %r2, %r1, %r5;"]
    assert lopsided(EXCHANGED.replace("bfly", "idx")) == []
    (line,) = check([ROW, replace(ROW, hot=False, lopsided=2)])
    assert "grad_dot large for sm_90: 2 sums" in line


PAIRS = """\
 mov.b64 %rd3, {%r1, %r2};
 mul.f32x2 %rd4, %rd1, %rd3;
 mov.b64 {%r3, %r4}, %rd4;
 shfl.sync.bfly.b32 %r5, %r3, 16, 31, -1;
 shfl.sync.bfly.b32 %r6, %r4, 16, 31, -1;
 mov.b64 %rd5, {%r5, %r6};
 mov.b64 %rd6, {%r6, %r5};
 fma.rn.f32x2 %rd7, %rd3, %rd1, %rd5;
 fma.rn.f32x2 %rd8, %rd1, %rd3, %rd6;
 mov.b64 {_, %r7}, %rd1;
 fma.rn.f32 %r8, %r2, %r7, %r6;
 fma.rn.f32 %r9, %r1, %r7, %r6;
"""


def test_pairs_of_numbers_are_looked_into() -> None:
    """Blackwell's code, of either Triton: halves that changed places are no thread's own product."""
    whole, half = "fma.rn.f32x2 %rd7, %rd3, %rd1, %rd5;", "fma.rn.f32 %r8, %r2, %r7, %r6;"
    assert lopsided(PAIRS) == [whole, half]
    assert lopsided(PAIRS.replace("mul.f32x2", "add.f32x2")) == []


ORDERS = """
from dataclasses import replace
import torch
from tests.kernels import aot, cases_head
plan = dict(cases_head.plans(torch.bfloat16, 1023))["bare mixture"]
(launch,) = [launch for launch in cases_head.record(10, plan) if launch.kernel.fn.__name__ == "mix"]
for order in (launch.arguments["LAST_FIRST"], False):
    changed = replace(launch, arguments={**launch.arguments, "LAST_FIRST": order})
    print(aot.compile_case(cases_head.compiled("mix", changed, 100), 100).lopsided)
"""


def test_threads_that_share_a_row_hold_the_same_sums_on_blackwell() -> None:
    """Of the tile that leaves a thread one number of a row's first axis; in the other order they do not."""
    run = compiling("-c", ORDERS)
    assert run.returncode == 0, run.stderr
    chosen, other = map(int, run.stdout.split())
    assert chosen == 0
    assert other > 0


def test_the_table_is_aligned() -> None:
    head, line, other = render([ROW, replace(ROW, kernel="x", registers=8, hot=False)]).splitlines()
    assert head.split() == ["kernel", "target", "registers", "spill", "stack", "shared", "hot", "lopsided"]
    assert line.split()[-7:] == ["sm_90", "224", "0", "0", "147456", "hot", "0"]
    assert line.index("224") + 3 == other.index(" 8 ") + 2


LISTING = """\
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDS.128 R4, [R2] ;
.L_x_0:
        /*0020*/              @P0  LDGSTS.E.BYPASS.128 [R6], desc[UR4][R8.64] ;
{steps}        /*0030*/              @!P1 BRA `(.L_x_0) ;
        /*0040*/              @P2  BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2) ;
"""


def test_the_longest_inner_loop_is_counted() -> None:
    """Not the loop around it, nor the one that waits."""
    steps = "/*0021*/ LDS R4, [R2] ;\n" * 3 + "/*0022*/ HMMA.16816.F32 R4, R4, R5, R6 ;\n" * 20
    assert loop.in_listing(LISTING.format(steps=steps)) == Loop(25, LDGSTS=1, LDS=3, BRA=1)
    assert loop.in_listing(LISTING.format(steps="")) == Loop(0, 0, 0, 0)


def test_two_versions_whose_loops_differ_are_told_apart() -> None:
    here, there = {"k sm_90": Loop(372, 4, 35, 1), "l sm_90": Loop(90, 8, 16, 1)}, {"k sm_90": Loop(691, 66, 253, 63)}
    back = loop.from_json(loop.to_json(there, "3.6.0"))
    assert back == (there, "3.6.0")
    found = loop.differences(here, "3.9.0", *back)
    assert [line.split(" per turn")[0] for line in found] == ["k sm_90: 4 LDGSTS", "k sm_90: 35 LDS"]
    assert loop.differences(here, "3.9.0", here, "3.6.0") == []
    head, line = loop.render(here, "3.9.0", *back).splitlines()
    assert head.split()[-2:] == ["BRA", "3.6.0"]
    assert line.split() == ["k", "sm_90", "372", "4", "35", "1", "691", "66", "253", "63"]
