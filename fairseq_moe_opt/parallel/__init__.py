"""Experts spread over ranks: exchanges that bring rows to them, and the ranks' agreement; on ``torch.distributed``.

An exchange (``all_to_all``, ``all_reduce``, ``padded``) decides what goes where; ``Collectives`` moves it: a process
group, or fake ranks in one process.
"""

from fairseq_moe_opt.parallel.agreement import agree, follow_first
from fairseq_moe_opt.parallel.all_reduce import AllReduceExchange
from fairseq_moe_opt.parallel.all_to_all import AllToAllExchange
from fairseq_moe_opt.parallel.collectives import Collectives
from fairseq_moe_opt.parallel.fake import FakeRanks, run_ranks
from fairseq_moe_opt.parallel.groups import expert_group, group_ranks
from fairseq_moe_opt.parallel.joining import join, join_world, one_message, own_device
from fairseq_moe_opt.parallel.mail import Mail
from fairseq_moe_opt.parallel.padded import PaddedAllToAllExchange
from fairseq_moe_opt.parallel.process_group import ProcessGroupRanks
from fairseq_moe_opt.parallel.slot_map import SlotMap
from fairseq_moe_opt.parallel.spread import ExpertSpread

__all__ = [
    "AllReduceExchange",
    "AllToAllExchange",
    "Collectives",
    "ExpertSpread",
    "FakeRanks",
    "Mail",
    "PaddedAllToAllExchange",
    "ProcessGroupRanks",
    "SlotMap",
    "agree",
    "expert_group",
    "follow_first",
    "group_ranks",
    "join",
    "join_world",
    "one_message",
    "own_device",
    "run_ranks",
]
