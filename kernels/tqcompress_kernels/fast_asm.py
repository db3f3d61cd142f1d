"""PTX that turns packed codes into int8 tensor-core operands, a register of four codes at a time.

A table of levels is looked up with `prmt`: each of the selector's four low nibbles picks one of eight bytes,
and a nibble with bit 3 set picks 0x00 or 0xFF, the sign of that byte. So a 4-bit code needs two lookups whose
sum is the level: codes 8-15 read `level + 1` (else 0), codes 0-7 read `level` (else -1).

Keys come a row at a time: one register holds 4 neighbouring bytes of a token. Values are wanted across tokens:
four registers hold the same bytes of 4 tokens, whose nibbles or bytes are regrouped before the lookup.
Every builder returns (text, number of outputs) for `inline_asm_elementwise(pack=4)`.
"""

from typing import NamedTuple

import triton

NIBBLES = "0x0F0F0F0F"
SELECT = "0xE4"  # lop3: bits of the first operand where the third is set, of the second elsewhere


class Asm:
    """Collects instructions; operands are numbered outputs first, then inputs."""

    def __init__(self, outputs: int, registers: str):
        self.outputs, self.lines = outputs, [f".reg .b32 {registers};"]

    def input(self, index: int) -> str:
        return f"${self.outputs + index}"

    def add(self, *lines: str) -> None:
        self.lines += [f"{line};" for line in lines]

    def look_up(self, selector: str, low: str, high: str, first: int, second: int) -> None:
        """Outputs `first` and `second`: the bytes that the low and the high half of a selector pick; it is used up."""
        self.add(
            f"prmt.b32 ${first}, {low}, {high}, {selector}",
            f"shr.u32 {selector}, {selector}, 16",
            f"prmt.b32 ${second}, {low}, {high}, {selector}",
        )

    def done(self) -> tuple[str, int]:
        return "{\n" + "\n".join(self.lines) + "\n}", self.outputs


