"""Checkpoints: formats to names. Header-only readers, key maps as tables, writers; no model runs here."""

from fairseq_moe_opt.checkpoints.convert import Conversion, convert
from fairseq_moe_opt.checkpoints.expert_files import ExpertFiles, ExpertRecords
from fairseq_moe_opt.checkpoints.fingerprint import checkpoint_fingerprint
from fairseq_moe_opt.checkpoints.opening import open_index
from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord, read_tensor

__all__ = [
    "CheckpointIndex",
    "Conversion",
    "ExpertFiles",
    "ExpertRecords",
    "TensorRecord",
    "checkpoint_fingerprint",
    "convert",
    "open_index",
    "read_tensor",
]
