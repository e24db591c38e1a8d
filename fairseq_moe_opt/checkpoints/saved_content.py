"""What the restricted unpickler leaves inert, as the objects it stands for: fairseq's Namespaces, numbers, tensors."""

from __future__ import annotations

import struct
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fairseq_moe_opt.checkpoints.restricted import (
    Inert,
    InertConfig,
    InertNamespace,
    InertScalar,
    TensorSlot,
    plain,
)


def as_saved(content: Any, tensor: Callable[[TensorSlot], Any]) -> Any:
    """``content`` with Namespaces, plain configuration, numpy's scalars as numbers, and ``tensor(slot)`` for tensors.

    What has no counterpart among these becomes None. Containers keep their type.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, InertNamespace):
            return Namespace(**convert(value.state or {}))
        if isinstance(value, InertConfig):
            return plain(value)
        if isinstance(value, TensorSlot):
            return tensor(value)
        if isinstance(value, InertScalar):
            return _number(value)
        if isinstance(value, Inert):
            return None
        if isinstance(value, Mapping):
            return type(value)((key, convert(item)) for key, item in value.items())  # type: ignore[call-arg]
        if isinstance(value, (list, tuple)):
            return type(value)(convert(item) for item in value)
        return value

    return convert(content)


def slots_in(value: Any) -> Iterator[TensorSlot]:
    """Every tensor in unpickled content."""
    if isinstance(value, TensorSlot):
        yield value
    elif isinstance(value, InertNamespace):
        yield from slots_in(value.state)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from slots_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from slots_in(item)


def _number(value: InertScalar) -> float | int | None:
    """A numpy scalar (a best loss, say) as Python's number: its dtype's code and its bytes say all."""
    dtype, data = (*value.args, None, None)[:2]
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    formats = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i"}
    if not isinstance(data, bytes) or code not in formats or len(data) != struct.calcsize(formats[code]):
        return None
    number: float | int = struct.unpack(formats[code], data)[0]
    return number
