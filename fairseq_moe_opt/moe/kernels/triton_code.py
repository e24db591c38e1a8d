"""The device code of the ``triton`` kernel. Importing it imports triton; only :mod:`.triton_grouped` does, to run it.

Whether functions here are compiled or interpreted is settled by ``TRITON_INTERPRET`` when this file is imported.

Offsets of rows and of experts are 64 bit: layers of more than 2^31 elements are common. Products are summed in float32,
float32 ones without TF32, and results rounded once, when they are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
GELU = tl.constexpr(2)
SILU = tl.constexpr(3)
GELU_TANH = tl.constexpr(4)
RELU2 = tl.constexpr(5)


@triton.jit
def _activate(x, activation: tl.constexpr):
    """Activation of float32 numbers; NaN stays NaN."""
    if activation == RELU:
        x = tl.where(x < 0.0, 0.0, x)
    elif activation == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == SILU:
        x = x * tl.sigmoid(x)
    elif activation == GELU_TANH:
        # 0.5 * (1 + tanh(y)) is sigmoid(2 * y).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif activation == RELU2:
        x = tl.where(x < 0.0, 0.0, x)
        x = x * x
    return x


@triton.jit
def _part(matrix, strides, expert, outputs, inputs, mask, widens: tl.constexpr):
    """(inputs, outputs) of an expert's matrix (outputs, inputs)."""
    first = matrix + expert * strides[0]
    part = tl.load(first + outputs[None, :] * strides[1] + inputs[:, None] * strides[2], mask=mask, other=0.0)
    return part.to(tl.float32) if widens else part


@triton.jit
def _plus_bias(sums, bias, strides, expert, outputs, wanted):
    """``sums`` (rows, outputs) plus an expert's bias."""
    values = tl.load(bias + expert * strides[0] + outputs * strides[1], mask=wanted, other=0.0)
    return sums + values.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_experts", "num_blocks"])  # else another batch size is compiled anew
def grouped_product(
    left,  # (rows, width), rows of `left_stride` elements
    order,  # (N,) the choice that a sorted row is; unused unless `gathers` or `scatters`
    blocks,  # (3, num_blocks), see blocks.py
    matrix,  # (E, num_outputs, width)
    bias,  # (E, num_outputs); unused unless `has_bias`
    gate,  # as `matrix`; unused unless `gated`
    gate_bias,  # as `bias`; unused unless `has_gate_bias`
    weight,  # (N,) of a choice; unused unless `weighted`
    out,  # (rows, num_outputs), rows of `out_stride` elements
    matrix_strides,
    bias_strides,
    gate_strides,
    gate_bias_strides,
    left_stride,
    out_stride,
    width,
    num_outputs,
    num_experts,
    num_blocks,
    top_k: tl.constexpr,
    gathers: tl.constexpr,  # sorted row r is row order[r] // top_k of `left`, else its row r
    scatters: tl.constexpr,  # and its result is row order[r] of `out`, else its row r
    weighted: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_gate_bias: tl.constexpr,
    activation: tl.constexpr,
    widens: tl.constexpr,  # operands become float32 first: the interpreter multiplies bfloat16's bits as integers
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    """``act(left @ matrix.T + bias)`` of one block of sorted rows and some outputs; gated ``act(gate) * that``."""
    block = tl.program_id(0)
    expert = tl.load(blocks + block)
    if expert >= num_experts:
        return
    rows = tl.load(blocks + num_blocks + block) + tl.arange(0, block_rows)
    present = rows < tl.load(blocks + 2 * num_blocks + block)
    choices = tl.load(order + rows, mask=present, other=0) if gathers or scatters else rows
    sources = left + (choices // top_k if gathers else rows)[:, None] * left_stride
    outputs = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
    wanted = outputs < num_outputs
    sums = tl.zeros((block_rows, block_outputs), dtype=tl.float32)
    gates = tl.zeros((block_rows, block_outputs), dtype=tl.float32)
    for first in range(0, width, block_inputs):
        inputs = first + tl.arange(0, block_inputs)
        within = inputs < width
        mask = within[:, None] & wanted[None, :]
        some = tl.load(sources + inputs[None, :], mask=present[:, None] & within[None, :], other=0.0)
        some = some.to(tl.float32) if widens else some
        values = _part(matrix, matrix_strides, expert, outputs, inputs, mask, widens)
        sums = tl.dot(some, values, sums, input_precision="ieee")
        if gated:
            values = _part(gate, gate_strides, expert, outputs, inputs, mask, widens)
            gates = tl.dot(some, values, gates, input_precision="ieee")
    if has_bias:
        sums = _plus_bias(sums, bias, bias_strides, expert, outputs, wanted)
    if has_gate_bias:
        gates = _plus_bias(gates, gate_bias, gate_bias_strides, expert, outputs, wanted)
    sums = _activate(gates, activation) * sums if gated else _activate(sums, activation)
    if weighted:
        sums *= tl.load(weight + choices, mask=present, other=0.0).to(tl.float32)[:, None]
    targets = out + (choices if scatters else rows)[:, None] * out_stride + outputs[None, :]
    tl.store(targets, sums.to(out.dtype.element_ty), mask=present[:, None] & wanted[None, :])


@triton.jit
def sum_choices(
    results,  # (T, top_k, width), contiguous; those of choices not computed were never written
    expert_index,  # (T, top_k), contiguous
    out,  # (T, width), contiguous
    width,
    num_experts,
    top_k: tl.constexpr,
    block: tl.constexpr,
):
    """Each token's results, summed in the order of its choices; 0 for one that is not computed."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), dtype=tl.float32)
    for choice in tl.static_range(top_k):
        row = token * top_k + choice
        readable = tl.where(tl.load(expert_index + row) < num_experts, width, 0)
        total += tl.load(results + row * width + columns, mask=columns < readable, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)
