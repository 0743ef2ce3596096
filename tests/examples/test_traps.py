"""Exceptions: what the handler finds in its registers, in machine and in supervisor mode."""

from __future__ import annotations

import pytest

from examples.emulator.layout import RAM_BASE

MACHINE_HANDLER = """
    la t0, handler
    csrw mtvec, t0
    j body
handler:
    csrr t0, mcause
    sd t0, 0(s0)
    csrr t0, mepc
    sd t0, 8(s0)
    csrr t0, mtval
    sd t0, 16(s0)
    csrr t0, mstatus
    sd t0, 24(s0)
    j finish
.org 0x100
body:
"""
BODY = RAM_BASE + 0x100


@pytest.mark.parametrize(
    ("fault", "cause", "value", "offset"),
    [
        pytest.param(".word 0xffffffff", 2, 0xFFFFFFFF, 0, id="illegal instruction"),
        pytest.param(".half 0", 2, 0, 0, id="illegal compressed instruction"),
        pytest.param("ebreak", 3, BODY, 0, id="ebreak"),
        pytest.param(".half 0x9002", 3, BODY, 0, id="compressed ebreak"),
        pytest.param("ecall", 11, 0, 0, id="ecall from machine mode"),
        pytest.param("li t1, 0x50000000\n ld t2, -8(t1)", 5, 0x4FFFFFF8, 8, id="load from nowhere"),
        pytest.param("li t1, 0x50000000\n sw t2, 12(t1)", 7, 0x5000000C, 8, id="store to nowhere"),
        pytest.param("li a5, 0x50000000\n .half 0x4798", 5, 0x50000008, 8, id="c.lw from nowhere"),
        pytest.param("li sp, 0x50000000\n .half 0xe406", 7, 0x50000008, 8, id="c.sdsp to nowhere"),
        pytest.param("li t1, 0x50000000\n jr t1", 1, 0x50000000, None, id="jump to nowhere"),
        pytest.param("li t1, 0x10000000\n jr t1", 1, 0x10000000, None, id="jump into a device"),
        pytest.param(
            "addi t1, s0, 2\n amoadd.w t2, t3, (t1)", 6, RAM_BASE + 0x100002, 4, id="misaligned AMO"
        ),
    ],
)
def test_exception_in_machine_mode(guest, fault, cause, value, offset):
    found = guest(f"{MACHINE_HANDLER}\n{fault}").run()
    where = value if offset is None else BODY + offset
    assert found[:3] == [cause, where, value]
    assert found[3] >> 11 & 3 == 3


def test_the_next_slice_goes_on_after_an_ebreak(guest):
    source = """
        la t0, handler
        csrw mtvec, t0
        li s1, 0
    again: ebreak
        addi s1, s1, 1
        li t0, 5
        bne s1, t0, again
        sd s1, 0(s0)
        j finish
    handler: csrr t0, mepc
        addi t0, t0, 4
        csrw mepc, t0
        mret
    """
    assert guest(source).run()[0] == 5


TO_SUPERVISOR = """
    la t0, machine
    csrw mtvec, t0
    la t0, supervisor
    csrw stvec, t0
    li t0, 0x1800
    csrc mstatus, t0
    li t0, 0x800
    csrs mstatus, t0
    la t0, body
    csrw mepc, t0
    j prepare
machine:
    csrr t0, mcause
    sd t0, 0(s0)
    csrr t0, mstatus
    sd t0, 8(s0)
    j finish
.org 0x80
supervisor:
    csrr t0, scause
    sd t0, 16(s0)
    csrr t0, stval
    sd t0, 24(s0)
    csrr t0, sstatus
    sd t0, 32(s0)
    csrr t0, sepc
    sd t0, 40(s0)
    j finish
prepare:
"""


def test_undelegated_ecall_of_supervisor_goes_to_machine_mode(guest):
    found = guest(f"{TO_SUPERVISOR} mret\n body: ecall").run()
    assert found[0] == 9
    assert found[1] >> 11 & 3 == 1


def test_delegated_ecall_of_user_goes_to_supervisor_mode(guest):
    source = f"""{TO_SUPERVISOR}
        li t0, 0x100
        csrw medeleg, t0
        mret
    body: la t0, user
        csrw sepc, t0
        li t0, 0x100
        csrc sstatus, t0
        sret
    user: ecall
    """
    found = guest(source).run()
    assert found[2] == 8
    assert found[4] & 0x100 == 0, "SPP says that it came from user mode"


