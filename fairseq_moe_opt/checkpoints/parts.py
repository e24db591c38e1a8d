"""Parts of a stored tensor as tensors of their own: one expert of a stack, one half of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fairseq_moe_opt.checkpoints.records import TensorRecord, span_elements


def parts_of(record: TensorRecord, view: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, TensorRecord]:
    """Where the views that ``view`` gives of the stored tensor lie; nothing is read.

    ``view`` is called with a tensor without storage, and may only look at it (index, slice, transpose ...).
    """
    whole = torch.empty_strided(record.shape, record.stride, dtype=record.dtype, device="meta")
    return {name: _located(record, part) for name, part in view(whole).items()}


def _located(record: TensorRecord, part: Tensor) -> TensorRecord:
    shape, stride = tuple(part.shape), part.stride()
    return replace(
        record,
        shape=shape,
        stride=stride,
        offset=record.offset + int(part.storage_offset()) * part.element_size(),
        nbytes=span_elements(shape, stride) * part.element_size(),
    )
