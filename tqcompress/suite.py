"""What `tqcompress eval --suite` measures: the shipped recipes as they are, and quantizers at equal bytes."""

from importlib import resources

import yaml

from .recipe import Recipe, shipped_recipes


def shipped() -> list[str]:
    """The shipped recipes but for the one that only explains."""
    return [name for name in shipped_recipes() if name != "reference"]


def at_equal_bytes() -> dict[float, list[Recipe]]:
    """For each budget, in bits a value, the recipes of `recipes/suite/iso-bytes.yaml`: `NAME@BUDGET`."""
    file = resources.files("tqcompress.recipes") / "suite" / "iso-bytes.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    found: dict[float, list[Recipe]] = {budget: [] for budget in data["budgets"]}
    for name, given in data["recipes"].items():
        for budget, bits in zip(data["budgets"], given["bits"], strict=True):
            if bits is not None:
                sides = {side: {"bits": bits} | given.get(side, {}) for side in ("key", "value")}
                rest = {key: value for key, value in given.items() if key != "bits"}
                label = f"{name}@{budget:g}"
                found[budget].append(Recipe.parse(data["common"] | rest | sides | {"name": label}, label))
    return found
