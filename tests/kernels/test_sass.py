"""The counting of machine code, on a listing small enough to count by hand."""

from __future__ import annotations

from tests.kernels.sass import parse, per_logit

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
"""


def test_a_tile_is_counted_without_its_product_and_without_guarded_work() -> None:
    code = parse(LISTING)
    assert len(code.instructions) == 12
    assert code.product_loops() == [range(2, 5)]
    assert code.tile_loop() == range(1, 11)
    assert code.guarded(code.tile_loop()) == {6, 7}
    assert [i.opcode for i in code.epilogue()] == ["CS2R", "BRA", "FADD", "MUFU.EX2", "BRA"]
    assert code.instructions[5].predicate == "P0"
    assert per_logit(code, logits=64, threads=32) == 2.5
