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
from fairseq_moe_opt.parallel.joining import join, one_message, own_device
from fairseq_moe_opt.parallel.mail import Mail
from fairseq_moe_opt.parallel.moving import Transfer, copy_in, nbytes_of, send_experts, settled, transfers
from fairseq_moe_opt.parallel.own_files import own_file, own_folder, own_number
from fairseq_moe_opt.parallel.padded import PaddedAllToAllExchange
from fairseq_moe_opt.parallel.process_group import ProcessGroupRanks
from fairseq_moe_opt.parallel.slot_map import SlotMap
from fairseq_moe_opt.parallel.spread import ALL_REDUCE, ALL_TO_ALL, EXCHANGES, ExpertSpread
from fairseq_moe_opt.parallel.timing import TimedRanks

__all__ = [
    "ALL_REDUCE",
    "ALL_TO_ALL",
    "EXCHANGES",
    "AllReduceExchange",
    "AllToAllExchange",
    "Collectives",
    "ExpertSpread",
    "FakeRanks",
    "Mail",
    "PaddedAllToAllExchange",
    "ProcessGroupRanks",
    "SlotMap",
    "TimedRanks",
    "Transfer",
    "agree",
    "copy_in",
    "expert_group",
    "follow_first",
    "group_ranks",
    "join",
    "nbytes_of",
    "one_message",
    "own_device",
    "own_file",
    "own_folder",
    "own_number",
    "run_ranks",
    "send_experts",
    "settled",
    "transfers",
]
