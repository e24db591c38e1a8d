"""Names and options between fairseq and Transformers' NLLB-MoE, and what cannot be expressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairseq_moe_opt.checkpoints import open_index
from fairseq_moe_opt.checkpoints.keymaps import hf_config, hf_generation_config, hf_name, hf_names
from fairseq_moe_opt.errors import CheckpointError
from tests.helpers.checkpoint_files import fairseq_options
from tests.helpers.goldens import FAIRSEQ_GOLDENS

HERE = Path("x.pt")


@pytest.mark.parametrize(
    "fairseq, hf",
    [
        ("encoder.embed_tokens.weight", "model.shared.weight"),
        ("decoder.embed_tokens.weight", None),
        ("decoder.output_projection.weight", None),
        ("encoder.version", None),
        ("decoder.embed_positions._float_tensor", None),
        ("decoder.layer_norm.bias", "model.decoder.layer_norm.bias"),
        ("encoder.layers.3.self_attn.out_proj.bias", "model.encoder.layers.3.self_attn.out_proj.bias"),
        ("decoder.layers.0.encoder_attn.q_proj.weight", "model.decoder.layers.0.cross_attention.q_proj.weight"),
        ("decoder.layers.0.encoder_attn_layer_norm.bias", "model.decoder.layers.0.cross_attention_layer_norm.bias"),
        ("encoder.layers.10.final_layer_norm.weight", "model.encoder.layers.10.ff_layer_norm.weight"),
        ("encoder.layers.0.fc1.weight", "model.encoder.layers.0.ffn.fc1.weight"),
        ("encoder.layers.1.moe_layer.gate.wg.weight", "model.encoder.layers.1.ffn.router.classifier.weight"),
        (
            "decoder.layers.1.moe_layer.experts.127.fc2.bias",
            "model.decoder.layers.1.ffn.experts.expert_127.fc2.bias",
        ),
    ],
)
def test_names(fairseq: str, hf: str | None) -> None:
    assert hf_name(fairseq) == hf


def test_every_tensor_of_a_golden_has_a_place_of_its_own() -> None:
    index = open_index(FAIRSEQ_GOLDENS / "A_top2_eom" / "checkpoint_single.pt")
    names = hf_names(index, HERE)
    assert len(set(names.values())) == len(names) == len(index) - 6


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.0.ffn_layernorm.weight", "decoder.layers.1.cmr_layer.gate.wg.weight", "encoder.embed.weight"],
)
def test_unknown_tensor_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.* has no place"):
        hf_names([name], HERE)


def config(**changes: Any) -> dict[str, Any]:
    return hf_config({"model": fairseq_options(**changes)}, 11, HERE, "float16")


def test_config_says_what_the_options_say() -> None:
    made = config(moe_freq=0, encoder_moe_freq=2, decoder_moe_freq=3, moe_batch_prioritized_routing=True)
    assert (made["encoder_sparse_step"], made["decoder_sparse_step"]) == (2, 3)
    assert made["batch_prioritized_routing"] is True
    assert made["normalize_router_prob_before_dropping"] is False
    assert (made["num_experts"], made["moe_token_dropout"], made["vocab_size"]) == (4, 0.2, 11)
    assert made["max_position_embeddings"] == 48
    assert made["router_ignore_padding_tokens"] is False
    assert config(use_moe_pad_mask=False)["router_ignore_padding_tokens"] is True
    assert hf_generation_config(made)["decoder_start_token_id"] == 2


def test_a_frequency_of_one_side_does_not_undercut_the_common_one() -> None:
    made = config(moe_freq=4, encoder_moe_freq=2)
    assert (made["encoder_sparse_step"], made["decoder_sparse_step"]) == (4, 4)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"moe_cmr": True}, "conditional MoE routing"),
        ({"moe_top1_expert": True}, "top-1 routing"),
        ({"moe_fom": 0.1}, "final output masking"),
        ({"encoder_normalize_before": False}, "post-LN layers"),
        ({"decoder_normalize_before": False}, "post-LN layers"),
        ({"scale_heads": True}, "NormFormer"),
        ({"share_all_embeddings": False}, "untied embeddings"),
        ({"moe_eval_capacity_token_fraction": -1.0}, "training capacity"),
        ({"decoder_learned_pos": True}, "learned positions"),
        ({"decoder_embed_dim": 16}, r"several widths \[8, 16\]"),
        ({"activation_fn": "gelu_fast"}, "activation_fn 'gelu_fast'"),
    ],
)
def test_what_transformers_cannot_express_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot express {said if 'training' not in said else '.*' + said}"):
        config(**changes)


def test_a_language_model_is_not_an_encoder_decoder() -> None:
    with pytest.raises(CheckpointError, match="lacks encoder_layers"):
        hf_config({"model": {"decoder_layers": 2, "share_all_embeddings": True}}, 11, HERE, "float32")
