"""An assembler for the few dozen instructions that the tests' guest programs are made of.

One instruction a line, ``label:`` before it or on a line of its own, ``#`` starts a comment.
``li`` takes what 44 bits can hold, ``la`` a label; the rest are single machine instructions.
"""

from __future__ import annotations

import re

_NAMES = (
    "zero ra sp gp tp t0 t1 t2 s0 s1 a0 a1 a2 a3 a4 a5 a6 a7 "
    "s2 s3 s4 s5 s6 s7 s8 s9 s10 s11 t3 t4 t5 t6"
)
REGISTERS = {name: number for number, name in enumerate(_NAMES.split())}
CSRS = {
    "mstatus": 0x300, "medeleg": 0x302, "mideleg": 0x303, "mie": 0x304, "mtvec": 0x305,
    "mcounteren": 0x306, "menvcfg": 0x30A, "mscratch": 0x340, "mepc": 0x341, "mcause": 0x342,
    "mtval": 0x343, "mip": 0x344, "sstatus": 0x100, "sie": 0x104, "stvec": 0x105, "sepc": 0x141,
    "scause": 0x142, "stval": 0x143, "sip": 0x144, "stimecmp": 0x14D, "satp": 0x180,
    "time": 0xC01, "pmpcfg0": 0x3A0, "pmpaddr0": 0x3B0, "scounteren": 0x106,
}  # fmt: skip
FIXED = {
    "ecall": 0x00000073, "ebreak": 0x00100073, "mret": 0x30200073, "sret": 0x10200073,
    "wfi": 0x10500073, "fence.i": 0x0000100F, "sfence.vma": 0x12000073, "nop": 0x00000013,
    "ret": 0x00008067,
}  # fmt: skip
LOADS = {"lb": 0, "lh": 1, "lw": 2, "ld": 3, "lbu": 4, "lhu": 5, "lwu": 6}
STORES = {"sb": 0, "sh": 1, "sw": 2, "sd": 3}
IMMEDIATES = {"addi": 0, "xori": 4, "ori": 6, "andi": 7, "slli": 1, "srli": 5}
TRIPLES = {"add": 0, "sub": 0x40000000, "and": 0x7000, "or": 0x6000, "xor": 0x4000}
BRANCHES = {"beq": 0, "bne": 1, "blt": 4, "bge": 5, "bltu": 6, "bgeu": 7}
CSR_OPS = {"csrrw": 1, "csrrs": 2, "csrrc": 3, "csrrwi": 5, "csrrsi": 6, "csrrci": 7}


def assemble(source: str, base: int = 0x8000_0000) -> bytes:
    """The machine code of ``source``, to run at ``base``."""
    labels: dict[str, int] = {}
    lines: list[tuple[int, list[str]]] = []
    where = base
    for line in source.splitlines():
        text = line.partition("#")[0].strip()
        while match := re.match(r"(\w+):\s*", text):
            labels[match[1]] = where
            text = text[match.end() :]
        if text.startswith(".org"):
            target = base + int(text.split()[1], 0)
            lines.append((where, [".zero", str(target - where)]))
            where = target
        elif text:
            words = re.split(r"[\s,()]+", text.rstrip(")"))
            lines.append((where, words))
            where += _size(words)
    code = bytearray()
    for at, words in lines:
        code += _encode(words, at, labels)
    return bytes(code)


def _size(words: list[str]) -> int:
    if words[0] == ".half":
        return 2
    if words[0] == "li":
        return 8 if _short(words) else 16
    return 8 if words[0] == "la" else 4


def _short(words: list[str]) -> bool:
    return -(1 << 31) <= int(words[2], 0) < (1 << 31) - 0x800


def _encode(words: list[str], at: int, labels: dict[str, int]) -> bytes:
    name, *args = words
    if name == ".zero":
        return bytes(int(args[0]))
    if name == ".half":
        return int(args[0], 0).to_bytes(2, "little")
    if name == "li":
        codes = _load_immediate(REGISTERS[args[0]], int(args[1], 0))
    elif name == "la":
        codes = _load_address(REGISTERS[args[0]], labels[args[1]] - at)
    else:
        codes = [_one(name, args, at, labels)]
    return b"".join((code & 0xFFFFFFFF).to_bytes(4, "little") for code in codes)


