"""PTX that turns strings of trellis codes into int8 tensor-core operands by lookups in shared memory.

A lookup's index is the window of one coordinate and the symbols of the `per - 1` after it, which together determine
`per` values: one 32-bit word of the table. With several copies of the table, entry e of copy r is word
`e * copies + r`, and a lane reads its own copy, so fewer lanes meet in one of the 32 banks.

The table is a static array: it is declared by the first statement (`declare`) and known to the others by name.
Every builder returns (text, number of outputs) for `inline_asm_elementwise(pack=4)`; see `fast_asm`. They are
functions that Triton knows, so that it compiles anew when they change.
"""

from typing import NamedTuple

import triton

from .fast_asm import Asm, Plan

KEY_CODES, VALUE_CODES = 32, 16  # coordinates that a lane reads in one go, of a quarter and of an eighth of a row


class Kind(NamedTuple):
    """How one side is read; `text` is what kernels are compiled for."""

    bits: int
    window: int
    per: int  # coordinates a lookup: 1, 2 or 4
    copies: int  # of the table: a power of two up to 32
    name: str  # of the table

    @property
    def text(self) -> str:
        """Begins as the kinds of `fast_asm` do, with a letter and the bits."""
        return f"w{self.bits}/{self.window}/{self.per}/{self.copies}/{self.name}"

    @property
    def entries(self) -> int:
        """Of one copy of the table."""
        return 1 << self.index_bits

    @property
    def index_bits(self) -> int:
        """Bits of the string that `per` coordinates depend on."""
        return self.window + (self.per - 1) * self.bits

    def words(self, codes: int) -> int:
        """32-bit words that the windows of `codes` coordinates lie in, if the first begins with one."""
        return -(-((codes - 1) * self.bits + self.window) // 32)


@triton.constexpr_function
def parse(text: str) -> Kind:
    """The kind of `Kind.text`."""
    *numbers, name = text[1:].split("/")
    return Kind(*map(int, numbers), name)


@triton.constexpr_function
def _look_up(asm: Asm, kind: str, words: list[str], first: int, target: str, lane: str) -> None:
    """Into `target`: the table's word for the coordinates from `first` on of the string `words`."""
    kind = parse(kind)
    at, shift = divmod(first * kind.bits, 32)
    place = 2 + kind.copies.bit_length() - 1  # of the index in an address
    mask = (kind.entries - 1) << place
    by = shift - place
    if shift + kind.index_bits > 32:
        asm.add(f"shf.r.wrap.b32 t, {words[at]}, {words[(at + 1) % len(words)]}, {by}")
    elif by:
        asm.add(f"{'shr' if by > 0 else 'shl'}.b32 t, {words[at]}, {abs(by)}")
    source = "t" if by or shift + kind.index_bits > 32 else words[at]
    if kind.copies > 1:
        asm.add(f"lop3.b32 t, {source}, {mask:#x}, {lane}, 0xEA")
    else:
        asm.add(f"and.b32 t, {source}, {mask:#x}")
    asm.add("add.u32 t, t, base", f"ld.shared.b32 {target}, [t]")


@triton.constexpr_function
def key_windows(text: str) -> tuple[str, int]:
    """Output j holds coordinates 4 j to 4 j + 3 of 32; inputs: the words of the string, the lane's copy."""
    kind = parse(text)
    asm, count = Asm(KEY_CODES // 4, "t, base, a<4>"), kind.words(KEY_CODES)
    words, lane = [asm.input(4 * i) for i in range(count)], asm.input(4 * count)
    asm.add(f"mov.u32 base, {kind.name}")
    for j in range(KEY_CODES // 4):
        if kind.per == 4:
            _look_up(asm, text, words, 4 * j, f"${j}", lane)
            continue
        for i in range(0, 4, kind.per):
            _look_up(asm, text, words, 4 * j + i, f"a{i}", lane)
        if kind.per == 1:
            asm.add("prmt.b32 a0, a0, a1, 0x0040", "prmt.b32 a2, a2, a3, 0x0040")
        asm.add(f"prmt.b32 ${j}, a0, a2, 0x5410")
    return asm.done()


@triton.constexpr_function
def value_windows(text: str) -> tuple[str, int]:
    """Output j holds coordinate j of 16 for 4 tokens; inputs: 4 tokens' words, in turn; the lane's copy."""
    kind = parse(text)
    asm, count = Asm(VALUE_CODES, "t, base, a<4>, u<4>"), kind.words(VALUE_CODES)
    lane = asm.input(4 * count)
    asm.add(f"mov.u32 base, {kind.name}")
    for j in range(0, VALUE_CODES, kind.per):
        for token in range(4):
            words = [asm.input(4 * i + token) for i in range(count)]
            _look_up(asm, text, words, j, f"a{token}", lane)
        if kind.per == 1:
            asm.add("prmt.b32 a0, a0, a1, 0x0040", "prmt.b32 a2, a2, a3, 0x0040", f"prmt.b32 ${j}, a0, a2, 0x5410")
            continue
        for half in range(kind.per // 2):
            select = ("0x5140", "0x7362")[half]
            asm.add(f"prmt.b32 u0, a0, a1, {select}", f"prmt.b32 u1, a2, a3, {select}")
            asm.add(
                f"prmt.b32 ${j + 2 * half}, u0, u1, 0x5410",
                f"prmt.b32 ${j + 2 * half + 1}, u0, u1, 0x7632",
            )
    return asm.done()


@triton.constexpr_function
def plan(side: str, text: str) -> Plan:
    """The plan of a kind for one side; its table is the lane's copy, as an offset in bytes."""
    kind = parse(text)
    codes = KEY_CODES if side == "key" else VALUE_CODES
    built, outputs = key_windows(text) if side == "key" else value_windows(text)
    operands = ",".join(["=&r"] * outputs + ["r"] * (4 * (kind.words(codes) + 1)))
    return Plan(codes, outputs, built, operands, 1)


@triton.constexpr_function
def declare(text: str, claim: int) -> str:
    """The statement that declares a kind's table, of `claim` bytes or as many as it needs; output: its address."""
    kind = parse(text)
    size = max(4 * kind.entries * kind.copies, claim)
    return f".shared .align 16 .b8 {kind.name}[{size}];\nmov.u32 $0, {kind.name};"
