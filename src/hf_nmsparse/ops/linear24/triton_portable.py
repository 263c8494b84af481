# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + b from the 2:4 weight as it is stored, in plain Triton: for every GPU that Triton compiles for.

A program expands a tile of W in registers, by comparing ids with the four columns of a group, and multiplies it by a tile of
x as a dense one. No layout and no instruction is asked for: tensor cores are used where Triton uses them for `tl.dot`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_values(words, inside, KIND: tl.constexpr, dtype: tl.constexpr):
    """First and second kept value of each group, `[rows, groups]`; zeros beyond the end of a row.

    words: pointers, `[rows, groups]` bytes for int4, else `[rows, 2 * groups]`; inside: which of them are in the row.
    """
    if KIND == "int4":  # a byte a group; nibble = value + 8, low nibble first
        byte = tl.load(words, inside, other=0x88)
        first = (byte & 0xF).to(tl.int8) - 8
        second = (byte >> 4).to(tl.int8) - 8
    else:
        both = tl.load(words, inside, other=0)
        first, second = tl.split(tl.reshape(both, (both.shape[0], both.shape[1] // 2, 2)))
    return first.to(dtype), second.to(dtype)


@triton.jit
def expanded(first, second, ids):
    """Dense tile `[rows, 4 * groups]` of kept values `[rows, groups]` and ids `[rows, groups / 2]`, two groups a byte."""
    ROWS: tl.constexpr = first.shape[0]
    GROUPS: tl.constexpr = first.shape[1]
    nibble = tl.reshape(tl.join(ids & 0xF, ids >> 4), (ROWS, GROUPS))
    column_of_first = nibble & 3
    column_of_second = nibble >> 2
    zero = tl.zeros_like(first)
    column_0 = tl.where(column_of_first == 0, first, tl.where(column_of_second == 0, second, zero))
    column_1 = tl.where(column_of_first == 1, first, tl.where(column_of_second == 1, second, zero))
    column_2 = tl.where(column_of_first == 2, first, tl.where(column_of_second == 2, second, zero))
    column_3 = tl.where(column_of_first == 3, first, tl.where(column_of_second == 3, second, zero))
    pairs = tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3))  # [rows, groups, high bit, low bit]
    return tl.reshape(pairs, (ROWS, 4 * GROUPS))


@triton.jit
def linear24_portable(
    x,  # [tokens, columns]
    values,  # [rows, value_columns]
    ids,  # uint8 [rows, id_columns]
    scale,  # [rows, scale_columns], or any pointer for values that are not quantised
    bias,  # [rows], or any pointer
    y,  # [tokens, rows], or float32 [K_PARTS, tokens, rows]
    tokens,
    rows,
    columns,
    value_columns,
    id_columns,
    scale_columns,
    steps,  # of COLUMNS, a program
    KIND: tl.constexpr,  # "dense", "int8" or "int4"
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,  # of W, a program
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a step; divides 128, the columns that share a scale
):
    GROUPS: tl.constexpr = COLUMNS // 4
    STEP_VALUES: tl.constexpr = GROUPS if KIND == "int4" else 2 * GROUPS
    number: tl.constexpr = x.dtype.element_ty

    # Rows and tokens beyond the last are the last: read again and not stored.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    weight_row = tl.minimum(row, rows - 1).to(tl.int64)
    x_row = tl.minimum(token, tokens - 1).to(tl.int64)
    first_step = tl.program_id(2) * steps
    last_step = tl.minimum(first_step + steps, tl.cdiv(columns, COLUMNS))

    value_rows = values + weight_row[:, None] * value_columns
    id_rows = ids + weight_row[:, None] * id_columns
    x_rows = x + x_row[None, :] * columns

    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(first_step, last_step):
        value_at = step * STEP_VALUES + tl.arange(0, STEP_VALUES)
        id_at = step * (GROUPS // 2) + tl.arange(0, GROUPS // 2)
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        inside = (value_at < value_columns)[None, :]
        first, second = kept_values(value_rows + value_at[None, :], inside, KIND, number)
        id_tile = tl.load(id_rows + id_at[None, :], (id_at < id_columns)[None, :], other=0x44)
        x_tile = tl.load(x_rows + column[:, None], (column < columns)[:, None], other=0.0)
        weight = expanded(first, second, id_tile)
        if KIND == "dense":
            acc = tl.dot(weight, x_tile, acc, input_precision="ieee")
        else:
            factor = tl.load(scale + weight_row * scale_columns + step * COLUMNS // 128).to(tl.float32)
            acc += factor[:, None] * tl.dot(weight, x_tile, input_precision="ieee")

    if HAS_BIAS:
        begins = (tl.program_id(2) == 0).to(tl.float32)  # the bias is added once
        acc += begins * tl.load(bias + weight_row).to(tl.float32)[:, None]
    part = tl.program_id(2).to(tl.int64) * tokens
    address = y + (part + token[None, :]) * rows + row[:, None]
    tl.store(address, acc.to(y.dtype.element_ty), (row < rows)[:, None] & (token < tokens)[None, :])
