# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + b for up to 64 tokens, on the sparse tensor cores of sm_80 and later, from the 2:4 weight as it is stored.

W is the A operand of `mma.sp.m16n8k32` (16 rows), x^T its B operand (8 tokens). A product may be summed over K in any
order, so each lane fills its slots of A with the 16 bytes it can load at once, and ids and x follow. Nothing is
expanded, shuffled or staged in shared memory.

A *chunk* is what a quad of lanes loads of one row at once: `4 G` groups of 4 columns, G = 4 groups a lane for 16-bit
values (16 bytes a lane), G = 8 for int8 (16 bytes) and int4 (8 bytes). Lane 4q+t, of rows q and q+8 (PTX ISA, "Matrix
Fragments for sparse mma.m16n8k32"; "real" groups are counted in the chunk, h is which of the chunk's G/2 products):

      real group   0 .. G-1  | G .. 2G-1 | 2G .. 3G-1 | 3G .. 4G-1        of row q, and of row q+8
      loaded by    lane t=0  |    t=1    |    t=2     |    t=3
                    |  |
      product h takes groups 2h (instruction group t) and 2h+1 (instruction group t+4) of what each lane holds

      A register   0: real group G t + 2h, row q      1: same, row q+8      2: G t + 2h+1, row q      3: same, row q+8
      B register r, token q: instruction k = 2t+i+8r, so instruction group t//2 + 2r, columns 2(t%2)+i; its real group is
                   G (t//2 + 2(r%2)) + 2h + r//2, and the lane takes the low (t even) or high (t odd) 32 bits of it
      metadata     the word of lane t serves the products h with h%2 = t//2; nibble n of its halves (row q low, row q+8
                   high) is instruction group 4(t%2) + n, real group G n + 2h + t%2. For G = 4 that is nibble 4n + t of
                   the row's 16, one word for both products; for G = 8 nibbles 8n + t and 8n + 4 + t of its 32.
      C, D         register r: row q + 8(r//2), token 2t + r%2

Warps share K and tokens; partial sums meet in a fixed order, so results are the same from run to run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MMA_CONSTRAINTS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")
_MMA = (
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.TYPE.TYPE.f32 "
    "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, "
)
MMA_BF16_FIRST = gl.constexpr(_MMA.replace("TYPE", "bf16") + "0x0;")
MMA_BF16_SECOND = gl.constexpr(_MMA.replace("TYPE", "bf16") + "0x1;")
MMA_FP16_FIRST = gl.constexpr(_MMA.replace("TYPE", "f16") + "0x0;")
MMA_FP16_SECOND = gl.constexpr(_MMA.replace("TYPE", "f16") + "0x1;")
SUBTRACT_BF16 = gl.constexpr("{ .reg .b32 m; mov.b32 m, 0xBF80BF80; fma.rn.bf16x2 $0, $2, m, $1; }")
SUBTRACT_FP16 = gl.constexpr("sub.rn.f16x2 $0, $1, $2;")
SUBTRACT_CONSTRAINTS = gl.constexpr("=r,r,r")
VALID_IDS = gl.constexpr(0x4444444444444444)
"""Columns 0 and 1 in each group: what the metadata says beyond the end of a row, where the values are 0."""


@gluon.constexpr_function
def axis_layout(layout, rank, axis):
    """The layout of a vector that becomes axis `axis` of a tensor of layout `layout` once expanded from the left."""
    for other in reversed(range(rank)):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def positions(SIZE: gl.constexpr, LAYOUT: gl.constexpr, RANK: gl.constexpr, AXIS: gl.constexpr):
    """0 .. SIZE-1 along one axis of a tensor, all other axes of size 1."""
    index = gl.arange(0, SIZE, axis_layout(LAYOUT, RANK, AXIS))
    for other in gl.static_range(RANK):
        if other != AXIS:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit
def rows_of_lanes(
    first_block,
    rows,
    BLOCKS: gl.constexpr,
    LAYOUT: gl.constexpr,
    RANK: gl.constexpr,
    HALF: gl.constexpr,
    LANE: gl.constexpr,
):
    """Rows q and q+8 of blocks along axis 0; those beyond the last row are the last: read again and not stored."""
    block = first_block + positions(BLOCKS, LAYOUT, RANK, 0)
    row = block * 16 + positions(2, LAYOUT, RANK, HALF) * 8 + positions(32, LAYOUT, RANK, LANE) // 4
    return gl.minimum(row, rows - 1)


@gluon.jit
def fragments(words, PRODUCTS: gl.constexpr):
    """`[i, j, low bit of register, lane, word 2h + high bit]` -> `[i, j, lane, register, h]`, registers renamed only."""
    OUTER: gl.constexpr = words.shape[0]
    INNER: gl.constexpr = words.shape[1]
    by_bits = words.reshape([OUTER, INNER, 2, 32, PRODUCTS, 2]).permute([0, 1, 3, 5, 2, 4])
    return by_bits.reshape([OUTER, INNER, 32, 4, PRODUCTS])


@gluon.jit
def multiply_pair(a, b, acc, metadata, ACC: gl.constexpr, FP16: gl.constexpr):
    """acc + A B of two products that share a metadata word.

    a: int32 `[row block, (chunk), lane, register, 2]`, b: int32 `[(chunk), token block, lane, register, 2]`,
    acc: `[row block, (chunk), token block, lane, register]`, metadata: int32 of that shape with 1 token block and register.
    """
    TOKEN_AXIS: gl.constexpr = len(a.shape) - 3
    A_LAYOUT: gl.constexpr = gl.SliceLayout(TOKEN_AXIS, ACC)
    B_LAYOUT: gl.constexpr = gl.SliceLayout(0, ACC)
    a0, a1 = gl.split(a)
    b0, b1 = gl.split(b)
    a0 = gl.expand_dims(gl.convert_layout(a0, A_LAYOUT, assert_trivial=True), TOKEN_AXIS)
    a1 = gl.expand_dims(gl.convert_layout(a1, A_LAYOUT, assert_trivial=True), TOKEN_AXIS)
    b0 = gl.expand_dims(gl.convert_layout(b0, B_LAYOUT, assert_trivial=True), 0)
    b1 = gl.expand_dims(gl.convert_layout(b1, B_LAYOUT, assert_trivial=True), 0)
    FIRST: gl.constexpr = MMA_FP16_FIRST if FP16 else MMA_BF16_FIRST
    SECOND: gl.constexpr = MMA_FP16_SECOND if FP16 else MMA_BF16_SECOND
    acc = gl.inline_asm_elementwise(FIRST, MMA_CONSTRAINTS, [a0, b0, acc, metadata], gl.float32, True, 4)
    return gl.inline_asm_elementwise(SECOND, MMA_CONSTRAINTS, [a1, b1, acc, metadata], gl.float32, True, 4)


@gluon.jit
def multiply_two_pairs(a, b, early, late, ACC: gl.constexpr, FP16: gl.constexpr):
    """A B of four products, of which the first two share the metadata `early`, the others `late`.

    a: int32 `[row block, chunk, lane, register, 4]`, b: int32 `[chunk, token block, lane, register, 4]`.
    """
    part = gl.zeros([a.shape[0], a.shape[1], b.shape[1], 32, 4], gl.float32, ACC)
    a_early, a_late = gl.split(a.reshape([a.shape[0], a.shape[1], 32, 4, 2, 2]).permute([0, 1, 2, 3, 5, 4]))
    b_early, b_late = gl.split(b.reshape([b.shape[0], b.shape[1], 32, 4, 2, 2]).permute([0, 1, 2, 3, 5, 4]))
    part = multiply_pair(a_early, b_early, part, early, ACC, FP16)
    return multiply_pair(a_late, b_late, part, late, ACC, FP16)


@gluon.jit
def exact_difference(minuend, subtrahend, FP16: gl.constexpr):
    """minuend - subtrahend of two 16-bit floating point numbers in each int32."""
    SUBTRACT: gl.constexpr = SUBTRACT_FP16 if FP16 else SUBTRACT_BF16
    return gl.inline_asm_elementwise(SUBTRACT, SUBTRACT_CONSTRAINTS, [minuend, subtrahend], gl.int32, True, 1)


@gluon.jit
def floats_of_int8(words, FP16: gl.constexpr):
    """int32 `[..., n]` of four int8 -> int32 `[..., n, 2]` of two 16-bit floats; exact.

    Under the exponent of 128 (bf16) or 1024 (fp16) the 7 low bits of a byte count ones: B + low bits. The same with
    bit 7 alone is B, or B + 128 for a negative byte. Their difference is the value.
    """
    BASE: gl.constexpr = 0x64006400 if FP16 else 0x43004300
    low = (words & 0xFF) | ((words & 0xFF00) << 8)
    high = ((words >> 16) & 0xFF) | ((words >> 8) & 0xFF0000)
    pairs = gl.join(low, high)
    return exact_difference((pairs & 0x007F007F) | BASE, (pairs & 0x00800080) | BASE, FP16)


@gluon.jit
def floats_of_int4(words, FP16: gl.constexpr):
    """int32 `[..., n]` of eight nibbles (value + 8) -> int32 `[..., n, 2, 2]` of two 16-bit floats; exact."""
    BASE: gl.constexpr = 0x64006400 if FP16 else 0x43004300
    bytes_02 = gl.join(words, words >> 16)
    pairs = gl.join(bytes_02, bytes_02 >> 8)  # the byte of each group in the lowest 8 bits
    spread = (pairs & 0xF) | ((pairs << 12) & 0xF0000)
    return exact_difference(spread | BASE, gl.full_like(spread, BASE | 0x00080008), FP16)


@gluon.jit
def metadata_words(ids, shift, ROW_BLOCKS: gl.constexpr, CHUNKS: gl.constexpr, IDS: gl.constexpr):
    """Metadata of the lanes from the ids of their rows.

    ids: int64 `[row block, row half, lane, chunk * IDS]`, 16 nibbles each; shift: 4 t. Returns int32
    `[row block, lane, chunk]`, twice: for products 0 and 1, and for products 2 and 3 (the same if IDS is 1).
    """
    low = (ids.to(gl.int32) >> shift) & 0x000F000F
    high = ((ids >> 32).to(gl.int32) >> shift) & 0x000F000F
    if IDS == 1:
        nibbles = low | (high << 8)
        nibbles = nibbles | (nibbles >> 12)  # bits 0-15: nibbles t, 4+t, 8+t, 12+t
    else:
        nibbles = low | (high << 4)
        first, second = gl.split(nibbles.reshape([ROW_BLOCKS, 2, 32, CHUNKS, 2]))
        nibbles = first | (second << 8)  # bits 0-15: nibbles t, 8+t, 16+t, 24+t; bits 16-31: those 4 after
    upper, lower = gl.split(nibbles.permute([0, 2, 3, 1]))  # rows q and q+8
    return (upper & 0xFFFF) | (lower << 16), ((upper >> 16) & 0xFFFF) | (lower & -65536)


@gluon.jit
def beside_accumulator(words, ACC: gl.constexpr):
    """Metadata `[row block, lane, chunk]` -> `[row block, chunk, 1, lane, 1]`, in the lanes of the accumulator."""
    WHERE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, ACC))
    words = gl.convert_layout(words.permute([0, 2, 1]), WHERE, assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(words, 2), 4)


