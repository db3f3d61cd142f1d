"""Bit planes: exact, of the documented sizes and bit order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqcompress.packing import look_up, pack, plane_fields, plane_widths, unpack

BITS = range(1, 9)


@st.composite
def rows(draw):
    """Bits and a 2-D tensor of codes below 2**bits; odd counts included."""
    bits = draw(st.integers(1, 8))
    count = draw(st.integers(1, 41))
    code = st.integers(0, 2**bits - 1)
    lists = draw(st.lists(st.lists(code, min_size=count, max_size=count), min_size=1, max_size=3))
    return bits, torch.tensor(lists)


@settings(deadline=None)
@given(rows())
def test_round_trip_is_exact(case):
    bits, codes = case
    packed, fields = pack(codes, bits), plane_fields(codes.shape[1], bits)
    assert packed.keys() == fields.keys()
    for name, field in fields.items():
        assert packed[name].dtype == field.dtype == torch.uint8
        assert packed[name].shape == (codes.shape[0], field.size)
    unpacked = unpack(packed | {"scale": codes}, bits, codes.shape[1])
    assert unpacked.dtype == torch.int32
    assert torch.equal(unpacked, codes.to(torch.int32))


def place(i, bits, width):
    """Where coordinate `i` lies in a plane: in order, but for the high bits of 3-bit codes."""
    group, a, b, c = i // 16, i // 8 % 2, i // 2 % 4, i % 2
    return 16 * group + 4 * b + 2 * a + c if (bits, width) == (3, 1) else i


@settings(deadline=None)
@given(rows())
def test_bit_order_is_the_documented_one(case):
    """A row of a plane is one little-endian integer of the codes' bits from `low` up, unused bits zero."""
    bits, codes = case
    packed, low = pack(codes, bits), 0
    for width in plane_widths(bits):
        for row, plane in zip(codes.tolist(), packed[f"codes{width}"].tolist(), strict=True):
            number = sum((code >> low) % 2**width << (place(i, bits, width) * width) for i, code in enumerate(row))
            assert int.from_bytes(bytes(plane), "little") == number
        low += width
    assert low == bits


def test_bit_order_by_hand():
    def planes(codes, bits):
        return {name: plane.tolist() for name, plane in pack(torch.tensor(codes), bits).items()}

    # 3 bits, codes 5, 2, 7: the low two bits 1, 2, 3 as 1 + 2*4 + 3*16, the high ones 1, 0, 1 in places 0, 1, 4.
    assert planes([5, 2, 7], 3) == {"codes2": [57], "codes1": [1 + 16, 0]}
    # 2 bits: code 0 sits in the lowest bits: 1 + 2*4 + 3*16 + 0*64.
    assert planes([1, 2, 3, 0], 2) == {"codes2": [57]}
    assert planes([1, 0, 0, 0, 0, 0, 0, 0, 1], 1) == {"codes1": [1, 1]}
    assert planes([3, 10, 15], 4) == {"codes4": [3 + 10 * 16, 15]}
    # 7 bits: 0b101_10_01 is 1001 below, 01 in the middle, 1 on top.
    assert planes([0b1011001], 7) == {"codes4": [0b1001], "codes2": [0b01], "codes1": [1]}
    assert planes([200, 7], 8) == {"codes8": [200, 7]}


@pytest.mark.parametrize(
    ("bits", "widths"),
    [(1, (1,)), (2, (2,)), (3, (2, 1)), (4, (4,)), (5, (4, 1)), (6, (4, 2)), (7, (4, 2, 1)), (8, (8,))],
)
def test_planes_are_the_binary_digits_widest_first(bits, widths):
    assert plane_widths(bits) == widths
    assert list(plane_fields(64, bits)) == [f"codes{width}" for width in widths]


@pytest.mark.parametrize(
    ("count", "bits", "sizes"),
    [
        (128, 3, [32, 16]),
        (128, 1, [16]),
        (5, 3, [2, 2]),
        (80, 3, [20, 10]),
        (8, 1, [1]),
        (9, 1, [2]),
        (80, 7, [40, 20, 10]),
        (3, 8, [3]),
    ],
)
def test_plane_sizes(count, bits, sizes):
    assert [field.size for field in plane_fields(count, bits).values()] == sizes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 13), (0, 13), (2, 3, 0, 13), (13,)])
def test_batch_dimensions_and_zero_tokens(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert all(packed[name].shape == (*shape[:-1], field.size) for name, field in plane_fields(13, bits).items())
    assert torch.equal(unpack(packed, bits, 13), codes.to(torch.int32))


@pytest.mark.parametrize("bits", BITS)
def test_strided_input_and_other_code_dtypes(bits):
    """Codecs hand over int64 codes of bucketize, booleans and whole floats; views of buffers are unpacked."""
    codes = torch.randint(0, 2**bits, (6, 4, 13), generator=torch.Generator().manual_seed(bits))
    packed, before = pack(codes, bits), codes.clone()
    for name, plane in packed.items():
        assert torch.equal(pack(codes.float(), bits)[name], plane)
        assert torch.equal(pack(codes.transpose(0, 1), bits)[name], plane.transpose(0, 1))
        assert bits > 1 or torch.equal(pack(codes == 1, bits)[name], plane)
    stored = {name: plane.clone() for name, plane in packed.items()}
    views = {name: plane[1::2, 1:3] for name, plane in packed.items()}
    assert torch.equal(unpack(views, bits, 13), codes[1::2, 1:3].to(torch.int32))
    assert torch.equal(codes, before)
    assert all(torch.equal(packed[name], plane) for name, plane in stored.items())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [13, 16, 20, 48, 80, 128])
def test_looking_levels_up_equals_unpacking_first(bits, count):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (2, 3, 5, count), generator=generator)
    levels = torch.randn(2**bits, generator=generator)
    packed = {name: torch.cat([plane, plane], 2)[:, 1:, 5:] for name, plane in pack(codes, bits).items()}  # views
    assert torch.equal(look_up(packed, bits, count, levels), levels[codes[:, 1:]])
