"""Interrupts: timers, software interrupts, the PLIC, and waiting for them."""

from __future__ import annotations

import pytest

from examples.emulator.syscon import Power

CLINT_HANDLER = """
    la t0, handler
    csrw mtvec, t0
    li s1, 0x02004000
    li s2, 0x0200bff8
    li s3, 0
    j body
.org 0x40
handler:
    addi s3, s3, 1
    csrr t0, mcause
    sd t0, 0(s0)
    csrr t0, mip
    sd t0, 8(s0)
    li t1, -1
    sd t1, 0(s1)          # the timer is off
    csrr t0, mip
    sd t0, 16(s0)
    mret
body:
"""
TIMER = 1 << 63 | 7


def test_timer_interrupt_in_machine_mode_comes_once(guest):
    source = f"""{CLINT_HANDLER}
        ld t0, 0(s2)
        addi t0, t0, 500
        sd t0, 0(s1)
        li t0, 0x80
        csrw mie, t0
        csrrsi zero, mstatus, 8
    wait: beq s3, zero, wait
        nop
        nop
        sd s3, 24(s0)
    """
    found = guest(source).run()
    assert found[0] == TIMER
    assert found[1] & 0x80, "mip shows the timer"
    assert not found[2] & 0x80, "writing mtimecmp takes it away at once"
    assert found[3] == 1


def test_wfi_lets_the_time_pass_to_the_timer(guest):
    source = """
        li s1, 0x02004000
        li s2, 0x0200bff8
        li t0, 0x80
        csrw mie, t0
        ld s3, 0(s2)
        li t1, 100000000      # ten seconds
        add t0, s3, t1
        sd t0, 0(s1)
        wfi
        ld t0, 0(s2)
        sub t0, t0, s3
        sd t0, 0(s0)
        csrr t0, mip
        sd t0, 8(s0)
    """
    found = guest(source).run(steps=20)
    assert 100_000_000 <= found[0] < 100_100_000
    assert found[1] == 0x80


def test_interrupts_opened_for_a_moment_between_two_wfi_are_taken(guest):
    """An idle loop that waits with interrupts off, and opens them only briefly."""
    source = """
        la t0, handler
        csrw mtvec, t0
        li s1, 0x02004000
        li t0, 0x80
        csrw mie, t0
        li t0, 1000
        sd t0, 0(s1)
        li s3, 0
    idle: wfi
        csrrsi zero, mstatus, 8
        csrrci zero, mstatus, 8
        beq s3, zero, idle
        sd s3, 0(s0)
        j finish
    handler: addi s3, s3, 1
        li t1, -1
        sd t1, 0(s1)
        mret
    """
    assert guest(source).run(steps=20)[0] == 1


def test_software_interrupt_by_msip_enters_the_vector(guest):
    source = """
        la t0, vectors
        addi t0, t0, 1
        csrw mtvec, t0
        li t0, 8
        csrw mie, t0
        csrrsi zero, mstatus, 8
        li s1, 0x02000000
        li t0, 1
        sw t0, 0(s1)
    wait: j wait
    .org 0x100
    vectors: j hang
        j hang
        j hang
        j software
    software: sw zero, 0(s1)
        csrr t0, mcause
        sd t0, 0(s0)
        csrr t0, mip
        sd t0, 8(s0)
    """
    assert guest(source).run()[:2] == [1 << 63 | 3, 0]


def test_machine_timer_passed_on_as_a_software_interrupt_of_supervisor_mode(guest):
    """What xv6 does: mtimecmp moves on, sip.SSIP is set, mret, and the kernel sees cause 1."""
    source = """
        la t0, timer
        csrw mtvec, t0
        la t0, kernel
        csrw stvec, t0
        li t0, 0x222
        csrw mideleg, t0
        csrw sie, t0
        li t0, 0x80
        csrs mie, t0
        li s1, 0x02004000
        li t0, 2000
        sd t0, 0(s1)
        li s3, 0
        li s4, 0
        li t0, 0x1800
        csrc mstatus, t0
        li t0, 0x880
        csrs mstatus, t0
        la t0, body
        csrw mepc, t0
        mret
    body: csrrsi zero, sstatus, 2
    wait: li t0, 3
        bne s4, t0, wait
        sd s3, 0(s0)
        sd s4, 8(s0)
        csrr t0, scause
        sd t0, 16(s0)
        j finish
    .org 0x100
    timer: addi s3, s3, 1
        ld t1, 0(s1)
        li t2, 20000
        add t1, t1, t2
        sd t1, 0(s1)
        li t1, 2
        csrw sip, t1
        mret
    .org 0x140
    kernel: addi s4, s4, 1
        csrrci zero, sip, 2
        sret
    """
    found = guest(source).run()
    assert found[:3] == [3, 3, 1 << 63 | 1]


