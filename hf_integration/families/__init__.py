"""Model families of Transformers whose Mixture-of-Experts layers this project runs, one file a family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import nn

from fairseq_moe_opt.build import ExpertBuffer, ExpertLayer
from fairseq_moe_opt.checkpoints import TensorRecord
from fairseq_moe_opt.errors import NoMoELayerError
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.families import experts_interface, fairseq_lm, nllb_moe, switch_transformers
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


class PairedFamily(Family, Protocol):
    """A family whose experts are pairs of linear layers in modules of their own."""

    MODEL_TYPE: str

    def expert_linears(
        self, model: nn.Module, but_of: Mapping[str, Collection[int]] = ...
    ) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of every linear layer of every expert, but for experts ``but_of`` a layer."""

    def sparse_blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The sparse layers by name, in the model's order."""

    def expert_pairs(self, block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """The two linear layers of every expert of a layer, in the order they are computed in."""

    def expert_layers(self, model: nn.Module, records: Callable[[str], TensorRecord]) -> tuple[ExpertLayer, ...]:
        """Where the experts of every layer lie; ``records`` finds a parameter by its name in ``model``."""

    def trace_layers(self, model: nn.Module) -> tuple[TraceLayer, ...]:
        """Name, phase and E of every layer."""


PAIRED: tuple[PairedFamily, ...] = (nllb_moe, switch_transformers, fairseq_lm)
FAMILIES: tuple[Family, ...] = (*PAIRED, experts_interface)


def family_of(model: nn.Module) -> Family:
    """The family of ``model``; NoMoELayerError names the families that were looked for."""
    return _first_match(FAMILIES, model)


def paired_family_of(model: nn.Module) -> PairedFamily:
    """The same among families whose experts are pairs of linear layers."""
    return _first_match(PAIRED, model)


_AnyFamily = TypeVar("_AnyFamily", bound=Family)


def _first_match(families: Sequence[_AnyFamily], model: nn.Module) -> _AnyFamily:
    for family in families:
        if family.matches(model):
            return family
    looked_for = ", ".join(family.NAME for family in families)
    raise NoMoELayerError(f"{type(model).__name__} has no Mixture-of-Experts layer of a known family ({looked_for})")
