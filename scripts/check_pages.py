"""Checks packed pages read and written by kernels, as an engine with a paged cache uses them, without one.

A small engine is played: sequences start with prompts in chunks, share the pages of a common prefix, grow by a token a
step, end, are thrown out and computed again in other pages. Every output is compared with attention in torch to what
the codecs decode. Keys and values are random: they say nothing about quality. Runs without installing anything; where
there is no CUDA device, kernels are interpreted: `--small` is for that, and leaves out trellis codes, which take long.

    python scripts/check_pages.py [--small] [--only trellis]
"""

import argparse
import random
import sys
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "scripts")]

import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu":
    import kernels_helpers  # noqa: F401  # kernels are interpreted from here on
from transformers import LlamaConfig

import tqcompress

tqcompress.__path__.append(str(ROOT))  # plugins and recipes, if nothing is installed
from tqcompress.plugins.fused import FEW_QUERIES
from tqcompress.plugins.vllm.fused_pages import FusedPages
from tqcompress.plugins.vllm.schedule import Step

from tqcompress.blockwise import attend_exact
from tqcompress.compression import Compression
from tqcompress.recipe import Recipe
from tqcompress.resolve import resolve
from tqcompress.shape import ModelShape
from tqcompress.view import LayerCodecs
from tqcompress_kernels import plain

BOUND = 2e-3  # of the norm of an output: the kernels' promise
WORSE = 1.05  # than the codecs' own: how far a stored vector may be from the true one
# Two searches for a trellis's closed path that round differently may begin it elsewhere: with vectors rounded to a
# hundredth of a table step one of 15,000 came out up to 1.09 times as far, and as many nearer. A single wrong symbol
# makes it 1.6 times at 2 bits, 2.4 at 3. So each vector may be somewhat farther, all together hardly.
WORSE_PATH, WORSE_IN_ALL = 1.25, 1.001


def side(bits: float, seed: int = 0, **options) -> dict:
    return {"bits": bits, "seed": seed, **options}


RECIPES = {
    "4 bits": {"key": side(4), "value": side(4, 1)},
    "4 and 3 bits, small scales": {"key": side(4, scale="log8"), "value": side(3, 1, scale="log8")},
    "fractions": {"key": side(2.5), "value": side(3.5, 1)},
    "trellis": {"quantizer": "trellis", "key": side(3), "value": side(2, 1)},
    "groups": {
        "key": side(4), "value": side(2, 1),
        "rules": [{"layers": "all", "heads": [1], "key": {"bits": 8}, "value": {"bits": 4}}],
    },
}  # fmt: skip


def layer(recipe: dict, heads: int, kv_heads: int, dim: int, sinks: int = 4) -> LayerCodecs:
    """The codecs of a layer of that shape."""
    config = LlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim,
        num_hidden_layers=1, vocab_size=8, intermediate_size=8,
    )  # fmt: skip
    parsed = Recipe.load({"version": 1, "keep": {"sinks": sinks, "window": 0}, **recipe})
    compression = Compression(parsed, resolve(parsed, ModelShape.of(config), "check"), {0: DEVICE})
    compression.choose_backends()
    return compression.layers[0]


def pages_of(codecs: LayerCodecs, block: int) -> FusedPages:
    form = FusedPages(codecs, block, torch.bfloat16, DEVICE)
    for _, fused in form.groups:
        if DEVICE.type == "cpu":
            fused.split = plain.split
    return form


@dataclass(eq=False)
class Sequence:
    """A request: all its keys and values `[2, tokens, kv_heads, head_dim]`, how many are computed, and its pages."""

    states: torch.Tensor
    done: int = 0
    table: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stored = torch.zeros_like(self.states, dtype=torch.float32)  # what was written, decoded


