"""A state dict whose tensors stay in their files until somebody asks for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from typing import final

from torch import Tensor

from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord, read_tensor
from fairseq_moe_opt.errors import CheckpointError


@final
class LazyStateDict(MutableMapping[str, Tensor]):
    """The tensors of ``index`` by name; each is read anew whenever it is asked for, and none is kept.

    Entries can be replaced, renamed and removed as in a dictionary, which is what fairseq's upgrade of old names does.

    Attributes:
        index: where every tensor lies, for whoever wants to read experts later or elsewhere.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._entries: dict[str, TensorRecord | Tensor] = dict(index)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry if isinstance(entry, Tensor) else read_tensor(entry)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape_of(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._entries[name].shape)

    def record_of(self, name: str) -> TensorRecord:
        """Where a tensor lies; CheckpointError when it is not in a file."""
        entry = self._entries.get(name)
        if not isinstance(entry, TensorRecord):
            raise CheckpointError(self.index.path, f"has no tensor {name!r} in its files")
        return entry

    def read_into(self, name: str, out: Tensor) -> None:
        """Reads a tensor straight into ``out`` (same shape), converting dtype and device where they differ."""
        entry = self._entries[name]
        if isinstance(entry, Tensor):
            out.copy_(entry)
        else:
            read_tensor(entry, out)

    def __reduce__(self) -> tuple[object, ...]:
        # Copied or pickled (saved again, sent to another process) it is a dictionary of tensors as torch writes it.
        return OrderedDict, (), None, None, iter(self.items())
