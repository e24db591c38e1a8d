"""Expert stores over a host model's own modules: the parameters stay where they are, under their own names."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fairseq_moe_opt.errors import NoMoELayerError
from fairseq_moe_opt.moe.int8_linear import Int8Linear
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, PackedExperts

_MADV_PAGEOUT = 21
"""From Linux 5.4 on; Python's mmap module does not name it."""


class ModuleExperts:
    """Experts given as pairs of ``nn.Linear``; reads the live parameters, so training and loading are seen at once.

    Attributes:
        pairs: (fc1, fc2) of every expert, in order.
    """

    layer_class: ClassVar[type[nn.Module]] = nn.Linear
    """What an expert's layers have to be."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        for fc1, fc2 in pairs:
            for module in (fc1, fc2):
                if not isinstance(module, self.layer_class):
                    raise NoMoELayerError(
                        f"an expert's layer is a {type(module).__name__}, not {self.layer_class.__name__}; "
                        "adapted experts, and those quantised by others, are not supported: load the model without"
                    )
        self.pairs = tuple(pairs)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.pairs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first expert's matrices, which is that of all."""
        return self.weights(0).fc1_weight.dtype

    @property
    def trainable(self) -> bool:
        """Whether any weight of any expert takes gradients."""
        return any(
            tensor.requires_grad for expert in range(len(self.pairs)) for tensor in self.weights(expert).tensors()
        )

    @property
    def transient(self) -> bool:
        """False: the weights stay."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(self.weights(expert).nbytes for expert in range(len(self.pairs)))

    def weights(self, expert: int) -> ExpertWeights:
        """The parameters themselves."""
        fc1, fc2 = self.pairs[expert]
        # Straight from the dictionaries: nn.Module's attribute look-up would cost more than a small expert's GEMM.
        first, second = fc1._parameters, fc2._parameters
        return ExpertWeights(first["weight"], first["bias"], second["weight"], second["bias"])  # type: ignore[arg-type]

    def hold(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Have these experts from now on, in this order."""
        self.pairs = tuple(pairs)

    def waves(
        self, needed: Sequence[int], rows: int | None = None, counts: Sequence[int] | None = None
    ) -> Iterator[ExpertWave]:
        """One wave with everything asked for."""
        yield ExpertWave(tuple(needed), tuple(self.weights(expert) for expert in needed))


class Int8ModuleExperts(ModuleExperts):
    """The same over pairs of :class:`~fairseq_moe_opt.moe.int8_linear.Int8Linear`."""

    layer_class = Int8Linear

    def weights(self, expert: int) -> ExpertWeights:
        """The parameters and buffers themselves."""
        fc1, fc2 = self.pairs[expert]
        first, second = fc1._buffers, fc2._buffers
        return ExpertWeights(
            first["weight"],  # type: ignore[arg-type]
            fc1._parameters["bias"],
            second["weight"],  # type: ignore[arg-type]
            fc2._parameters["bias"],
            fc1_scale=first["weight_scale"],
            fc2_scale=second["weight_scale"],
        )


class PackedModuleExperts(ModuleExperts):
    """The same, with the parameters made views of one tensor a matrix, for kernels that compute all experts at once.

    Packing goes expert by expert and releases each one's former storage, so it never holds a layer twice. It is
    redone when the model was moved or cast. ``unpack`` gives every parameter its own storage again.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__(pairs)
        self._packed = self._pack()

    def waves(
        self, needed: Sequence[int], rows: int | None = None, counts: Sequence[int] | None = None
    ) -> Iterator[ExpertWave]:
        """One wave with everything asked for, and the stack."""
        if not (self._is_view(0) and self._is_view(len(self.pairs) - 1)):
            self._packed = self._pack()
        for wave in super().waves(needed, rows):
            yield ExpertWave(wave.experts, wave.weights, self._packed)

    def hold(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Have these experts from now on; packed anew unless each one's parameters are the views at its place."""
        super().hold(pairs)
        in_place = len(pairs) == self._packed.num_experts and all(map(self._is_view, range(len(pairs))))
        if not in_place:
            self._packed = self._pack()

    def unpack(self) -> None:
        """Give every expert's parameters storage of their own, expert by expert."""
        for expert in range(len(self.pairs)):
            for parameter in self.weights(expert).tensors():
                parameter.data = parameter.data.clone()

    def _is_view(self, expert: int) -> bool:
        mine, packed = self.weights(expert).fc1_weight, self._packed.fc1_weight
        return mine.dtype == packed.dtype and mine.data_ptr() == packed[expert].data_ptr()

    def _pack(self) -> PackedExperts:
        first = self.weights(0)
        ffn_width, model_width = first.fc1_weight.shape
        packed = PackedExperts.empty(
            len(self.pairs),
            model_width,
            ffn_width,
            dtype=first.fc1_weight.dtype,
            device=first.fc1_weight.device,
            bias=first.fc1_bias is not None,
        )
        for expert in range(len(self.pairs)):
            _move_into(self.weights(expert).tensors(), packed.expert(expert).tensors())
        return packed


def trade_places(one: tuple[nn.Module, nn.Module], other: tuple[nn.Module, nn.Module]) -> None:
    """Give each of two experts, of the same shapes and dtypes, the other's parameters and buffers: their memory."""
    for mine, theirs in zip(one, other, strict=True):
        for name in mine._parameters:
            mine._parameters[name], theirs._parameters[name] = theirs._parameters[name], mine._parameters[name]
        for name in mine._buffers:
            mine._buffers[name], theirs._buffers[name] = theirs._buffers[name], mine._buffers[name]


def move_expert(expert: tuple[nn.Module, nn.Module], device: torch.device) -> None:
    """Give an expert memory on ``device`` that holds nothing yet; none at all on ``meta``."""
    for module in expert:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.empty_like(parameter, device=device, memory_format=torch.contiguous_format)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def _move_into(parameters: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, view in zip(parameters, views, strict=True):
            view.copy_(parameter)
            former, parameter.data = parameter.data, view
            _page_out(former)


def _page_out(tensor: Tensor) -> None:
    """Tell the system that the pages under ``tensor`` are not needed soon; their content stays valid.

    Transformers maps safetensors files: pages read for packing would stay in the process beside the packed copy.
    Only a hint: where the system has no such call, or refuses it, nothing happens.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.numel() * tensor.element_size() - first
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_PAGEOUT)
