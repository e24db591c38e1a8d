"""Model families of Transformers whose Mixture-of-Experts layers this project runs, one file a family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from fairseq_moe_opt.build import ExpertBuffer
from fairseq_moe_opt.errors import NoMoELayerError
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.families import experts_interface, nllb_moe
from hf_integration.patching import Installed


class Family(Protocol):
    """What a family file offers."""

    NAME: str

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` has layers of this family."""

    def expert_linears(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of every linear layer of every expert; none where experts are stacks of matrices."""

    def trace_layers(self, model: nn.Module) -> tuple[TraceLayer, ...]:
        """Name, phase and E of every layer, in the model's order."""

    def install(
        self,
        model: nn.Module,
        options: MoEOptions,
        buffer: ExpertBuffer | None = None,
        spread: ExpertSpread | None = None,
    ) -> Installed:
        """Put the engine's layers in place of the model's own.

        Experts come from ``buffer`` where they are buffered; with ``spread``, only this rank's do.
        """


FAMILIES: tuple[Family, ...] = (nllb_moe, experts_interface)


def family_of(model: nn.Module) -> Family:
    """The family of ``model``; NoMoELayerError names the families that were looked for."""
    for family in FAMILIES:
        if family.matches(model):
            return family
    looked_for = ", ".join(family.NAME for family in FAMILIES)
    raise NoMoELayerError(f"{type(model).__name__} has no Mixture-of-Experts layer of a known family ({looked_for})")