SSTC = """
    la t0, machine
    csrw mtvec, t0
    la t0, kernel
    csrw stvec, t0
    li t0, 0x222
    csrw mideleg, t0
    csrw mie, t0
    li t0, 0x1800
    csrc mstatus, t0
    li t0, 0x800
    csrs mstatus, t0
    la t0, body
    csrw mepc, t0
    j prepare
.org 0x80
machine:
    csrr t0, mcause
    sd t0, 0(s0)
    csrr t0, mtval
    sd t0, 8(s0)
    j finish
.org 0xc0
kernel:
    csrr t0, scause
    sd t0, 16(s0)
    csrr t0, sip
    sd t0, 24(s0)
    li t0, -1
    csrw stimecmp, t0
    csrr t0, sip
    sd t0, 32(s0)
    j finish
prepare:
"""
SSTC_ON = """
    li t0, 1
    slli t0, t0, 63
    csrw menvcfg, t0
    csrr t0, menvcfg
    sd t0, 40(s0)
    li t0, 2
    csrw mcounteren, t0
"""


def test_supervisor_timer_of_sstc(guest):
    source = f"""{SSTC}{SSTC_ON} mret
    body: csrr t0, time
        addi t0, t0, 1000
        csrw stimecmp, t0
        csrrsi zero, sstatus, 2
    wait: wfi
        j wait
    """
    found = guest(source).run(steps=20)
    assert found[2] == 1 << 63 | 5
    assert found[3] == 0x20
    assert found[4] == 0, "writing stimecmp takes the interrupt away"
    assert found[5] == 1 << 63


@pytest.mark.parametrize("csr", ["time", "stimecmp"])
def test_time_in_supervisor_mode_needs_leave(guest, csr):
    found = guest(f"{SSTC} mret\n body: csrr a0, {csr}").run()
    assert found[0] == 2
    assert found[1] & 0x7F == 0x73, "mtval holds the instruction"


def test_unknown_csr_is_illegal(guest):
    assert guest(f"{SSTC}\n body: .word 0x5c0022f3").run()[0] == 2


UART_PROGRAM = """
    la t0, handler
    csrw {tvec}, t0
    li s1, 0x0c000000
    li t0, 1
    sw t0, 40(s1)            # priority of source 10
    li s2, {enable}
    li t0, 0x400
    sw t0, 0(s2)
    li s2, {context}
    sw zero, 0(s2)
    li s3, 0x10000000
    li t0, 1
    sb t0, 1(s3)             # receiver interrupt
    li s4, 0
"""
UART_HANDLER = """
handler:
    lw t0, 4(s2)             # claim
    sd t0, 0(s0)
    csrr t1, {ip}
    sd t1, 8(s0)
    lbu t1, 0(s3)
    add s4, s4, t1
    sw t0, 4(s2)             # complete
    lw t1, 4(s2)
    sd t1, 16(s0)
    {ret}
"""


def test_typed_byte_interrupts_machine_mode_through_the_plic(guest):
    source = (
        UART_PROGRAM.format(tvec="mtvec", enable="0x0c002000", context="0x0c200000")
        + """
        li t0, 0x800
        csrw mie, t0
        csrrsi zero, mstatus, 8
    wait: wfi
        li t0, 0x83              # 'A' + 'B'
        bne s4, t0, wait
        csrr t0, mcause
        sd t0, 24(s0)
        j finish
    .org 0x200
    """
        + UART_HANDLER.format(ip="mip", ret="mret")
    )
    machine = guest(source)
    machine.board.step()
    machine.board.uart.receive(b"A")
    machine.board.step()
    assert machine.board.power is None
    machine.board.uart.receive(b"B")
    found = machine.run()
    assert found[0] == 10
    assert not found[1] & 0x800, "a claim lowers the line"
    assert found[2] == 0, "nothing else waits"
    assert found[3] == 1 << 63 | 11


def test_typed_byte_interrupts_supervisor_mode_through_the_plic(guest):
    source = (
        """
        li t0, 0x222
        csrw mideleg, t0
        csrw mie, t0
        li t0, 0x1800
        csrc mstatus, t0
        li t0, 0x800
        csrs mstatus, t0
        la t0, body
        csrw mepc, t0
        mret
    body:
    """
        + UART_PROGRAM.format(tvec="stvec", enable="0x0c002080", context="0x0c201000")
        + """
        csrrsi zero, sstatus, 2
    wait: beq s4, zero, wait
        csrr t0, scause
        sd t0, 24(s0)
        j finish
    .org 0x200
    """
        + UART_HANDLER.format(ip="sip", ret="sret")
    )
    machine = guest(source)
    machine.board.step()
    machine.board.uart.receive(b"A")
    found = machine.run()
    assert found[0] == 10
    assert not found[1] & 0x200
    assert found[3] == 1 << 63 | 9


def test_a_guest_that_waits_for_nothing_is_asleep(guest):
    machine = guest("wait: wfi\n j wait")
    machine.run(steps=3)
    assert machine.board.power is Power.ASLEEP


def test_reset_and_failure_are_told_apart(guest):
    for value, power in ((0x7777, Power.RESET), (0x53333, Power.FAILED)):
        machine = guest(f"li t0, 0x100000\n li t1, {value}\n sw t1, 0(t0)\n j hang")
        machine.run()
        assert machine.board.power is power


def test_two_runs_are_the_same_to_the_tick(guest):
    source = """
        li s1, 0x0200bff8
        li s2, 20000
    again: ld t0, 0(s1)
        addi s2, s2, -1
        bne s2, zero, again
        sd t0, 0(s0)
    """
    ends = set()
    for _ in range(2):
        machine = guest(source)
        ends.add((machine.run()[0], machine.board.clock.now()))
    assert len(ends) == 1
