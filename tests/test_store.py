"""The store that holds what a plan promises."""

import pytest
import torch

from tqcompress import Field, Layout
from tqcompress.store import TokenStore

# Codes of each token beside a step shared by four, as affine's keys have them.
LAYOUT = Layout({"codes": Field(torch.uint8, 3), "step": Field(torch.float16, 2, 4)})
BATCH, HEADS, BLOCK = 2, 3, 4


def packed_rows(tokens: int, start: int = 0) -> dict[str, torch.Tensor]:
    """Rows in which every token, head and sequence has its own numbers."""
    rows = {}
    for name, field in LAYOUT.fields.items():
        count, first = tokens // field.tokens, start // field.tokens
        token = torch.arange(first, first + count)[:, None] * 7 + torch.arange(field.size)
        head = torch.arange(HEADS)[:, None, None] * 31 + torch.arange(BATCH)[:, None, None, None] * 101
        rows[name] = ((token + head) % 251).to(field.dtype)
    return rows


def new_store(capacity: int = 0) -> TokenStore:
    return TokenStore(LAYOUT, BATCH, HEADS, torch.device("cpu"), capacity)


def filled(tokens: int) -> TokenStore:
    store = new_store()
    store.append(packed_rows(tokens), tokens)
    return store


def assert_holds(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("step", [4, 12, 400])
@pytest.mark.parametrize("capacity", [0, 8, 1200])
def test_store_appends_and_reads(step, capacity):
    store = new_store(capacity)
    assert_holds(store.read(), packed_rows(0))
    for start in range(0, 1200, step):
        store.append(packed_rows(step, start), step)
    assert store.length == 1200
    assert_holds(store.read(), packed_rows(1200))
    assert_holds(store.read(8, 20), packed_rows(12, 8))
    assert_holds(store.read(1196), packed_rows(4, 1196))
    assert store.nbytes == BATCH * HEADS * (1200 * 3 + 300 * 2 * 2)


def test_store_appending_nothing():
    store = filled(8)
    store.append(packed_rows(0), 0)
    assert_holds(store.read(), packed_rows(8))


def test_store_views_stay_valid_after_growth():
    store = filled(8)
    view, before = store.read(), store.allocated_nbytes
    store.append(packed_rows(2000, 8), 2000)
    assert store.allocated_nbytes > before  # it did grow
    assert_holds(view, packed_rows(8))
    assert_holds(store.read(0, 8), packed_rows(8))


def test_store_reads_views_not_copies():
    store = filled(400)
    pointers = {buffer.untyped_storage().data_ptr() for buffer in store.buffers.values()}
    assert {view.untyped_storage().data_ptr() for view in store.read(8, 16).values()} == pointers


@pytest.mark.parametrize("step", [4, 36])
def test_store_spare_room_is_bounded_and_growth_is_amortised(step):
    store = new_store()
    token = BATCH * HEADS * LAYOUT.nbytes_per_token
    growths, copied, before = 0, 0, 0
    for start in range(0, 8000, step):
        store.append(packed_rows(step, start), step)
        # At the moment of growth at most an eighth of the tokens held or 256, rounded up; then it shrinks.
        spare = store.allocated_nbytes / token - store.length
        assert 0 <= spare <= max(store.length / 8, TokenStore.MIN_GROWTH) + TokenStore.ALIGNMENT
        if store.allocated_nbytes != before:
            growths, copied, before = growths + 1, copied + start, store.allocated_nbytes
    # Below 2048 tokens every 256 at least (8 times), then by an eighth: log(8000/2048) / log(9/8) = 11.6 times.
    assert growths <= 1 + 8 + 12
    assert copied <= 9 * 8000  # a geometric sum with the ratio 9/8


def test_store_of_a_given_capacity_allocates_once():
    store = new_store(448)
    before = {name: buffer.data_ptr() for name, buffer in store.buffers.items()}
    for start in range(0, 448, 4):
        store.append(packed_rows(4, start), 4)
    assert {name: buffer.data_ptr() for name, buffer in store.buffers.items()} == before
    assert store.nbytes == store.allocated_nbytes


def test_store_crops_and_goes_on():
    store = filled(400)
    store.crop(1000)
    assert store.length == 400
    store.crop(12)
    assert_holds(store.read(), packed_rows(12))
    store.append(packed_rows(8, 100), 8)
    assert_holds(store.read(0, 12), packed_rows(12))
    assert_holds(store.read(12), packed_rows(8, 100))
    store.crop(0)
    assert_holds(store.read(), packed_rows(0))


def test_store_maps_every_buffer_and_grows_at_the_new_batch_size():
    store = filled(8)
    order = torch.tensor([1, 0, 0])
    store.map(lambda buffer: buffer.index_select(0, order))
    rows = {name: tensor[order] for name, tensor in packed_rows(8).items()}
    assert_holds(store.read(), rows)
    more = {name: tensor[order] for name, tensor in packed_rows(2000, 8).items()}
    store.append(more, 2000)
    assert_holds(store.read(0, 8), rows)
    assert_holds(store.read(8), more)
