"""Split-KV decoding on int8 tensor cores (mma.sync m16n8k32, sm_80 and later), one warp a program.

Packed rows come through a ring of shared-memory buffers (`fast_tiles`); in registers codes become signed bytes
(`fast_asm`), which go straight into the tensor core. The query and the softmax weights are 16-bit fixed point, a high
and a low byte in neighbouring columns, so products are exact and their error is that of rounding to 1/32000 of a
column's largest number.

Tokens lie on the rows of the key product and, as its depth, of the value product; heads lie on the columns. The
order of coordinates and of the tokens of a tile is free, so it is chosen such that every lane loads whole vectors
and every load of a warp whole cache lines: lane 4g + c reads a quarter c of the rows of tokens `8 i + g` of the keys
and an eighth g of the rows of tokens `4 i + c` of the values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .fast_operands import (
    LIMIT,
    code_bits,
    is_trellis,
    is_uniform,
    join_fixed,
    key_operands,
    key_tables,
    main_bits,
    per_head,
    query_operands,
    value_tables,
    word_count,
    zero_point,
)  # fmt: skip
from .fast_products import add_values, key_products, no_values, store_values
from .fast_tiles import (
    by_row,
    copy_side,
    key_tile,
    load_rows,
    ring,
    row_tokens,
    scale_ring,
    value_scales,
    value_tile,
)  # fmt: skip
from .fast_trellis import (
    copy_strings,
    declare,
    in_shared_memory,
    key_strings,
    load_table,
    string_scales,
    trellis_key_operands,
    value_strings,
    warp_barrier,
)
from .fast_wide import copy_wide, wide_key_operands, wide_ring, wide_rows, wide_value_words
from .overlap import let_next_start, wait_for_previous


@gluon.jit
def side_ring(kind: gl.constexpr, NAME: gl.constexpr, SIZE: gl.constexpr, BUFFERS: gl.constexpr, T: gl.constexpr,
              DIM: gl.constexpr, p_scale):  # fmt: skip
    """The ring of one side; strings of trellis codes have theirs in an array `NAME` of `SIZE` bytes."""
    if is_trellis(kind):
        declare(NAME, SIZE)
        return (0, 0, scale_ring(BUFFERS, T, p_scale))
    else:
        return ring(BUFFERS, T, DIM, main_bits(kind), code_bits(kind) == 3, p_scale)


@gluon.jit
def copy_ahead(kind: gl.constexpr, NAME: gl.constexpr, PIECE: gl.constexpr, buffers, stage, side, s, end,
               D: gl.constexpr, ROW: gl.constexpr, HIGH_ROW: gl.constexpr, table, PAGE: gl.constexpr,
               T: gl.constexpr):  # fmt: skip
    """Start copying a whole tile of one side into its ring."""
    if is_trellis(kind):
        copy_strings(kind, NAME, buffers[2], stage, side, s, D, ROW, table, PAGE, T, PIECE)
    else:
        bits: gl.constexpr = main_bits(kind)
        copy_side(buffers, stage, side, s, end, D, bits, code_bits(kind) == 3, ROW, HIGH_ROW, table, PAGE, T)


# Not specialised: what changes from step to step, or it would be compiled anew.
@gluon.jit(do_not_specialize=["tokens", "kv_heads", "all_columns"])
def decode_kernel(
    p_query, p_bias, p_kc, p_kh, p_ks, k_table, p_vc, p_vh, p_vs, v_table, p_mask, p_lengths, p_pages, p_out, p_lse,
    tokens, kv_heads, all_columns, scaling, softcap, key_step, value_step,
    kc_n, kc_h, kh_n, kh_h, ks_n, ks_h, vc_n, vc_h, vh_n, vh_h, vs_n, vs_h, mask_b, pages_b, wide_key, wide_value,
    KEY: gl.constexpr, VALUE: gl.constexpr, D: gl.constexpr, KD: gl.constexpr, VD: gl.constexpr,
    COLUMNS: gl.constexpr, C: gl.constexpr, T: gl.constexpr, PAGE: gl.constexpr,
    KR: gl.constexpr, KHR: gl.constexpr, KSR: gl.constexpr, VR: gl.constexpr, VHR: gl.constexpr, VSR: gl.constexpr,
    STAGES: gl.constexpr, SOFTCAP: gl.constexpr, MASK: gl.constexpr, LENGTHS: gl.constexpr, BIAS: gl.constexpr,
    BUFFERS: gl.constexpr, RINGS: gl.constexpr, PIECES: gl.constexpr,
    WIDE_KEY: gl.constexpr, WIDE_VALUE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """One split of one KV head. See `plain.split` for the arguments, and `fast_wide` for the wide ones."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    A8: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    B8: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    N: gl.constexpr = 2 * C
    KB: gl.constexpr = code_bits(KEY)
    VB: gl.constexpr = code_bits(VALUE)
    KMAIN: gl.constexpr = main_bits(KEY)
    VMAIN: gl.constexpr = main_bits(VALUE)
    VALUE_WORDS: gl.constexpr = word_count("value", VALUE, VD)
    WK: gl.constexpr = WIDE_KEY[1]  # how many of the first coordinates have more bits; KEY, KD ... are of the others
    WV: gl.constexpr = WIDE_VALUE[1]
    WK_KIND: gl.constexpr = WIDE_KEY[0]
    WV_KIND: gl.constexpr = WIDE_VALUE[0]
    WK_D: gl.constexpr = WIDE_KEY[2]
    WV_D: gl.constexpr = WIDE_VALUE[2]
    WK_ROW: gl.constexpr = WIDE_KEY[3]
    WV_ROW: gl.constexpr = WIDE_VALUE[3]
    WK_HIGH_ROW: gl.constexpr = WIDE_KEY[4]
    WV_HIGH_ROW: gl.constexpr = WIDE_VALUE[4]
    OL: gl.constexpr = join_fixed(gl.zeros([16, N], gl.int32, MMA)).type.layout
    SL: gl.constexpr = join_fixed(gl.zeros([T, N], gl.int32, MMA)).type.layout
    HEAD: gl.constexpr = gl.SliceLayout(0, SL)
    HEAD_O: gl.constexpr = gl.SliceLayout(0, OL)

    let_next_start(OVERLAP)
    row = gl.program_id(0).to(gl.int64)
    i_split = gl.program_id(1)
    splits = gl.num_programs(1)
    b = row // kv_heads
    h = row % kv_heads
    if LENGTHS:
        tokens = gl.minimum(tokens, gl.load(p_lengths + b).to(gl.int32))
    tiles = gl.cdiv(tokens, T)
    start = tiles * i_split // splits * T
    end = gl.minimum(tiles * (i_split + 1) // splits * T, tokens)
    whole = start + gl.maximum(end - start, 0) // T * T
    first = b if PAGE == 0 else b * 0  # pages are found through the table
    p_pages += b * pages_b
    p_mask += b * mask_b
    keys = (
        p_kc + first * kc_n + h * kc_h,
        p_kh + first * kh_n + h * kh_h,
        p_ks + first * ks_n + h * ks_h,
        kc_n,
        kh_n,
        ks_n,
    )
    values = (
        p_vc + first * vc_n + h * vc_h,
        p_vh + first * vh_n + h * vh_h,
        p_vs + first * vs_n + h * vs_h,
        vc_n,
        vh_n,
        vs_n,
    )

    if WK > 0:
        k_rows = wide_rows(wide_key, first, h)
        wk_ring = wide_ring(WK_KIND, BUFFERS, T, WK_D)
        wk_tables = key_tables(wide_key[2], WK_KIND, T)
    if WV > 0:
        v_rows = wide_rows(wide_value, first, h)
        wv_ring = wide_ring(WV_KIND, BUFFERS, T, WV_D)
        wv_tables = value_tables(wide_value[2], WV_KIND, T)
        wide_acc = no_values(WV_D // 16, C, OL)

    # Whole tiles come through a ring of shared-memory buffers, copied `STAGES - 1` tiles ahead of their use.
    K_NAME: gl.constexpr = "tq_keys"
    V_NAME: gl.constexpr = "tq_values"
    KP: gl.constexpr = PIECES[0]
    VP: gl.constexpr = PIECES[1]
    k_ring = side_ring(KEY, K_NAME, RINGS[0], BUFFERS, T, KD, p_ks)
    v_ring = side_ring(VALUE, V_NAME, RINGS[1], BUFFERS, T, VD, p_vs)
    if in_shared_memory(KEY):
        load_table(k_table + 32, KEY)
    if in_shared_memory(VALUE) and VALUE != KEY:  # else it is the keys' table
        load_table(v_table + 32, VALUE)
    async_copy.commit_group()
    for ahead in gl.static_range(STAGES - 1):
        if start + ahead * T < whole:
            coming = start + ahead * T
            copy_ahead(KEY, K_NAME, KP, k_ring, ahead, keys, coming, end, D - WK, KR, KHR, p_pages, PAGE, T)
            copy_ahead(VALUE, V_NAME, VP, v_ring, ahead, values, coming, end, D - WV, VR, VHR, p_pages, PAGE, T)
            if WK > 0:
                copy_wide(WK_KIND, wk_ring, ahead, k_rows, coming, end, WK, WK_ROW, WK_HIGH_ROW, p_pages, PAGE)
            if WV > 0:
                copy_wide(WV_KIND, wv_ring, ahead, v_rows, coming, end, WV, WV_ROW, WV_HIGH_ROW, p_pages, PAGE)
        async_copy.commit_group()

    k_tables = key_tables(k_table, KEY, T)
    v_tables = value_tables(v_table, VALUE, T)

    wait_for_previous(OVERLAP)
    p_query += row * all_columns * D
    queries, top, total = query_operands(
        p_query + WK, KEY, word_count("key", KEY, KD), D - WK, D, COLUMNS, N, B8
    )  # fmt: skip
    gain = per_head(top, HEAD) * (key_step * scaling / LIMIT)
    head = gl.arange(0, C, HEAD)
    offset = gl.zeros([C], gl.float32, HEAD)
    if is_uniform(KEY):
        offset = zero_point(total, KEY, HEAD)
    if WK > 0:
        wide_queries, top, total = query_operands(
            p_query, WK_KIND, word_count("key", WK_KIND, WK_D), WK, D, COLUMNS, N, B8
        )
        wide_gain = per_head(top, HEAD) * (wide_key[3] * scaling / LIMIT)
        if is_uniform(WK_KIND):
            wide_offset = zero_point(total, WK_KIND, HEAD)
    bias = gl.zeros([C], gl.float32, HEAD)
    if BIAS:
        bias = gl.load(p_bias + row * all_columns + head, mask=head < COLUMNS, other=0.0)

    m = gl.full([C], -1e30, gl.float32, HEAD)
    mass = gl.zeros([C], gl.float32, HEAD)
    weight = gl.zeros([C], gl.float32, HEAD)  # sum of the fixed-point weights
    acc = no_values(VD // 16, C, OL)
    stage = 0
    for part in gl.static_range(2):  # whole tiles, then the one that ends in the middle, if any
        for s in range(start if part == 0 else whole, whole if part == 0 else end, T):
            if part == 0:
                free = (stage + STAGES - 1) % STAGES
                coming = gl.minimum(s + (STAGES - 1) * T, whole - T)
                if is_trellis(KEY) or is_trellis(VALUE):
                    warp_barrier()  # all lanes have read the tile before
                copy_ahead(KEY, K_NAME, KP, k_ring, free, keys, coming, end, D - WK, KR, KHR, p_pages, PAGE, T)
                copy_ahead(VALUE, V_NAME, VP, v_ring, free, values, coming, end, D - WV, VR, VHR, p_pages, PAGE, T)
                if WK > 0:
                    copy_wide(WK_KIND, wk_ring, free, k_rows, coming, end, WK, WK_ROW, WK_HIGH_ROW, p_pages, PAGE)
                if WV > 0:
                    copy_wide(
                        WV_KIND, wv_ring, free, v_rows, coming, end, WV, WV_ROW, WV_HIGH_ROW, p_pages,
                        PAGE,
                    )  # fmt: skip
                async_copy.commit_group()
                async_copy.wait_group(STAGES - 1)
                if is_trellis(KEY) or is_trellis(VALUE):
                    warp_barrier()
            elif in_shared_memory(KEY) or in_shared_memory(VALUE):  # there may have been no whole tile to wait for
                async_copy.wait_group(0)
                warp_barrier()
            if is_trellis(KEY):
                words = key_strings(KEY, K_NAME, stage, keys, s, end, D, KR, p_pages, PAGE, T, part == 1)
                ks = string_scales(k_ring[2], stage, keys, s, end, KSR, p_pages, PAGE, T, part == 1)
                operands = trellis_key_operands(KEY, words, k_tables)
            else:
                words, high, ks = key_tile(
                    k_ring, stage, keys, s, end, KD, D - WK, KMAIN, KB == 3, KR, KHR, KSR, p_pages, PAGE, T, part == 1
                )
                operands = key_operands(KEY, words, high, k_tables)
            scores = key_products(operands, queries, T, N, A8, MMA)
            if is_uniform(KEY):
                scores = scores - offset[None, :]
            if WK > 0:
                operands = wide_key_operands(
                    WK_KIND, wk_ring, stage, k_rows, s, end, WK_D, WK, WK_ROW, WK_HIGH_ROW, p_pages,
                    PAGE, T, part == 1, wk_tables,
                )  # fmt: skip
                more = key_products(operands, wide_queries, T, N, A8, MMA)
                if is_uniform(WK_KIND):
                    more = more - wide_offset[None, :]
                scores = (scores * gain[None, :] + more * wide_gain[None, :]) * by_row(ks, scores)[:, None]
            else:
                scores = scores * (by_row(ks, scores)[:, None] * gain[None, :])
            if BIAS:
                scores = scores + bias[None, :]
            if SOFTCAP:  # tanh by way of exp2
                scores = softcap * (1.0 - 2.0 / (1.0 + gl.exp2(scores * (2.8853900817779268 / softcap))))
            scores = scores * 1.4426950408889634
            if MASK or part == 1:
                seen = s + row_tokens(T) < end
                if MASK:
                    seen = seen & (load_rows(p_mask, s, end, 1, p_pages, 0, 0, T, part == 1) != 0)
                scores = scores + by_row(gl.where(seen, 0.0, -1e30), scores)[:, None]
            tile_top = gl.maximum(gl.max(scores, 0), -1e30)
            new_m = gl.maximum(m, tile_top)
            shrink = gl.exp2(m - new_m)
            grow = gl.exp2(tile_top - new_m)
            m = new_m
            p = gl.exp2(scores - tile_top[None, :])
            if MASK or part == 1:
                p = gl.where(scores > -5e29, p, 0.0)
            mass = mass * shrink + grow * gl.sum(p, 0)

            if is_trellis(VALUE):
                vs = string_scales(v_ring[2], stage, values, s, end, VSR, p_pages, PAGE, T, part == 1)
            else:
                vs = value_scales(v_ring, stage, values, s, end, VSR, p_pages, PAGE, T, part == 1)
            vmax = gl.maximum(gl.max(vs, 0), 1e-30)
            grow = grow * (vmax / LIMIT)
            # 1.5 * 2**23 puts the integer into the low bits of the float; the 128 rounds the high byte.
            x = gl.fma(p, by_row(vs * (LIMIT / vmax), scores)[:, None] + gl.zeros_like(p), gl.full_like(p, 12583040.0))
            if is_uniform(VALUE) or (WV > 0 and is_uniform(WV_KIND)):
                weight = weight * shrink + grow * gl.sum(x - 12583040.0, 0)
            bits = x.to(gl.int32, bitcast=True)
            P = gl.join((bits >> 8).to(gl.int8), (bits ^ 128).to(gl.int8))
            P = gl.permute(gl.reshape(P, [T // 32, 4, 2, 4, N]), [0, 2, 3, 1, 4])  # the order of `value_words`
            P = gl.convert_layout(gl.reshape(P, [T, N]), B8)
            shrink_o = gl.convert_layout(shrink, HEAD_O)[None, :]
            grow_o = gl.convert_layout(grow, HEAD_O)[None, :]
            if is_trellis(VALUE):
                v_words = value_strings(VALUE, V_NAME, stage, values, s, end, D, VR, p_pages, PAGE, T, part == 1)
                v_high = v_words
            else:
                v_words, v_high = value_tile(
                    v_ring, stage, values, s, end, VD, D - WV, VMAIN, VB == 3, VR, VHR, p_pages, PAGE, T, part == 1
                )
            acc = add_values(VALUE, VALUE_WORDS, v_words, v_high, v_tables, acc, P, shrink_o, grow_o, A8, MMA)
            if WV > 0:
                v_words, v_high = wide_value_words(
                    WV_KIND, wv_ring, stage, v_rows, s, end, WV_D, WV, WV_ROW, WV_HIGH_ROW,
                    p_pages, PAGE, T, part == 1,
                )  # fmt: skip
                wide_acc = add_values(
                    WV_KIND, word_count("value", WV_KIND, WV_D), v_words, v_high, wv_tables,
                    wide_acc, P, shrink_o, grow_o, A8, MMA,
                )  # fmt: skip
            if part == 0:
                stage = (stage + 1) % STAGES
    inverse = gl.where(mass > 0.0, 1.0 / mass, 0.0)
    o_out = (row * splits + i_split) * all_columns
    scale_o = gl.convert_layout(inverse, HEAD_O)[None, :]
    weight_o = gl.convert_layout(weight * inverse, HEAD_O)[None, :]
    col = gl.arange(0, C, HEAD_O)[None, :]
    p_out += (o_out + col) * D
    store_values(
        p_out + WV, acc, scale_o * value_step, weight_o * value_step, VALUE, VALUE_WORDS, D - WV, col < COLUMNS
    )
    if WV > 0:
        store_values(
            p_out, wide_acc, scale_o * wide_value[3], weight_o * wide_value[3], WV_KIND,
            word_count("value", WV_KIND, WV_D), WV, col < COLUMNS,
        )  # fmt: skip
    lse = gl.where(mass > 0.0, m + gl.log2(mass), -float("inf"))
    gl.store(p_lse + o_out + head, lse, mask=head < COLUMNS)
