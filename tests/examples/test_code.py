"""Code that the guest itself overwrites."""

from __future__ import annotations

SUPERVISOR = """
    li t0, 0x1800
    csrc mstatus, t0
    li t0, 0x800
    csrs mstatus, t0
    la t0, body
    csrw mepc, t0
    mret
body:
    li t0, 0x80400
    li t1, 1
    slli t1, t1, 63
    or t0, t0, t1
    csrw satp, t0
    sfence.vma
"""

REWRITE = f"""{SUPERVISOR}
    li s1, 0x40300000        # the page as data
    li s2, 0x80300100        # its code, in its other place
    li s3, 0x00100513        # addi a0, zero, 1
    li s4, 0x00200513        # addi a0, zero, 2
    li s5, 0x00008067        # ret
    sw s3, 0x100(s1)
    sw s5, 0x104(s1)
    fence.i
    jalr s2
    sd a0, 0(s0)
    sfence.vma
    sw zero, 0(s1)           # the first store is nowhere near the code
    sw s4, 0x100(s1)
    fence.i
    jalr s2
    sd a0, 8(s0)
"""


def test_code_rewritten_through_another_mapping_is_run_as_it_is_now(guest):
    machine = guest(REWRITE)
    # Pages of 1 GiB: devices and RAM in their places, and RAM once more as data at 0x40000000.
    for index, page, flags in ((0, 0, 0xCF), (1, 2, 0xC7), (2, 2, 0xCF)):
        at = 0x40_0000 + 8 * index
        machine.board.ram[at : at + 8] = (page << 28 | flags).to_bytes(8, "little")
    assert machine.run()[:2] == [1, 2]