def constraints(outputs: int, inputs: int) -> str:
    """Early-clobber outputs, register inputs."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


def key_uniform(bits: int) -> tuple[str, int]:
    """Output j holds code `8 / bits * byte + j` of the 4 bytes, times 2**(shift of j below 4)."""
    count = 8 // bits
    asm = Asm(count, "high")
    word, mask = asm.input(0), (1 << bits) - 1
    if bits == 8:
        asm.add(f"xor.b32 $0, {word}, 0x80808080")
        return asm.done()
    asm.add(f"shr.u32 high, {word}, 4")
    for j in range(count):
        source, shift = (word, j * bits) if j * bits < 4 else ("high", j * bits - 4)
        asm.add(f"and.b32 $0, {source}, {mask << shift:#04x}{f'{mask << shift:02x}' * 3}".replace("$0", f"${j}"))
    return asm.done()


def key_table4() -> tuple[str, int]:
    """Codes 0-3 of the word as (upper, lower) lookups, then codes 4-7; inputs: word, 4 x each table word."""
    asm = Asm(4, "x, y")
    word, p0, p1, n0, n1 = (asm.input(4 * i) for i in range(5))
    asm.add(
        f"xor.b32 x, {word}, 0x88888888",
        f"prmt.b32 $0, {p0}, {p1}, x",
        f"prmt.b32 $1, {n0}, {n1}, {word}",
        "shr.u32 x, x, 16",
        f"shr.u32 y, {word}, 16",
        f"prmt.b32 $2, {p0}, {p1}, x",
        f"prmt.b32 $3, {n0}, {n1}, y",
    )
    return asm.done()


def key_table3(odd: bool) -> tuple[str, int]:
    """16 codes: outputs (even codes 0-6, even 8-14, odd 1-7, odd 9-15); inputs: word, high bits, table words.

    The high bits of two words share a register; `odd` tells which half is this word's.
    """
    asm = Asm(4, "x, s, t")
    word, high, p0, p1 = (asm.input(4 * i) for i in range(4))
    if odd:
        asm.add(f"shr.u32 x, {high}, 14", f"prmt.b32 x, x, {high}, 0x7610")
    else:
        asm.add(f"shl.b32 x, {high}, 2", f"prmt.b32 x, x, {high}, 0x5410")
    for parity in range(2):
        if parity:
            asm.add(f"shr.u32 s, {word}, 2", "shr.u32 x, x, 1")
        asm.add(
            "and.b32 t, x, 0x44444444",
            f"lop3.b32 s, {'s' if parity else word}, 0x33333333, t, 0xEA",
        )
        asm.look_up("s", p0, p1, 2 * parity, 2 * parity + 1)
    return asm.done()


def key_table2() -> tuple[str, int]:
    """As `key_table3` without high bits; inputs: word, table word."""
    asm = Asm(4, "s")
    word, p0 = asm.input(0), asm.input(4)
    for parity in range(2):
        if parity:
            asm.add(f"shr.u32 s, {word}, 2", "and.b32 s, s, 0x33333333")
        else:
            asm.add(f"and.b32 s, {word}, 0x33333333")
        asm.look_up("s", p0, p0, 2 * parity, 2 * parity + 1)
    return asm.done()


def _bytes_across(asm: Asm, count: int) -> list[str]:
    """Registers r0.. of byte i of 4 tokens, from the first four inputs."""
    a, b, c, d = (asm.input(i) for i in range(4))
    for half, selector in enumerate(("0x5140", "0x7362")[: count // 2]):
        asm.add(f"prmt.b32 t0, {a}, {b}, {selector}", f"prmt.b32 t1, {c}, {d}, {selector}")
        asm.add(f"prmt.b32 r{2 * half}, t0, t1, 0x5410", f"prmt.b32 r{2 * half + 1}, t0, t1, 0x7632")
    return [f"r{i}" for i in range(count)]


def value_uniform(bits: int) -> tuple[str, int]:
    """Output `j * bytes + i` holds code j of byte i of 4 tokens, in place (times 2**(j * bits)).

    The topmost code of a byte is stored with its highest bit inverted, which makes it a signed number; 1-bit
    words have only 2 bytes.
    """
    bytes_, count = (2 if bits == 1 else 4), 8 // bits
    asm = Asm(bytes_ * count, "t0, t1, r0, r1, r2, r3, flip")
    registers = _bytes_across(asm, bytes_)
    if bits == 8:
        asm.add(*(f"xor.b32 ${i}, {r}, 0x80808080" for i, r in enumerate(registers)))
        return asm.done()
    asm.add("mov.b32 flip, 0x80808080")
    for j in range(count):
        mask = f"{((1 << bits) - 1) << (j * bits):02x}" * 4
        for i, register in enumerate(registers):
            top = j == count - 1
            asm.add(
                f"lop3.b32 ${j * bytes_ + i}, {register}, 0x{mask}, {'flip' if top else 0}, {'0x6A' if top else '0xC0'}"
            )
    return asm.done()


@triton.constexpr_function
def nibbles_across(asm: Asm, words: list[str]) -> None:
    """Registers ae, ao, be, bo: in each byte a nibble (even or odd ones) of tokens 0 and 1 (a) or 2 and 3 (b)."""
    for name, first, second in (("a", *words[:2]), ("b", *words[2:])):
        asm.add(
            f"shl.b32 t, {second}, 4",
            f"lop3.b32 {name}e, {first}, t, {NIBBLES}, {SELECT}",
            f"shr.u32 t, {first}, 4",
            f"lop3.b32 {name}o, t, {second}, {NIBBLES}, {SELECT}",
        )


QUADS = [(half, parity) for half in range(2) for parity in range(2)]


@triton.constexpr_function
def quad(asm: Asm, half: int, parity: int) -> tuple[int, int]:
    """Register s: a nibble of 4 tokens in its low half and another in its high half; returns which nibbles."""
    suffix = "eo"[parity]
    asm.add(f"prmt.b32 s, a{suffix}, b{suffix}, {('0x5140', '0x7362')[half]}")
    return 4 * half + parity, 4 * half + 2 + parity


def value_table4() -> tuple[str, int]:
    """Outputs 2i, 2i + 1: the two lookups of code i of 4 tokens; inputs: 4 words, 4 x each table word."""
    asm = Asm(16, "ae, ao, be, bo, s, t")
    p0, p1, n0, n1 = (asm.input(4 + 4 * i) for i in range(4))
    nibbles_across(asm, [asm.input(i) for i in range(4)])
    for half, parity in QUADS:
        first, second = quad(asm, half, parity)
        asm.add(
            "xor.b32 t, s, 0x88888888",
            f"prmt.b32 ${2 * first}, {p0}, {p1}, t",
            f"prmt.b32 ${2 * first + 1}, {n0}, {n1}, s",
            "shr.u32 t, t, 16",
            "shr.u32 s, s, 16",
            f"prmt.b32 ${2 * second}, {p0}, {p1}, t",
            f"prmt.b32 ${2 * second + 1}, {n0}, {n1}, s",
        )
    return asm.done()


def value_table3() -> tuple[str, int]:
    """Output i holds code i of 4 tokens; inputs: 4 words, 4 x 16 high bits, table words."""
    asm = Asm(16, "ae, ao, be, bo, s, t, u, he, ho, x, y")
    p0, p1 = asm.input(8), asm.input(12)
    nibbles_across(asm, [asm.input(i) for i in range(4)])
    _half_nibbles_across(asm, [asm.input(4 + i) for i in range(4)], "he", "ho")
    for half, parity in QUADS:
        first, second = quad(asm, half, parity)
        high = "he" if parity == 0 else "ho"
        for code in range(2):
            shift = ("shl.b32 t, {}, 2", "shl.b32 t, {}, 1", "mov.b32 t, {}", "shr.u32 t, {}, 1")[2 * half + code]
            if code:
                asm.add("shr.u32 s, s, 2")
            asm.add(
                shift.format(high),
                "and.b32 t, t, 0x44444444",
                "lop3.b32 u, s, 0x33333333, t, 0xEA",
            )
            asm.look_up("u", p0, p1, 2 * first + code, 2 * second + code)
    return asm.done()


def value_table2() -> tuple[str, int]:
    """As `value_table3` without high bits; inputs: 4 words, table word."""
    asm = Asm(16, "ae, ao, be, bo, s, t, u")
    p0 = asm.input(4)
    nibbles_across(asm, [asm.input(i) for i in range(4)])
    for half, parity in QUADS:
        first, second = quad(asm, half, parity)
        for code in range(2):
            if code:
                asm.add("shr.u32 s, s, 2")
            asm.add("and.b32 u, s, 0x33333333")
            asm.look_up("u", p0, p0, 2 * first + code, 2 * second + code)
    return asm.done()


def _half_nibbles_across(asm: Asm, words: list[str], even: str, odd: str) -> None:
    """Two registers with the nibbles of the low 16 bits of 4 tokens' words: 0 and 2, and 1 and 3, of all tokens."""
    asm.add(
        f"prmt.b32 x, {words[0]}, {words[2]}, 0x5410",
        f"prmt.b32 y, {words[1]}, {words[3]}, 0x5410",
        "shl.b32 t, y, 4",
        f"lop3.b32 {even}, x, t, {NIBBLES}, {SELECT}",
        "shr.u32 t, x, 4",
        f"lop3.b32 {odd}, t, y, {NIBBLES}, {SELECT}",
        f"prmt.b32 {even}, {even}, {even}, 0x3120",
        f"prmt.b32 {odd}, {odd}, {odd}, 0x3120",
    )


