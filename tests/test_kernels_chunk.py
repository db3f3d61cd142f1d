"""Chunks of queries over packed tokens, and the flash attention behind them, against the reference in float64."""

import pytest
import torch
from decode_helpers import DEVICE, HEADS, random, side

from tqcompress_kernels import chunk, flash, reference

EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def padded(batch: int, tokens: int, pads, sinks: int = 0) -> torch.Tensor:
    """What is left of `tokens` stored ones: of row i, `pads[i]` behind the sinks are hidden, and one in the middle."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    for row, pad in zip(mask, pads, strict=True):
        row[sinks : sinks + pad] = False
        row[tokens // 2] = False
    return mask.to(DEVICE)


def close(got, got_lse, want, want_lse, scores: float, values: float, eps: float) -> None:
    """Errors as the number format explains them.

    A score of size `scores` is a sum of float32 products of exact operands, off by no more than 2**-16 of that; a
    weight is off by that much relatively, and it, the value and the output are rounded by `eps` each.
    """
    off = scores * 2.0**-16 + 1e-6
    blind = want_lse == -torch.inf
    assert got.isfinite().all()
    assert torch.equal(got_lse == -torch.inf, blind) and (got[blind] == 0).all()
    assert (got_lse - want_lse)[~blind].abs().max() <= off
    assert (got - want)[~blind].abs().max() <= (2 * off + 3 * eps) * values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        {"causal": True},
        {"causal": True, "masked": True, "queries": 70},
        {"masked": True, "bias": True, "softcap": 3.0, "share": 1, "dim": 40},
        {"bias": True, "dim": 136, "tokens": 70, "queries": 35},
    ],
    ids=str,
)
def test_flash(case, dtype):
    case = {"queries": 40, "tokens": 90, "share": 2, "dim": 64, "softcap": None} | case
    batch, tokens, queries, dim = 2, case["tokens"], case["queries"], case["dim"]
    query = random(batch, queries, HEADS * case["share"], dim).transpose(1, 2).to(dtype) * 3  # as models make them
    key, value = (random(batch, HEADS, tokens + 3, dim, seed=s).to(dtype)[:, :, 3:] for s in (1, 2))
    mask = padded(batch, tokens, [75, 0]) if case.get("masked") else None
    if mask is not None:  # a row that sees a hidden token is far off
        key, value = (x.masked_fill(~mask[:, None, :, None], 50.0) for x in (key, value))
    bias = random(batch, HEADS * case["share"], queries, seed=3) if case.get("bias") else None
    rest = (dim**-0.5, case["softcap"], mask, bias, case.get("causal", False))
    got, got_lse = flash.attention(query, key, value, *rest)
    want, want_lse = reference.attention(query.double(), key, value, *rest)
    assert got.dtype == dtype and got_lse.dtype == torch.float32
    seen = value if mask is None else value.masked_fill(~mask[:, None, :, None], 0.0)
    size = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).median() * dim**-0.5
    close(got, got_lse, want, want_lse, size.item(), seen.abs().max().item(), EPS[dtype])


def run(dtype, mask=None, softcap=None, queries=40, tokens=300, dim=64, means=True, sinks=3, recent=60, workspace=1):
    """A chunk, what the reference makes of it, and the largest product of norms in a packed score."""
    batch, share = 2, 2
    key, value = side(4, batch, tokens, dim, uniform=True), side(3, batch, tokens, dim, seed=1)
    query = random(batch, queries, HEADS * share, dim).transpose(1, 2).to(dtype)
    back = [torch.linalg.qr(random(n, dim, dim, seed=n))[0].contiguous() for n in (1, HEADS)]
    mean = [random(HEADS, dim, seed=4 + i) if means else None for i in range(2)]
    exact = [tuple(random(batch, HEADS, n, dim, seed=s).to(dtype) for s in (n, n + 1)) for n in (sinks, recent)]
    rest = (*back, *mean, *exact, tokens, dim**-0.5, softcap)
    got = chunk.chunk_attention(query, key, value, *rest, mask, workspace)
    want = reference.decode_attention(query.double(), key, value, *rest, None, mask)
    longest = reference.stored(key, dim, torch.float64).norm(dim=-1).flatten().tolist()
    return got, want, query.double().norm(dim=-1).max().item() * max(longest, default=0.0) * dim**-0.5


def relative(got, want) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pads", [None, [200, 0], [297, 5], [300, 299]], ids=str)
def test_a_chunk_is_what_the_reference_computes(pads, dtype, softcap):
    """In blocks of 128 tokens: some are all padding in one row and none in the other."""
    mask = None if pads is None else padded(2, 363, pads, 3)
    (got, got_lse), (want, want_lse), scores = run(dtype, mask, softcap)
    # The rotated query and decoded keys are rounded by half a unit each, so scores and weights are off by at most
    # that of |q| |k|, far less on average; then weights, values and the output of a block are rounded.
    assert relative(got, want) < 8 * EPS[dtype] + 2.0**-14
    assert (got_lse - want_lse).abs().max() <= 2 * (EPS[dtype] + 2.0**-20) * scores
    assert got.dtype == got_lse.dtype == torch.float32


def test_padding_queries_get_zeros():
    """A chunk whose first queries are padding themselves, in a row that has seen nothing before."""
    mask = torch.ones(2, 363, dtype=torch.bool, device=DEVICE)
    mask[0, :333] = False
    (got, got_lse), (want, want_lse), _ = run(torch.float32, mask, workspace=64 << 20)
    assert (want_lse[0, :, :10] == -torch.inf).all() and (want_lse[:, :, 10:] > -torch.inf).all()
    assert torch.equal(got_lse == -torch.inf, want_lse == -torch.inf)
    assert (got[want_lse == -torch.inf] == 0).all()
    assert relative(got, want) < 2.0**-14


@pytest.mark.parametrize("sizes", [{"tokens": 0, "sinks": 0, "recent": 40}, {"tokens": 130, "sinks": 0, "dim": 72}])
def test_parts_may_be_missing(sizes):
    (got, got_lse), (want, want_lse), _ = run(torch.float32, means=False, **sizes)
    assert relative(got, want) < 2.0**-14
    assert (got_lse - want_lse).abs().max() < 1e-4


@pytest.mark.parametrize("hidden", [5, 100, 320])
def test_a_hidden_token_and_a_later_one_change_nothing(hidden):
    """The sharpest check of a mask: outputs are equal to the bit whatever hidden tokens and later ones hold."""
    batch, dim, queries, tokens = 1, 64, 40, 256
    states = random(2, batch, HEADS, 362, dim, seed=9)
    mask = torch.ones(batch, 362, dtype=torch.bool, device=DEVICE)
    mask[:, hidden] = False

    def attend(states, part):
        # All tokens exact: the first ones as sinks, so that each of the three parts has one hidden.
        key = side(4, batch, 0, dim)
        back = torch.eye(dim, device=DEVICE)[None]
        sinks, recent = ((states[0][:, :, s], states[1][:, :, s]) for s in (slice(0, tokens), slice(tokens, None)))
        query = random(batch, HEADS, queries, dim, seed=5)
        return chunk.chunk_attention(
            query, key, key, back, back, None, None, sinks, recent, 0, 0.125, None, mask if part else None
        )

    changed = states.clone()
    changed[..., hidden, :] = 30.0
    assert all(torch.equal(*pair) for pair in zip(attend(states, True), attend(changed, True), strict=True))
    assert not torch.equal(attend(states, False)[0], attend(changed, False)[0])
    last = states.clone()
    last[..., -1, :] = 30.0
    for got, want in zip(attend(last, True), attend(states, True), strict=True):
        assert torch.equal(got[:, :, :-1], want[:, :, :-1])
        assert not torch.equal(got[:, :, -1], want[:, :, -1])
