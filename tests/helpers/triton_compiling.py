"""Compiling the device code of the triton kernel for a GPU that need not be here. Imports triton."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fairseq_moe_opt.moe.kernels import triton_code
from fairseq_moe_opt.moe.kernels.triton_grouped import _tiles

NAMES: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compiled(capability: int, dtype: torch.dtype, *, rows: int, gated: bool) -> int:
    """Bytes of shared memory of ``grouped_product`` for ``rows`` rows an expert, compiled to a GPU's own code."""
    tiles, number = _tiles(rows, 1, dtype), f"*{NAMES[dtype]}"
    constants: dict[str, object] = {
        "top_k": 2,
        "gathers": gated,
        "scatters": not gated,
        "weighted": not gated,
        "has_bias": True,
        "gated": gated,
        "has_gate_bias": gated,
        "activation": 3 if gated else 0,
        "widens": False,
        "block_rows": tiles.rows,
        "block_outputs": tiles.outputs,
        "block_inputs": tiles.inputs,
    }
    types: dict[str, object] = dict.fromkeys(("left", "matrix", "bias", "gate", "gate_bias", "weight", "out"), number)
    types |= {"order": "*i64", "blocks": "*i64"}
    types |= dict.fromkeys(("matrix_strides", "gate_strides"), ("i64", "i32", "constexpr"))
    types |= dict.fromkeys(("bias_strides", "gate_bias_strides"), ("i32", "constexpr"))
    types |= dict.fromkeys(("left_stride", "out_stride", "width", "num_outputs", "num_experts", "num_blocks"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    names = triton_code.grouped_product.arg_names
    # The innermost strides are 1, as of matrices that are packed.
    values = {(names.index(name),): value for name, value in constants.items()}
    for name, kind in types.items():
        if isinstance(kind, tuple):
            values[names.index(name), len(kind) - 1] = 1
    source = ASTSource(
        fn=triton_code.grouped_product, signature={name: types[name] for name in names}, constexprs=values
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return int(kernel.metadata.shared)
