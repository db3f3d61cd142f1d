"""The PTX of the int8 decode kernel, run by a tiny interpreter: codes in, signed bytes out."""

import random
import re

import pytest
import torch
from kernels_helpers import triton  # noqa: F401  (skips without Triton)

from tqcompress.packing import pack
from tqcompress_kernels import fast_asm
from tqcompress_kernels.lookups import integer_step, lookup

MASK = 0xFFFFFFFF


def prmt(a, b, selector):
    source = a | (b << 32)
    result = 0
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = (source >> (8 * (nibble & 7))) & 255
        if nibble & 8:  # replicate the sign
            byte = 255 if byte & 128 else 0
        result |= byte << (8 * i)
    return result


def lop3(a, b, c, table):
    result = 0
    for bit in range(32):
        index = ((a >> bit & 1) << 2) | ((b >> bit & 1) << 1) | (c >> bit & 1)
        result |= (table >> index & 1) << bit
    return result


OPERATIONS = {
    "mov": lambda a: a,
    "shl": lambda a, b: a << b & MASK,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "prmt": prmt,
    "lop3": lop3,
    "add": lambda a, b: a + b & MASK,
    "shf.r.wrap": lambda low, high, by: (high << 32 | low) >> (by & 31) & MASK,
}


def run(text, outputs, inputs, shared=b"", **names):
    """The output registers; outputs must not be read, and every one must be written.

    `shared`: the bytes of shared memory; `names`: addresses in it.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)} | names
    for line in re.findall(r"^(?!\.reg)([\w.]+)\.[bu](8|16|32) (.+);$", text, re.M):
        size = int(line[1]) // 8
        load = {"ld.shared": lambda address, size=size: int.from_bytes(shared[address : address + size], "little")}
        operations = OPERATIONS | load
        target, *sources = (part.strip(" []") for part in line[2].split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        assert not any(s.startswith("$") and int(s[1:]) < outputs for s in sources)
        registers[target] = operations[line[0]](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def signed(register):
    """The four signed bytes of a register."""
    return [((register >> (8 * i)) & 255 ^ 128) - 128 for i in range(4)]


def levels_of(bits):
    half = {2: [37, 123], 3: [13, 40, 71, 113], 4: [5, 15, 25, 36, 48, 62, 79, 126]}[bits]
    return torch.tensor([-x for x in half[::-1]] + half, dtype=torch.float32)


def table_words(bits):
    """The words of the table, as the kernel loads them."""
    found = lookup(levels_of(bits), torch.device("cpu"))
    assert found.kind == f"t{bits}"
    assert found.step == pytest.approx(1)
    return [int(word) & MASK for word in found.table[:, 0].tolist()]


def words_of(codes, bits, width):
    """The 32-bit words of the plane of `width` bits."""
    data = bytes(pack(torch.tensor(codes), bits)[f"codes{width}"].tolist())
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def codes_for(bits, count, seed):
    return [random.Random(seed + i).randrange(2**bits) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_uniform_keys_come_out_as_their_codes(bits, seed):
    codes = codes_for(bits, 32 // bits, seed)
    text, outputs = fast_asm.key_uniform(bits)
    out = run(text, outputs, words_of(codes, bits, bits) * 4)
    for j, register in enumerate(out):
        factor = 2 ** (j * bits % 4) if bits < 4 else 1
        want = [codes[8 // bits * byte + j] for byte in range(4)]
        assert signed(register) == [code - 128 if bits == 8 else code * factor for code in want]


@pytest.mark.parametrize("seed", range(5))
def test_4_bit_keys_come_out_as_two_lookups_whose_sum_is_the_level(seed):
    codes, levels = codes_for(4, 8, seed), levels_of(4).int().tolist()
    text, outputs = fast_asm.key_table4()
    out = run(text, outputs, [x for word in (words_of(codes, 4, 4)[0], *table_words(4)) for x in [word] * 4])
    for half in range(2):
        total = [a + b for a, b in zip(signed(out[2 * half]), signed(out[2 * half + 1]), strict=True)]
        assert total == [levels[code] for code in codes[4 * half : 4 * half + 4]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 3])
def test_keys_of_2_and_3_bits_come_out_as_levels(bits, seed):
    """Output 2 * parity + half holds codes 8 * half + parity, + 2 and so on; two words share their high bits."""
    codes, levels = codes_for(bits, 32, seed), levels_of(bits).int().tolist()
    for odd, word in enumerate(words_of(codes, bits, 2)):
        inputs = [word, *(words_of(codes, bits, 1) if bits == 3 else []), *table_words(bits)]
        text, outputs = fast_asm.key_table3(bool(odd)) if bits == 3 else fast_asm.key_table2()
        out = run(text, outputs, [x for value in inputs for x in [value] * 4])
        for o, register in enumerate(out):
            first = 16 * odd + 8 * (o % 2) + o // 2
            assert signed(register) == [levels[codes[first + 2 * i]] for i in range(4)]


def value_inputs(bits, seed):
    """Codes of 4 tokens, as many as their words hold; the words of the main plane; the high bits."""
    count = {1: 16, 2: 16, 3: 16, 4: 8, 8: 4}[bits]
    tokens = [codes_for(bits, count, seed + 100 * t) for t in range(4)]
    words = [int.from_bytes(bytes(pack(torch.tensor(codes), bits)[f"codes{2 if bits == 3 else bits}"].tolist()), "little") for codes in tokens]  # fmt: skip # noqa: E501
    high = [int.from_bytes(bytes(pack(torch.tensor(c), 3)["codes1"].tolist()), "little") for c in tokens] if bits == 3 else []  # fmt: skip # noqa: E501
    return tokens, words, high


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_uniform_values_come_out_across_tokens(bits, seed):
    tokens, words, _ = value_inputs(bits, seed)
    text, outputs = fast_asm.value_uniform(bits)
    size, per_byte = (2 if bits == 1 else 4), 8 // bits
    for index, register in enumerate(run(text, outputs, words)):
        j, byte = divmod(index, size)
        zero = 2 ** (bits - 1) if j == per_byte - 1 else 0
        want = [(codes[byte * per_byte + j] - zero) * 2 ** (j * bits) for codes in tokens]
        assert signed(register) == want


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("bits", [2, 3])
def test_values_of_half_words_come_out_as_levels_across_tokens(bits, odd, seed):
    """8 of 16 codes, the first or the last; of shuffled high bits a lane has those of both, shifted if it is odd."""
    tokens, words, high = value_inputs(bits, seed)
    junk = random.Random(seed).randrange(1 << 16) << 16
    words = [word >> 16 * odd & 0xFFFF | junk for word in words]
    high = [word >> 2 * odd for word in high]
    levels = levels_of(bits).int().tolist()
    text, outputs = fast_asm.value_half(bits)
    out = run(text, outputs, words + high + [x for word in table_words(bits) for x in [word] * 4])
    for code in range(8):
        assert signed(out[code]) == [levels[codes[8 * odd + code]] for codes in tokens]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_come_out_as_levels_across_tokens(bits, seed):
    tokens, words, high = value_inputs(bits, seed)
    levels = levels_of(bits).int().tolist()
    text, outputs = {2: fast_asm.value_table2, 3: fast_asm.value_table3, 4: fast_asm.value_table4}[bits]()
    out = run(text, outputs, words + high + [x for word in table_words(bits) for x in [word] * 4])
    for code in range(len(tokens[0])):
        got = signed(out[code])
        if bits == 4:
            got = [a + b for a, b in zip(signed(out[2 * code]), signed(out[2 * code + 1]), strict=True)]
        assert got == [levels[codes[code]] for codes in tokens]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_default_levels_have_a_lookup(bits, dim):
    """What `quantizer: turboquant` uses by default at these bits is what the kernel reads."""
    from tqcompress.codec import HeadShape, TensorSpec
    from tqcompress.plan import build_codec

    levels = build_codec(TensorSpec("turboquant", bits), HeadShape(1, dim, "key")).levels().levels
    found = lookup(levels, torch.device("cpu"))
    assert not isinstance(found, str)
    assert found.bits == bits
    if found.kind[0] == "t":
        whole = levels.double() / found.step
        assert (whole - whole.round()).abs().max() < 1e-3
        assert whole.abs().max() <= 126


def test_levels_without_a_lookup_say_why():
    assert "5-bit levels" in lookup(torch.arange(32.0) ** 3, torch.device("cpu"))
    assert "common step" in lookup(torch.tensor([-3.14159, -1.0, 1.0, 3.14159]), torch.device("cpu"))
    assert integer_step(torch.tensor([-2.0, -1.0, 1.0, 2.0])) == pytest.approx(1)
