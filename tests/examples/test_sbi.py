"""The firmware in Python: what a kernel in supervisor mode gets for its calls (SBI 2.0)."""

from __future__ import annotations

import pytest

from examples.emulator.layout import RAM_BASE
from examples.emulator.syscon import Power

BASE, TIMER, IPI, FENCE, HART = 0x10, 0x54494D45, 0x735049, 0x52464E43, 0x48534D
RESET, CONSOLE = 0x53525354, 0x4442434E
DONE, FAILED, NOT_SUPPORTED, INVALID_PARAM, INVALID_ADDRESS, ALREADY = 0, -1, -2, -3, -5, -6
ALL = (1 << 64) - 1
HANDLER = """
    la t0, handler
    csrw stvec, t0
    j body
.org 0x80
handler:
    csrr t0, scause
    sd t0, 0(s0)
    csrr t0, time
    sd t0, 8(s0)
    j finish
body:
"""


def call(extension: int, function: int = 0, *arguments: int) -> str:
    """A call; its error goes to the next word of the results, its value to the one after."""
    lines = [
        f"addi a{n}, zero, -1" if value == ALL else f"li a{n}, {value:#x}"
        for n, value in enumerate(arguments)
    ]
    lines += [f"li a7, {extension:#x}", f"li a6, {function}", "ecall"]
    return "\n".join([*lines, "sd a0, 0(s0)", "sd a1, 8(s0)", "addi s0, s0, 16\n"])


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(
    ("question", "error", "value"),
    [
        pytest.param(call(BASE, 0), DONE, 2 << 24, id="version of the specification"),
        pytest.param(call(BASE, 3, TIMER), DONE, 1, id="timer is there"),
        pytest.param(call(BASE, 3, CONSOLE), DONE, 1, id="debug console is there"),
        pytest.param(call(BASE, 3, 0x504D55), DONE, 0, id="performance counters are not"),
        pytest.param(call(BASE, 4), DONE, 0, id="vendor"),
        pytest.param(call(BASE, 7), NOT_SUPPORTED, 0, id="unknown base function"),
        pytest.param(call(0x1234567), NOT_SUPPORTED, 0, id="unknown extension"),
        pytest.param(call(TIMER, 1), NOT_SUPPORTED, 0, id="unknown timer function"),
        pytest.param(call(IPI, 0, 2, 0), INVALID_PARAM, 0, id="interrupt to hart 1"),
        pytest.param(call(IPI, 0, 1, 1), INVALID_PARAM, 0, id="interrupt to hart 1 by the base"),
        pytest.param(call(IPI, 0, 0, 0), DONE, 0, id="interrupt to nobody"),
        pytest.param(call(FENCE, 0, 1, 0), DONE, 0, id="FENCE.I"),
        pytest.param(call(FENCE, 2, 0, ALL, 0, 0, 0), DONE, 0, id="SFENCE.VMA by ASID on all"),
        pytest.param(call(FENCE, 1, 4, 0, 0, 0), INVALID_PARAM, 0, id="fence on hart 2"),
        pytest.param(call(FENCE, 3, 1, 0), NOT_SUPPORTED, 0, id="hypervisor's fence"),
        pytest.param(call(HART, 0, 0, RAM_BASE, 0), ALREADY, 0, id="start of the running hart"),
        pytest.param(call(HART, 0, 1, RAM_BASE, 0), INVALID_PARAM, 0, id="start of hart 1"),
        pytest.param(call(HART, 1), FAILED, 0, id="stop of the only hart"),
        pytest.param(call(HART, 2, 0), DONE, 0, id="hart 0 is started"),
        pytest.param(call(HART, 2, 9), INVALID_PARAM, 0, id="status of hart 9"),
        pytest.param(call(HART, 3, 5), INVALID_PARAM, 0, id="unknown way to suspend"),
        pytest.param(call(HART, 3, 1 << 31, 16), INVALID_ADDRESS, 0, id="resume outside memory"),
        pytest.param(call(RESET, 0, 7, 0), INVALID_PARAM, 0, id="unknown reset"),
        pytest.param(call(CONSOLE, 0, 4, 16, 0), INVALID_PARAM, 0, id="write from outside memory"),
        pytest.param(call(CONSOLE, 1, 4, RAM_BASE, 1), INVALID_PARAM, 0, id="read to far above"),
    ],
)
def test_answer(guest, question, error, value):
    found = guest(question, supervisor=True).run()
    assert signed(found[0]) == error
    assert found[1] == value


@pytest.mark.parametrize(
    ("kind", "reason", "power"),
    [(0, 0, Power.OFF), (0, 1, Power.FAILED), (1, 0, Power.RESET), (2, 0, Power.RESET)],
)
def test_reset_does_not_come_back(guest, kind, reason, power):
    machine = guest(call(RESET, 0, kind, reason), supervisor=True)
    machine.run()
    assert machine.board.power is power
    assert machine.results[:2] == [0, 0]


