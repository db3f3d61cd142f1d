"""Cases of `check_kernels.py` for vectors whose first coordinates have more bits; kinds are those of `bench_decode`."""

from collections.abc import Callable, Iterator

# Fractions and outliers at head_dim 128: bits and sizes that the int8 kernel reads in ways of their own.
KINDS = [
    "2.5",
    "2.25",
    "2.75",
    "3.5",
    "3.25",
    "3.75",
    "1.5",
    "4x32+2",
    "4x16+2",
    "4x64+1",
    "3x32+1",
    "8x32+4",
    "u4x64+u2",
]
ELSEWHERE = [(64, "2.5"), (64, "3.5"), (64, "4x16+2"), (64, "4x32+3"), (96, "4x32+2"), (192, "2.5"), (256, "2.5")]
ELSEWHERE += [(256, "3.25"), (256, "4x64+2")]
PLAIN = [("2.5", 128), ("4x16+2", 64), ("3.25", 64), ("6x16+5", 80), ("8x32+5", 128), ("2.5", 256), ("1.2", 80)]


def parts_cases(tokens: int, decode: Callable, encode: Callable, chunk: Callable) -> Iterator[tuple[Callable, tuple]]:
    """Functions of `check_kernels` and their arguments."""
    for kind in KINDS:
        yield decode, ("int8", kind, kind, 128, 4, tokens, "random")
        yield decode, ("int8", kind, "4", 128, 4, tokens, "random", 1, ("means", "mask"))
        yield decode, ("int8", "3", kind, 128, 8, tokens, "random", 1, ("lengths", "log8"))
    for dim, kind in ELSEWHERE:
        yield decode, ("int8", kind, kind, dim, 4, tokens, "random")
    for pair in (("2.5", "2.5"), ("3.5", "4x32+2")):
        for options in (("paged",), ("softcap",), ("bare",), ("bf16", "mask")):
            yield decode, ("int8", *pair, 128, 4, tokens, "random", 1, options)
        for inputs in ("heavy", "constant", "zero", "huge"):
            yield decode, ("int8", *pair, 128, 4, tokens, inputs, 1, ("fp32",))
        for share in (1, 5, 16):
            yield decode, ("int8", *pair, 128, share, tokens, "random")
        for length in (1, 63, 65):
            yield decode, ("int8", *pair, 128, 4, length, "random")
    yield decode, ("int8", "T16.3", "2.5", 128, 4, tokens, "random")
    for kind, dim in PLAIN:
        yield decode, ("plain", kind, kind, dim, 4, tokens, "random", 1, ("mask", "means"))
    for options in (("paged",), ("lengths", "softcap"), ("log8",)):
        yield decode, ("plain", "2.5", "4x32+2", 128, 4, tokens, "random", 1, options)
    for inputs in ("heavy", "zero", "huge"):
        yield decode, ("plain", "2.5", "3.5", 128, 4, tokens, inputs)
    for kind, dim in (("2.5", 128), ("3.25", 64), ("4x16+2", 64), ("3.75", 128), ("6x32+5", 96), ("2.5", 256)):
        yield encode, (kind, dim, "bfloat16", "random", "fp16", True, tokens)
        yield encode, (kind, dim, "float32", "heavy", "log8", False, 7)
    for inputs in ("constant", "zero", "huge"):
        yield encode, ("2.5", 128, "float16", inputs, "fp16", True, tokens)
    yield chunk, (128, 4, 1500, 300, "bfloat16", ("2.5",))
    yield chunk, (64, 4, 1500, 300, "float16", ("4x16+2", "mask"))
