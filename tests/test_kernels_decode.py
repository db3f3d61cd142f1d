"""The decoding kernels against their naive reference, in float64; buffers come full of NaN."""

import pytest
import torch
from decode_helpers import DEVICE, HEADS, check_split, in_pages, in_records, random, run_split, side

from tqcompress_kernels import decode, reference, tuning
from tqcompress_kernels.combine import combine
from tqcompress_kernels.encode_reference import pack
from tqcompress_kernels.prepare import empty, prepare

# bits of keys and values, dim, columns, uniform levels, log8 scales
CASES = [
    (1, 1, 64, 1, False, True),
    (2, 2, 128, 4, False, True),
    (2, 4, 64, 16, True, False),
    (3, 3, 128, 4, False, True),
    (3, 3, 64, 8, True, False),
    (3, 1, 72, 3, True, True),
    (4, 4, 128, 4, True, True),
    (4, 4, 64, 5, False, False),
    (4, 2, 80, 2, False, True),
    (3, 2, 256, 9, False, True),
    (8, 4, 96, 4, True, True),
    (8, 8, 64, 1, False, False),
    (5, 6, 64, 10, False, True),
    (7, 5, 192, 20, True, True),
]


@pytest.mark.parametrize("bits", range(1, 9))
def test_reference_unpacks_what_was_packed(bits):
    codes = torch.randint(0, 2**bits, (2, HEADS, 3, 72), generator=torch.Generator().manual_seed(bits))
    packed = side(bits, 2, 3, 72)._replace(planes=tuple(plane.to(DEVICE) for plane in pack(codes, bits)))
    assert torch.equal(reference.unpack(packed, 72).cpu(), codes)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split(case):
    key_bits, value_bits, dim, columns, uniform, log8 = case
    key, value = (side(b, 1, 70, dim, uniform, log8, seed=b) for b in (key_bits, value_bits))
    check_split(random(1, HEADS, columns, dim), random(1, HEADS, columns), key, value, 70, dim**-0.5)


@pytest.mark.parametrize("options", ["lengths", "mask", "softcap", "views", "splits"])
def test_split_options(options):
    key, value = side(4, 3, 70, 64, uniform=True), side(3, 3, 70, 64)
    query, bias, extra, splits = random(3, HEADS, 3, 64), random(3, HEADS, 3), {}, 2
    if options == "lengths":
        extra["lengths"] = torch.tensor([0, 64, 100], dtype=torch.int32, device=DEVICE)
    elif options == "mask":
        extra["mask"] = random(3, 90)[:, 7:] > 0.5
        extra["mask"][1] = False
        extra["mask"][2, :65] = False  # a whole block of nothing before the first token
    elif options == "softcap":
        query, extra["softcap"] = query * 10, 5.0
    elif options == "views":  # a part of bigger buffers, every other head, rows that no word is aligned to
        extra["paged"] = tuple(in_records(x, 1) for x in (key, value))
    else:
        splits = 7  # most of them empty
    check_split(query, bias, key, value, 70, 0.125, splits, **extra)


@pytest.mark.parametrize("page", [16, 24, 64, 128])
def test_split_over_pages(page):
    key, value = side(4, 2, 150, 64), side(2, 2, 150, 64, log8=False)
    (paged_key, table), (paged_value, _) = in_pages(key, page), in_pages(value, page)
    if page == 24:
        paged_key = in_records(paged_key, 2)
    lengths = torch.tensor([150, 60], device=DEVICE)
    check_split(
        random(2, HEADS, 4, 64), torch.zeros(2, HEADS, 4, device=DEVICE), key, value, 150, 0.125,
        paged=(paged_key, paged_value), table=table, lengths=lengths,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "uniform"),
    [
        ("huge", False),
        ("huge", True),
        ("constant", True),
        ("one token", False),
        ("one coordinate", False),
        ("tiny", True),
    ],
)
def test_split_of_hostile_numbers(kind, uniform):
    """Scores of +-30 from queries of 1e3 or 1e-30, value scales over 20 octaves, weights on one token."""
    key, value = side(4, 1, 130, 128, uniform), side(4, 1, 130, 128, uniform, log8=False, octaves=20, seed=1)
    query = random(1, HEADS, 4, 128) * 1e3
    if kind == "constant":  # as a rotation spreads a query of one large coordinate
        query = torch.full_like(query, 1e3)
    elif kind == "one coordinate":
        query = query * 1e-3
        query[..., 5] = 1e3
    elif kind == "one token":
        key.scale[:, :, 77] = 255
    elif kind == "tiny":
        query = query * 1e-33
    scores = query.double() @ reference.stored(key, 128, torch.float64).transpose(-1, -2)
    scaling = 30 / scores.abs().max().item()
    check_split(query, torch.zeros(1, HEADS, 4, device=DEVICE), key, value, 130, scaling)


def test_split_of_nothing():
    key, value = side(4, 1, 64, 64), side(4, 1, 64, 64)
    query = torch.zeros(1, HEADS, 2, 64, device=DEVICE)
    partial, lse = run_split(query, query[..., 0].clone(), key, value, 0, 1.0, 3)
    assert (partial == 0).all() and (lse == -torch.inf).all()


