"""The device side of `encode_trellis`: Viterbi's algorithm, a vector a lane, all path costs of a vector in registers.

Table entries are integers V, so costs are integers too: a coordinate X, in table steps and fixed point, adds
`V * V - 2 * V * X`, an integer multiplication and an addition with constants of the program. The lowest bits of a cost
are no cost: there a path notes the symbols it dropped in the last `GROUP` steps, lower steps lower, so that the minimum
also tells where it came from. They are stored and cleared after each group. See `plugins/trellis.py` for the algorithm.
"""

import triton
import triton.language as tl

from .encode_kernel import stored_scale
from .ring import due_block
from .storage import offset_of


@triton.constexpr_function
def _own_cost(value, point, note):
    """What a state adds whatever the coordinate is, with the note of the symbol that it drops."""
    return (value * value << point) + note


@triton.constexpr_function
def _places(bits, first):
    """The `bits` bits from `first` on, as a signed number of 32 bits."""
    mask = ((1 << bits) - 1) << first
    return mask - (1 << 32 if mask >> 31 else 0)


@triton.constexpr_function
def _text(table, bits, point, r, overlap, products):
    """PTX of `_least`: as a chain in this order, an addition and a minimum become one instruction (VIADDMNMX).

    Of `products` states the addition is a product with a number that only we know to be 1, for the multiplier to do.
    """
    lines, one = [".reg .s32 path;"], f"${2 + (1 << bits)}"
    for j in range(1 << bits):
        value = table[(overlap << bits) + j]
        target = "path" if j else "$0"
        lines.append(f"mad.lo.s32 {target}, $1, {value}, ${j + 2};")
        own = _own_cost(value, point, j << bits * r)
        add = f"mad.lo.s32 {target}, {one}, {own}" if j < products else f"add.s32 {target}, {own}"
        lines.append(f"{add}, {target};")
        if j:
            lines.append("min.s32 $0, path, $0;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _constraints(bits):
    return ",".join(["=&r"] + ["r"] * ((1 << bits) + 2))


@triton.jit
def _least(x, behind, one, TABLE: tl.constexpr, BITS: tl.constexpr, POINT: tl.constexpr, R: tl.constexpr,
           OVERLAP: tl.constexpr, PTX: tl.constexpr, PRODUCTS: tl.constexpr):  # fmt: skip
    """The least cost of the states that hand on an overlap, given those of the overlaps behind them."""
    if PTX:
        text: tl.constexpr = _text(TABLE, BITS, POINT, R, OVERLAP, PRODUCTS)
        return tl.inline_asm_elementwise(text, _constraints(BITS), (x,) + behind + (one,), tl.int32, True, 1)
    else:
        best = behind[0] + x * TABLE[OVERLAP << BITS] + _own_cost(TABLE[OVERLAP << BITS], POINT, 0)
        for j in tl.static_range(1, 1 << BITS):
            path = behind[j] + x * TABLE[(OVERLAP << BITS) + j]
            best = tl.minimum(best, path + _own_cost(TABLE[(OVERLAP << BITS) + j], POINT, j << BITS * R))
        return best


@triton.jit
def _stepped(costs, x, one, TABLE: tl.constexpr, BITS: tl.constexpr, POINT: tl.constexpr, R: tl.constexpr,
             PTX: tl.constexpr, PRODUCTS: tl.constexpr):  # fmt: skip
    """The least costs of paths to every overlap after one more coordinate, the `R`-th of a group; `x` is -2 X."""
    new = ()
    for overlap in tl.static_range(len(costs)):
        # The states that hand on an overlap are neighbours: they differ in the symbol that is dropped.
        behind = ()
        for j in tl.static_range(1 << BITS):
            behind += (costs[((overlap << BITS) + j) % len(costs)],)
        new += (_least(x, behind, one, TABLE, BITS, POINT, R, overlap, PTX, PRODUCTS),)
    return new


@triton.jit
def _forward(p_x, costs, first, last, p_notes, stride, m_v, one, TABLE: tl.constexpr, BITS: tl.constexpr,
             POINT: tl.constexpr, GROUP: tl.constexpr, KEEP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
             PTX: tl.constexpr, PRODUCTS: tl.constexpr):  # fmt: skip
    """Costs after the coordinates `first` to `last` (modulo DIM); with KEEP every group's notes are stored."""
    NOTE: tl.constexpr = BITS * GROUP
    A_WORD: tl.constexpr = 32 // NOTE
    WORDS: tl.constexpr = (len(costs) + A_WORD - 1) // A_WORD
    for i in range(first, last, GROUP):
        for r in tl.static_range(GROUP):
            x = tl.load(p_x + (i + r) % DIM * stride, mask=m_v, other=0) << NOTE
            costs = _stepped(costs, x, one, TABLE, BITS, POINT, r, PTX, PRODUCTS)
        if KEEP:
            for w in tl.static_range(WORDS):
                word = costs[w * A_WORD] & ((1 << NOTE) - 1)
                for o in tl.static_range(1, min(A_WORD, len(costs) - w * A_WORD)):
                    word |= (costs[w * A_WORD + o] << (NOTE * o)) & _places(NOTE, NOTE * o)
                tl.store(p_notes + ((i - first) // GROUP * WORDS + w) * BLOCK, word)
        cleared = ()
        for o in tl.static_range(len(costs)):
            cleared += (costs[o] & -(1 << NOTE),)
        costs = cleared
    return costs


@triton.jit
def _note(p_notes, group, overlap, OVERLAPS: tl.constexpr, NOTE: tl.constexpr, BLOCK: tl.constexpr):
    """What the best path to `overlap` noted in a group."""
    A_WORD: tl.constexpr = 32 // NOTE
    WORDS: tl.constexpr = (OVERLAPS + A_WORD - 1) // A_WORD
    word = tl.load(p_notes + (group * WORDS + overlap // A_WORD) * BLOCK)
    return (word >> (overlap % A_WORD * NOTE)) & ((1 << NOTE) - 1)


# Not specialised: what changes from call to call, or Triton compiles anew.
@triton.jit(do_not_specialize=["slot_stride", "sinks", "capacity", "tokens", "heads", "start", "count", "tiles", "one"])
def viterbi_kernel(
    p_x,  # int32 [DIM, count]: -2 X without the bits of notes, and norms: what `encode_kernel` makes for METHOD "unit"
    p_norm,
    p_values,  # float32 [states], the table in units of its step
    p_notes,  # int32, for every program [groups of a pass, WORDS, BLOCK]
    codes,
    scale,
    slots,
    p_state,  # of the ring whose block is encoded; see `encode_kernel`
    code_strides,
    scale_strides,
    slot_stride,
    sinks,
    capacity,
    tokens,
    heads,
    start,
    count,
    tiles,
    step,
    one,  # 1: see `_text`
    TABLE: tl.constexpr,
    BITS: tl.constexpr,
    POINT: tl.constexpr,  # the bit of a cost that is worth one squared table step
    LOWEST: tl.constexpr,  # what paths begin with
    FAR: tl.constexpr,  # more than any path with the right beginning costs more than one with a wrong one
    GROUP: tl.constexpr,
    REACH: tl.constexpr,
    DIM: tl.constexpr,
    LOG_SCALE: tl.constexpr,
    CORRECT: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    PTX: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Vectors `tile * BLOCK` and on, for every `num_programs`-th tile."""
    OVERLAPS: tl.constexpr = len(TABLE) >> BITS
    NOTE: tl.constexpr = BITS * GROUP
    WORDS: tl.constexpr = (OVERLAPS + 32 // NOTE - 1) // (32 // NOTE)
    lane = tl.arange(0, BLOCK)
    if ROOM:
        due, _first, start, _packed = due_block(p_state, sinks, capacity, ROOM)
        tiles = tl.where(due, tiles, 0)
    p_notes += tl.program_id(0).to(tl.int64) * (DIM // GROUP * WORDS * BLOCK) + lane
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_v = tile * BLOCK + lane.to(tl.int64)
        m_v = i_v < count
        # The overlap at the seam, from the coordinates about it.
        costs = ()
        for _ in tl.static_range(OVERLAPS):
            costs += (tl.full([BLOCK], LOWEST, tl.int32),)
        costs = _forward(p_x + i_v, costs, DIM - REACH, DIM, p_notes, count, m_v, one, TABLE, BITS, POINT, GROUP, False,
                         DIM, BLOCK, PTX, PRODUCTS)  # fmt: skip
        costs = _forward(p_x + i_v, costs, DIM, DIM + REACH, p_notes, count, m_v, one, TABLE, BITS, POINT, GROUP, True,
                         DIM, BLOCK, PTX, PRODUCTS)  # fmt: skip
        least = costs[0]
        overlap = tl.zeros([BLOCK], tl.int32)
        for o in tl.static_range(1, OVERLAPS):
            overlap = tl.where(costs[o] < least, o, overlap)
            least = tl.minimum(costs[o], least)
        tl.debug_barrier()  # notes are read by the lane that wrote them; the compiler need not know
        for group in range(REACH // GROUP - 1, -1, -1):
            note = _note(p_notes, group, overlap, OVERLAPS, NOTE, BLOCK)
            for r in tl.static_range(GROUP):
                symbol = (note >> (BITS * (GROUP - 1 - r))) & ((1 << BITS) - 1)
                overlap = ((overlap << BITS) | symbol) & (OVERLAPS - 1)
        # The best path from that overlap to itself.
        costs = ()
        for o in tl.static_range(OVERLAPS):
            costs += (tl.where(overlap == o, LOWEST, LOWEST + FAR),)
        costs = _forward(p_x + i_v, costs, 0, DIM, p_notes, count, m_v, one, TABLE, BITS, POINT, GROUP, True, DIM,
                         BLOCK, PTX, PRODUCTS)  # fmt: skip
        tl.debug_barrier()
        token, i_h, page = i_v % tokens, i_v // tokens % heads, i_v // tokens // heads
        seen = m_v
        if PAGE_TOKENS:
            slot = tl.load(slots + page * slot_stride + token, mask=seen, other=-1)
            seen, page, row = slot >= 0, slot // PAGE_TOKENS, slot % PAGE_TOKENS
        else:
            row = token + start
        rows = codes + offset_of(page, row, i_h, lane * 0, code_strides, CODE_UNIT)
        energy = tl.zeros([BLOCK], tl.float32)
        for octet in range(DIM // 8 - 1, -1, -1):
            string = tl.zeros([BLOCK], tl.int32)
            for part in tl.static_range(8 // GROUP):
                note = _note(p_notes, (octet + 1) * (8 // GROUP) - 1 - part, overlap, OVERLAPS, NOTE, BLOCK)
                for r in tl.static_range(GROUP):
                    symbol = (note >> (BITS * (GROUP - 1 - r))) & ((1 << BITS) - 1)
                    state = (overlap << BITS) | symbol
                    overlap = state & (OVERLAPS - 1)
                    string = (string << BITS) | symbol
                    if CORRECT:
                        value = tl.load(p_values + state)
                        energy += value * value
            for byte in tl.static_range(BITS):
                tl.store(rows + octet * BITS + byte, (string >> (8 * byte)).to(tl.uint8), mask=seen)
        norm = tl.load(p_norm + i_v, mask=m_v, other=0.0)
        stored = norm / (step * tl.sqrt(energy)) if CORRECT else norm / DIM**0.5
        rows = scale + offset_of(page, row, i_h, lane * 0, scale_strides, 1)
        tl.store(rows, stored_scale(stored, LOG_SCALE), mask=seen)
