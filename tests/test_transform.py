"""Centring and balancing: the algebra, and that attention is what it is without them but for less noise."""

import pytest
import torch
from codec_helpers import HEADS, build, moments, vectors

from tqcompress.transform import RIDGE, balancing

DIM = 64


def noise(matrix, spread, query):
    """What an isotropic quantizer behind `matrix` does to scores, up to a factor; `[kv_heads]`."""
    inverse = torch.linalg.inv(matrix)
    traces = (matrix @ spread @ matrix.mT, inverse.mT @ query @ inverse)
    return torch.stack([x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in traces]).prod(0)


def test_balancing_makes_keys_and_queries_equal_and_the_noise_least():
    found = moments(DIM)
    eye = torch.eye(DIM, dtype=torch.float64)
    spread, query = (
        x + RIDGE * x.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye for x in (found.covariance, found.query)
    )
    best = balancing(found.covariance, found.query, "key")
    keys = best @ spread @ best.mT
    inverse = torch.linalg.inv(best)
    queries = inverse.mT @ query @ inverse
    factor = (queries / keys).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(queries, keys * factor.mean(-1)[:, None, None], rtol=1e-9, atol=1e-9)
    assert (keys - torch.diag_embed(keys.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9
    # It keeps the size of keys, so that their scales keep their range.
    assert torch.allclose(keys.diagonal(dim1=-2, dim2=-1).sum(-1), spread.diagonal(dim1=-2, dim2=-1).sum(-1))
    least = noise(best, spread, query)
    diagonal = noise(balancing(found.covariance, found.query, "diagonal"), spread, query)
    none = noise(eye.expand_as(best), spread, query)
    assert (least < diagonal).all()
    assert (diagonal <= none * (1 + 1e-12)).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        nearby = best @ (eye + 0.05 * torch.randn(HEADS, DIM, DIM, generator=generator, dtype=torch.float64))
        assert (noise(nearby, spread, query) > least).all()


@pytest.mark.parametrize("kind", ["key", "diagonal"])
def test_heads_without_variance_keep_their_basis(kind):
    """Zero covariances of keys or queries, and one that lacks directions."""
    zero, eye = torch.zeros(HEADS, DIM, DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64)
    thin = torch.diag_embed(torch.arange(DIM, dtype=torch.float64) < 3).double().expand(HEADS, DIM, DIM)
    for spread, query in ((zero, zero), (zero, thin), (thin, zero), (thin, thin)):
        matrix = balancing(spread, query, kind)
        assert matrix.isfinite().all()
        assert (torch.linalg.inv(matrix) @ matrix - eye).abs().max() < 1e-9


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("balance", ["none", "diagonal", "key"])
def test_scores_in_the_stored_basis_are_those_of_decoded_keys(center, balance):
    codec = build("turboquant", 3, "key", DIM, (("center", center), ("balance", balance)))
    packed, query = codec.encode(vectors(codec)), vectors(codec, seed=3)
    scores = codec.rotate(query) @ codec.decode_rotated(packed).mT
    want = query.double() @ codec.decode(packed).double().mT
    # Each score is a sum of 64 products of numbers that the basis changes by less than its condition, 3.2.
    bound = 20 * DIM * 2.0**-24 * query.norm(dim=-1).max() * codec.decode(packed).norm(dim=-1).max()
    assert (scores - want).abs().max() < bound
    assert (codec.decode(packed) - codec.unrotate(codec.decode_rotated(packed))).abs().max() == 0


@pytest.mark.parametrize("side", ["key", "value"])
def test_centring_removes_the_mean_from_what_is_quantized(side):
    """Vectors about a mean far away: their error is that of vectors about zero."""
    plain, centred = (build("turboquant", 3, side, DIM, (("center", center),)) for center in (False, True))
    x = vectors(plain)
    far = 20 * torch.randn(HEADS, 1, DIM, generator=torch.Generator().manual_seed(4))
    centred.mean.copy_(far[:, 0])

    def error(codec, x):
        return (codec.decode(codec.encode(x)) - x).square().mean()

    assert error(centred, x + far) < 1.05 * error(plain, x)
    assert error(plain, x + far) > 20 * error(plain, x)
    build.cache_clear()  # its mean was changed


def test_scalar_levels_tell_kernels_all_of_it():
    """What fused kernels are given: encoding by it gives the same codes but for rounding, decoding the same vectors."""
    codec = build("turboquant", 4, "key", DIM, (("center", True), ("balance", "key")))
    form, x = codec.levels(), vectors(codec).double()
    y = (x - form.mean.double()[:, None]) @ form.into.double()
    unit = y * DIM**0.5 / y.norm(dim=-1, keepdim=True)
    nearest = form.levels.double()[(unit[..., None] - form.levels.double()).abs().argmin(-1)]
    decoded = nearest * y.norm(dim=-1, keepdim=True) / nearest.norm(dim=-1, keepdim=True)
    back = decoded @ form.back.double() + form.mean.double()[:, None]
    got = codec.decode(codec.encode(x.float())).double()
    off = (got - back).norm(dim=-1) / back.norm(dim=-1)
    assert off.quantile(0.9) < 2.0**-10  # fp16 scales; a coordinate next to a border may take the other level
    assert torch.allclose(form.into @ form.back, torch.eye(DIM).expand(HEADS, DIM, DIM), atol=1e-5)