@gluon.jit
def scales_of_registers(scale, ACC: gl.constexpr):
    """Scales `[row block, chunk, row half, lane]` -> float32 `[row block, chunk, 1, lane, register]`."""
    factor = scale.to(gl.float32).permute([0, 1, 3, 2])
    factor = gl.join(factor, factor).reshape([scale.shape[0], scale.shape[1], 32, 4])  # register r: row half r//2
    return gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(2, ACC), assert_trivial=True), 2)


@gluon.jit
def rows_of_registers(first_row, BLOCKS: gl.constexpr, LAYOUT: gl.constexpr):
    """The row of y of each element of an accumulator `[row block, token block, lane, register]`."""
    row = first_row + positions(BLOCKS, LAYOUT, 4, 0) * 16
    return row + positions(32, LAYOUT, 4, 2) // 4 + positions(4, LAYOUT, 4, 3) // 2 * 8


@gluon.jit
def linear24_decode(
    x,  # int64 view of [tokens, K]
    values,  # int32 view of [rows, ...]
    ids,  # int64 view of [rows, K/8]
    scale,  # [rows, ceil(K/128)], or any pointer for 16-bit values
    bias,  # [rows], or any pointer
    y,  # [tokens, rows], or float32 [K_PARTS, tokens, rows]
    tokens,
    rows,
    steps,
    K: gl.constexpr,
    KIND: gl.constexpr,  # "dense", "int8" or "int4"
    FP16: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROW_BLOCKS: gl.constexpr,  # of 16 rows, a program
    TOKEN_BLOCKS: gl.constexpr,  # of 8 tokens
    UNROLL: gl.constexpr,  # neighbouring chunks a warp has in flight
    K_WARPS: gl.constexpr,
    TOKEN_WARPS: gl.constexpr,
    K_PARTS: gl.constexpr,  # programs that share the sum over K
):
    G: gl.constexpr = 4 if KIND == "dense" else 8
    WORDS: gl.constexpr = 2 if KIND == "int4" else 4  # int32 of values a lane and row
    NOTHING: gl.constexpr = -0x77777778 if KIND == "int4" else 0  # values of 0: nibbles of 8
    IDS: gl.constexpr = G // 4  # int64 of ids a chunk and row
    ROW_WORDS: gl.constexpr = K * WORDS // (4 * G)
    CHUNKS: gl.constexpr = UNROLL * K_WARPS

    ACC: gl.constexpr = gl.BlockedLayout(
        [ROW_BLOCKS, UNROLL, TOKEN_BLOCKS // TOKEN_WARPS, 1, 4],
        [1, 1, 1, 32, 1],
        [1, K_WARPS, TOKEN_WARPS, 1, 1],
        [4, 3, 1, 2, 0],
    )
    VALUES: gl.constexpr = gl.SliceLayout(  # [row block, chunk, row half, lane, word]
        2,
        gl.BlockedLayout(
            [ROW_BLOCKS, UNROLL, 1, 2, 1, WORDS],
            [1, 1, 1, 1, 32, 1],
            [1, K_WARPS, TOKEN_WARPS, 1, 1, 1],
            [5, 4, 3, 1, 2, 0],
        ),
    )
    IDS_LAYOUT: gl.constexpr = gl.SliceLayout(  # [row block, row half, lane, chunk]: chunks are neighbours in memory
        1,
        gl.BlockedLayout(
            [ROW_BLOCKS, 1, 2, 1, UNROLL * IDS], [1, 1, 1, 32, 1], [1, TOKEN_WARPS, 1, 1, K_WARPS], [4, 3, 2, 1, 0]
        ),
    )
    X_LAYOUT: gl.constexpr = gl.BlockedLayout(  # [chunk, token block, low bit of register, lane, group]
        [UNROLL, TOKEN_BLOCKS // TOKEN_WARPS, 2, 1, G],
        [1, 1, 1, 32, 1],
        [K_WARPS, TOKEN_WARPS, 1, 1, 1],
        [4, 3, 2, 0, 1],
    )
    first_block = gl.program_id(0) * ROW_BLOCKS
    first_chunk = gl.program_id(1) * steps * CHUNKS
    last_chunk = first_chunk + steps * CHUNKS
    last_word = gl.minimum(last_chunk * (4 * WORDS), ROW_WORDS)
    last_id = gl.minimum(last_chunk * IDS, K // 64)

    lane = positions(32, VALUES, 5, 3)
    value_word = (first_chunk + positions(CHUNKS, VALUES, 5, 1)) * (4 * WORDS) + lane % 4 * WORDS
    row = rows_of_lanes(first_block, rows, ROW_BLOCKS, VALUES, 5, 2, 3)
    value_pointers = values + row * ROW_WORDS + value_word + positions(WORDS, VALUES, 5, 4)

    id_word = first_chunk * IDS + positions(CHUNKS * IDS, IDS_LAYOUT, 4, 3)
    id_pointers = ids + rows_of_lanes(first_block, rows, ROW_BLOCKS, IDS_LAYOUT, 4, 1, 2) * (K // 64) + id_word
    id_shift = positions(32, IDS_LAYOUT, 4, 2) % 4 * 4

    # Tokens that are not there have no output, and columns beyond K meet values of 0: any address of x does.
    lane = positions(32, X_LAYOUT, 5, 3)
    token = gl.minimum(positions(TOKEN_BLOCKS, X_LAYOUT, 5, 1) * 8 + lane // 4, tokens - 1)
    x_group = (first_chunk + positions(CHUNKS, X_LAYOUT, 5, 0)) * (4 * G)
    x_group = x_group + (lane % 4) // 2 * G + positions(2, X_LAYOUT, 5, 2) * (2 * G)
    x_pointers = x + token * (K // 4) + positions(G, X_LAYOUT, 5, 4)
    takes_high = lane % 2 == 1

    if KIND != "dense":
        SCALES: gl.constexpr = gl.SliceLayout(  # [row block, chunk, row half, lane]
            2,
            gl.BlockedLayout(
                [ROW_BLOCKS, UNROLL, 1, 2, 1], [1, 1, 1, 1, 32], [1, K_WARPS, TOKEN_WARPS, 1, 1], [4, 3, 1, 2, 0]
            ),
        )
        row = rows_of_lanes(first_block, rows, ROW_BLOCKS, SCALES, 4, 2, 3)
        scale_chunk = first_chunk + positions(CHUNKS, SCALES, 4, 1)
        scale_pointers = scale + row * ((K + 127) // 128) + scale_chunk

    acc = gl.zeros([ROW_BLOCKS, CHUNKS, TOKEN_BLOCKS, 32, 4], gl.float32, ACC)
    # One step ahead, across the iterations of the loop: within one the assembler would put each load beside its use,
    # and wait for memory once a load.
    next_a = gl.load(value_pointers, value_word < last_word, NOTHING, eviction_policy="evict_first")
    next_ids = gl.load(id_pointers, id_word < last_id, VALID_IDS)
    next_b = gl.load(x_pointers + gl.minimum(x_group, K // 4 - G))
    for step in range(steps):
        a, ids_here, b = next_a, next_ids, next_b
        ahead = (step + 1) * CHUNKS
        inside = value_word + ahead * (4 * WORDS) < last_word
        next_a = gl.load(value_pointers + ahead * (4 * WORDS), inside, NOTHING, eviction_policy="evict_first")
        next_ids = gl.load(id_pointers + ahead * IDS, id_word + ahead * IDS < last_id, VALID_IDS)
        next_b = gl.load(x_pointers + gl.minimum(x_group + ahead * (4 * G), K // 4 - G))
        if KIND == "int8":
            a = floats_of_int8(a, FP16).reshape([ROW_BLOCKS, CHUNKS, 2, 32, G])
        if KIND == "int4":
            a = floats_of_int4(a, FP16).reshape([ROW_BLOCKS, CHUNKS, 2, 32, G])
        b = gl.where(takes_high, (b >> 32).to(gl.int32), b.to(gl.int32))
        a = fragments(a, G // 2)
        b = fragments(b, G // 2)
        early, late = metadata_words(ids_here, id_shift, ROW_BLOCKS, CHUNKS, IDS)
        early = beside_accumulator(early, ACC)
        if KIND == "dense":
            acc = multiply_pair(a, b, acc, early, ACC, FP16)
        else:
            part = multiply_two_pairs(a, b, early, beside_accumulator(late, ACC), ACC, FP16)
            inside = scale_chunk + step * CHUNKS < (K + 127) // 128
            factor = gl.load(scale_pointers + step * CHUNKS, inside, 0)
            acc = acc + scales_of_registers(factor, ACC) * part

    total = gl.sum(acc, 1)  # [row block, token block, lane, register]
    OUT: gl.constexpr = gl.SliceLayout(1, ACC)
    row = rows_of_registers(first_block * 16, ROW_BLOCKS, OUT)
    token = positions(TOKEN_BLOCKS, OUT, 4, 1) * 8 + positions(32, OUT, 4, 2) % 4 * 2 + positions(4, OUT, 4, 3) % 2
    if HAS_BIAS and K_PARTS == 1:
        total = total + gl.load(bias + gl.minimum(row, rows - 1)).to(gl.float32)
    part_offset = gl.program_id(1) * tokens * rows
    gl.store(y + part_offset + token * rows + row, total.to(y.dtype.element_ty), (row < rows) & (token < tokens))


@gluon.jit
def sum_of_parts(parts, bias, y, rows, elements, HAS_BIAS: gl.constexpr, K_PARTS: gl.constexpr, BLOCK: gl.constexpr):
    """y `[tokens, rows]` = bias + the sum over the first axis of parts, float32 `[K_PARTS, tokens, rows]`, in order."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [BLOCK // 32], [0])
    element = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, LAYOUT)
    inside = element < elements
    total = gl.load(parts + element, inside, 0.0)
    for part in gl.static_range(1, K_PARTS):
        total = total + gl.load(parts + part * elements + element, inside, 0.0)
    if HAS_BIAS:
        total = total + gl.load(bias + element % rows, inside, 0.0).to(gl.float32)
    gl.store(y + element, total.to(y.dtype.element_ty), inside)
