"""What encoding for a trellis does, naively, in the precision of its input; `reference.states` reads the codes."""

import torch
from torch import Tensor


def search(x: Tensor, table: Tensor, bits: int, reach: int | None = None) -> Tensor:
    """int64 `[vectors, dim]`: the symbols of a closed path for each vector `[vectors, dim]`, found in two passes.

    The first finds the overlap of the last and the first state (the window less one symbol) from the coordinates about
    the seam, the second the path of least squared error that has it.
    """
    table, (vectors, dim), window = table.to(x.dtype), x.shape, len(table).bit_length() - 1
    fan, overlaps = 2**bits, len(table) >> bits
    reach = reach or min(dim // 2, max(24, 3 * window, 6 * -(-window // bits)))
    costs, choices = _forward(x.roll(reach, 1)[:, : 2 * reach], x.new_zeros(vectors, overlaps), table, fan)
    seam, _ = _backward(choices[reach:], costs.argmin(1), fan)
    costs = x.new_full((vectors, overlaps), torch.inf).scatter(1, seam[:, None], 0)
    _, choices = _forward(x, costs, table, fan)
    return _backward(choices, seam, fan)[1]


def _forward(x: Tensor, costs: Tensor, table: Tensor, fan: int) -> tuple[Tensor, list[Tensor]]:
    """Least costs of paths to every overlap, and at each coordinate which symbol the best one dropped."""
    overlaps, choices = costs.shape[1], []
    behind = torch.arange(len(table), device=x.device) % overlaps
    for column in x.unbind(1):
        paths = costs[:, behind] + (column[:, None] - table).square()
        costs, choice = paths.unflatten(1, (overlaps, fan)).min(2)
        choices.append(choice)
    return costs, choices


def _backward(choices: list[Tensor], overlap: Tensor, fan: int) -> tuple[Tensor, Tensor]:
    """The overlap that the best paths to `overlap` began with, and their symbols."""
    symbols = []
    for choice in reversed(choices):
        symbols.append(choice.gather(1, overlap[:, None])[:, 0])
        overlap = (overlap * fan + symbols[-1]) % choice.shape[1]
    return overlap, torch.stack(symbols[::-1], 1)


def pack(symbols: Tensor, bits: int) -> Tensor:
    """uint8 `[vectors, dim * bits / 8]`: the symbols as strings."""
    string = (symbols[..., None] >> torch.arange(bits, device=symbols.device)) & 1
    octets = string.flatten(1).unflatten(1, (-1, 8)) << torch.arange(8, device=symbols.device)
    return octets.sum(-1).to(torch.uint8)
