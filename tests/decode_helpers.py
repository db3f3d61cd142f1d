"""What tests of the decoding kernels need: packed sides of several layouts, and bounds on errors."""

import torch
from kernels_helpers import DEVICE  # first: it decides how the kernels run

from tqcompress_kernels import plain, reference
from tqcompress_kernels.encode_reference import pack
from tqcompress_kernels.packed import Packed

HEADS = 2
NAN = float("nan")
U = 2.0**-11  # unit roundoff of fp16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def levels_of(bits: int, uniform: bool) -> torch.Tensor:
    """Symmetric ascending levels of unit size, evenly spaced or with gaps that grow."""
    half = torch.arange(2 ** (bits - 1)) + 0.5
    half = half if uniform else half**1.3 + 0.05
    levels = torch.cat([-half.flip(0), half])
    return (levels / levels.square().mean().sqrt()).to(DEVICE)


def side(
    bits: int, batch: int, rows: int, dim: int, uniform=False, log8=True, seed: int = 0, octaves: float = 2
) -> Packed:  # fmt: skip
    """Random codes; scales spread over some octaves, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (batch, HEADS, rows, dim), generator=generator)
    log = (torch.rand(batch, HEADS, rows, 1, generator=generator) - 0.5) * octaves
    zero = torch.rand(batch, HEADS, rows, 1, generator=generator) < 0.02
    if log8:
        scale = (log * 16 + 128).round().clamp(1, 255).masked_fill(zero, 0).to(torch.uint8)
    else:
        scale = log.exp2().masked_fill(zero, 0).half()
    planes = tuple(plane.to(DEVICE) for plane in pack(codes, bits))
    return Packed(planes, scale.to(DEVICE), levels_of(bits, uniform), bits, None, uniform)


def in_records(packed: Packed, stray: int) -> Packed:
    """The same rows as an engine may store them: all fields of a token and head in one record, heads inside tokens.

    Records have an odd number of bytes if `stray` and the fields have, so nothing in them is aligned.
    """
    fields = [*packed.planes, packed.scale.view(torch.uint8)]
    sizes = [field.shape[-1] for field in fields]
    pages, heads, rows, _ = fields[0].shape
    buffer = torch.full((pages, rows, heads, sum(sizes) + stray), 0xA5, dtype=torch.uint8, device=DEVICE)
    views = buffer.transpose(1, 2).split([*sizes, stray], dim=-1)[: len(sizes)]
    for view, field in zip(views, fields, strict=True):
        view.copy_(field)
    return packed._replace(planes=tuple(views[:-1]), scale=views[-1])


def in_pages(packed: Packed, page: int, seed: int = 0) -> tuple[Packed, torch.Tensor]:
    """The same tokens in shuffled pages among others that hold junk, and the block table, with entries to spare."""
    batch, _, rows, _ = packed.planes[0].shape
    used = -(-rows // page)
    order = torch.randperm(batch * used + 3, generator=torch.Generator().manual_seed(seed))
    table = torch.full((batch, used + 2), 1 << 30, dtype=torch.int32)  # a page that is not there must not be read
    table[:, :used] = order[: batch * used].view(batch, used)

    def paged(field: torch.Tensor) -> torch.Tensor:
        pages = torch.full((len(order), HEADS, page, field.shape[-1]), 0xA5, device=DEVICE).to(field.dtype)
        for b in range(batch):
            for n in range(used):
                tokens = field[b, :, n * page : (n + 1) * page]
                pages[int(table[b, n]), :, : tokens.shape[1]] = tokens
        return pages

    moved = packed._replace(planes=tuple(paged(plane) for plane in packed.planes), scale=paged(packed.scale))
    return moved, table.to(DEVICE)


def run_split(query, bias, key, value, tokens, scaling, splits, lengths=None, mask=None, table=None, softcap=None):
    """`plain.split` into poisoned buffers."""
    batch, heads, columns, dim = query.shape
    partial = torch.full((batch, heads, splits, columns, dim), NAN, device=DEVICE)
    lse = torch.full((batch, heads, splits, columns), NAN, device=DEVICE)
    plain.split(query, bias, key, value, partial, lse, tokens, lengths, mask, table, scaling, softcap)
    return partial, lse


def merged(partial: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All splits as one, in float64, and the natural log-sum-exp."""
    lse = lse.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    whole = lse.logsumexp(2)
    weights = (lse - whole.masked_fill(whole == -torch.inf, 0).unsqueeze(2)).exp()
    return (weights.unsqueeze(-1) * partial.double()).sum(2), whole


def check_split(query, bias, key, value, tokens, scaling, splits=2, **options) -> None:
    """`plain.split` against float64, within what its number formats explain, and within 1e-3 of the output."""
    lengths, mask, softcap = (options.get(name) for name in ("lengths", "mask", "softcap"))
    table = options.pop("table", None)
    paged = options.pop("paged", (key, value))
    got, got_lse = merged(*run_split(query, bias, *paged, tokens, scaling, splits, table=table, **options))
    whole = query.double(), bias.double(), key, value, 1, 64, tokens, lengths, mask, None, scaling, softcap
    want, want_lse = (x.squeeze(2) for x in reference.split(*whole))
    want_lse = want_lse * torch.log(torch.tensor(2.0, dtype=torch.float64))
    k, v = (reference.stored(x, query.shape[-1], torch.float64)[:, :, :tokens] for x in (key, value))
    # Scores: queries and levels are right to 2**-22 of a column's largest, products exact, and sums of dim of them
    # float32; 4 for what tensor cores cut off and exp2 rounds.
    dim = query.shape[-1]
    size = query.double().abs().amax(-1, keepdim=True) * k.abs().sum(-1).unsqueeze(-2) * scaling
    off = 4 * (dim + 16) * 2.0**-24 * (size.amax(-1) + bias.abs() + 1)
    empty = want_lse == -torch.inf
    assert (got[empty] == 0).all() and (got_lse[empty] == -torch.inf).all()
    assert ((got_lse - want_lse)[~empty].abs() <= off[~empty]).all()
    # Values: a weight and a level are rounded to fp16 once, relative to the largest level; weights below 2**-24 of
    # the largest are lost.
    largest = max(part.levels.abs().max() for _, _, part in value.parts(dim))
    scale = reference.scales(value, torch.float64)[:, :, :tokens]
    mass, _ = (x.squeeze(2) for x in reference.split(*whole[:3], _flat(value), *whole[4:]))
    bound = mass[..., :1] * largest * (2.1 * U + torch.expm1(2 * off.unsqueeze(-1)))
    bound += tokens * 2.0**-24 * scale.amax(2, keepdim=True)[:, :, :, :1] * largest
    assert ((got - want).abs() <= bound)[~empty].all()
    assert ((got - want).norm(dim=-1) <= 1e-3 * want.norm(dim=-1))[~empty].all()
    assert v.shape[2] == tokens


def _flat(value: Packed) -> Packed:
    """Values whose coordinates are all their scale: attention to them is the average scale."""
    wide = value.wide and value.wide._replace(levels=torch.ones_like(value.wide.levels))
    return value._replace(levels=torch.ones_like(value.levels), wide=wide)
