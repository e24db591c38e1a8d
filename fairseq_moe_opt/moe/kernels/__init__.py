"""Expert kernels: grouped FFNs over rows sorted by expert, one file a backend, behind an append-only registry.

``naive`` is the oracle and never goes away. Nothing falls back silently: a kernel asked for by name either runs or
raises :class:`~fairseq_moe_opt.errors.KernelError` saying why, and what ``auto`` chose is in the report.
"""

from __future__ import annotations

import torch

from fairseq_moe_opt.errors import KernelError, OptionError
from fairseq_moe_opt.moe.kernels.fused import NO_LAYOUT, FusedKernel, no_activation
from fairseq_moe_opt.moe.kernels.grouped_mm import GroupedMMKernel
from fairseq_moe_opt.moe.kernels.loop import LoopKernel
from fairseq_moe_opt.moe.kernels.naive import NaiveKernel
from fairseq_moe_opt.moe.kernels.triton_grouped import TritonKernel
from fairseq_moe_opt.moe.protocols import ExpertKernel
from fairseq_moe_opt.moe.types import ExpertWeights

_REGISTRY: dict[str, ExpertKernel] = {}

AUTO = "auto"


def register_kernel(kernel: ExpertKernel) -> None:
    """Add ``kernel`` under its name; a name is taken once (OptionError)."""
    if kernel.name in _REGISTRY or kernel.name == AUTO:
        raise OptionError("kernel", f"the name {kernel.name!r} is taken")
    _REGISTRY[kernel.name] = kernel


def kernel_names() -> tuple[str, ...]:
    """Every registered name, in order of registration."""
    return tuple(_REGISTRY)


def available_kernels(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Names of the kernels that can run on experts with ``dtype`` matrices on ``device``."""
    device = torch.device(device)
    return tuple(name for name, kernel in _REGISTRY.items() if kernel.refusal(device, dtype) is None)


def get_kernel(name: str) -> ExpertKernel:
    """The kernel registered as ``name``; OptionError lists the names there are."""
    try:
        return _REGISTRY[name]
    except KeyError:
        known = ", ".join((AUTO, *_REGISTRY))
        raise OptionError("kernel", f"{name!r} is not one of {known}") from None


def choose_kernel(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    activation: str | None = None,
    apart: bool = False,
    example: ExpertWeights | None = None,
) -> ExpertKernel:
    """The kernel for experts with ``dtype`` matrices on ``device``; ``auto`` takes the fastest measured one there.

    Args:
        name: of a kernel, or ``auto``.
        device, dtype: of the experts' matrices.
        activation: of the experts; None when it is not known.
        apart: the experts are never packed in one tensor, which ``auto`` heeds.
        example: one of the experts, as the others lie in memory; None when it is not known.

    Raises KernelError when the named kernel cannot run there, or cannot compute such experts.
    """
    if name == AUTO:
        name = _fastest(device, dtype, activation, apart, example)
    kernel = get_kernel(name)
    reason = kernel.refusal(device, dtype)
    if reason is None and isinstance(kernel, FusedKernel):
        reason = _unfit(activation, example)
    if reason is not None:
        raise KernelError(f"kernel {name!r} cannot run here: {reason}")
    return kernel


def _unfit(activation: str | None, example: ExpertWeights | None) -> str | None:
    """Why the compiled kernel cannot compute such experts; None if it can, as far as is known."""
    if activation is not None and not FusedKernel.computes(activation):
        return no_activation(activation)
    return None if example is None or FusedKernel.reads(example) else NO_LAYOUT


def _fastest(
    device: torch.device, dtype: torch.dtype, activation: str | None, apart: bool, example: ExpertWeights | None
) -> str:
    """On CPU the compiled kernel where it is there; on CUDA grouped GEMMs save launches. Else threads over experts."""
    if device.type == "cuda" and not apart:
        if get_kernel("grouped_mm").refusal(device, dtype) is None:
            return "grouped_mm"
        known = activation is None or activation in TritonKernel.activations
        if known and _TRITON.refusal(device, dtype) is None and _TRITON.suits(device, dtype):
            return "triton"
    known = _unfit(activation, example) is None
    if known and get_kernel("fused").refusal(device, dtype) is None:
        return "fused"
    # Few rows an expert, and an activation of many operations: done for all rows at once, they cost much less.
    at_once = device.type == "cpu" and not (known or apart)
    return "grouped_mm" if at_once and get_kernel("grouped_mm").refusal(device, dtype) is None else "loop"


_LOOP, _TRITON = LoopKernel(), TritonKernel()
register_kernel(NaiveKernel())
register_kernel(_LOOP)
register_kernel(GroupedMMKernel())
register_kernel(FusedKernel(_LOOP))
register_kernel(_TRITON)

__all__ = [
    "AUTO",
    "available_kernels",
    "choose_kernel",
    "get_kernel",
    "kernel_names",
    "register_kernel",
]
