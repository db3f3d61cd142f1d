"""PTX that turns strings of trellis codes into int8 tensor-core operands by lookups in shared memory.

A lookup's index is the window of one coordinate and the symbols of the `per - 1` after it, which together determine
`per` values: one 32-bit word of the table. With several copies of the table, entry e of copy r is word
`e * copies + r`, and a lane reads its own copy, so fewer lanes meet in one of the 32 banks. A single copy has no more
bytes an entry than it needs.

Windows of 4 bits need no shared memory: the string and shifted versions of it are words of eight nibbles, each a
window, and are looked up as 4-bit codes are in `fast_asm`, in a table of registers whose two halves add up.

The table is a static array: it is declared by the first statement (`declare`) and known to the others by name.
Every builder returns (text, number of outputs) for `inline_asm_elementwise(pack=4)`; see `fast_asm`. They are
functions that Triton knows, so that it compiles anew when they change.
"""

from typing import NamedTuple

import triton

from .fast_asm import NIBBLES, QUADS, SELECT, Asm, Plan, nibbles_across, quad

CODES = 32  # coordinates of a quarter of a row that a lane reads in one go, of rows that have as many; else 16


class Kind(NamedTuple):
    """How one side is read; `text` is what kernels are compiled for."""

    bits: int
    window: int
    per: int  # coordinates a lookup: 1 to 4
    copies: int  # of the table: a power of two up to 32; 0 if it is in registers
    codes: int  # coordinates of a key that a lane reads in one go, twice those of a value
    name: str  # of the table

    @property
    def text(self) -> str:
        """Begins as the kinds of `fast_asm` do, with a letter and the bits."""
        return f"w{self.bits}/{self.window}/{self.per}/{self.copies}/{self.codes}/{self.name}"

    @property
    def entries(self) -> int:
        """Of one copy of the table."""
        return 1 << self.index_bits

    @property
    def index_bits(self) -> int:
        """Bits of the string that `per` coordinates depend on."""
        return self.window + (self.per - 1) * self.bits

    @property
    def size(self) -> int:
        """Bytes of an entry."""
        return self.per if self.copies == 1 and self.per < 3 else 4

    @property
    def nbytes(self) -> int:
        """Of all copies of the table in shared memory."""
        return self.entries * self.size * self.copies

    def codes_of(self, side: str) -> int:
        """Coordinates that a lane reads in one go."""
        return self.codes if side == "key" else self.codes // 2

    def words(self, side: str) -> int:
        """32-bit words that the windows of `codes_of` coordinates lie in, if the first begins with one."""
        return -(-((self.codes_of(side) - 1) * self.bits + self.window) // 32)


@triton.constexpr_function
def parse(text: str) -> Kind:
    """The kind of `Kind.text`."""
    *numbers, name = text[1:].split("/")
    return Kind(*map(int, numbers), name)  # type: ignore[call-arg, arg-type]  # a number for each other field


@triton.constexpr_function
def _look_up(asm: Asm, kind: str, words: list[str], first: int, target: str, lane: str) -> None:
    """Into `target`: the table's word for the coordinates from `first` on of the string `words`."""
    found = parse(kind)
    at, shift = divmod(first * found.bits, 32)
    place = (found.size * found.copies).bit_length() - 1  # of the index in an address
    mask = (found.entries - 1) << place
    by = shift - place
    if shift + found.index_bits > 32:
        asm.add(f"shf.r.wrap.b32 t, {words[at]}, {words[min(at + 1, len(words) - 1)]}, {by}")
    elif by:
        asm.add(f"{'shr' if by > 0 else 'shl'}.b32 t, {words[at]}, {abs(by)}")
    source = "t" if by or shift + found.index_bits > 32 else words[at]
    if found.copies > 1:
        asm.add(f"lop3.b32 t, {source}, {mask:#x}, {lane}, 0xEA")
    else:
        asm.add(f"and.b32 t, {source}, {mask:#x}")
    asm.add("add.u32 t, t, base", f"ld.shared.{('u8', 'u16', 'b32')[found.size // 2]} {target}, [t]")


@triton.constexpr_function
def key_windows(text: str) -> tuple[str, int]:
    """Output j holds coordinates 4 j to 4 j + 3; inputs: the words of the string, the lane's copy."""
    kind = parse(text)
    asm, count = Asm(kind.codes // 4, "t, base, a<4>"), kind.words("key")
    words, lane = [asm.input(4 * i) for i in range(count)], asm.input(4 * count)
    asm.add(f"mov.u32 base, {kind.name}")
    for j in range(kind.codes // 4):
        if (
            kind.per == 3
        ):  # its first and its last coordinates are of two lookups, one of which the next one goes on with
            first, last = 4 * j // 3, (4 * j + 3) // 3
            for i in range(first + (j % 3 > 0), last + 1):
                _look_up(asm, text, words, 3 * i, f"a{i % 2}", lane)
            select = sum((c % 3 + 4 * (c // 3 - first)) << 4 * i for i, c in enumerate(range(4 * j, 4 * j + 4)))
            asm.add(f"prmt.b32 ${j}, a{first % 2}, a{last % 2}, {select:#06x}")
            continue
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
    """Output j holds coordinate j for 4 tokens; inputs: 4 tokens' words, in turn; the lane's copy."""
    kind = parse(text)
    asm, count = Asm(kind.codes // 2, "t, base, a<4>, u<4>"), kind.words("value")
    lane = asm.input(4 * count)
    asm.add(f"mov.u32 base, {kind.name}")
    for j in range(0, kind.codes // 2, kind.per):
        for token in range(4):
            words = [asm.input(4 * i + token) for i in range(count)]
            _look_up(asm, text, words, j, f"a{token}", lane)
        for first in range(j, min(j + kind.per, kind.codes // 2), 2):  # two coordinates of four tokens
            select = 0x0040 if kind.per == 1 else (0x5140, 0x7362)[(first - j) // 2]
            asm.add(f"prmt.b32 u0, a0, a1, {select:#06x}", f"prmt.b32 u1, a2, a3, {select:#06x}")
            asm.add(f"prmt.b32 ${first}, u0, u1, 0x5410")
            if first + 1 < min(j + kind.per, kind.codes // 2):
                asm.add(f"prmt.b32 ${first + 1}, u0, u1, 0x7632")
    return asm.done()


@triton.constexpr_function
def _shifted(asm: Asm, target: str, words: list[str], by: int) -> None:
    """Into `target`: the 32 bits from bit `by` of the string `words` on; bits in front of it are any."""
    at, shift = divmod(by, 32)
    if shift == 0:
        asm.add(f"mov.b32 {target}, {words[at]}")
    elif at < 0:
        asm.add(f"shl.b32 {target}, {words[0]}, {-by}")
    elif at + 1 < len(words):
        asm.add(f"shf.r.wrap.b32 {target}, {words[at]}, {words[at + 1]}, {shift}")
    else:
        asm.add(f"shr.u32 {target}, {words[at]}, {shift}")


@triton.constexpr_function
def _every_third(first: int) -> str:
    """A mask of the nibbles `first`, `first + 3` and so on of a word."""
    return f"{sum(15 << 4 * i for i in range(first, 8, 3)):#010x}"


@triton.constexpr_function
def _look_up_nibbles(asm: Asm, selector: str, tables: list[str], outputs: list[int]) -> None:
    """Eight windows in nibbles: outputs are two lookups, whose sum is the value, of the low four; then of the high."""
    low, high = tables[:2], tables[2:]
    asm.add(f"xor.b32 x, {selector}, 0x88888888")
    for half in range(2):
        if half:
            asm.add("shr.u32 x, x, 16", f"shr.u32 y, {selector}, 16")
        asm.add(
            f"prmt.b32 ${outputs[2 * half]}, {high[0]}, {high[1]}, x",
            f"prmt.b32 ${outputs[2 * half + 1]}, {low[0]}, {low[1]}, {'y' if half else selector}",
        )


@triton.constexpr_function
def key_nibbles(text: str) -> tuple[str, int]:
    """Outputs 4 q to 4 q + 3 are those of the q-th word of nibbles (`key_nibble`); inputs: words, 4 of a table.

    At 2 bits windows begin with every nibble of the string and of the string shifted by 2 bits. At 3 bits those of
    coordinates i, i + 4 and so on are three nibbles apart: three such sets, shifted to different nibbles, fill three
    words of four, and what of the last set is in three words fits into one.
    """
    kind = parse(text)
    asm, count = Asm(kind.codes // 2, "x, y, a<4>"), kind.words("key")
    words = [asm.input(4 * i) for i in range(count)]
    tables = [asm.input(4 * (count + i)) for i in range(4)]
    for q in range(kind.codes // 8):
        if kind.bits == 2:
            _shifted(asm, "a0", words, 32 * (q // 2) + 2 * (q % 2))
        elif q < 3:
            _shifted(asm, "a1", words, 32 * q - 1)
            _shifted(asm, "a2", words, 32 * q - 2)
            asm.add(f"lop3.b32 a0, {words[q]}, a1, {_every_third(q % 3)}, {SELECT}")
            asm.add(f"lop3.b32 a0, a2, a0, {_every_third((q + 2) % 3)}, {SELECT}")
        else:
            for i in range(3):
                _shifted(asm, f"a{i}", words, 32 * i + 1)
            asm.add(f"lop3.b32 a0, a0, a1, {_every_third(2)}, {SELECT}")
            asm.add(f"lop3.b32 a0, a2, a0, {_every_third(1)}, {SELECT}")
        _look_up_nibbles(asm, "a0", tables, list(range(4 * q, 4 * q + 4)))
    return asm.done()


@triton.constexpr_function
def value_nibbles(text: str) -> tuple[str, int]:
    """Outputs 2 j and 2 j + 1 are the two lookups of coordinate j for 4 tokens; inputs: 4 tokens' words, a table.

    At 3 bits the windows of coordinates j and j + 8 are 24 bits apart: in the first and the last byte of a word.
    """
    kind = parse(text)
    asm, count = Asm(kind.codes, "ae, ao, be, bo, s, t, x, y, w<4>"), kind.words("value")
    tokens = [[asm.input(4 * i + token) for i in range(count)] for token in range(4)]
    tables = [asm.input(4 * (count + i)) for i in range(4)]
    if kind.bits == 2:
        for odd in range(2):
            for token in range(4):
                _shifted(asm, f"w{token}", tokens[token], 2 * odd)
            nibbles_across(asm, ["w0", "w1", "w2", "w3"])
            for half, parity in QUADS:
                first, second = (2 * (2 * i + odd) for i in quad(asm, half, parity))
                _look_up_nibbles(asm, "s", tables, [first, first + 1, second, second + 1])
        return asm.done()
    for j in range(8):
        for token in range(4):
            _shifted(asm, f"w{token}", tokens[token], 3 * j - 4 * (token % 2))
        asm.add(
            f"lop3.b32 ae, w0, w1, {NIBBLES}, {SELECT}",
            f"lop3.b32 be, w2, w3, {NIBBLES}, {SELECT}",
            "prmt.b32 s, ae, be, 0x7340",
        )
        _look_up_nibbles(asm, "s", tables, [2 * j, 2 * j + 1, 2 * j + 16, 2 * j + 17])
    return asm.done()


@triton.constexpr_function
def key_coordinates(text: str) -> list[list[int]]:
    """The coordinates in the four bytes of each output for keys."""
    kind = parse(text)
    if kind.copies:
        return [list(range(4 * j, 4 * j + 4)) for j in range(kind.codes // 4)]
    found = []
    for q in range(kind.codes // 8):
        if kind.bits == 2:
            nibbles = [16 * (q // 2) + 2 * n + q % 2 for n in range(8)]
        elif q < 3:
            nibbles = [4 * (n // 3) + n % 3 for n in range(8 * q, 8 * q + 8)]
        else:
            nibbles = [4 * ((n + 8 * ((n + 1) % 3)) // 3) + 3 for n in range(8)]
        found += [nibbles[:4], nibbles[:4], nibbles[4:], nibbles[4:]]
    return found


@triton.constexpr_function
def plan(side: str, text: str) -> Plan:
    """The plan of a kind for one side; its table is four words in registers, or the lane's copy, in bytes."""
    kind = parse(text)
    if kind.copies:
        built, outputs = key_windows(text) if side == "key" else value_windows(text)
    else:
        built, outputs = key_nibbles(text) if side == "key" else value_nibbles(text)
    tables = 1 if kind.copies else 4
    operands = ",".join(["=&r"] * outputs + ["r"] * (4 * (kind.words(side) + tables)))
    return Plan(kind.codes_of(side), outputs, built, operands, tables)


@triton.constexpr_function
def declare(name: str, size: int) -> str:
    """The statement that declares an array in shared memory; output: its address."""
    return f".shared .align 16 .b8 {name}[{size}];\nmov.u32 $0, {name};"
