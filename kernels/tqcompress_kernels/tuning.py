"""How many spans the packed tokens of a decode are split into."""

import functools

import torch

PROGRAMS = 8  # a multiprocessor: as many as its registers hold
SPAN = 512  # tokens: shorter spans take longer to start than to run
MIN_SPAN = 64  # where the device would idle otherwise
MAX_SPLITS = 512

# Measured: (device name, batch * kv_heads, head_dim) -> programs in all, where it differs from the rule.
MEASURED: dict[tuple[str, int, int], int] = {}


@functools.cache
def _device(device: torch.device) -> tuple[str, int]:
    """Name and number of multiprocessors."""
    if device.type != "cuda":
        return device.type, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def splits(device: torch.device, heads: int, head_dim: int, tokens: int) -> int:
    """The split count for `heads` = batch * kv_heads and at most `tokens` packed tokens; 0 for no tokens."""
    if tokens <= 0:
        return 0
    name, processors = _device(device)
    programs = MEASURED.get((name, heads, head_dim), PROGRAMS * processors)
    span = SPAN
    while span > MIN_SPAN and heads * tokens < 2 * processors * span:
        span //= 2
    return max(1, min(programs // max(heads, 1), -(-tokens // span), MAX_SPLITS))


def spread(device: torch.device, programs: int, tokens: int) -> bool:
    """Whether this many programs for `tokens` each may start while another kernel ends.

    They are then put where there is room, up to `PROGRAMS` on one multiprocessor, instead of one after the other on
    each: as good if they fill the device or leave room on each, and if each is so short that its start is most of it.
    """
    processors = _device(device)[1]
    return programs <= processors or programs > (PROGRAMS - 1) * processors or tokens <= MIN_SPAN
