"""Retrieval: is a number that stands somewhere in a long text still found when the cache of that text is compressed?

The needle in a haystack of Kamradt (2023), as a completion that any language model can give. The prompt is read once,
exactly, as a prefill is; its keys and values then go into each cache, and the answer is generated from there.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from . import api
from .cache import CompressedLayer
from .compression import Compression
from .errors import TQCompressError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEEDLE = "\nThe secret number of {city} is {number}. Remember it.\n"
QUESTION = "\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Athens", "Oslo", "Cairo", "Lima", "Tokyo")
ANSWER_TOKENS = 12
READ_AT_ONCE = 1024  # tokens of the prompt


@dataclass(frozen=True)
class Retrieval:
    """How often a recipe finds the needle in contexts of one length."""

    recipe: str
    tokens: int  # of the prompt and the answer
    found: int  # of those that the uncompressed model finds
    uncompressed: int  # that the uncompressed model finds
    tried: int


@torch.no_grad()
def retrieve(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    compressions: dict[str, Compression],
    lengths: list[int],
    depths: int = 5,
    repeats: int = 2,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Retrieval]:
    """Hide a number at `depths` places of prompts cut from `text`, `repeats` times, and ask for it.

    With the answer they have each of `lengths` tokens. What is found at one length comes before the next is tried.
    `compressions` are those of `api.plan_compression`; the model is uncompressed again afterwards. `progress` is called
    after every prompt. Raises `TQCompressError` if the text is too short, or the model's context.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and max(lengths) > limit:
        raise TQCompressError(f"lengths: found {max(lengths)}; the model's context is {limit} tokens")
    hay = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(hay) < max(lengths):
        raise TQCompressError(f"the text has {len(hay)} tokens; a prompt of {max(lengths)} needs more")
    generator = random.Random(seed)
    for length in lengths:
        found, dense = dict.fromkeys(compressions, 0), 0
        for i in range(depths * repeats):
            prompt, number = _prompt(tokenizer, hay, length, (i % depths + 0.5) / depths, generator)
            ids = torch.tensor(prompt, device=model.device)[None]
            exact = _read(model, ids[:, :-1])
            if number in _answer(model, tokenizer, copy.deepcopy(exact), ids):
                dense += 1
                for name, compression in compressions.items():
                    api.attach(model, compression)
                    found[name] += number in _answer(model, tokenizer, _compressed(model, compression, exact), ids)
                    api.remove(model)
            progress()
        for name, count in found.items():
            yield Retrieval(name, length, count, dense, depths * repeats)


def _prompt(
    tokenizer: "PreTrainedTokenizerBase", hay: list[int], length: int, depth: float, generator: random.Random
) -> tuple[list[int], str]:
    """Token ids of a prompt with a needle at a relative depth, and the number to find."""
    city, number = generator.choice(CITIES), str(generator.randint(10000, 99999))
    needle, question = (
        tokenizer(text.format(city=city, number=number), add_special_tokens=False).input_ids
        for text in (NEEDLE, QUESTION)
    )
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - ANSWER_TOKENS - len(start) - len(needle) - len(question)
    if room < 1:
        raise TQCompressError(f"lengths: found {length}; question and answer alone take {length - room} tokens")
    first, cut = generator.randrange(len(hay) - room + 1), int(room * depth)
    text = hay[first : first + room]
    return [*start, *text[:cut], *needle, *text[cut:], *question], number


def _read(model: "PreTrainedModel", ids: Tensor) -> DynamicCache:
    """The uncompressed cache of a prompt."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for part in ids.split(READ_AT_ONCE, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


def _compressed(model: "PreTrainedModel", compression: Compression, exact: DynamicCache) -> Cache:
    """A compressed cache of the same prompt."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    compression.compress_layers(cache)
    for index, (layer, kept) in enumerate(zip(cache.layers, exact.layers, strict=True)):
        if isinstance(layer, CompressedLayer):
            layer.update(kept.keys, kept.values)
        else:
            cache.layers[index] = copy.deepcopy(kept)
    return cache


def _answer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", cache: Cache, ids: Tensor) -> str:
    """What the model goes on with, greedily; the cache holds all but the last token of the prompt."""
    token, answer = ids[:, -1:], []
    for _ in range(ANSWER_TOKENS):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        answer.append(int(token))
    text: str = tokenizer.decode(answer)
    return text
