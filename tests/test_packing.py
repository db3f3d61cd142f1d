"""Bit packing: exact, of the documented size and bit order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqcompress.packing import pack, packed_size, unpack

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
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0], packed_size(codes.shape[1], bits))
    unpacked = unpack(packed, bits, codes.shape[1])
    assert unpacked.dtype == torch.int32
    assert torch.equal(unpacked, codes.to(torch.int32))


@settings(deadline=None)
@given(rows())
def test_bit_order_is_the_documented_one(case):
    """Code i occupies bits i*bits to (i+1)*bits - 1: the row is one little-endian integer, unused bits zero."""
    bits, codes = case
    for row, packed in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert int.from_bytes(bytes(packed), "little") == number


def test_bit_order_by_hand():
    # 3 bits, codes 5, 2, 7: bits (lowest first) 101 010 11|1, so byte 0 = 1+4+16+64+128 and byte 1 = 1.
    assert pack(torch.tensor([5, 2, 7]), 3).tolist() == [213, 1]
    # 2 bits: code 0 sits in the lowest bits: 1 + 2*4 + 3*16 + 0*64.
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [57]
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    # 5 bits, codes 31, 1: the second straddles the bytes only by its zeros; 31 + 1*32.
    assert pack(torch.tensor([31, 1]), 5).tolist() == [63, 0]
    assert pack(torch.tensor([200, 7]), 8).tolist() == [200, 7]


@pytest.mark.parametrize(
    ("count", "bits", "size"), [(128, 3, 48), (128, 1, 16), (5, 3, 2), (8, 1, 1), (9, 1, 2), (80, 7, 70), (3, 8, 3)]
)
def test_packed_size(count, bits, size):
    assert packed_size(count, bits) == size


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 13), (0, 13), (2, 3, 0, 13), (13,)])
def test_batch_dimensions_and_zero_tokens(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], packed_size(13, bits))
    assert torch.equal(unpack(packed, bits, 13), codes.to(torch.int32))


@pytest.mark.parametrize("bits", BITS)
def test_strided_input_and_other_code_dtypes(bits):
    """Codecs hand over int64 codes of bucketize and whole floats; views of buffers are unpacked."""
    codes = torch.randint(0, 2**bits, (6, 4, 13), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert torch.equal(pack(codes.float(), bits), packed)
    assert torch.equal(pack(codes.transpose(0, 1), bits), packed.transpose(0, 1))
    assert torch.equal(unpack(packed[1::2, 1:3], bits, 13), codes[1::2, 1:3].to(torch.int32))
