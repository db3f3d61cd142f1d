"""What the commands share: a progress bar, the model's prompt and answers, checks of texts and recipes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from .calibrate import Calibrator
from .compression import Compression
from .errors import RecipeError, TQCompressError
from .output import replace_file
from .recipe import Recipe
from .texts import load_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "In one short paragraph: what does the text above say about how laws are made?"


def progress() -> Progress:
    """A progress bar on a terminal's standard error, in place of transformers' own."""
    logging.disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    errors = Console(stderr=True)  # results alone go to standard output
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def calibrator(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", bar: Progress, step: TaskID
) -> Calibrator:
    """One that shows its progress as the task `step`."""

    def show(what: str, done: int, total: int) -> None:
        bar.update(step, description=what, completed=done, total=total)

    return Calibrator(model, tokenizer, show)


def text_for(recipes: Sequence[str | Recipe], text: str) -> str:
    """The content of `text`. Refuses bad recipes, and those that would be measured on what they are calibrated on."""
    calibrations = [(recipe, Recipe.load(recipe).calibration) for recipe in recipes]
    content = load_text(text)
    for recipe, settings in calibrations:
        if settings is None:
            continue
        seen, measured = load_text(settings.text).strip(), content.strip()
        if measured in seen or seen in measured:
            name = recipe if isinstance(recipe, str) else recipe.name
            raise TQCompressError(
                f"{name}: calibration.text: {settings.text} is what {text} would measure it on; use another text"
            )
    return content


def default_window(model: "PreTrainedModel") -> int:
    """Tokens of a window to measure in: 2048, or the model's context if that is shorter."""
    return min(2048, getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 2048))


def label(recipe: str | Recipe) -> str:
    """A recipe's name in a table."""
    if isinstance(recipe, Recipe):
        return recipe.name
    return Path(recipe).stem if Path(recipe).suffix else recipe


def plan_each(
    recipes: Sequence[str | Recipe], required: Sequence[str | Recipe], plan: Callable[[str | Recipe], Compression]
) -> tuple[dict[str, Compression], list[str]]:
    """What `plan` makes of each recipe, by its label, and why others were left out: only `required` ones must work."""
    planned, left_out = {}, []
    for recipe in recipes:
        try:
            if label(recipe) in planned:
                raise TQCompressError(f"two of the recipes have the same name: {label(recipe)}")
            planned[label(recipe)] = plan(recipe)
        except RecipeError as error:  # this model's heads, for instance, have no groups of that size
            if recipe in required:
                raise
            left_out.append(str(error))
    return planned, left_out


def text_name(text: str) -> str:
    """How results name a text: a file without the directories, which mean nothing elsewhere."""
    return Path(text).name if Path(text).is_file() else text


def token_ids(tokenizer: "PreTrainedTokenizerBase", content: str, max_tokens: int) -> torch.Tensor:
    """The first token ids of a text, without special tokens."""
    return torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids[:max_tokens])


def prompt_inputs(tokenizer: "PreTrainedTokenizerBase", prompt: str | None) -> Any:
    """The prompt as a chat message where the tokenizer has a chat template.

    The default one is long enough that most of its cache is compressed: a short prompt fits the window.
    """
    if prompt is None:
        prompt = f"{load_text('constitution')[2000:5500]}\n\n{PROMPT}"
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def generate(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", inputs: Any, max_new_tokens: int) -> str:
    """What the model answers, greedily."""
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    answer: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return answer.strip()


def count(text: str, name: str = "tokens") -> int:
    """`8K` -> 8192. Raises `TQCompressError` for anything but a positive number, with or without a K."""
    digits = text.strip().removesuffix("K")
    if not digits.isdecimal() or int(digits) == 0:
        raise TQCompressError(f"{name}: found {text!r}; numbers of tokens such as 512 or 8K are allowed")
    return int(digits) * (1024 if text.strip().endswith("K") else 1)


def write_json(path: Path | None, data: Any) -> None:
    """Write `data`, if there is a file to write it to."""
    if path is not None:
        replace_file(path, f"{json.dumps(data, indent=2)}\n".encode())
