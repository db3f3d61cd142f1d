"""Block-wise attention against dense softmax attention in float64."""

import pytest
import torch
from codec_helpers import moments
from hypothesis import given, settings
from hypothesis import strategies as st

from tqcompress import HeadShape, TensorSpec, blockwise
from tqcompress.plan import build_codec
from tqcompress.store import TokenStore
from tqcompress.view import Backend, GroupCodecs, GroupView

torch.set_num_threads(1)
EPS = 2.0**-24  # half a unit in the last place of 1, float32
SPECS = [
    TensorSpec("turboquant", 3, {"rotation": "dense"}),
    TensorSpec("turboquant", 2, {"scale": "log8"}),
    TensorSpec("exact", 32),
    TensorSpec("affine", 2, {"group": 4}),
]


def make_view(key_spec, value_spec, batch, heads, dim, sinks, packed, recent, generator):
    """A view of random tokens, and the dense keys and values that it stands for, in float64."""
    codecs = [
        build_codec(spec, HeadShape(heads, dim, side)) for spec, side in ((key_spec, "key"), (value_spec, "value"))
    ]
    for codec in codecs:
        if codec.needs_statistics:
            codec.fit(moments(dim))
    packed = packed // 4 * 4 if "affine" in (key_spec.quantizer, value_spec.quantizer) else packed
    exact, stores, dense = [], [], []
    for codec in codecs:
        parts = [torch.randn(batch, heads, tokens, dim, generator=generator) for tokens in (sinks, packed, recent)]
        store = TokenStore(codec.layout(), batch, heads, torch.device("cpu"))
        if packed:
            store.append(codec.encode(parts[1]), packed)
            parts[1] = codec.decode(store.read())
        stores.append(store)
        exact.append((parts[0], parts[2]))
        dense.append(torch.cat(parts, dim=2).double())
    group = GroupCodecs(tuple(range(heads)), *codecs, Backend("torch", blockwise.attend, ""))
    (key_sinks, key_recent), (value_sinks, value_recent) = exact
    view = GroupView(group, *stores, packed, (key_sinks, value_sinks), (key_recent, value_recent))
    return view, *dense


