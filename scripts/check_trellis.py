"""Checks of the kernels for trellis codes, for `check_kernels.py`."""

import torch
from check_kernels import DEVICE, decode_case
from trellis_sides import lookup_of, parse, table_of

from tqcompress_kernels import (
    encode,
    encode_reference,
    encode_trellis,
    fast,
    reference,
    ring,
    step,
    trellis_reference,
)

AUTO, REGISTERS = (None, None), (None, 0)
# Codes, and how keys and values are looked up: coordinates at once, copies of the table; options of the kernel.
LOOKUPS = [
    ("T16.2", REGISTERS, REGISTERS, {}), ("T16.2", (4, 4), (4, 4), {}), ("T16.2", (4, 2), (4, 2), {}),
    ("T16.2", (4, 4), REGISTERS, {}), ("T16.2", REGISTERS, (4, 4), {}),
    ("T16.3", REGISTERS, REGISTERS, {}), ("T16.3", (2, 32), (2, 32), {}), ("T16.3", (2, 16), (2, 16), {}),
    ("T16.3", (3, 2), (3, 2), {}), ("T16.3", REGISTERS, (2, 16), {}),
    ("T16.4", AUTO, AUTO, {}),
    ("T64.2", (4, 1), (4, 1), {}), ("T64.2", (3, 8), (3, 8), {}), ("T64.2", (2, 16), (2, 16), {}),
    ("T64.3", (3, 1), (3, 1), {}), ("T64.3", (2, 4), (2, 4), {}), ("T64.3", (2, 1), (2, 1), {}),
    ("T256.2", (3, 1), (3, 1), {}), ("T256.2", (2, 4), (2, 4), {}), ("T256.2", (2, 1), (2, 1), {}),
    ("T256.3", (2, 1), (2, 1), {}), ("T256.3", (2, 2), (2, 2), {}), ("T256.3", (1, 8), (1, 8), {}),
    ("T1024.2", (2, 1), (2, 1), {}), ("T1024.2", (1, 1), (1, 1), {}),
    ("T1024.3", (2, 1), (2, 1), {}), ("T1024.3", (1, 2), (1, 2), {}),
]  # fmt: skip
# The same codes with other rings and tiles.
RINGS = [
    ("T16.2", REGISTERS, REGISTERS, {"stages": 3}), ("T256.2", (3, 1), (3, 1), {"tile": 32}),
    ("T256.3", (2, 1), (2, 1), {"stages": 3}), ("T256.3", (2, 1), (2, 1), {"stages": 1}),
    ("T256.3", (2, 1), (2, 1), {"tile": 32, "stages": 4}),
]  # fmt: skip
# Of the encoder, what differs from the default.
ENCODERS = [
    ("T256.2", {}), ("T256.2", {"reach": 64}), ("T256.2", {"group": 1}), ("T256.3", {}), ("T256.3", {"reach": 48}),
]  # fmt: skip


def encoder_of(into, table, step: float, bits: int, scale_format: str, options: dict):
    """An encoder with some options of `trellis_encoder` and some fields replaced."""
    made = {name: options[name] for name in ("group", "reach") if name in options}
    by = encode_trellis.trellis_encoder(into, None, table, step, bits, scale_format, **made)
    return by._replace(ptx=options.get("ptx", by.ptx))