def value_half(bits: int) -> tuple[str, int]:
    """`value_table2` and `value_table3` for words of 8 codes: 16 bits, and 16 with the high bits in places 4 b + c."""
    asm = Asm(8, "se, so, t, u, he, ho, x, y")
    tables = [asm.input(4), asm.input(4)] if bits == 2 else [asm.input(8), asm.input(12)]
    _half_nibbles_across(asm, [asm.input(i) for i in range(4)], "se", "so")
    if bits == 3:
        _half_nibbles_across(asm, [asm.input(4 + i) for i in range(4)], "he", "ho")
    for parity, (low, high) in enumerate((("se", "he"), ("so", "ho"))):
        for code in range(2):
            if code:
                asm.add(f"shr.u32 {low}, {low}, 2")
            if bits == 2:
                asm.add(f"and.b32 u, {low}, 0x33333333")
            else:
                asm.add(
                    f"shl.b32 t, {high}, {2 - code}",
                    "and.b32 t, t, 0x44444444",
                    f"lop3.b32 u, {low}, 0x33333333, t, 0xEA",
                )
            asm.look_up("u", tables[0], tables[1], 2 * parity + code, 4 + 2 * parity + code)
    return asm.done()


class Plan(NamedTuple):
    """How the words of a kind become operands."""

    codes: int  # in a word
    operands: int  # that a word becomes
    text: str | tuple[str, str]  # two where even and odd words differ
    constraints: str
    tables: int  # 32-bit words of the table of levels


def _plan(codes: int, built: tuple[str | tuple[str, str], int], inputs: int, tables: int) -> Plan:
    """`inputs` counts tensors: four registers each."""
    text, outputs = built
    return Plan(codes, outputs, text, constraints(outputs, 4 * inputs), tables)


def key_plans() -> dict[str, Plan]:
    """The plan of every kind of keys."""
    plans = {f"u{bits}": _plan(32 // bits, key_uniform(bits), 1, 0) for bits in (1, 2, 4, 8)}
    texts = (key_table3(False)[0], key_table3(True)[0])
    plans["t2"] = _plan(16, key_table2(), 2, 1)
    plans["t3"] = _plan(16, (texts, 4), 4, 2)
    plans["t4"] = _plan(8, key_table4(), 5, 4)
    return plans


def value_plans() -> dict[str, Plan]:
    """The plan of every kind of values; 4 words, of 4 tokens, count as one input, 1-bit words have 16 codes.

    "h": tables for words of which a lane has a half, those of rows of 64.
    """
    plans = {f"u{bits}": _plan(min(16, 32 // bits), value_uniform(bits), 1, 0) for bits in (1, 2, 4, 8)}
    plans["t2"] = _plan(16, value_table2(), 2, 1)
    plans["t3"] = _plan(16, value_table3(), 4, 2)
    plans["t4"] = _plan(8, value_table4(), 5, 4)
    plans["h2"] = _plan(8, value_half(2), 2, 1)
    plans["h3"] = _plan(8, value_half(3), 4, 2)
    return plans
