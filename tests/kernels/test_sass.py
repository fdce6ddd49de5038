"""The counting of machine code, on a listing small enough to count by hand."""

from __future__ import annotations

import json

import pytest

from tests.kernels.sass import parse, per_logit
from tests.kernels.test_compile import compiling

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   CS2R R24, SRZ ;
.L_x_1:
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/                   FSEL R24, R24, -INF , P2 ;
        /*0070*/                   STG.E desc[UR4][R2.64], R3 ;
.L_x_2:
        /*0080*/                   FADD R4, R4, R24 ;
        /*0090*/                   MUFU.EX2 R5, R4 ;
        /*00a0*/              @!P3 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BAR.SYNC 0x0 ;
        /*00d0*/                   BRA `(.L_x_2) ;
"""


def test_a_tile_is_counted_without_its_product_and_without_guarded_work() -> None:
    code = parse(LISTING)
    assert len(code.instructions) == 14
    assert code.loops() == [range(2, 5), range(1, 11)]  # not the one behind the end
    assert code.product_loops() == [range(2, 5)]
    assert code.guarded(range(1, 11)) == {6, 7}
    assert [i.opcode for i in code.epilogue()] == ["CS2R", "BRA", "FADD", "MUFU.EX2", "BRA"]
    assert code.instructions[5].predicate == "P0"
    assert per_logit(code, logits=64, threads=32) == 2.5


COUNTING = """
import json, torch
from tests.kernels import aot, cases_head, sass
found = {}
for size, what in ((576, "bare losses"), (1024, "bare losses"), (1024, "bare mixture")):
    plan = dict(cases_head.plans(torch.bfloat16, size))[what]
    for launch in cases_head.record(9, plan):
        if launch.kernel.fn.__name__ == "sweep":
            kernel = aot.compiled(cases_head.compiled(what, launch, 90), 90)
            code = sass.parse(sass.disassemble(kernel.asm["cubin"]))
            logits = launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"]
            product = [code.instructions[i].name for i in code.product_loops()[0]]
            count = sass.per_logit(code, logits, 32 * launch.num_warps)
            found[f"{what} {size}"] = [count, product.count("UTMALDG"), product.count("LDGSTS")]
            break
print(json.dumps(found))
"""


PAIR = """
import json, torch
from tests.kernels import aot, cases_head, sass
plan = dict(cases_head.plans(torch.bfloat16, 576))["mixture of one size"]
(launch,) = [launch for launch in cases_head.record(9, plan) if launch.kernel.fn.__name__ == "mix"]
kernel = aot.compiled(cases_head.compiled("mix", launch, 90), 90)
code = sass.parse(sass.disassemble(kernel.asm["cubin"]))
(product,) = code.product_loops()
names = [code.instructions[i].name for i in product]
columns = launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"]
print(json.dumps([sass.per_logit(code, columns, 32 * launch.num_warps), names.count("UTMALDG"), names.count("LDGSTS")]))
"""


@pytest.mark.slow
def test_two_models_logits_cost_thirty_two_instructions_together_in_the_second_sweep() -> None:
    """On Hopper, every field with labels, beside the one loop of both products."""
    run = compiling("-c", PAIR)
    assert run.returncode == 0, run.stderr
    count, by_descriptor, by_address = json.loads(run.stdout)
    assert 20 < count <= 32
    assert (by_descriptor, by_address) == (4, 0)


@pytest.mark.slow
def test_a_logit_of_the_first_sweep_costs_twelve_instructions_at_most() -> None:
    """On Hopper, beside its product, whose loop has both operands loaded by descriptors."""
    run = compiling("-c", COUNTING)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == {"bare losses 576", "bare losses 1024", "bare mixture 1024"}
    for what, (count, by_descriptor, by_address) in found.items():
        assert count <= 12, f"{what}: {count} instructions"
        assert (by_descriptor, by_address) == (2, 0), what
