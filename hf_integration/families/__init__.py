"""Model families of Transformers whose Mixture-of-Experts layers this project runs, one file a family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from torch import nn

from fairseq_moe_opt.build import ExpertBuffer
from fairseq_moe_opt.errors import NoMoELayerError
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.families import experts_interface, nllb_moe, switch_transformers
from hf_integration.families.pairs_of_linears import PairsOfLinears
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


_F = TypeVar("_F", bound=Family)

PAIRS_OF_LINEARS: tuple[PairsOfLinears, ...] = (nllb_moe.FAMILY, switch_transformers.FAMILY)
"""Those whose experts are pairs of linear layers."""

FAMILIES: tuple[Family, ...] = (*PAIRS_OF_LINEARS, experts_interface)


def family_of(model: nn.Module) -> Family:
    """The family of ``model``; NoMoELayerError names the families that were looked for."""
    return _first_match(model, FAMILIES)


def pairs_of_linears(model: nn.Module) -> PairsOfLinears:
    """The same among those of ``PAIRS_OF_LINEARS``."""
    return _first_match(model, PAIRS_OF_LINEARS)


def _first_match(model: nn.Module, families: Sequence[_F]) -> _F:
    for family in families:
        if family.matches(model):
            return family
    looked_for = ", ".join(family.NAME for family in families)
    raise NoMoELayerError(f"{type(model).__name__} has no Mixture-of-Experts layer of a known family ({looked_for})")