def reference(query, key, value, mask, scaling, softcap):
    """Output and log-sum-exp `[batch, heads, queries, ...]` in float64."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = query.double() @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None or mask.dim() == 2:
        queries, tokens = scores.shape[2:]
        causal = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
        mask = causal if mask is None else causal & mask[:, None, None]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[..., None] == -torch.inf, 0.0, (scores - lse[..., None]).exp())
    return weights @ value, lse


def bounds(query, key, value, scaling, mask):
    """Bounds on the float32 errors of output and log-sum-exp.

    A dot product of n terms errs by at most n eps |a| |b|; rotating the query and decoding a key each add
    another n eps, so with 4 for the remaining operations a score errs by (3 dim + 4) eps |q| |k| scaling, plus
    eps times an added mask. A softmax weight errs by twice that relatively, and the sums over tokens, done block
    by block, by tokens + 8 eps.
    """
    dim, tokens = key.shape[-1], key.shape[2]
    norms = query.norm(dim=-1).max().item() * key.norm(dim=-1).max().item()
    added = mask.abs().max().item() if mask is not None and mask.dtype != torch.bool else 0.0
    score = ((3 * dim + 4) * norms * scaling + 4 * added) * EPS
    output = (2 * score + (tokens + 8 + 2 * dim) * EPS) * value.norm(dim=-1).max().item()
    return output, score + (tokens + 8) * EPS + 4 * EPS * norms * scaling


def make_mask(kind, batch, heads, queries, tokens, generator):
    if kind == "causal":
        return None
    if kind == "padding":
        return torch.rand(batch, tokens, generator=generator) < 0.6
    rows = heads if kind == "heads" else 1
    seen = torch.rand(batch, rows, queries, tokens, generator=generator) < 0.6
    return torch.randn(seen.shape, generator=generator) if kind == "float" else seen


def check(output, lse, query, key, value, mask, scaling, softcap):
    want, want_lse = reference(query, key, value, mask, scaling, softcap)
    limit, lse_limit = bounds(query, key, value, scaling, mask)
    assert output.dtype == lse.dtype == torch.float32
    assert output.isfinite().all()
    blind = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind)
    assert (output[blind] == 0).all()
    assert (output - want).abs().max() <= limit
    if (~blind).any():
        assert (lse - want_lse)[~blind].abs().max() <= lse_limit


sizes = {
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 3),
    "share": st.integers(1, 5),
    "queries": st.integers(1, 9),
    "dim": st.sampled_from([4, 8, 12, 20, 32]),
    "mask": st.sampled_from(["causal", "padding", "bool", "float", "heads"]),
    "softcap": st.sampled_from([None, 2.0, 30.0]),
    "workspace": st.sampled_from([1, 3000, 20000, 1 << 25]),
    "at_once": st.sampled_from([1, 2, 4, 256]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=80, deadline=None)
@given(
    specs=st.tuples(st.sampled_from(SPECS), st.sampled_from(SPECS)),
    sinks=st.integers(0, 5),
    packed=st.integers(0, 50),
    recent=st.integers(0, 12),
    **sizes,
)
def test_attend(
    specs, sinks, packed, recent, batch, heads, share, queries, dim, mask, softcap, workspace, at_once, seed
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    recent = max(recent, queries)  # the new tokens are always among the recent ones
    view, key, value = make_view(*specs, batch, heads, dim, sinks, packed, recent, generator)
    query = torch.randn(batch, heads * share, queries, dim, generator=generator)
    scaling = dim**-0.5
    mask = make_mask(mask, batch, heads * share, queries, key.shape[2], generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "WORKSPACE_BYTES", workspace)
        patch.setattr(blockwise, "QUERIES_AT_ONCE", at_once)
        output, lse = blockwise.attend(query, view, mask, scaling, softcap)
    check(output, lse, query, key, value, mask, scaling, softcap)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 50), **sizes)
def test_attend_exact(tokens, batch, heads, share, queries, dim, mask, softcap, workspace, at_once, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = max(tokens, queries)
    key, value = (torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(2))
    query = torch.randn(batch, heads * share, queries, dim, generator=generator)
    mask = make_mask(mask, batch, heads * share, queries, tokens, generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "WORKSPACE_BYTES", workspace)
        patch.setattr(blockwise, "QUERIES_AT_ONCE", at_once)
        output, lse = blockwise.attend_exact(query, key, value, mask, 0.3, softcap)
    check(output, lse, query, key.double(), value.double(), mask, 0.3, softcap)


@pytest.mark.parametrize("low", [False, -torch.inf])
def test_queries_that_see_nothing(low):
    """Rows of a left-padded batch: zeros, no NaN, also when only later blocks are seen."""
    generator = torch.Generator().manual_seed(0)
    view, key, value = make_view(SPECS[0], SPECS[1], 2, 2, 8, 3, 20, 6, generator)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    mask = torch.full((2, 1, 5, 29), low)
    mask[1, :, 3:, 24:] = True if low is False else 0.0  # batch row 1 sees recent tokens only, and not with all
    output, lse = blockwise.attend(query, view, mask, 0.3)
    check(output, lse, query, key, value, mask if low is False else mask == 0, 0.3, None)
    assert (lse[0] == -torch.inf).all() and lse[1, :, 3:].isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_extreme_scores(scale):
    """Scores of thousands neither overflow nor lose the best token; tiny ones give the mean."""
    generator = torch.Generator().manual_seed(0)
    view, key, value = make_view(SPECS[2], SPECS[2], 1, 1, 16, 2, 30, 4, generator)
    query = scale * 10 * torch.randn(1, 3, 1, 16, generator=generator)
    output, lse = blockwise.attend(query, view, None, 1.0)
    want, want_lse = reference(query, key, value, None, 1.0, None)
    limit, lse_limit = bounds(query, key, value, 1.0, None)
    assert (output - want).abs().max() <= limit and (lse - want_lse).abs().max() <= lse_limit
