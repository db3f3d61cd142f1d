"""Fractional bits and outlier channels: what gets more bits, what that costs, and that attention stays what it is."""

import json

import pytest
import torch
from codec_helpers import HEADS, build, moments, vectors
from plan_helpers import resolved
from tiny import prompt, tiny_model
from transformers import DynamicCache

import tqcompress
from tqcompress import RecipeError, TensorSpec
from tqcompress.api import compression_of
from tqcompress.calibrate import Moments, Statistics
from tqcompress.parts import bring_forward, wide_coordinates
from tqcompress.plan import Plan
from tqcompress.report import describe
from tqcompress.shape import LayerShape, ModelShape

DIM = 64
OUTLIERS = {"channels": 16, "bits": 4}
FULL = LayerShape("full", 6, 2, DIM)


def loss(codec, x) -> float:
    return ((codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize(
    ("bits", "dim", "count"), [(2.5, 64, 32), (3.25, 64, 16), (2.75, 128, 96), (2.33, 96, 32), (1.125, 128, 16)]
)
def test_the_coordinates_with_one_bit_more(bits, dim, count):
    assert wide_coordinates(bits, dim) == count


@pytest.mark.parametrize(("bits", "dim", "allowed"), [(2.3, 64, "2, 2.25, 2.5, 2.75, 3"), (3.5, 16, "3, 4")])
def test_bits_that_do_not_divide_the_head_name_those_that_do(bits, dim, allowed):
    with pytest.raises(RecipeError, match=f"^bits: found {bits}; head_dim {dim} allows {allowed}$"):
        wide_coordinates(bits, dim)


@pytest.mark.parametrize("whole", [1, 2, 3, 4])
def test_a_fraction_has_the_errors_of_both_neighbours_in_their_shares(whole):
    """All coordinates are alike after the rotation, so the loss is the weighted mean of the neighbours' losses."""
    x = torch.randn(2, HEADS, 500, DIM, generator=torch.Generator().manual_seed(0))
    fewer, more = (loss(build("turboquant", bits, "value", DIM), x) for bits in (whole, whole + 1))
    for fraction in (0.25, 0.5, 0.75):
        codec = build("turboquant", whole + fraction, "value", DIM)
        assert codec.layout().nbytes_per_token == (whole + fraction) * DIM / 8 + 2
        # The decoded vector keeps its norm, which shifts the mean by a share of the difference.
        expected = fewer + fraction * (more - fewer)
        assert loss(codec, x) == pytest.approx(expected, rel=0.03)


def spread(sizes: torch.Tensor, count: int = 4000) -> tuple[torch.Tensor, Moments]:
    """Gaussian vectors whose channels have these standard deviations, and their moments."""
    x = torch.randn(2, HEADS, count, DIM, generator=torch.Generator().manual_seed(1)) * sizes
    covariance = torch.diag_embed(sizes.double() ** 2).expand(HEADS, DIM, DIM)
    return x, Moments(count, torch.zeros(HEADS, DIM, dtype=torch.float64), covariance, moments(DIM).query)


def sizes_with(large: list[int], size: float = 6.0) -> torch.Tensor:
    sizes = torch.ones(DIM)
    sizes[large] = size
    return sizes


def fitted(bits: float, found: Moments, side: str = "value", **options):
    codec = tqcompress.plan.build_codec(
        TensorSpec("turboquant", bits, options), tqcompress.HeadShape(HEADS, DIM, side, torch.bfloat16)
    )
    codec.fit(found)
    return codec


def test_channels_that_vary_most_are_found_and_coded_with_more_bits():
    large = [1, 2, 3, 5, 8, 13, 21, 34, 55, 60, 61, 62, 40, 41, 42, 43]
    x, found = spread(sizes_with(large))
    codec = fitted(2, found, outliers=OUTLIERS)
    assert codec.state()["outliers"].tolist() == [sorted(large)] * HEADS
    assert codec.layout().nbytes_per_token == (16 * 4 + 48 * 2) / 8 + 2
    error = (codec.decode(codec.encode(x)) - x).square().mean((0, 1, 2))
    energy = x.square().mean((0, 1, 2))
    quiet = [channel for channel in range(DIM) if channel not in large]
    # Those of a Gaussian at 4 and 2 bits, .0095 and .1175, but that the parts of a vector share a scale although their
    # lengths vary: that of the outliers, who are few, varies most.
    assert (error[large].sum() / energy[large].sum()).item() == pytest.approx(0.0095, rel=0.4)
    assert (error[quiet].sum() / energy[quiet].sum()).item() == pytest.approx(0.1175, rel=0.05)
    assert loss(codec, x) < 0.4 * loss(build("turboquant", 2.5, "value", DIM), x)


def test_listed_channels_come_first_and_those_that_vary_most_fill_up():
    _, found = spread(sizes_with([20, 30]))
    codec = fitted(2, found, outliers={"channels": [7, 50], "bits": 3})
    chosen = codec.state()["outliers"].tolist()
    assert all({7, 20, 30, 50} <= set(head) and len(head) == 16 for head in chosen)
    assert codec.needs_statistics


@pytest.mark.parametrize("balance", ["none", "diagonal", "key"])
def test_both_parts_have_one_mean_square_and_all_together_keep_theirs(balance):
    _, found = spread(sizes_with([3, 9]))
    codec = fitted(2, found, "key", outliers=OUTLIERS, balance=balance)
    stored = codec.into.double().mT @ found.covariance @ codec.into.double()
    power = stored.diagonal(dim1=-2, dim2=-1)
    first, rest = power[:, :16].mean(-1), power[:, 16:].mean(-1)
    assert torch.allclose(first, rest, rtol=1e-5)
    assert torch.allclose(power.sum(-1), found.covariance.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-2)
    # A rotation within each part: no coordinate of it is much larger than another.
    assert power.max() < 4 * power.mean()


def test_heads_that_saw_nothing_keep_their_channels():
    zero, eye = torch.zeros(1, DIM, DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64)[None]
    matrix, chosen = bring_forward(eye, zero, 16, [40])
    assert 40 in chosen[0].tolist()
    assert torch.equal(matrix @ matrix.mT, eye)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("balance", ["none", "diagonal", "key"])
def test_scores_in_the_stored_basis_are_those_of_decoded_keys(center, balance):
    codec = fitted(2, moments(DIM), "key", center=center, balance=balance, outliers=OUTLIERS)
    packed, query = codec.encode(vectors(codec)), vectors(codec, seed=3)
    scores = codec.rotate(query) @ codec.decode_rotated(packed).mT
    expected = query @ codec.decode(packed).mT
    assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_some_heads_have_their_own_channels():
    codec = fitted(2, moments(DIM), "key", balance="key", outliers=OUTLIERS)
    part, packed = codec.of_heads([1]), codec.encode(vectors(codec))
    assert part.state()["outliers"].equal(codec.state()["outliers"][1:])
    got, want = part.decode({name: rows[:, 1:] for name, rows in packed.items()}), codec.decode(packed)[:, 1:]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_recipe_gives_outliers_to_both_sides_and_rules_take_them_away():
    rules = [{"layers": 1, "heads": 1, "key": {"outliers": None}}, {"layers": 1, "heads": 0, "key": {"outliers": None}}]
    rules += [{"layers": 2, "key": {"bits": 2.5, "outliers": None}}]
    model = ModelShape("tiny", "llama", torch.bfloat16, (FULL,) * 3, "None")
    plan = resolved(model, key={"bits": 2}, value={"bits": 2}, outliers=OUTLIERS, rules=rules)
    assert [len(plan.layer_groups(i)) for i in range(3)] == [1, 1, 1]
    assert plan.layer_groups(1)[0].key == TensorSpec("turboquant", 2)
    assert describe(plan.layer_groups(0)[0].key) == "2 bit turboquant outliers=(bits=4 channels=16)"
    bits = [[row[0] for row in plan.head_bits(side)] for side in ("key", "value")]
    assert bits == [[2.75, 2.25, 2.75], [2.75] * 3]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict())), plan.model) == plan
    matrices, channels, books = 2 * 2 * DIM * DIM * 4, 2 * 16 * 2, (4 + 16) * 4  # two heads each
    signs, book = DIM, 4 * 4
    states = [matrices + channels + books, signs + book, signs + book + 8 * 4] + [matrices + channels + books] * 3
    exact = plan.nbytes(1) - 3 * 2 * 2 * DIM * 2
    assert exact == sum(states)


