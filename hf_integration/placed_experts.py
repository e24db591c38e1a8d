"""``ep_implementation="moe_opt"``: placements in Transformers' own expert-parallel world.

There, weights reach a rank already sharded equally and contiguously, so what can be honoured is a placement that gives
every rank equally many experts, each once: ranks exchange weights once, and from then on every routed index is
translated. How tokens travel stays Transformers' ``AutoEP``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_moe_opt.errors import PlacementError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer
from fairseq_moe_opt.placement import Placement, check_made_for
from hf_integration.experts_module import ExpertsModule, experts_modules
from hf_integration.families.experts_interface import phase_of

NAME = "moe_opt"
_ATTRIBUTE = "_moe_opt_parallel"
_ELSEWHERE = "; `python -m hf_integration.launch` and hf_integration.from_pretrained(parallel=...) honour any placement"


def register_ep_implementation() -> bool:
    """Make ``moe_opt`` a name of Transformers' registry; False where the release has none."""
    try:
        module = importlib.import_module("transformers.distributed.expert_parallel")
        interface, auto = module.EPImplementationInterface, module.AutoEP
    except (ImportError, AttributeError):
        return False
    interface.register(NAME, _placed(auto))
    return True


def _placed(auto: Any) -> type:
    class PlacedEP(auto):
        """Transformers' ``AutoEP`` over experts that may have changed places."""

        def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.slot_of: Tensor | None = None
            setattr(experts, _ATTRIBUTE, self)

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
            if self.slot_of is not None:
                top_k_index = self.slot_of.to(top_k_index.device)[top_k_index]
            return super().__call__(hidden_states, top_k_index, top_k_weights)

    return PlacedEP


def place_experts(model: nn.Module, placement: Placement) -> None:
    """Give the ranks of a ``model`` loaded with ``ep_implementation="moe_opt"`` the experts that ``placement`` says.

    Every rank calls this at the same time, once, after loading. Raises PlacementError, with nothing changed, for a
    placement of another model or number of ranks, or one that is not equally many experts a rank, each once.
    """
    found = {name: module for name, module in experts_modules(model) if hasattr(module, _ATTRIBUTE)}
    if not found:
        raise PlacementError(
            'cannot be applied: no experts of this model run through ep_implementation="moe_opt"' + _ELSEWHERE
        )
    sizes = {name: ExpertsModule.of(module).num_experts for name, module in found.items()}
    ranks = {getattr(module, _ATTRIBUTE).ep_mesh.size() for module in found.values()}
    layers = tuple(TraceLayer(name, phase_of(name), size) for name, size in sizes.items())
    check_made_for(placement, Trace(layers, ()).fingerprint, next(iter(sizes.values())), ranks.pop())
    orders = {name: equal_order(placement, name, size) for name, size in sizes.items()}
    moved = [name for name, module in found.items() if getattr(module, _ATTRIBUTE).slot_of is not None]
    if moved:
        raise PlacementError(f"cannot be applied twice: the experts of {moved[0]!r} were moved already; load again")
    for name, module in found.items():
        _move(module, orders[name])


def equal_order(placement: Placement, layer: str, num_experts: int) -> tuple[int, ...]:
    """The experts of ``layer`` in the order of ranks and slots; PlacementError unless equal parts hold each once."""
    if layer not in placement.layers:
        raise PlacementError(f"does not place the layer {layer!r} of this model")
    by_rank = placement.layers[layer]
    if len({len(experts) for experts in by_rank}) != 1:
        counts = ", ".join(str(len(experts)) for experts in by_rank)
        raise PlacementError(f"gives ranks {counts} experts of {layer!r}; Transformers shards equally" + _ELSEWHERE)
    order = tuple(expert for experts in by_rank for expert in experts)
    if sorted(order) != list(range(num_experts)):
        raise PlacementError(f"has replicas in {layer!r}; Transformers holds every expert once" + _ELSEWHERE)
    return order


def _move(module: nn.Module, order: tuple[int, ...]) -> None:
    """Exchange the rows of all stacks of ``module``, so that place ``p`` of all ranks' holds expert ``order[p]``."""
    parallel = getattr(module, _ATTRIBUTE)
    group, size, rank = parallel.ep_mesh.get_group(), parallel.ep_mesh.size(), parallel.ep_mesh.get_local_rank()
    share = len(order) // size
    wanted = [order[one * share : (one + 1) * share] for one in range(size)]
    sent = [[expert for expert in wanted[one] if expert // share == rank] for one in range(size)]
    received = [[expert for expert in wanted[rank] if expert // share == one] for one in range(size)]
    slots = [wanted[rank].index(expert) for experts in received for expert in experts]
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        with torch.no_grad():
            rows = local.reshape(share, -1)
            outgoing = rows[[expert % share for experts in sent for expert in experts]]
            incoming = torch.empty_like(rows)
            dist.all_to_all_single(
                incoming, outgoing, [len(one) for one in received], [len(one) for one in sent], group
            )
            placed = torch.empty_like(rows)
            placed[slots] = incoming
            local.copy_(placed.view(local.shape))
    slot_of = torch.empty(len(order), dtype=torch.int64)
    slot_of[list(order)] = torch.arange(len(order))
    parallel.slot_of = slot_of
