"""Experts that are not in memory: modules that hold nothing, and the buffer over the checkpoint's files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe_opt.build import EXPERT_DTYPES, ExpertBuffer, ExpertLayer, LayerSpec, build_buffer
from fairseq_moe_opt.checkpoints import ExpertRecords
from fairseq_moe_opt.checkpoints.lazy import LazyStateDict
from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.options import MoEOptions


class MetaExperts(nn.ModuleList):
    """Experts whose parameters have names and shapes, and hold nothing, but for those that were given memory."""

    def __init__(self, build: Callable[[], Iterable[nn.Module]]) -> None:
        # On the meta device there is nothing to initialise either, which takes minutes for a model of 50 billion.
        with torch.device("meta"):
            super().__init__(build())
        self.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``half``, ``cuda`` and the like, for experts that have memory; slots follow the gate's device and dtype."""
        for expert in self:
            if not next(expert.parameters()).is_meta:
                expert._apply(fn)
        return self

    def give_memory(self, experts: Iterable[int]) -> None:
        """Let these ``experts`` hold something: it is not initialised, and is to be read from a checkpoint."""
        for expert in experts:
            self[expert].to_empty(device="cpu")


class FileExperts:
    """The experts of all sparse layers of one model, and the buffer over them.

    The buffer is made when it is first asked for, because fairseq changes a model's dtype and device after loading it.
    Copies of a model share this: experts never change.

    Attributes:
        lock: held while the buffer, or an engine over it, is made.
    """

    def __init__(self, layers: Sequence[ExpertLayer], options: MoEOptions) -> None:
        self.lock = threading.RLock()
        self._layers, self._options = tuple(layers), options
        self._made: tuple[tuple[torch.device, torch.dtype], ExpertBuffer] | None = None

    def buffer(self, device: torch.device, dtype: torch.dtype) -> ExpertBuffer:
        """The buffer for a model of ``dtype`` on ``device``, made anew when these have changed.

        Raises OptionError when the memory allowed is too small for it.
        """
        with self.lock:
            if self._made is None or self._made[0] != (device, dtype):
                self._made = None  # first gives back the memory of the one before
                own = EXPERT_DTYPES.get(self._options.expert_dtype, dtype)
                self._made = (device, dtype), build_buffer(self._layers, self._options, device, dtype, own)
            return self._made[1]

    def run_as(self, options: MoEOptions) -> None:
        """Make a new buffer as ``options`` say when it is next asked for."""
        with self.lock:
            self._options, self._made = options, None

    def __deepcopy__(self, memo: dict[int, object]) -> FileExperts:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        raise MoEError("a model with buffered experts cannot be pickled: its experts are not in it; load it again")


def locate(spec: LayerSpec, held: Sequence[int], tensors: LazyStateDict) -> ExpertLayer:
    """Where the experts of a layer lie, of which ``held`` are this process's; CheckpointError when one is not there."""
    names = (f"{spec.name}.experts.{expert}" for expert in range(spec.router.num_experts))
    return ExpertLayer(spec.name, spec.phase, tuple(_records(name, tensors) for name in names), tuple(held))


class RefuseStateDict:
    """A hook for modules whose state dict would lack experts: they are ``state``, and would be there ``otherwise``."""

    def __init__(self, state: str, otherwise: str) -> None:
        self._state, self._otherwise = state, otherwise

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Raise MoEError."""
        raise MoEError(
            f"the experts of this model are {self._state}, so it has no complete state dict to save: copy the "
            f"checkpoint it was loaded from, or load it {self._otherwise}"
        )


def _records(prefix: str, tensors: LazyStateDict) -> ExpertRecords:
    names = [f"{one}.{leaf}" for one in ("fc1", "fc2") for leaf in ("weight", "bias")]
    return {name.replace(".", "_"): tensors.record_of(f"{prefix}.{name}") for name in names}
