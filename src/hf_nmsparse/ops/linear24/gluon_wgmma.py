# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + b for many tokens, on the sparse tensor cores of Hopper (sm_90a), from the 2:4 weight as it is stored.

W is the A operand of `wgmma.mma_async.sp.m64nNk32` and comes from registers: four warps, a *warpgroup*, multiply 64 rows, a
warp 16 of them. x^T is the B operand and comes from shared memory, where the instruction finds it by a descriptor.

As in `gluon_decode`, the order of a sum over K is free, so a lane fills its slots of A with the 16 bytes that it can load at
once, and W goes from memory to registers: not through shared memory, whose whole bandwidth the reading of B takes at the
full rate of the instruction. In 64 columns a row has 16 groups of four columns, a word of two kept values each. Lane 4q+t
needs the words of four *places*, t, t+4, t+8 and t+12; it loads words 4t .. 4t+3 instead:

      place     0  1  2  3    4  5  6  7    8  9 10 11   12 13 14 15      holds group 4 (place % 4) + place // 4
      group     0  4  8 12    1  5  9 13    2  6 10 14    3  7 11 15
      product   h = 0  .  .  .  .  .  .     h = 1  .  .  .  .  .  .

      A register r of product h, lane 4q+t of a warp: row q + 8(r%2), place 8h + 4(r//2) + t, which is word 2h + r//2 of the
                   four that the lane has of that row
      B            [token, 32 columns] of product h: places 8h .. 8h+7. The copies to shared memory put the groups of x, 8
                   bytes each, where the places are; they stay within one line of 128 bytes
      metadata     product h reads the lanes with t = 2h + j, j = 0, 1: four nibbles of row q low, of row q+8 high, for places
                   8h + 4j + n; those are groups 4n + t, so nibbles t, 4+t, 8+t and 12+t of the row's 16, in both products
      C, D         register 4b + r: row q + 8(r//2), token 8b + 2t + r%2

Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; CUTLASS, `ELayout_64x32` in
`mma_traits_sm90_gmma_sparse.hpp`, which gives lane 4q + 2h + j the same metadata.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .gluon_decode import beside_accumulator, metadata_words, positions, rows_of_lanes, rows_of_registers
from .gluon_gemm import barrier, copy_to_shared, tile_of_program

_TOKEN_BYTES = 128  # of 64 columns of one token, what the swizzle works on
_UNIT_BITS = 4  # a descriptor counts in units of 16 bytes
_ADDRESS_MASK = 0x3FFFF  # of shared memory
_STRIDE = (8 * _TOKEN_BYTES >> _UNIT_BITS) << 32  # from 8 tokens to the next 8
_SWIZZLE_OF_128_BYTES = 1 << 62


@gluon.constexpr_function
def product_text(tokens, fp16):
    """PTX that adds the product of 64 rows of W a warpgroup with 64 columns of `tokens` tokens to the accumulators.

    With n = tokens / 2, what a lane holds: `$0 ..` are the accumulators, as `$n ..` is what they were; `$2n ..` the 8 words of
    A, row q first; `$3n` the metadata; `$4n` where the tile of x begins, in bytes from the start of shared memory. Operands
    come n at a time, because Triton hands over each tensor with as many elements a lane as there are accumulators.

    A descriptor (PTX ISA, "Matrix Descriptor Format") is, in units of 16 bytes,

        bits 0-13    the address of the tile, 32 columns (64 bytes) more for the second product. The swizzle replaces bits 4-6
                     of an address by their exclusive or with bits 7-9, which 64 bytes more in a line do not touch
        bits 16-29   0, without a meaning for a tile along K with this swizzle
        bits 32-45   64, from 8 tokens to the next 8
        bits 49-51   0: the pattern of 8 tokens begins at an address divisible by 1024, as all tiles do
        bits 62-63   1, swizzle of 128 bytes

    The fence makes the instruction wait for what was last written to its registers. The wait for the products is part of the
    text: until it is over neither A, nor B, nor the accumulators may be touched, and between two texts the compiler may move
    them.
    """
    lane = tokens // 2
    number = "f16" if fp16 else "bf16"
    sums = ", ".join(f"${register}" for register in range(lane))
    lines = [
        ".reg .pred adds; .reg .b32 address; .reg .b64 first, second;",
        "setp.eq.u32 adds, 0, 0;",
        "mov.u32 address, global_smem;",  # what Triton calls the shared memory of a kernel
        f"add.u32 address, address, ${4 * lane};",
        f"and.b32 address, address, {_ADDRESS_MASK};",
        f"shr.u32 address, address, {_UNIT_BITS};",
        "cvt.u64.u32 first, address;",
        f"or.b64 first, first, {_SWIZZLE_OF_128_BYTES | _STRIDE};",
        f"add.u64 second, first, {_TOKEN_BYTES // 2 >> _UNIT_BITS};",
        "wgmma.fence.sync.aligned;",
    ]
    for product, descriptor in enumerate(("first", "second")):
        a = ", ".join(f"${2 * lane + 4 * (register % 2) + 2 * product + register // 2}" for register in range(4))
        lines.append(
            f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{number}.{number} "
            f"{{{sums}}}, {{{a}}}, {descriptor}, ${3 * lane}, {product}, adds, 1, 1, 0;"
        )
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def product_constraints(tokens):
    """What the operands of `product_text` are: results, their values before, and three tensors of 32-bit words."""
    lane = tokens // 2
    return ",".join(["=f"] * lane + [str(register) for register in range(lane)] + ["r"] * (3 * lane))


@gluon.jit
def copy_step(tiles, x, offsets, step, steps, STAGES: gl.constexpr):
    """Begin to copy what a step multiplies, if there is such a step, to its place in the ring of stages."""
    copy_to_shared(tiles.index(step % STAGES), x + step * 16 + offsets, mask=step < steps)
    async_copy.commit_group()


@gluon.jit
def linear24_wgmma(
    x,  # int64 view of [tokens, K]
    values,  # int32 view of [rows, K/2]
    ids,  # int64 view of [rows, K/8]
    bias,  # [rows], or any pointer
    y,  # [tokens, rows], or float32 [K_PARTS, tokens, rows]
    tokens,
    rows,
    steps,  # of 64 columns, a program
    K: gl.constexpr,
    FP16: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WARPGROUPS: gl.constexpr,  # of 64 rows, a program
    TOKEN_BLOCKS: gl.constexpr,  # of 8 tokens
    STAGES: gl.constexpr,
    K_PARTS: gl.constexpr,  # programs that share the sum over K
    GROUP: gl.constexpr,  # tiles of rows whose programs run together, for the sake of the L2 cache
):
    WARPS: gl.constexpr = 4 * WARPGROUPS
    ROWS: gl.constexpr = 16 * WARPS
    TOKENS: gl.constexpr = 8 * TOKEN_BLOCKS
    TILE_BYTES: gl.constexpr = TOKENS * 128
    # [warp, pair of token blocks, block of the pair, lane, register]. The last two dimensions but the lane are, in A, the row
    # half and the word: a lane's 8 words of A stand beside the first 8 of its accumulators.
    ACC: gl.constexpr = gl.BlockedLayout(
        [1, TOKEN_BLOCKS // 2, 2, 1, 4], [1, 1, 1, 32, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    A_LAYOUT: gl.constexpr = gl.SliceLayout(1, ACC)
    IDS_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2, 1, 1], [1, 1, 32, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [WARPS, 1], [1, 0])
    # The only shared memory of the kernel, so it begins where that does: `product_text` relies on it, the host checks it.
    tiles = gl.allocate_shared_memory(gl.int64, [STAGES, TOKENS, 16], gl.NVMMASharedLayout(128, 64, rank=2))

    first_row, first_token = tile_of_program(rows, tokens, ROWS, TOKENS, GROUP)
    first_step = gl.program_id(1) * steps
    steps = gl.minimum(steps, K // 64 - first_step)  # of this program; not above 0 where K is used up

    # Rows and tokens beyond the last are the last: read again and not stored.
    token = gl.minimum(first_token + positions(TOKENS, X_COPY, 2, 0), tokens - 1)
    place = positions(16, X_COPY, 2, 1)
    x_offsets = token * (K // 4) + place % 4 * 4 + place // 4
    first_x = x + first_step * 16
    lane = positions(32, A_LAYOUT, 4, 2)
    row = rows_of_lanes(first_row // 16, rows, WARPS, A_LAYOUT, 4, 1, 2)
    value_offsets = row * (K // 4) + lane % 4 * 4 + positions(4, A_LAYOUT, 4, 3)
    id_offsets = rows_of_lanes(first_row // 16, rows, WARPS, IDS_LAYOUT, 4, 1, 2) * (K // 64)
    id_shift = positions(32, IDS_LAYOUT, 4, 2) % 4 * 4

    for stage in gl.static_range(STAGES - 1):
        copy_step(tiles, first_x, x_offsets, stage, steps, STAGES)
    ahead = gl.minimum(first_step, K // 64 - 1)
    next_values = gl.load(values + ahead * 16 + value_offsets)
    next_ids = gl.load(ids + ahead + id_offsets)
    acc = gl.zeros([WARPS, TOKEN_BLOCKS // 2, 2, 32, 4], gl.float32, ACC)
    if K_PARTS == 1 and HAS_BIAS:
        row = gl.minimum(rows_of_registers(first_row, WARPS, A_LAYOUT), rows - 1)
        acc = acc + gl.expand_dims(gl.load(bias + row).to(gl.float32), 1)
    for step in range(steps):
        a, ids_here = next_values, next_ids
        # Before the barrier: the assembler would move loads that come after it behind the products.
        ahead = gl.minimum(first_step + step + 1, K // 64 - 1)
        next_values = gl.load(values + ahead * 16 + value_offsets)
        next_ids = gl.load(ids + ahead + id_offsets)
        async_copy.wait_group(STAGES - 2)
        barrier()  # the copies of all warps are there, and no warpgroup reads the stage that is filled next
        hopper.fence_async_shared()  # and the tensor cores, which read shared memory another way, see them
        copy_step(tiles, first_x, x_offsets, step + STAGES - 1, steps, STAGES)
        metadata, _ = metadata_words(ids_here, id_shift, WARPS, 1, 1)
        TEXT: gl.constexpr = product_text(TOKENS, FP16)
        CONSTRAINTS: gl.constexpr = product_constraints(TOKENS)
        operands = [acc, gl.expand_dims(a, 1), beside_accumulator(metadata, ACC), step % STAGES * TILE_BYTES]
        acc = gl.inline_asm_elementwise(TEXT, CONSTRAINTS, operands, gl.float32, False, TOKENS // 2)

    async_copy.wait_group(0)
    barrier()  # what follows may use the memory of the tiles

    # [warp, token block, q, t, row half, token bit] -> [token, row], 8 rows side by side in a lane, 16 in a warp
    tile = acc.to(y.dtype.element_ty).reshape([WARPS, TOKEN_BLOCKS, 8, 4, 2, 2]).permute([1, 3, 5, 0, 4, 2])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, WARPS], [1, 0])
    tile = gl.convert_layout(tile.reshape([TOKENS, ROWS]), OUT)
    token = first_token + positions(TOKENS, OUT, 2, 0)
    row = first_row + positions(ROWS, OUT, 2, 1)
    part_offset = gl.program_id(1) * tokens * rows
    gl.store(y + part_offset + token * rows + row, tile, (row < rows) & (token < tokens))
