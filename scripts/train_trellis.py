"""Train the tables of `quantizer: trellis` and write `tqcompress/data/trellis.safetensors`.

python scripts/train_trellis.py                        # all of them: about 20 minutes on one core
python scripts/train_trellis.py --states 256 --bits 2  # one; the others in the file stay as they are

Encoding allocates 64 MiB anew each time; MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ above that may save time.

Generalised Lloyd iteration (Linde, Buzo and Gray 1980; for trellis codes Marcellin and Fischer 1990): encode Gaussian
vectors with the table, replace every entry by the mean of the coordinates that fell on it, again. Several starts run
for a while, the best goes on. Then the entries move to integers times one step, and the iteration ends on that grid.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqcompress.plugins.trellis import pack_string, search, windows

DIM = 128
VECTORS = 2048  # fresh ones each iteration
DECAY = 0.7  # of the sums of earlier iterations, so that an entry is the mean of three times as many coordinates
SCREENED, SCREEN_ITERATIONS, SCREEN_VECTORS = {16: 64, 64: 64, 256: 32, 1024: 12}, 3, 512  # starts, briefly
TRIED, TRIAL_ITERATIONS = {16: 8, 64: 8, 256: 6, 1024: 3}, 10  # the best of these, longer
GRID_ITERATIONS = 6
REACH = 8  # lengths of the window on either side of the seam that paths are found from
SPREAD = {1: 1.0, 2: 1.05, 3: 1.3, 4: 1.5}  # of the first entries; at high rates the best are wider than the Gaussian
OUTPUT = Path(__file__).resolve().parents[1] / "tqcompress" / "data" / "trellis.safetensors"


class Trainer:
    """Gaussian vectors, and what a table makes of them."""

    def __init__(self, states: int, bits: int):
        self.states, self.bits = states, bits
        self.generator = torch.Generator().manual_seed(1000 * states + bits)

    def start(self) -> Tensor:
        """Gaussian quantiles in an order that is linear over GF(2), as a convolutional code's.

        The matrix takes the bits of a state to those of its quantile's number. It is random, but the states that
        leave one overlap, which differ in their upper `bits` bits, and those that enter one, which differ in the
        lower, all differ in the upper bits of the number: their values are as far apart as can be, which
        Ungerboeck asks of a trellis (1982). Rows of odd weight put complementary states opposite. After 12
        iterations the error was 6 to 22 % less than from random orders (64 and 256 states).
        """
        length, bits = self.states.bit_length() - 1, self.bits
        while True:
            matrix = torch.randint(2, (length, length), generator=self.generator)
            matrix[:, 0] ^= 1 ^ (matrix.sum(1) % 2)
            if all(map(invertible, (matrix, matrix[:bits, :bits], matrix[:bits, length - bits :]))):
                break
        state = (torch.arange(self.states)[:, None] >> torch.arange(length)) & 1
        number = (state @ matrix.T % 2) @ (2 ** torch.arange(length - 1, -1, -1))
        return SPREAD[bits] * torch.special.ndtri((number + 0.5) / self.states)

    def statistics(self, table: Tensor, vectors: int = VECTORS) -> tuple[float, Tensor, Tensor]:
        """The mean squared error, and of each state the sum of its coordinates and their number."""
        x = torch.randn(vectors, DIM, generator=self.generator)
        symbols = search(x, table, self.bits, REACH * -(-(self.states.bit_length() - 1) // self.bits))
        states = windows(pack_string(symbols, self.bits), self.bits, DIM, self.states).long().flatten()
        error = (table[states] - x.flatten()).square().mean().item()
        sums = torch.zeros(self.states, dtype=torch.float64).index_add_(0, states, x.flatten().double())
        counts = states.bincount(minlength=self.states).double()
        return error, sums - sums.flip(0), counts + counts.flip(0)

    def lloyd(self, table: Tensor, iterations: int, vectors: int = VECTORS) -> tuple[float, Tensor, Tensor]:
        """The error at the end, averaged over the last quarter; the table; the states' frequencies."""
        total, number, errors = 0.0, 0.0, []
        for _ in range(iterations):
            error, sums, counts = self.statistics(table, vectors)
            errors.append(error)
            total, number = DECAY * total + sums, DECAY * number + counts
            table = torch.where(number > 0, total / number.clamp_min(1e-9), table).float()
        recent = errors[-max(1, iterations // 4) :]
        return sum(recent) / len(recent), table, number / number.sum()

    def grid(self, table: Tensor) -> tuple[Tensor, float]:
        """int8 entries and their step: the best step for the table, then Lloyd iterations on the integers."""
        _, _, frequency = self.lloyd(table, 1)
        best = None
        for step in torch.linspace(0.5, 1.0, 200).mul(table.abs().max() / 127).tolist():
            error = (frequency * (rounded(table, step) * step - table).square()).sum().item()
            best = min(best or (error, step), (error, step))
        step, entries, total, number = best[1], rounded(table, best[1]), 0.0, 0.0
        for _ in range(GRID_ITERATIONS):
            _, sums, counts = self.statistics(entries * step)
            total, number = total + sums, number + counts
            step = float((entries * total).sum() / (entries.square() * number).sum())
            entries = rounded((total / number.clamp_min(1)).float(), step)
        return entries.to(torch.int8), step


def rounded(table: Tensor, step: float) -> Tensor:
    """Integers in [-127, 127] without 0: with it a vector could decode to the norm 0, by which encoders divide."""
    entries = (table / step).round().clamp(-127, 127)
    return torch.where(entries == 0, torch.where(table < 0, -1.0, 1.0), entries)


def invertible(matrix: Tensor) -> bool:
    """Whether a matrix of bits is invertible over GF(2)."""
    return round(torch.linalg.det(matrix.double()).item()) % 2 == 1


def train(states: int, bits: int, iterations: int) -> dict[str, Tensor]:
    """The tensors of one table, by their names in the file."""
    trainer = Trainer(states, bits)
    starts = [trainer.start() for _ in range(SCREENED[states])]
    starts.sort(key=lambda start: trainer.lloyd(start, SCREEN_ITERATIONS, SCREEN_VECTORS)[0])
    trials = [trainer.lloyd(start, TRIAL_ITERATIONS) for start in starts[: TRIED[states]]]
    spread = " ".join(f"{error:.5f}" for error, _, _ in trials)
    table = trainer.lloyd(min(trials, key=lambda trial: trial[0])[1], iterations)[1]
    trainer.generator.manual_seed(0)
    plain = trainer.statistics(table, 2 * VECTORS)[0]
    entries, step = trainer.grid(table)
    trainer.generator.manual_seed(0)
    error = trainer.statistics(entries * step, 2 * VECTORS)[0]
    print(f"{states} states, {bits} bits: trials {spread}; trained {plain:.5f}, as int8 {error:.5f}", flush=True)
    name = f"states{states}.bits{bits}"
    return {name: entries, f"{name}.step": torch.tensor(step, dtype=torch.float32)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, nargs="+", default=list(SCREENED), choices=list(SCREENED))
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=60, help="after the trials")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in the same order everywhere
    tables = load_file(args.output) if args.output.exists() else {}
    for states in args.states:
        for bits in args.bits:
            tables |= train(states, bits, args.iterations)
            save_file(tables, args.output)
