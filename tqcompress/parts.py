"""Parts: the first coordinates of a stored vector may have more bits than the rest, under the same scale.

Fractional bits: after one rotation all coordinates are alike, so 2.5 bits are 3 bits for the first half and 2 for the
other. Outliers (the mixed precision of TurboQuant, arXiv 2504.19874, section 4.3, and of KVQuant, arXiv 2401.18079):
channels that vary most are brought to the front, and each part gets a rotation of its own. One scale is enough because
a factor of each part, measured once, gives both the same mean square; it is undone in decoding.
"""

import torch
from torch import Tensor

from .errors import RecipeError
from .recipe import Outliers

GRANULE = 16  # coordinates: the high bits of 3-bit codes are packed so many at a time


def wide_coordinates(bits: float, dim: int) -> int:
    """How many of `dim` coordinates have one bit more than `bits` rounded down; two decimals of `bits` are enough.

    Raises `RecipeError` if the number is no multiple of `GRANULE`.
    """
    count = round((bits % 1) * dim / GRANULE) * GRANULE
    if not 0 < count < dim or abs(count / dim - bits % 1) >= 0.005:
        parts = [f"{round(bits // 1 + n / dim, 2):g}" for n in range(0, dim, GRANULE)] + [f"{bits // 1 + 1:g}"]
        raise RecipeError(f"bits: found {bits:g}; head_dim {dim} allows {', '.join(parts)}")
    return count


def outlier_count(outliers: Outliers, bits: int, dim: int) -> int:
    """The channels of the first part, a multiple of `GRANULE`. Raises `RecipeError`."""
    listed = isinstance(outliers.channels, list)
    if listed and max(outliers.channels) >= dim:
        raise RecipeError(f"outliers.channels: found {max(outliers.channels)}; channels are 0 to {dim - 1}")
    given = len(outliers.channels) if listed else outliers.channels
    count = -(-given // GRANULE) * GRANULE
    if count >= dim or (count > given and not listed):
        allowed = ", ".join(map(str, range(GRANULE, dim, GRANULE))) or "none"
        raise RecipeError(f"outliers.channels: found {given}; head_dim {dim} allows {allowed}")
    if outliers.bits <= bits:
        raise RecipeError(
            f"outliers.bits: found {outliers.bits}; more than the {bits} of the other channels are needed"
        )
    return count


def bring_forward(matrix: Tensor, spread: Tensor, count: int, listed: list[int]) -> tuple[Tensor, Tensor]:
    """`matrix` with its most varying coordinates first and both parts of the same mean square, and which they are.

    Args:
        matrix: float64 `[kv_heads, dim, dim]`, the map `y = matrix @ x` before the rotations.
        spread: second moments of `x`, the same shape.
        count: of the first part.
        listed: coordinates that come first whatever they vary.

    Returns:
        The new matrix, which keeps the mean square of all coordinates together, and int16 `[kv_heads, count]`.
    """
    variance = (matrix @ spread @ matrix.mT).diagonal(dim1=-2, dim2=-1)
    rank = variance.clone()
    rank[:, listed] = torch.inf
    order = rank.argsort(dim=-1, descending=True, stable=True)
    chosen = order[:, :count].sort(-1).values
    order = torch.cat([chosen, order[:, count:].sort(-1).values], dim=-1)
    variance = variance.gather(-1, order)
    part = torch.ones_like(variance)
    part[:, :count], part[:, count:] = variance[:, :count].mean(-1)[:, None], variance[:, count:].mean(-1)[:, None]
    factor = torch.where(part > 0, variance.mean(-1)[:, None] / part, 1.0).sqrt()  # 1 where nothing was seen
    return matrix.gather(1, order[..., None].expand_as(matrix)) * factor[..., None], chosen.to(torch.int16)