def test_timer_goes_off_at_its_time(guest):
    source = f"""{HANDLER}
        li t0, 0x20
        csrs sie, t0
        {call(TIMER, 0, 50000)}
        csrrsi zero, sstatus, 2
    wait: wfi
        j wait
    """
    found = guest(source, supervisor=True).run()
    assert found[2] == 5 | 1 << 63  # s0 has moved on by one call
    assert 50_000 <= found[3] < 60_000


def test_timer_that_goes_off_between_waiting_and_sleeping_is_not_missed(guest):
    source = f"""{HANDLER}
        li t0, 0x20
        csrs sie, t0
        {call(TIMER, 0, 50000)}
        csrrsi zero, sstatus, 2
    wait: wfi
        j wait
    """
    machine = guest(source, supervisor=True)
    board = machine.board
    while not board.step():
        pass
    board.clock.sleep_until(60_000)  # as the host's clock may
    board.sleep()
    assert board.power is None
    assert machine.run()[2] == 5 | 1 << 63


def test_timer_is_taken_back_by_a_later_one(guest):
    source = f"""
        {call(TIMER, 0, 0)}
        csrr s1, sip
        {call(TIMER, 0, ALL)}
        csrr s2, sip
        sd s1, 0(s0)
        sd s2, 8(s0)
    """
    found = guest(source, supervisor=True).run()
    assert found[4] & 0x20
    assert not found[5] & 0x20


@pytest.mark.parametrize("source", [call(IPI, 0, 1, 0), call(IPI, 0, 0, ALL), call(4, 0, 0)])
def test_interrupt_to_itself_arrives(guest, source):
    found = guest(
        f"{HANDLER}\ncsrrsi zero, sie, 2\ncsrrsi zero, sstatus, 2\n{source}", supervisor=True
    ).run()
    assert found[0] == 1 | 1 << 63


def test_software_interrupt_is_cleared_by_the_kernel_itself(guest):
    source = f"{call(IPI, 0, 1, 0)}\ncsrr s1, sip\ncsrrci zero, sip, 2\ncsrr s2, sip\n"
    found = guest(f"{source} sd s1, 0(s0)\n sd s2, 8(s0)", supervisor=True).run()
    assert (found[2] & 2, found[3] & 2) == (2, 0)


def test_fence_makes_a_changed_page_table_count(guest):
    # A table of 1 GiB pages at +0x200000: the second GiB of addresses first shows what is at
    # 0x80000000, then (the entry changed) what is at 0x40000000, where there is nothing to load.
    source = f"""
        la t0, handler
        csrw stvec, t0
        li t1, {RAM_BASE + 0x200000:#x}
        li t2, {(RAM_BASE >> 12) << 10 | 0xCF:#x}
        sd t2, 8(t1)
        sd t2, 16(t1)
        li t2, 0xcf
        sd t2, 0(t1)
        li t2, {(RAM_BASE + 0x200000) >> 12:#x}
        li t3, 8
        slli t3, t3, 60
        or t2, t2, t3
        csrw satp, t2
        sfence.vma
        li t4, 0x40000000
        ld t5, 0(t4)
        sd zero, 8(t1)
        {call(FENCE, 1, 0, ALL, 0, 0)}
        ld t5, 0(t4)
        j finish
    .org 0x200
    handler:
        csrr t0, scause
        sd t0, 0(s0)
        csrr t0, stval
        sd t0, 8(s0)
        li t0, 0x100000
        li t1, 0x5555
        sw t1, 0(t0)
        j handler
    """
    found = guest(source, supervisor=True).run()
    assert found[:4] == [0, 0, 13, 0x40000000]


def test_suspended_hart_resumes_where_it_was_told(guest):
    source = f"""
        li t0, 0x20
        csrs sie, t0
        {call(TIMER, 0, 70000)}
        la a1, resume
        li a0, 0x80000000
        li a2, 0x77
        li a7, {HART:#x}
        li a6, 3
        ecall
        j finish
    resume:
        sd a0, 0(s0)
        sd a1, 8(s0)
        csrr t0, time
        sd t0, 16(s0)
    """
    found = guest(source, supervisor=True).run()
    assert found[2:4] == [0, 0x77]
    assert found[4] >= 70_000


def test_debug_console_writes_and_reads(guest):
    machine = guest(
        f"li t0, 0x216968\n sd t0, 0(s0)\n addi s0, s0, 64\n"
        f"{call(CONSOLE, 0, 3, RAM_BASE + 0x100000, 0)}"
        f"{call(CONSOLE, 2, 0x0A)}"
        f"{call(CONSOLE, 1, 8, RAM_BASE + 0x100000, 0)}",
        supervisor=True,
    )
    machine.board.uart.receive(b"typed")
    machine.run()
    assert machine.output == b"hi!\n"
    assert machine.results[0].to_bytes(8, "little") == b"typed\0\0\0"


def test_legacy_console(guest):
    machine = guest(f"{call(1, 0, 0x78)}{call(2)}{call(2)}", supervisor=True)
    machine.board.uart.receive(b"y")
    found = machine.run()
    assert machine.output == b"x"
    assert (found[0], found[2], signed(found[4])) == (0, ord("y"), -1)


def test_legacy_shutdown(guest):
    machine = guest(call(8), supervisor=True)
    machine.run()
    assert machine.board.power is Power.OFF