class Engine:
    """Gives pages to sequences, and runs their steps. Pages begin full of bytes that are no numbers."""

    def __init__(self, form: FusedPages, pages: int, share: int, seed: int):
        self.form, self.share, self.random = form, share, random.Random(seed)
        self.pages = torch.full((pages, 1, form.block_size, form.content_bytes), 255, dtype=torch.uint8, device=DEVICE)
        self.free = list(range(pages))
        self.users = [0] * pages
        self.generator = torch.Generator().manual_seed(seed)
        self.worst, self.written, self.bad = 0.0, 0, 0
        self.squares = torch.zeros(2, dtype=torch.float64, device=DEVICE)  # of all errors: the codecs' own, and these

    def states(self, tokens: int) -> torch.Tensor:
        """Random keys and values."""
        made = torch.randn(2, tokens, *self.form.exact_shape[2:], generator=self.generator)
        return made.to(DEVICE, torch.bfloat16)

    def room(self, one: Sequence, tokens: int) -> bool:
        """Give pages for so many tokens in all, in no order, or say that there are not enough."""
        missing = -(-tokens // self.form.block_size) - len(one.table)
        if missing > len(self.free):
            return False
        for _ in range(missing):
            page = self.free.pop(self.random.randrange(len(self.free)))
            self.users[page] = 1
            one.table.append(page)
        return True

    def give_back(self, one: Sequence) -> None:
        """The sequence ends, or is thrown out; pages that others use stay."""
        for page in one.table:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)
        one.table, one.done = [], 0

    def share_prefix(self, one: Sequence, other: Sequence, tokens: int) -> None:
        """`one` begins as `other` does: it points to that one's full pages."""
        count = min(tokens, other.done) // self.form.block_size
        one.table, one.done = other.table[:count], count * self.form.block_size
        one.stored[:, : one.done] = other.stored[:, : one.done]
        for page in one.table:
            self.users[page] += 1

    def step(self, batch: list[tuple[Sequence, int]]) -> None:
        """Compute so many new tokens of every sequence; compare."""
        form, size = self.form, self.form.block_size
        counts, lengths = [new for _, new in batch], [one.done + new for one, new in batch]
        starts = [0, *accumulate(counts)]
        tables = torch.zeros(len(batch), max(len(one.table) for one, _ in batch) + 1, dtype=torch.int32)
        slots = []
        for i, (one, new) in enumerate(batch):
            tables[i, : len(one.table)] = torch.tensor(one.table)
            slots += [one.table[t // size] * size + t % size for t in range(one.done, one.done + new)]
        slots = torch.tensor([*slots, -1, -1], device=DEVICE)  # padded, as engines do
        known = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
        # Of single tokens an engine may know no more than a bound.
        longest = [length + (new == 1) * self.random.randint(0, 9) for length, new in zip(lengths, counts, strict=True)]
        step = Step(starts, known, longest, tables.to(DEVICE), slots)
        fresh = torch.cat([one.states[:, one.done : one.done + new] for one, new in batch], dim=1)
        flat = torch.cat([fresh, self.states(2)], dim=1)
        form.write(self.pages, slots, *flat, step.exact(size, form.sinks))
        stored = self.stored(slots[:-2], fresh)
        heads, dim = form.exact_shape[2:]
        query = torch.randn(starts[-1], self.share * heads, dim, generator=self.generator).to(DEVICE, torch.bfloat16)
        output = query.new_zeros(query.shape, dtype=torch.float32)
        for tokens, rows, past, most in step.batches:
            parts = (x[tokens].unflatten(0, (len(past), -1)).transpose(1, 2) for x in (query, *fresh))
            output[tokens] = (
                form.attend(self.pages, rows, past, *parts, dim**-0.5, None, most).transpose(1, 2).flatten(0, 1)
            )
        for i, (one, new) in enumerate(batch):
            mine = slice(starts[i], starts[i + 1])
            self.compare(one, query[mine].transpose(0, 1)[None].float(), output[mine].transpose(0, 1)[None])
            one.stored[:, one.done : one.done + new] = stored[:, mine]
            one.done += new

    def compare(self, one: Sequence, query: torch.Tensor, got: torch.Tensor) -> None:
        """The output `[1, heads, new, head_dim]` of one sequence beside attention to what was stored for it."""
        new = query.shape[2]
        seen = one.stored[:, : one.done + new].clone()
        for part in (slice(None, self.form.sinks), slice(one.done, None)):
            seen[:, part] = one.states[:, : one.done + new][:, part].float()
        want = attend_exact(query, *seen.transpose(1, 2)[:, None], None, self.form.exact_shape[3] ** -0.5)[0]
        error, size = (got - want).norm(dim=-1), want.norm(dim=-1)
        # Chunks are computed in bfloat16: queries, keys, values and weights, each rounded once.
        few = new * self.share <= FEW_QUERIES
        found = (error / size).max() if few else error.norm() / size.norm() * BOUND / (4 * 2**-7)
        self.worst = max(self.worst, float(found.nan_to_num(torch.inf)))

    def stored(self, slots: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What pages hold of tokens `[2, tokens, kv_heads, head_dim]` just written; counts vectors that are farther
        from the true ones than the codecs' own. Where a value lies halfway between two levels they may differ."""
        page, place = slots // self.form.block_size, slots % self.form.block_size
        found = torch.zeros_like(states, dtype=torch.float32)
        for group in self.form.codecs.groups:
            for which, codec in enumerate((group.key, group.value)):
                fields = self.form.fields(self.pages, codec)
                held = codec.decode({name: rows[page, :, place].transpose(0, 1)[None] for name, rows in fields.items()})
                true = states[which][:, list(group.heads)].transpose(0, 1)[None].float()
                own, mine = ((x - true).norm(dim=-1) for x in (codec.decode(codec.encode(true)), held))
                worse = WORSE_PATH if codec.name == "trellis" else WORSE
                self.written, self.bad = self.written + own.numel(), self.bad + int((~(mine <= worse * own)).sum())
                self.squares += torch.stack([own, mine]).double().square().flatten(1).sum(1)
                found[which][:, list(group.heads)] = held[0].transpose(0, 1)
        return found


def play(form: FusedPages, share: int, sequences: int, longest: int, steps: int, seed: int = 0) -> Engine:
    """Run an engine with too few pages for all its sequences."""
    # Half of what all would take, and enough for the longest alone.
    per_sequence = -(-longest // form.block_size) + 1
    engine = Engine(form, max(per_sequence + 1, sequences * per_sequence // 2), share, seed)
    prefix, waiting, running = engine.states(longest // 2), [], []
    for i in range(sequences):
        tokens = engine.random.randint(1, longest - steps) + steps
        states = engine.states(tokens)
        if i % 2:
            states[:, : min(tokens, longest // 2)] = prefix[:, :tokens]
        waiting.append(Sequence(states))
    for step in range(steps):
        while waiting:
            one = waiting[0]
            like = [other for other in running if torch.equal(*(x.states[:, : longest // 2] for x in (one, other)))]
            if like and one.states.shape[1] > longest // 2:
                engine.share_prefix(one, like[0], longest // 2)
            prompt = one.states.shape[1] - steps
            if not engine.room(one, max(prompt, one.done)):
                engine.give_back(one)
                break
            running.append(waiting.pop(0))
            while one.done < prompt:  # in chunks, of any size, amid single tokens of others
                chunk = one, min(prompt - one.done, engine.random.choice([1, 3, longest // 3, longest]))
                others = [other for other in running[:-1] if other.done < other.states.shape[1] - 1]
                others = [
                    (other, 1) for other in others[: engine.random.randint(0, 3)] if engine.room(other, other.done + 1)
                ]
                batch = [chunk, *others]
                engine.random.shuffle(batch)
                engine.step(batch)
        for one in list(running):
            if one.done == one.states.shape[1]:
                engine.give_back(one)
                running.remove(one)
        full = _grows(engine, running)
        while running and (full or step % 5 == 4):  # the last to come is thrown out, now and then for no reason
            engine.give_back(running[-1])
            waiting.insert(0, running.pop())
            full, step = _grows(engine, running), 0
        if running:
            engine.step([(one, 1) for one in running])
    return engine


def _grows(engine: Engine, running: list[Sequence]) -> bool:
    """Whether a sequence needs a page that is not there for its next token; all others get theirs."""
    return bool([one for one in running if not engine.room(one, one.done + 1)])


def check(small: bool, only: str | None) -> bool:
    """Every recipe, or only one, and every shape; prints the worst error of each."""
    shapes = [(4, 2, 32, 16)] if small else [(32, 8, 128, 64), (9, 3, 64, 32), (8, 8, 128, 128), (32, 8, 128, 16)]
    sizes = (3, 40, 6) if small else (24, 1500, 40)
    failed = False
    for name, recipe in RECIPES.items():
        if (small and name == "trellis") or only not in (None, name):
            continue
        for heads, kv_heads, dim, block in shapes:
            codecs = layer(recipe, heads, kv_heads, dim)
            form = pages_of(codecs, block)
            engine = play(form, heads // kv_heads, *sizes)
            own, mine = engine.squares.tolist()
            bad = engine.bad or not engine.worst <= BOUND or not mine <= WORSE_IN_ALL * own
            failed |= bool(bad)
            kernels = ", ".join(sorted({group.backend.name for group in codecs.groups}))
            print(
                f"{name:28} {heads:3}/{kv_heads} heads of {codecs.head_dim:3}, pages of {block:3}: worst error "
                f"{engine.worst:.1e}, {engine.bad} of {engine.written} vectors encoded worse, "
                f"squared errors {mine / own:.6f} of the codecs'; {kernels}" + ("  FAILED" if bad else ""),
                flush=True,
            )
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--only", choices=list(RECIPES), help="one recipe instead of all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = check(options.small, options.only)
    print("FAILED" if failed else "all right")
    sys.exit(failed)


if __name__ == "__main__":
    main()