def test_delegation_does_not_move_traps_of_machine_mode_down(guest):
    source = f"""{MACHINE_HANDLER}
        li t0, 4
        csrw medeleg, t0
        .word 0xffffffff
    """
    assert guest(source).run()[0] == 2


PAGED = f"""{TO_SUPERVISOR}
    li t0, 0xb000
    csrw medeleg, t0
    mret
body:
    li t0, 0x80400
    li t1, 1
    slli t1, t1, 63
    or t0, t0, t1
    csrw satp, t0
    sfence.vma
"""


def identity_tables(board) -> None:
    """Sv39 with pages of 1 GiB: devices and RAM where they are, nothing at 0x40000000."""
    for index in (0, 2):
        entry = index << 28 | 0xCF
        at = 0x40_0000 + 8 * index
        board.ram[at : at + 8] = entry.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("access", "cause", "value"),
    [
        ("li t1, 0x40000000\n ld t2, 0x10(t1)", 13, 0x40000010),
        ("li t1, 0x40000000\n sd t2, 0x18(t1)", 15, 0x40000018),
        ("li t1, 0x40000000\n jr t1", 12, 0x40000000),
    ],
    ids=["load", "store", "fetch"],
)
def test_page_fault_gives_its_address(guest, access, cause, value):
    machine = guest(f"{PAGED} {access}")
    identity_tables(machine.board)
    found = machine.run()
    assert found[2:4] == [cause, value]
    assert found[4] & 0x100, "SPP says that it came from supervisor mode"


def test_illegal_instruction_behind_page_tables_gives_its_bits(guest):
    source = PAGED.replace("0xb000", "0xb004") + "\n .word 0xfedcba8f"
    machine = guest(source)
    identity_tables(machine.board)
    assert machine.run()[2:4] == [2, 0xFEDCBA8F]


def test_load_from_nowhere_behind_page_tables_is_an_access_fault(guest):
    machine = guest(f"{PAGED} li t1, 0x30000000\n ld t2, 0x20(t1)")
    identity_tables(machine.board)
    machine.run()
    assert machine.results[0] == 5, "not delegated: machine mode"


def test_protection_by_pmp_is_obeyed(guest):
    source = f"""{TO_SUPERVISOR}
        li t0, 0x20040000     # 0x80100000 >> 2
        csrw pmpaddr0, t0
        li t0, 0x0f
        csrw pmpcfg0, t0
        mret
    body: li t1, 0x80300000
        ld t2, 0(t1)
    """
    assert guest(source).run()[0] == 5


@pytest.mark.parametrize(
    ("access", "cause"),
    [("ld t1, 0(s0)", 5), ("sd t1, 0(s0)", 7), ("amoadd.w t2, t3, (s0)", 7)],
    ids=["load", "store", "atomic"],
)
def test_page_tables_outside_memory_make_an_access_fault(guest, access, cause):
    # In machine mode with supervisor mode's translation (MPRV), so that the code is still there.
    source = f"""
        la t0, handler
        csrw mtvec, t0
        li t0, 0x40000
        li t1, 1
        slli t1, t1, 63
        or t0, t0, t1
        csrw satp, t0
        sfence.vma
        li t0, 0x1000
        csrc mstatus, t0
        li t0, 0x20800
        csrs mstatus, t0
        {access}
    handler:
        li t0, 0x20000
        csrc mstatus, t0
        csrr t0, mcause
        sd t0, 0(s0)
    """
    assert guest(source).run()[0] == cause


@pytest.mark.parametrize(
    ("instruction", "status"),
    [
        ("sfence.vma", 0x10_0000),
        ("csrr a0, satp", 0x10_0000),
        ("mret", 0),
        ("csrr a0, mscratch", 0),
    ],
    ids=["fence with TVM", "satp with TVM", "mret", "register of machine mode"],
)
def test_supervisor_mode_may_not(guest, instruction, status):
    found = guest(
        f"{TO_SUPERVISOR} li t0, {status}\n csrs mstatus, t0\n mret\n body: {instruction}"
    )
    assert found.run()[0] == 2
