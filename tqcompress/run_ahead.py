"""`run_ahead`: the loop of `generate()` without its wait for the device at every step.

transformers asks after each token whether all sequences are finished, and the device idles while the host then
prepares the next step: more than a millisecond for a large model. Here the answer is copied to the host behind the
step and read after the next one was begun. A sequence that ends itself costs one step more, which is taken back.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer


@torch.no_grad()
def run_ahead(
    model: "PreTrainedModel",
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: "BaseStreamer | None" = None,
    **model_kwargs: Any,
) -> "Tensor | GenerateDecoderOnlyOutput":
    """Greedy decoding or sampling for `model.generate(..., custom_generate=tqcompress.run_ahead)`.

    The tokens are those that `generate()` finds alone. transformers hands no streamer to a custom loop: give it as
    `custom_generate=functools.partial(tqcompress.run_ahead, streamer=streamer)`; it gets each token one step later.
    Raises `ValueError` for beams, assisted decoding, and outputs other than tokens, scores, logits and the cache.
    """
    config = generation_config
    _check(config)
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = config._pad_token_tensor.to(input_ids.device) if has_eos else None
    compiled = model._valid_auto_compile_criteria(model_kwargs, config)
    forward = model.get_compiled_call(config.compile_config) if compiled else model.__call__
    scores: tuple[Tensor, ...] | None = () if config.return_dict_in_generate and config.output_scores else None
    logits: tuple[Tensor, ...] | None = () if config.return_dict_in_generate and config.output_logits else None
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)

    outputs = model._prefill(input_ids, config, model_kwargs, is_first_iteration=True)
    cache = outputs.get("past_key_values")
    kept = config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)  # the caller sees it afterwards
    stop = _Stop(streamer, late=cache is None or not kept or cache.is_croppable)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        # A copy: a compiled model writes its next logits to the same place.
        last = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        del outputs
        chosen = logits_processor(input_ids, last)
        scores, logits = scores if scores is None else (*scores, chosen), logits if logits is None else (*logits, last)
        tokens = torch.multinomial(chosen.softmax(-1), 1)[:, 0] if config.do_sample else chosen.argmax(-1)
        if pad is not None:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
        longest = stopping_criteria.max_length
        if stop(unfinished, tokens) or (longest is not None and input_ids.shape[1] >= longest):
            break
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
        )
        outputs = forward(**inputs, return_dict=True)
    if stop.too_late:
        input_ids = input_ids[:, :-1]
        scores, logits = scores and scores[:-1], logits and logits[:-1]
        if cache is not None and kept:
            cache.crop(-1)
    stop.finish()
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=logits, past_key_values=cache)


def _check(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"run_ahead decodes greedily or samples; found {mode.value}: leave custom_generate away")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise ValueError(f"run_ahead does not return what {name} asks for: leave custom_generate away")


class _Stop:
    """Whether all sequences were finished a step ago, or, if not `late`, now; the streamer gets tokens as late."""

    def __init__(self, streamer: "BaseStreamer | None", late: bool):
        self.streamer, self.late = streamer, late
        self.too_late = False  # one step was made that nobody asked for
        self.pending: tuple[Tensor, Tensor, torch.Event | None] | None = None

    def __call__(self, unfinished: Tensor, tokens: Tensor) -> bool:
        before, self.pending = self.pending, self._copied(unfinished.max() == 0, tokens)
        if not self.late:
            return self._read(self.pending)
        self.too_late = before is not None and self._read(before)
        return self.too_late

    def finish(self) -> None:
        """Hand over the tokens of the last step."""
        if self.late and not self.too_late:
            self._read(self.pending)  # type: ignore[arg-type]  # a step was made
        if self.streamer is not None:
            self.streamer.end()

    def _copied(self, done: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, torch.Event | None]:
        """On their way to the host, and the event that says that they are there."""
        if not done.is_cuda:
            return done, tokens, None
        wanted = (done, tokens) if self.streamer is not None else (done,)
        copies = [x.new_empty(x.shape, device="cpu", pin_memory=True).copy_(x, non_blocking=True) for x in wanted]
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(done.device))
        return copies[0], copies[-1], event

    def _read(self, copies: tuple[Tensor, Tensor, torch.Event | None]) -> bool:
        done, tokens, event = copies
        if event is not None:
            event.synchronize()
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        return bool(done)