def trellis_encode_case(kind: str, dim: int, dtype: str, inputs: str, scale_format: str, options: dict) -> float:
    """The excess error of paths over the reference's, relative; more than 1 if other things are wrong.

    A path may differ where rounding to the kernel's grid makes it as good; so may the seam, which costs little.
    """
    torch.manual_seed(0)
    (table, step), (states, bits), tokens = table_of(kind, DEVICE), parse(kind), 200
    x = torch.randn(2, 2, tokens, dim, device=DEVICE)
    x = {"heavy": x**5, "constant": x * 0 + 3, "zero": x * 0, "huge": x * 150}.get(inputs, x).to(getattr(torch, dtype))
    into = torch.linalg.qr(torch.randn(dim, dim, device=DEVICE)).Q[None].contiguous()
    by = encoder_of(into, table, step, bits, scale_format, options)
    codes = torch.full((2, 2, tokens + 8, dim * bits // 8), 0xA5, dtype=torch.uint8, device=DEVICE)
    scale = torch.zeros(2, 2, tokens + 8, 1, device=DEVICE).to(torch.float16 if scale_format == "fp16" else torch.uint8)
    encode.encode(x, (codes,), scale, 3, by)
    if (codes[:, :, :3] != 0xA5).any() or (codes[:, :, tokens + 3 :] != 0xA5).any():
        return float("inf")
    y = (x.double() @ into.double()).flatten(0, 2)
    unit = y * dim**0.5 / y.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    want = trellis_reference.pack(trellis_reference.search(unit, table, bits, by.reach), bits)
    got, window = codes[:, :, 3 : tokens + 3].flatten(0, 2), states.bit_length() - 1
    values = [table.double()[reference.states(c, bits, window, dim)] for c in (got, want)]
    errors = [(v - unit).square().sum(-1) for v in values]
    exact = y.norm(dim=-1) / values[0].norm(dim=-1)
    stored = encode_reference.decode_scale(scale[:, :, 3 : tokens + 3]).flatten().double()
    unit_in_the_last_place = 2.0**-10 if scale_format == "fp16" else 2.0 ** (1 / 16) - 1
    off = ((stored - exact).abs() > 1.01 * unit_in_the_last_place * exact + 1e-7).double().mean().item()
    same = (got == want).all(-1).double().mean().item()
    print(f"     {same:.4f} of vectors have the reference's codes: {kind} {dtype} {inputs} {options}", flush=True)
    return max(((errors[0].sum() - errors[1].sum()) / errors[1].sum()).item(), 0.0) + off


def trellis_step_case(key: str, value: str) -> float:
    """Relative error of steps whose ring fills, in a CUDA graph, so that a block is encoded while it replays."""
    torch.manual_seed(0)
    dim, batch, heads, capacity, window, count = 128, 2, 2, 256, 64, 128
    basis = torch.linalg.qr(torch.randn(dim, dim, device=DEVICE)).Q[None].contiguous()
    sides, stores = [], []
    for kind in (key, value):
        (table, size), (states, bits) = table_of(kind, DEVICE), parse(kind)
        by = encode_trellis.trellis_encoder(basis, None, table, size, bits, "fp16")
        back = basis.mT.contiguous()
        sides.append(step.Side(table, bits, size, False, back, None, by, states.bit_length() - 1))
        codes = torch.zeros(batch, heads, capacity, dim * bits // 8, dtype=torch.uint8, device=DEVICE)
        stores.append(((codes,), torch.zeros(batch, heads, capacity, 1, dtype=torch.float16, device=DEVICE)))
    packed = [side.packed(*store) for side, store in zip(sides, stores, strict=True)]
    split = fast.FastSplit(lookup_of(packed[0]), lookup_of(packed[1], of_keys=False))
    constants = step.Constants(*sides, split)
    tokens = torch.randn(2, batch, heads, count + 8, dim, device=DEVICE, dtype=torch.bfloat16)
    held = ring.empty_ring(tokens[0], 0, window)
    held.exact[:, :, :, : held.room] = tokens[:, :, :, : held.room]
    held.state[0] = held.room
    query, new = torch.randn(batch, 2 * heads, 1, dim, device=DEVICE).bfloat16(), tokens[:, :, :, :1].clone()
    state = held.state.clone()
    for graph in (None, torch.cuda.CUDAGraph()):  # the first run compiles
        held.state.copy_(state)
        call = lambda: step.ring_step(query, tuple(new), held, *stores, constants, None, dim**-0.5)  # noqa: E731
        if graph is None:
            call()
            continue
        with torch.cuda.graph(graph):
            out, _ = call()
    held.exact[:, :, :, : held.room] = tokens[:, :, :, : held.room]
    held.state.copy_(state)
    for i in range(3):
        new.copy_(tokens[:, :, :, held.room + i : held.room + i + 1])
        graph.replay()
    length = int(held.state[2])
    recent = tuple(tokens[:, :, :, length : held.room + 3].double())
    want, _ = reference.decode_attention(
        query.double(), *packed, *(side.back for side in sides), None, None, None, recent, length, dim**-0.5
    )
    for states, side, (planes, scale) in zip(tokens, sides, stores, strict=True):
        codes, scales = torch.zeros_like(planes[0]), torch.zeros_like(scale)
        encode.encode(states[:, :, :64], (codes,), scales, 0, side.encoder)
        if not (torch.equal(codes, planes[0]) and torch.equal(scales, scale)):
            return float("inf")
    torch.cuda.synchronize()
    return ((out - want).norm() / want.norm()).item() / 4 + (length != 64)  # the output is rounded to bfloat16


def trellis_cases(tokens: int):
    """(function, arguments) of every check."""
    for kind, key, value, how in LOOKUPS + RINGS:
        yield decode_case, ("int8", kind, kind, 128, 4, tokens, "random", 1, (), (key, value), how)
    for kind in ("T16.2", "T64.1", "T64.3", "T256.2", "T256.3", "T1024.4"):
        yield decode_case, ("int8", kind, kind, 64, 4, tokens, "random")
    for short in (1, 63, 64, 65, 129):  # spans without a whole tile, and with one
        yield decode_case, ("int8", "T256.3", "T16.2", 128, 4, short, "random")
    for options in (("mask",), ("lengths", "softcap"), ("means", "bf16"), ("log8",), ("paged",), ("bare",)):
        yield decode_case, ("int8", "T256.3", "T16.2", 128, 4, tokens, "random", 1, options)
    for key, value, dim, share in (
        ("T256.2", "3", 128, 4), ("4", "T256.3", 128, 4), ("T256.3", "T256.2", 256, 4), ("T64.1", "T64.4", 128, 16),
    ):  # fmt: skip
        yield decode_case, ("int8", key, value, dim, share, tokens, "random")
    for inputs in ("heavy", "constant", "zero", "huge"):
        yield decode_case, ("int8", "T256.3", "T256.2", 128, 4, tokens, inputs, 1, ("fp32",))
    for key, value, dim in (("T256.3", "T16.2", 128), ("T1024.2", "4", 64), ("2", "T64.1", 80)):
        yield decode_case, ("plain", key, value, dim, 4, tokens, "random", 1, ("mask", "means"))
    for states in (16, 64, 256, 1024):
        for bits in (1, 2, 3, 4):
            if states >> bits <= 256:
                yield trellis_encode_case, (f"T{states}.{bits}", 128, "bfloat16", "random", "fp16", {})
    for kind, options in [("T256.2", {"ptx": False}), ("T256.3", {"ptx": False}), *ENCODERS]:
        yield trellis_encode_case, (kind, 128, "bfloat16", "random", "fp16", options)
    for inputs in ("heavy", "constant", "zero", "huge"):
        yield trellis_encode_case, ("T256.3", 128, "float32", inputs, "log8", {})
    yield trellis_encode_case, ("T64.2", 256, "float16", "random", "fp16", {})
    yield trellis_encode_case, ("T64.3", 80, "float16", "random", "fp16", {})
    yield trellis_step_case, ("T256.3", "T16.2")