def _load_immediate(rd: int, value: int) -> list[int]:
    if not -(1 << 31) <= value < (1 << 31) - 0x800:
        high = _load_immediate(rd, value >> 12)
        low = value & 0xFFF
        # The low twelve bits are added in two halves, for addi sign-extends.
        assert low < 0x800, "li: bit 11 of a long constant"
        return [*high, _immediate(0x13, 1, rd, rd, 12), _immediate(0x13, 0, rd, rd, low)]
    upper = (value + 0x800) >> 12
    return [upper << 12 | rd << 7 | 0x37, _immediate(0x1B, 0, rd, rd, value - (upper << 12))]


def _load_address(rd: int, distance: int) -> list[int]:
    upper = (distance + 0x800) >> 12
    return [upper << 12 | rd << 7 | 0x17, _immediate(0x13, 0, rd, rd, distance - (upper << 12))]


def _immediate(opcode: int, function: int, rd: int, rs: int, value: int) -> int:
    return (value & 0xFFF) << 20 | rs << 15 | function << 12 | rd << 7 | opcode


def _one(name: str, args: list[str], at: int, labels: dict[str, int]) -> int:
    if name in FIXED:
        return FIXED[name]
    if name == ".word":
        return int(args[0], 0)
    if name in CSR_OPS:
        source = int(args[2], 0) if name.endswith("i") else REGISTERS[args[2]]
        return _immediate(0x73, CSR_OPS[name], REGISTERS[args[0]], source, CSRS[args[1]])
    if name == "csrr":
        return _immediate(0x73, 2, REGISTERS[args[0]], 0, CSRS[args[1]])
    if name in ("csrw", "csrs", "csrc"):
        return _immediate(0x73, " wsc".index(name[3]), 0, REGISTERS[args[1]], CSRS[args[0]])
    if name in ("j", "jal"):
        offset = labels[args[-1]] - at
        bits = (offset >> 20 & 1) << 31 | (offset >> 1 & 0x3FF) << 21
        bits |= (offset >> 11 & 1) << 20 | (offset >> 12 & 0xFF) << 12
        return bits | (0 if name == "j" else REGISTERS["ra"]) << 7 | 0x6F
    if name == "jr":
        return _immediate(0x67, 0, 0, REGISTERS[args[0]], 0)
    if name == "jalr":
        return _immediate(0x67, 0, REGISTERS["ra"], REGISTERS[args[0]], 0)
    if name == "amoadd.w":
        return (
            REGISTERS[args[1]] << 20
            | REGISTERS[args[2]] << 15
            | 2 << 12
            | REGISTERS[args[0]] << 7
            | 0x2F
        )
    if name in BRANCHES:
        offset = labels[args[2]] - at
        bits = (offset >> 12 & 1) << 31 | (offset >> 5 & 0x3F) << 25
        bits |= (offset >> 1 & 0xF) << 8 | (offset >> 11 & 1) << 7
        pair = REGISTERS[args[1]] << 20 | REGISTERS[args[0]] << 15
        return bits | pair | BRANCHES[name] << 12 | 0x63
    registers = [REGISTERS[arg] for arg in args if arg in REGISTERS]
    if name in TRIPLES:
        return registers[2] << 20 | registers[1] << 15 | TRIPLES[name] | registers[0] << 7 | 0x33
    if name in IMMEDIATES:
        return _immediate(0x13, IMMEDIATES[name], *registers, int(args[2], 0))
    offset = int(args[1], 0)
    if name in LOADS:
        return _immediate(0x03, LOADS[name], *registers, offset)
    bits = (offset >> 5 & 0x7F) << 25 | registers[0] << 20 | registers[1] << 15 | (offset & 31) << 7
    return bits | STORES[name] << 12 | 0x23
