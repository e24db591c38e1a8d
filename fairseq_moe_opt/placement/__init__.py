"""Which rank holds which expert: load histories, strategies, evaluation and files. Pure functions on numpy arrays."""

from fairseq_moe_opt.placement.evaluate import (
    LayerBalance,
    LowerBounds,
    NetworkBytes,
    evaluate,
    layer_balance,
    lower_bounds,
    network_bytes,
    rank_loads,
)
from fairseq_moe_opt.placement.files import check_made_for, read_placement, write_placement
from fairseq_moe_opt.placement.history import LoadHistory, history_of, read_history
from fairseq_moe_opt.placement.replan import replan
from fairseq_moe_opt.placement.strategies import DEFAULT_STRATEGY, Strategy, place, register_strategy, strategy_names
from fairseq_moe_opt.placement.synthetic import WORKLOADS, synthetic_history
from fairseq_moe_opt.placement.types import Cluster, Move, Placement, RankSlots, moves_between

__all__ = [
    "DEFAULT_STRATEGY",
    "WORKLOADS",
    "Cluster",
    "LayerBalance",
    "LoadHistory",
    "LowerBounds",
    "Move",
    "NetworkBytes",
    "Placement",
    "RankSlots",
    "Strategy",
    "check_made_for",
    "evaluate",
    "history_of",
    "layer_balance",
    "lower_bounds",
    "moves_between",
    "network_bytes",
    "place",
    "rank_loads",
    "read_history",
    "read_placement",
    "register_strategy",
    "replan",
    "strategy_names",
    "synthetic_history",
    "write_placement",
]
