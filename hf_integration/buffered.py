"""What a model may not do while its experts are in files, and how it gets them back.

The parameters of buffered experts are on the ``meta`` device: they keep their names and shapes, and hold nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    ``experts`` are the (fc1, fc2) modules of every sparse layer by the layer's name. The model takes no gradients from
    now on: slots are overwritten after use. Undoing ``patches`` first reads all experts into memory.
    """
    model.requires_grad_(False)
    for name in experts:
        block = model.get_submodule(name)
        patches.on_undo(block.register_state_dict_pre_hook(_refuse_state_dict).remove)
        patches.set_attribute(block, "_apply", _Apply(block, device, dtype))
    patches.set_attribute(model, "_apply", _Apply(model, device, dtype))
    patches.on_undo(Materialize(experts, stores, device))


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise MoEError(
        "the experts of this model are buffered, so it has no complete state dict to save: copy the checkpoint it was "
        "loaded from, or load it with expert_memory='all'"
    )


class _Apply:
    """``nn.Module._apply``, behind ``to``, ``half``, ``cuda`` ...: only what changes neither device nor dtype."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._module, self._device, self._dtype = module, device, dtype

    def __call__(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        probe = torch.empty(0, dtype=self._dtype, device=self._device)
        changed = change(probe)
        if changed.device != probe.device or changed.dtype != probe.dtype:
            raise MoEError(
                f"the experts of this model are buffered on {self._device} in {self._dtype}: load it again with the "
                "device and dtype that are wanted"
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
        wanted = sum(_nbytes(fc1) + _nbytes(fc2) for pairs in self._experts.values() for fc1, fc2 in pairs)
        there = available_memory(self._device)
        if there is not None and wanted > there:
            raise MoEError(
                f"undo would read all experts into memory: {readable(wanted)}, of which {readable(there)} is "
                "available; delete the model instead, or load it again with other options"
            )
        for name, pairs in self._experts.items():
            store = self._stores[name]
            for expert, (fc1, fc2) in enumerate(pairs):
                _fill(store, ExpertKey(name, expert), fc1, fc2, self._device)


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
