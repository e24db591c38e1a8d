"""What a model may not do while its experts are in files, and how it gets them back.

The parameters of buffered experts are on the ``meta`` device: they keep their names and shapes, and hold nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe_opt.buffering import BufferedExperts
from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.moe.types import ExpertKey, ExpertWeights
from fairseq_moe_opt.sizes import readable
from hf_integration.patching import Patches

_MEMINFO = Path("/proc/meminfo")
_AROUND = "base_model."
"""Begins the names of what a model holds in those of a ``PeftModel`` around it."""

Pairs = Sequence[tuple[nn.Module, nn.Module]]


def keep_in_files(
    model: nn.Module,
    experts: Mapping[str, Pairs],
    stores: Mapping[str, BufferedExperts],
    patches: Patches,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Make ``model`` say so, in one line, when it is asked for what it cannot do without its experts in memory.

    ``experts`` are the (fc1, fc2) modules of every sparse layer by the layer's name. Undoing ``patches`` first reads
    all experts into memory.
    """
    refuse_without_experts(model, experts, patches, device, dtype, Reason("buffered", "with expert_memory='all'"))
    patches.on_undo(Materialize(experts, stores, device))


@dataclass(frozen=True)
class Reason:
    """Why experts are not in a model: they are ``state``; loading it again ``otherwise`` would have them there."""

    state: str
    otherwise: str


def refuse_without_experts(
    model: nn.Module,
    blocks: Iterable[str],
    patches: Patches,
    device: torch.device,
    dtype: torch.dtype,
    reason: Reason,
) -> None:
    """Refuse state dicts, and moves to another device or dtype, of a ``model`` that lacks experts of its ``blocks``.

    The model takes no gradients from now on.
    """
    model.requires_grad_(False)
    for name in blocks:
        block = model.get_submodule(name)
        patches.on_undo(block.register_state_dict_pre_hook(_RefuseStateDict(reason)).remove)
        patches.on_undo(block.register_state_dict_post_hook(_leave_out).remove)
        patches.set_attribute(block, "_apply", _Apply(block, device, dtype, reason))
    patches.set_attribute(model, "_apply", _Apply(model, device, dtype, reason))


class _RefuseStateDict:
    """Of the model; one of a ``PeftModel`` around it is asked for adapters, and does without the experts."""

    def __init__(self, reason: Reason) -> None:
        self._reason = reason

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if prefix.startswith(_AROUND):
            return
        raise MoEError(
            f"the experts of this model are {self._reason.state}, so it has no complete state dict to save: copy the "
            f"checkpoint it was loaded from, or load it {self._reason.otherwise}"
        )


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """What is not there is not in a ``PeftModel``'s state dict either."""
    if prefix.startswith(_AROUND):
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]


class _Apply:
    """``nn.Module._apply``, behind ``to``, ``half``, ``cuda`` ...: only what changes neither device nor dtype."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, reason: Reason) -> None:
        self._module, self._device, self._dtype, self._reason = module, device, dtype, reason

    def __call__(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        probe = torch.empty(0, dtype=self._dtype, device=self._device)
        changed = change(probe)
        if changed.device != probe.device or changed.dtype != probe.dtype:
            raise MoEError(
                f"the experts of this model are {self._reason.state} on {self._device} in {self._dtype}: load it again "
                "with the device and dtype that are wanted"
            )
        return self._module


class Materialize:
    """The inverse of buffering: every expert is read into memory of its own."""

    def __init__(
        self, experts: Mapping[str, Pairs], stores: Mapping[str, BufferedExperts], device: torch.device
    ) -> None:
        self._experts, self._stores, self._device = experts, stores, device

    def __call__(self) -> None:
        """Read all experts; MoEError when there is not enough memory for them, with nothing changed."""
        require_memory(chain.from_iterable(chain(*self._experts.values())), self._device)
        for name, pairs in self._experts.items():
            store = self._stores[name]
            for expert, (fc1, fc2) in enumerate(pairs):
                _fill(store, ExpertKey(name, expert), fc1, fc2, self._device)


def require_memory(experts: Iterable[nn.Module], device: torch.device) -> None:
    """Raise MoEError unless there is memory for what ``experts`` ask for."""
    wanted, there = sum(map(_nbytes, experts)), available_memory(device)
    if there is not None and wanted > there:
        raise MoEError(
            f"undo would read all experts into memory: {readable(wanted)}, of which {readable(there)} is "
            "available; delete the model instead, or load it again with other options"
        )


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be had without pushing anything else out; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers by name."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_of(module).values())


def _fill(store: BufferedExperts, key: ExpertKey, fc1: nn.Module, fc2: nn.Module, device: torch.device) -> None:
    """Read one expert into memory of its own and make that the modules' parameters and buffers."""
    fields: dict[str, Tensor | None] = {"fc1_bias": None, "fc2_bias": None}
    values: list[tuple[nn.Module, str, Tensor]] = []
    for name, module in (("fc1", fc1), ("fc2", fc2)):
        for leaf, tensor in _tensors_of(module).items():
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            fields[f"{name}_{leaf.removeprefix('weight_')}"] = value  # weight_scale is fc1_scale there
            values.append((module, leaf, value))
    weights: Any = fields
    store.pool.read(key, ExpertWeights(**weights))
    for module, leaf, value in values:
        former = getattr(module, leaf)
        is_parameter = isinstance(former, nn.Parameter)
        setattr(module, leaf, nn.Parameter(value, former.requires_grad) if is_parameter else value)
