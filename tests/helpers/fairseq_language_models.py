"""Language models of fairseq's kind in Transformers: the converted golden, and a tiny random one with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fairseq_moe_opt.checkpoints import convert
from fairseq_moe_opt.checkpoints.lm_tokenizer import write_lm_tokenizer
from hf_integration.fairseq_lm import FairseqMoELMConfig, FairseqMoELMForCausalLM
from tests.helpers.goldens import FAIRSEQ_GOLDENS

GOLDEN = "E_lm_moe_branch"
SMALL = Path(__file__).resolve().parents[1] / "data" / "demo_small"
ROWS = 8007
"""Symbols of ``SMALL``'s dictionary with fairseq's four."""


def converted_golden(folder: Path, **how: Any) -> Path:
    """The golden as a folder."""
    return convert(FAIRSEQ_GOLDENS / GOLDEN, folder, **how).path


def tiny_language_model(seed: int = 5, **changes: Any) -> FairseqMoELMForCausalLM:
    """A random model of 2 layers, the second with 8 experts, whose texts do not end at once."""
    values: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    values |= {"ffn_dim": 24, "max_position_embeddings": 40, "num_experts": 8, "init_std": 0.3}
    torch.manual_seed(seed)
    return FairseqMoELMForCausalLM(FairseqMoELMConfig(**(values | changes))).eval()


def language_model_folder(folder: Path, **changes: Any) -> Path:
    """The same with the small demo's SentencePiece vocabulary, saved."""
    model = tiny_language_model(**{"vocab_size": ROWS, "learned_positions": True, **changes})
    model.save_pretrained(folder)
    config = {"vocab_size": ROWS, "add_bos_token": False, "max_position_embeddings": 40}
    write_lm_tokenizer(folder, SMALL / "spm.model", SMALL / "dict.txt", config=config)
    return folder
