# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + b for many tokens, on the sparse tensor cores of sm_80 and later, from the 2:4 weight as it is stored.

As in `gluon_decode`, W is the A operand of `mma.sp.m16n8k32` and x^T the B operand. Here both pass through shared memory,
several steps of 64 columns ahead (`cp.async`), and come out of it as fragments in the natural order of K (`ldmatrix`):

      A register r, lane 4q+t: row q + 8(r%2), words t + 4(r//2) + 8h of the row's 16 (two kept values each)
      B register r, lane 4q+t: token q, words t + 4r + 16h of the token's 32
      metadata of lane 4q+t: the 16 bits of ids number t of the row's 4, row q low, row q+8 high; h = 0 reads it from the
                   lanes with t = 0, 1 and h = 1 from those with t = 2, 3
      C, D         register r: row q + 8(r//2), token 2t + r%2
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .gluon_decode import multiply_pair, positions, rows_of_registers

# Triton 3.6 has these under other names.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def a_words(row_blocks, row_warps, token_warps):
    """Which word of the tile of W, `[row, word]`, each register, lane and warp reads: basis vectors, low bits first."""
    each = row_blocks // row_warps
    registers = [[8, 0], [0, 4], [0, 8]] + [[16 << bit, 0] for bit in range(each.bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [[0, 0]] * (token_warps.bit_length() - 1)
    warps += [[16 * each << bit, 0] for bit in range(row_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * row_blocks, 16])


@gluon.constexpr_function
def b_words(token_blocks, row_warps, token_warps):
    """The same of the tile of x, `[token, word]`."""
    each = token_blocks // token_warps
    registers = [[0, 4], [0, 8], [0, 16]] + [[8 << bit, 0] for bit in range(each.bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [[8 * each << bit, 0] for bit in range(token_warps.bit_length() - 1)]
    warps += [[0, 0]] * (row_warps.bit_length() - 1)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [8 * token_blocks, 32])


@gluon.jit
def tile_of_program(rows, tokens, ROWS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr):
    """First row and token of a program. Their order: a group of row tiles, then the token tiles, then the next group."""
    row_tiles = (rows + ROWS - 1) // ROWS
    token_tiles = (tokens + TOKENS - 1) // TOKENS
    in_group = gl.program_id(0) % (GROUP * token_tiles)
    first_tile = gl.program_id(0) // (GROUP * token_tiles) * GROUP
    group = gl.minimum(row_tiles - first_tile, GROUP)
    return (first_tile + in_group % group) * ROWS, in_group // group * TOKENS


@gluon.jit
def copy_step(x_tiles, w_tiles, x_pointers, w_pointers, step, steps, STAGES: gl.constexpr):
    """Begin to copy what a step multiplies, if there is such a step, to its place in the ring of stages."""
    copy_to_shared(x_tiles.index(step % STAGES), x_pointers + step * 32, mask=step < steps)
    copy_to_shared(w_tiles.index(step % STAGES), w_pointers + step * 16, mask=step < steps)
    async_copy.commit_group()


@gluon.jit
def linear24_gemm(
    x,  # int32 view of [tokens, K]
    values,  # int32 view of [rows, K/2]
    ids,  # int16 view of [rows, K/8]
    bias,  # [rows], or any pointer
    y,  # [tokens, rows], or float32 [K_PARTS, tokens, rows]
    tokens,
    rows,
    steps,  # of 64 columns, a program
    K: gl.constexpr,
    FP16: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROW_BLOCKS: gl.constexpr,  # of 16 rows, a program
    TOKEN_BLOCKS: gl.constexpr,  # of 8 tokens
    ROW_WARPS: gl.constexpr,
    TOKEN_WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    K_PARTS: gl.constexpr,  # programs that share the sum over K
    GROUP: gl.constexpr,  # tiles of rows whose programs run together, for the sake of the L2 cache
):
    ROWS: gl.constexpr = 16 * ROW_BLOCKS
    TOKENS: gl.constexpr = 8 * TOKEN_BLOCKS
    WARPS: gl.constexpr = ROW_WARPS * TOKEN_WARPS
    ACC: gl.constexpr = gl.BlockedLayout(
        [ROW_BLOCKS // ROW_WARPS, TOKEN_BLOCKS // TOKEN_WARPS, 1, 4],
        [1, 1, 32, 1],
        [ROW_WARPS, TOKEN_WARPS, 1, 1],
        [3, 2, 1, 0],
    )
    A_LAYOUT: gl.constexpr = gl.SliceLayout(1, ACC)
    A_WORDS: gl.constexpr = a_words(ROW_BLOCKS, ROW_WARPS, TOKEN_WARPS)
    B_WORDS: gl.constexpr = b_words(TOKEN_BLOCKS, ROW_WARPS, TOKEN_WARPS)
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    x_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, TOKENS, 32], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    w_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 16], gl.SwizzledSharedLayout(4, 2, 4, [1, 0]))

    first_row, first_token = tile_of_program(rows, tokens, ROWS, TOKENS, GROUP)
    first_step = gl.program_id(1) * steps
    steps = gl.minimum(steps, K // 64 - first_step)  # of this program; not above 0 where K is used up

    # Rows and tokens beyond the last are the last: read again and not stored.
    token = gl.minimum(first_token + positions(TOKENS, X_COPY, 2, 0), tokens - 1)
    x_pointers = x + token * (K // 2) + first_step * 32 + positions(32, X_COPY, 2, 1)
    row = gl.minimum(first_row + positions(ROWS, W_COPY, 2, 0), rows - 1)
    w_pointers = values + row * (K // 4) + first_step * 16 + positions(16, W_COPY, 2, 1)
    lane = positions(32, A_LAYOUT, 3, 1)
    block = positions(ROW_BLOCKS, A_LAYOUT, 3, 0)
    upper = gl.minimum(first_row + block * 16 + lane // 4, rows - 1)
    lower = gl.minimum(first_row + block * 16 + lane // 4 + 8, rows - 1)
    upper_pointers = ids + upper * (K // 16) + first_step * 4 + lane % 4
    lower_pointers = ids + lower * (K // 16) + first_step * 4 + lane % 4

    for stage in gl.static_range(STAGES - 1):
        copy_step(x_tiles, w_tiles, x_pointers, w_pointers, stage, steps, STAGES)
    next_upper = gl.load(upper_pointers, mask=steps > 0, other=0x4444)
    next_lower = gl.load(lower_pointers, mask=steps > 0, other=0x4444)
    acc = gl.zeros([ROW_BLOCKS, TOKEN_BLOCKS, 32, 4], gl.float32, ACC)
    if K_PARTS == 1 and HAS_BIAS:
        row = gl.minimum(rows_of_registers(first_row, ROW_BLOCKS, ACC), rows - 1)
        acc = acc + gl.load(bias + row).to(gl.float32)
    for step in range(steps):
        async_copy.wait_group(STAGES - 2)
        barrier()  # the copies of all warps are there, and no warp reads the stage that is filled next
        copy_step(x_tiles, w_tiles, x_pointers, w_pointers, step + STAGES - 1, steps, STAGES)
        metadata = (next_upper.to(gl.int32) & 0xFFFF) | (next_lower.to(gl.int32) << 16)
        ahead = gl.minimum(step + 1, steps - 1) * 4
        next_upper = gl.load(upper_pointers + ahead)
        next_lower = gl.load(lower_pointers + ahead)
        a = w_tiles.index(step % STAGES).load(A_WORDS)  # row: block, half, q; word: h, high bit of register, t
        a = a.reshape([ROW_BLOCKS, 2, 8, 2, 2, 4]).permute([0, 2, 5, 4, 1, 3]).reshape([ROW_BLOCKS, 32, 4, 2])
        b = x_tiles.index(step % STAGES).load(B_WORDS)  # token: block, q; word: h, register, t
        b = b.reshape([TOKEN_BLOCKS, 8, 2, 4, 4]).permute([0, 1, 4, 3, 2]).reshape([TOKEN_BLOCKS, 32, 4, 2])
        acc = multiply_pair(a, b, acc, gl.expand_dims(metadata, 1), ACC, FP16)

    async_copy.wait_group(0)
    barrier()  # what follows may use the memory of the tiles

    # [row block, token block, q, t, row half, token bit] -> [token, row], rows side by side in memory
    tile = acc.to(y.dtype.element_ty).reshape([ROW_BLOCKS, TOKEN_BLOCKS, 8, 4, 2, 2]).permute([1, 3, 5, 0, 4, 2])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // ROWS, ROWS // 8], [WARPS, 1], [1, 0])
    tile = gl.convert_layout(tile.reshape([TOKENS, ROWS]), OUT)
    token = first_token + positions(TOKENS, OUT, 2, 0)
    row = first_row + positions(ROWS, OUT, 2, 1)
    part_offset = gl.program_id(1) * tokens * rows
    gl.store(y + part_offset + token * rows + row, tile, (row < rows) & (token < tokens))
