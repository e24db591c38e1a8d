"""An unpickler that builds nothing but plain data and descriptions of tensors.

PyTorch's zip checkpoints keep a pickle beside the raw storages. Here a storage becomes a description (dtype,
key, elements) and is never read, and a class becomes an inert stand-in, so that loading runs no code of
anybody: fairseq's ``argparse.Namespace`` and omegaconf's containers included, whether or not omegaconf is
installed. Any other global is refused by name.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, final

import torch

from fairseq_moe_opt.errors import CheckpointError


@final
@dataclass(frozen=True)
class StorageSlot:
    """A storage in a zip: the key of its member, its dtype (None when untyped) and its number of elements."""

    key: str
    dtype: torch.dtype | None
    numel: int


@final
@dataclass(frozen=True)
class TensorSlot:
    """A tensor as pickled: a view of a storage; ``offset``, ``shape`` and ``stride`` are in elements."""

    storage: StorageSlot
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """Stands in for an object of a foreign class: keeps what was pickled, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Sets the fields here as well, because pickle may make an object without calling ``__init__``."""
        made = super().__new__(cls)
        made.args, made.kwargs, made.state = args, kwargs, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


@final
class InertNamespace(Inert):
    """Stands in for ``argparse.Namespace``, the form of a cfg section of fairseq's older architectures."""


@final
class InertConfig(Inert):
    """Stands in for any class of omegaconf: containers (``_content``) and value nodes (``_val``)."""


@final
class InertScalar(Inert):
    """Stands in for a numpy scalar: its arguments are an inert dtype and the bytes."""


def plain(value: Any) -> Any:
    """Turns unpickled configuration into dicts, lists and scalars; foreign leaves become None."""
    if isinstance(value, InertNamespace):
        return plain(value.state or {})
    if isinstance(value, InertConfig):
        return _plain_config(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else None


def load_restricted(data: bytes, path: Path) -> Any:
    """Unpickles ``data`` (of the file ``path``) under the rules above; raises CheckpointError otherwise."""
    try:
        return _RestrictedUnpickler(data, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(path, f"its pickle is damaged or foreign ({type(error).__name__})") from error


def _plain_config(value: InertConfig) -> Any:
    state = value.state if isinstance(value.state, Mapping) else {}
    if "_content" in state:
        return plain(state["_content"])
    return plain(state.get("_val"))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorSlot:
    """Stands in for ``torch._utils._rebuild_tensor`` and ``_rebuild_tensor_v2``."""
    if not isinstance(storage, StorageSlot) or storage.dtype is None:
        raise pickle.UnpicklingError("a tensor without a typed storage")
    return TensorSlot(storage, storage.dtype, int(offset), tuple(shape), tuple(stride))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> TensorSlot:
    """Stands in for ``torch._utils._rebuild_tensor_v3``, whose storage is untyped."""
    if not isinstance(storage, StorageSlot) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a storage or a dtype")
    return TensorSlot(storage, dtype, int(offset), tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    """Stands in for ``torch._utils._rebuild_parameter``: a parameter is its tensor."""
    return data


def _defaultdict(*_: Any) -> dict[Any, Any]:
    """Stands in for ``collections.defaultdict``: its items without its factory."""
    return {}


def _encode(text: Any, _encoding: Any = None) -> bytes:
    """Stands in for ``_codecs.encode``, which is how protocol 2 writes bytes."""
    return str(text).encode("latin1")


@final
@dataclass(frozen=True)
class _StorageType:
    """Stands in for ``torch.HalfStorage`` and its kind; ``dtype`` None for an untyped storage."""

    dtype: torch.dtype | None


_STORAGES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

_FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _defaultdict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): Inert,
    ("_codecs", "encode"): _encode,
    ("argparse", "Namespace"): InertNamespace,
    ("typing", "Any"): Inert,
    # Trainer state may hold a numpy scalar (a best loss): kept as an inert leaf, numpy is not called.
    ("numpy", "dtype"): Inert,
    ("numpy.core.multiarray", "scalar"): InertScalar,
    ("numpy._core.multiarray", "scalar"): InertScalar,
}

# Only types whose construction from pickled data is harmless: no bytes(10**12), no getattr, no eval.
# `long` and `unicode` are what protocol 2 calls int and str.
_BUILTINS: Mapping[str, type] = {
    **{kind.__name__: kind for kind in (dict, list, tuple, set, frozenset, str, int, float, bool, complex)},
    "long": int,
    "unicode": str,
}


@final
class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(BytesIO(data), encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global; a global outside the list is a CheckpointError that names it."""
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("builtins", "__builtin__") and name in _BUILTINS:
            return _BUILTINS[name]
        if module.split(".")[0] == "omegaconf":
            return InertConfig
        found = _torch_global(module, name)
        if found is None:
            raise CheckpointError(self._path, f"its pickle refers to {module}.{name}, which is not allowed")
        return found

    def persistent_load(self, pid: Any) -> StorageSlot:
        """A persistent id ``("storage", type, key, location, numel)`` as the description of a storage."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id that is not a storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, _StorageType):
            raise pickle.UnpicklingError("a storage of an unknown type")
        return StorageSlot(str(key), kind.dtype, int(numel))


def _torch_global(module: str, name: str) -> _StorageType | torch.dtype | None:
    """A storage class of torch as its dtype, or a dtype such as ``torch.float16``; None for anything else."""
    if name == "UntypedStorage" and module in ("torch", "torch.storage"):
        return _StorageType(None)
    if module in ("torch", "torch.cuda") and name in _STORAGES:
        return _StorageType(_STORAGES[name])
    if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
        return dtype
    return None