@torch.no_grad()
def test_a_model_with_both_is_saved_and_read_as_it_was(tmp_path):
    """head_dim 32: attention over packed tokens is that over their decoded vectors, and an artifact brings it back."""
    model = tiny_model("llama", head_dim=32)
    recipe = {
        "version": 1, "key": {"bits": 2, "outliers": {"channels": 16, "bits": 5}}, "value": {"bits": 3.5},
        "keep": {"sinks": 2, "window": 4}, "center": {"key": True}, "balance": "key",
        "calibration": {"text": "unused"},
    }  # fmt: skip
    generator = torch.Generator().manual_seed(5)

    def some(query: bool) -> Moments:
        x = torch.randn(2, 400, 32, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 3, 32)
        return Moments(400, x.mean(1), x.mT @ x / 400, torch.eye(32).double().expand(2, 32, 32) if query else None)

    statistics = Statistics({i: {"key": some(True), "value": some(False)} for i in range(3)})

    def logits(model):
        cache = DynamicCache(config=model.config)
        ids = prompt(40)
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([30, 1, 9], dim=1)], dim=1)

    uncompressed = logits(model)
    plan = tqcompress.apply(model, recipe, statistics=statistics)
    assert plan.head_bits("key")[0] == [3.5 + 16 / 32] * 2
    assert plan.head_bits("value")[0] == [3.5 + 16 / 32] * 2
    compressed = logits(model)
    assert not torch.equal(compressed[:, 30:], uncompressed[:, 30:])
    tqcompress.save(model, tmp_path, weights=True)
    tqcompress.remove(model)
    tqcompress.load(model, tmp_path)
    assert torch.equal(logits(model), compressed)
    assert "outliers" in compression_of(model).codecs["0-0"]["key"].state()
