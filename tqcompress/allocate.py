"""Allocation: bits for each layer, KV head and side under a budget, from what each of them does to predictions.

What a recipe with a `budget` gives no bits is split into units, as `over` says. Around a uniform setting within the
budget each unit in turn gets each of the `choices`, and the change of the KL divergence against the uncompressed model
is measured, with the recipe's own quantizers and exact tokens, as `evaluate` measures it. (The error of a layer's
attention output is cheaper to measure, and ranks layers wrongly.) The changes are taken to add up; the choice for each
unit that makes their sum least is then a multiple-choice knapsack problem, solved exactly as an integer program. They
add up only nearly, so the result is measured against the uniform setting of the same size on other text, and the
better one is kept.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from .compression import Compression
from .errors import RecipeError, TQCompressError
from .evaluate import divergences
from .plan import SIDES, Plan, Side
from .recipe import Budget, Recipe
from .resolve import Allocated
from .view import LayerCodecs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Slot = tuple[int, int, Side]  # layer, KV head, side
Bits = dict[Slot, float]
PARTS = ("layers", "heads", "sides")  # of a slot, in order
HELD_OUT = 4  # windows that decide what is kept: their passes are few beside those that measure sensitivities


@dataclass(frozen=True)
class Allocation:
    """What came of a budget: both settings, measured on text that neither was chosen by. KL is in nats a token."""

    budget: float
    allocated_bits: float  # a stored coordinate, as `budget.bits`
    allocated_kl: float
    uniform_bits: float
    uniform_kl: float
    uniform: str  # what it is, for people
    tokens: int  # that both were measured on

    @property
    def kept(self) -> bool:
        """Whether the allocated bits are better than the uniform ones."""
        return self.allocated_kl < self.uniform_kl

    def __str__(self) -> str:
        return (
            f"budget of {self.budget:g} bits: KL {self.allocated_kl:.4f} allocated ({self.allocated_bits:.3f} bits), "
            f"{self.uniform_kl:.4f} uniform ({self.uniform_bits:.3f} bits: {self.uniform}), on {self.tokens:,} "
            f"held-out tokens of the calibration text; the {'allocated' if self.kept else 'uniform'} bits are used"
        )


class Sizes:
    """What each choice costs each slot that a recipe leaves open, in bits a token, and what room there is."""

    def __init__(self, budget: Budget, plan_of: Callable[[Allocated], Plan], source: str):
        """`plan_of` resolves the recipe, which `source` names in errors. Raises `RecipeError`."""
        self.choices = sorted(budget.choices)
        self.of: dict[Slot, dict[float, float]] = {}
        for choice in self.choices:
            slots: list[Slot] = []
            plan = plan_of(lambda *slot, bits=choice, seen=slots: seen.append(slot) or bits)
            tables = {side: plan.head_bits(side) for side in SIDES}
            for layer, head, side in slots:
                size = tables[side][layer][head] * plan.model.layers[layer].head_dim
                self.of.setdefault((layer, head, side), {})[choice] = size
        if not self.of:
            raise RecipeError(f"{source}: budget: all bits are given; leave out those that are to be allocated")
        layers = {group.layer: plan.model.layers[group.layer] for group in plan.groups}
        self.values = sum(layer.values_per_token for layer in layers.values())
        total = sum(sum(tables[side][i]) * layer.head_dim for side in SIDES for i, layer in layers.items())
        self.given = total - sum(size[self.choices[-1]] for size in self.of.values())
        self.room = budget.bits * self.values - self.given
        least, most = (self.mean(dict.fromkeys(self.of, self.choices[i])) for i in (0, -1))
        if budget.bits < least:
            raise RecipeError(
                f"{source}: budget.bits: found {budget.bits:g}; the least that budget.choices allow is {least:.3f}, "
                "scales and given bits included"
            )
        if budget.bits > most:
            raise RecipeError(
                f"{source}: budget.bits: found {budget.bits:g}; the most that budget.choices can use is {most:.3f}"
            )

    def total(self, bits: Bits) -> float:
        """Bits of a token in the open slots."""
        return sum(self.of[slot][choice] for slot, choice in bits.items())

    def mean(self, bits: Bits) -> float:
        """Bits of a stored coordinate, the given ones included, as `budget.bits` counts them."""
        return (self.total(bits) + self.given) / self.values

    def fits(self, bits: Bits) -> bool:
        """Whether it is within the budget, but for rounding."""
        return self.total(bits) <= self.room + 1e-9 * self.values

    def uniform(self) -> dict[tuple[float, float], Bits]:
        """Those of one number of bits for all keys and one for all values that fit, and of which none can be raised."""
        pairs = {}
        for pair in product(self.choices, repeat=2):
            bits = {slot: pair[SIDES.index(slot[2])] for slot in self.of}
            if self.fits(bits):
                pairs[pair] = bits
        return {(k, v): bits for (k, v), bits in pairs.items() if not any(
            other != (k, v) and other[0] >= k and other[1] >= v for other in pairs
        )}  # fmt: skip

    def filled(self, bits: Bits) -> Bits:
        """A uniform setting of the budget's size: the room left goes to the keys, then to the values.

        As many layers as fit get the next choice, spread evenly over the depth.
        """
        for side in SIDES:
            layers = sorted({slot[0] for slot in bits if slot[2] == side})
            for count in range(len(layers), 0, -1):
                raised = {layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)}
                trial = {
                    slot: self._next(b) if slot[2] == side and slot[0] in raised else b for slot, b in bits.items()
                }
                if self.fits(trial):
                    bits = trial
                    break
        return bits

    def _next(self, choice: float) -> float:
        return self.choices[min(self.choices.index(choice) + 1, len(self.choices) - 1)]


def units(slots: Iterable[Slot], over: Sequence[str]) -> list[list[Slot]]:
    """The slots in groups that get the same bits: those that differ only in what `over` does not name."""
    found = defaultdict(list)
    for slot in slots:
        found[tuple(part for part, name in zip(slot, PARTS, strict=True) if name in over)].append(slot)
    return list(found.values())


def solve(losses: np.ndarray, sizes: np.ndarray, room: float) -> list[int]:
    """One choice for each unit: the least sum of `losses` whose sum of `sizes` is within `room`, exactly.

    Both are `[units, choices]`. A multiple-choice knapsack problem, given to HiGHS as an integer program with one
    variable of 0 or 1 for each unit and choice. Raises `TQCompressError` if nothing fits.
    """
    count, choices = losses.shape
    # HiGHS stops within 1e-6 of the optimum: that is too coarse for losses in nats.
    scaled = losses / max(np.abs(losses).max(), np.finfo(float).tiny) * 1e4
    one_each = np.kron(np.eye(count), np.ones(choices))
    within = LinearConstraint(sizes.reshape(1, -1) / room, ub=1)
    found = milp(
        scaled.ravel(),
        integrality=np.ones(losses.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), within],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise TQCompressError(f"budget: no choice of bits fits ({found.message})")
    chosen: list[int] = found.x.reshape(count, choices).argmax(1).tolist()
    return chosen


def allocate(
    model: "PreTrainedModel",
    recipe: Recipe,
    source: str,
    windows: Callable[[], list[torch.Tensor]],
    plan_of: Callable[[Allocated], Plan],
    build: Callable[[Plan], Compression],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Plan, Allocation]:
    """The plan that a recipe's budget amounts to, and what was measured.

    Args:
        source: names the recipe in errors.
        windows: gives token ids `[tokens]` of at least two windows of text, asked once the recipe is seen to be right.
        plan_of: resolves the recipe with given bits.
        build: makes the codecs of a plan, fitted.
        progress: called with the forward passes done and their number.

    Raises `RecipeError` for a budget that nothing or everything fits, and if text or tokens are too few.
    """
    budget: Budget = recipe.budget  # type: ignore[assignment]  # or this is not called
    sizes = Sizes(budget, plan_of, source)
    groups = units(sizes.of, budget.over)
    pairs = sizes.uniform()
    search, *held_out = _pieces(windows(), budget, plan_of(_answer(next(iter(pairs.values())))), source)
    alone = sum(1 for _ in _changes(groups, sizes.choices, next(iter(pairs.values()))))
    done, total = 0, 2 + len(pairs) + alone + 3 * len(held_out)

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, max(total, done))

    def layers_of(bits: Bits) -> dict[int, LayerCodecs]:
        return build(plan_of(_answer(bits))).layers

    training = model.training
    model.eval()
    try:
        progress(done, total)
        kls = divergences(model, [search], [partial(layers_of, bits) for bits in pairs.values()], step)
        kl, pair = min(zip(kls, pairs, strict=True))
        base = pairs[pair]
        losses = _sensitivities(model, search, groups, sizes.choices, base, kl, plan_of, build, step)
        cost = np.array([[sum(sizes.of[slot][c] for slot in unit) for c in sizes.choices] for unit in groups])
        chosen = solve(losses, cost, sizes.room)
        allocated = {s: sizes.choices[i] for unit, i in zip(groups, chosen, strict=True) for s in unit}
        uniform = sizes.filled(base)
        both = [partial(layers_of, bits) for bits in (allocated, uniform)]
        allocated_kl, uniform_kl = divergences(model, held_out, both, step)
    finally:
        model.train(training)
    name = f"{pair[0]:g}-bit keys, {pair[1]:g}-bit values" + (
        ", the rest of the bits spread evenly" * (uniform != base)
    )
    bits = (sizes.mean(allocated), allocated_kl, sizes.mean(uniform), uniform_kl)
    outcome = Allocation(budget.bits, *bits, name, sum(map(len, held_out)))
    return plan_of(_answer(allocated if outcome.kept else uniform)), outcome


def _answer(bits: Bits) -> Allocated:
    return lambda *slot: bits[slot]


def _changes(groups: list[list[Slot]], choices: list[float], base: Bits) -> Iterable[tuple[int, int, Bits]]:
    """Each unit and choice by their places, with the bits in which that unit alone is not as in `base`."""
    for row, unit in enumerate(groups):
        for column, choice in enumerate(choices):
            if any(base[slot] != choice for slot in unit):
                yield row, column, base | dict.fromkeys(unit, choice)


def _sensitivities(
    model: "PreTrainedModel",
    window: torch.Tensor,
    groups: list[list[Slot]],
    choices: list[float],
    base: Bits,
    kl: float,
    plan_of: Callable[[Allocated], Plan],
    build: Callable[[Plan], Compression],
    step: Callable[[], None],
) -> np.ndarray:
    """The change of `kl` when a unit alone gets a choice: `[units, choices]`, 0 where it changes nothing."""
    plan = plan_of(_answer(base))
    layers = build(plan).layers

    def changed(bits: Bits) -> dict[int, LayerCodecs]:
        other = plan_of(_answer(bits))
        new = tuple(group for group in other.groups if group not in plan.groups)
        touched = {group.layer for group in new}  # only their codecs are built anew
        if not touched:
            return layers
        part = replace(other, groups=tuple(group for group in other.groups if group.layer in touched))
        return layers | build(part).layers

    wanted = list(_changes(groups, choices, base))
    found = divergences(model, [window], [partial(changed, bits) for _, _, bits in wanted], step)
    losses = np.zeros((len(groups), len(choices)))
    for (row, column, _), value in zip(wanted, found, strict=True):
        losses[row, column] = value - kl
    return losses


def _pieces(windows: list[torch.Tensor], budget: Budget, plan: Plan, source: str) -> list[torch.Tensor]:
    """What to measure on: the beginning of one window for sensitivities, and of others for the decision."""
    if len(windows) < 2:
        raise RecipeError(
            f"{source}: calibration: its text has {len(windows)} windows that statistics leave; a budget is measured "
            "on two or more: give a longer text, fewer tokens or a shorter length"
        )
    if budget.tokens > len(windows[0]):
        raise RecipeError(
            f"{source}: budget.tokens: found {budget.tokens}; a window of the calibration text has {len(windows[0])}"
        )
    if any(plan.packed_tokens(group.layer, budget.tokens) == 0 for group in plan.groups):
        raise RecipeError(
            f"{source}: budget.tokens: found {budget.tokens}; all of them are kept exact here: sinks {plan.sinks}, "
            f"window {plan.window}"
        )
    return [window[: budget.tokens] for window in windows[: 1 + HELD_OUT]]
