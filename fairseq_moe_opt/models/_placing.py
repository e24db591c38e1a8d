"""Reads a checkpoint's tensors from their files into the memory that a model has already."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe_opt.checkpoints.lazy import LazyStateDict
from fairseq_moe_opt.errors import CheckpointError

_MESSAGE_LENGTH = 400


def read_in_place(model: nn.Module, tensors: LazyStateDict, strict: bool) -> Any:
    """``model.load_state_dict(tensors, strict)`` with one tensor in memory beside the model's own.

    Parameters on the meta device are checked like all others, and nothing is read for them. Returns torch's pair of
    missing and unexpected names. Raises CheckpointError for tensors that are missing,
    unexpected or of another shape, as torch sees them, in one line and before anything is read.
    """
    own = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    stubs = {name: _stub(tensors.shape_of(name), own.get(name)) for name in tensors}
    try:
        # torch's own checks, on tensors of the right shapes that take no memory; the values are read afterwards.
        result = nn.Module.load_state_dict(model, stubs, strict)
    except RuntimeError as error:
        message = " ".join(str(error).split())
        shortened = message if len(message) <= _MESSAGE_LENGTH else message[:_MESSAGE_LENGTH] + " ..."
        raise CheckpointError(tensors.index.path, f"does not fit the model its options describe: {shortened}") from None
    with torch.no_grad():
        for name, value in own.items():
            if name in tensors and not value.is_meta:
                tensors.read_into(name, value)
    return result


def _stub(shape: tuple[int, ...], own: Tensor | None) -> Tensor:
    """A tensor of the entry's shape with one number for memory, or none where the model's ``own`` has none."""
    return torch.zeros((), device="meta" if own is not None and own.is_meta else "cpu").expand(shape)