def attend(
    batch=1, share=2, queries=1, dim=64, tokens=40, sinks=3, recent=20, dtype=torch.float16, means=True, lengths=None,
    masked=False, softcap=None, through=decode.decode_attention, splits=2,
):  # fmt: skip
    """`decode_attention` and its reference on random inputs: the relative error of the output, that of the lse."""
    key, value = side(4, batch, tokens, dim, uniform=True), side(3, batch, tokens, dim, seed=1)
    query = random(batch, queries, HEADS * share, dim).transpose(1, 2).to(dtype)  # as models make them
    back = torch.linalg.qr(random(1, dim, dim, seed=2))[0], torch.linalg.qr(random(HEADS, dim, dim, seed=3))[0]
    back = [x.contiguous() for x in back]
    mean = [random(HEADS, dim, seed=4) if means else None for _ in range(2)]
    exact = [
        None if n is None else tuple(random(batch, HEADS, n + 5, dim, seed=s).to(dtype)[:, :, 5:] for s in (n, n + 1))
        for n in (sinks, recent)
    ]
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    mask = random(batch, (sinks or 0) + tokens + (recent or 0)) > 0 if masked else None
    rest = (*back, *mean, *exact, tokens, dim**-0.5, softcap, lengths, mask)
    got, got_lse = through(query, key, value, *rest, splits=splits)
    want, want_lse = reference.decode_attention(query.double(), key, value, *rest)
    assert got.shape == want.shape and got_lse.shape == want_lse.shape
    assert got.dtype == got_lse.dtype == torch.float32
    unseen = want_lse == -torch.inf
    assert (got[unseen] == 0).all() and (got_lse[unseen] == -torch.inf).all()
    return ((got - want).norm() / want.norm().clamp_min(1e-9)).item(), (got_lse - want_lse)[~unseen].abs().max().item()


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dtype": torch.float32, "share": 4, "dim": 128, "means": False, "tokens": 70},
        {"dtype": torch.bfloat16, "queries": 3, "batch": 2, "lengths": [0, 30], "recent": 10},
        {"queries": 4, "share": 1, "masked": True, "batch": 2, "recent": 10},
        {"queries": 5, "recent": 2},  # some queries are older than the first recent token
        {"sinks": None, "recent": None, "softcap": 3.0},
        {"sinks": 4, "recent": 0, "tokens": 5},
        {"sinks": 0, "recent": 33, "dim": 80, "share": 1, "softcap": 3.0},
        {"through": decode.through_op},
        {"splits": None},
    ],
    ids=str,
)
def test_decode_attention(case):
    error, lse_error = attend(**case)
    assert error < 1e-3  # what values cost, see `check_split`; everything else is accurate to float32
    assert lse_error < 3e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_tokens_alone_are_accurate_to_float32(dtype):
    error, lse_error = attend(tokens=0, splits=None, queries=3, recent=10, masked=True, dtype=dtype)
    assert error < 3e-5 and lse_error < 3e-5


def test_nothing_at_all_is_zero():
    key, value = side(4, 1, 0, 64), side(4, 1, 0, 64)
    query, back = random(1, HEADS, 1, 64), torch.eye(64, device=DEVICE)[None]
    out, lse = decode.decode_attention(query, key, value, back, back, None, None, None, None, 0, 1.0)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_paged_attention():
    key, value = side(4, 2, 90, 64, uniform=True), side(4, 2, 90, 64, seed=1)
    (paged_key, table), (paged_value, _) = in_pages(key, 16), in_pages(value, 16)
    query, lengths = random(2, HEADS * 4, 1, 64).half(), torch.tensor([33, 90], device=DEVICE)
    back = torch.linalg.qr(random(1, 64, 64))[0].contiguous()
    got, got_lse = decode.paged_attention(
        query, (paged_key, paged_value), table, lengths, back, back, 0.125, max_tokens=90, splits=2
    )
    want, want_lse = reference.decode_attention(
        query.double(), key, value, back, back, None, None, None, None, 90, 0.125, lengths=lengths
    )
    assert (got - want).norm() < 1e-3 * want.norm()
    assert (got_lse - want_lse).abs().max() < 3e-5


def test_prepare_and_combine_write_everything():
    """The ends of a decode alone: a rotation there and back of splits that weigh the same."""
    dim, columns = 64, 3
    query = random(1, HEADS * columns, 1, dim)
    back = torch.linalg.qr(random(HEADS, dim, dim))[0].contiguous()
    rotated, bias = (x.fill_(float("nan")) for x in empty(query, HEADS, query))
    prepare(query, back, None, rotated, bias, 1.0)
    assert (bias == 0).all()
    partial = torch.stack([rotated, rotated, torch.zeros_like(rotated)], 2)
    lse = torch.zeros(1, HEADS, 3, columns, device=DEVICE)
    lse[:, :, 2] = -torch.inf
    out, out_lse = torch.full_like(query, float("nan")), torch.full_like(query[..., 0], float("nan"))
    combine(partial, lse, back, None, query, None, None, None, 0, 1.0, None, out, out_lse)
    assert (out - query).abs().max() < 1e-5
    assert (out_lse - torch.log(torch.tensor(2.0))).abs().max() < 1e-5


def test_custom_op_is_sound():
    key, value = side(4, 1, 20, 64), side(2, 1, 20, 64)
    query, back = random(1, HEADS, 1, 64).half(), torch.eye(64, device=DEVICE)[None]
    sides = [*key.flat, *value.flat]
    arguments = (query, *sides, back, back, None, None, [], [], 20, 0.1, None, None, None, None, "plain", 1)
    torch.library.opcheck(decode.decode_attention_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_split_count():
    device = torch.device("cpu")
    assert tuning.splits(device, 1, 128, 0) == 0
    assert tuning.splits(device, 10_000, 128, 1 << 20) == 1
    assert tuning.splits(device, 1, 128, 300) == 3
    assert tuning.splits(device, 1, 128, 1 << 24) <= tuning.MAX_SPLITS
