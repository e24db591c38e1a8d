"""The configuration of fairseq's sparse language models."""

# No ``from __future__ import annotations``: Transformers makes a dataclass of this and checks values against the types.

from transformers import PreTrainedConfig


class FairseqMoELMConfig(PreTrainedConfig):
    """``transformer_lm`` of fairseq, every ``moe_freq``-th layer of which is sparse.

    Attributes:
        embedding_size: width of the embedding, and ``output_size`` of what the last layer gives, where they are not
            ``hidden_size``; None where they are.
        learned_positions: positions are a table of ``max_position_embeddings`` rows, not sines and cosines;
            ``use_positions`` False is a model without any.
        scale_embedding: embeddings are multiplied by the square root of ``hidden_size``.
        pre_norm: layers normalise what they are given, not what they give; ``final_norm``: once more after the last.
        moe_freq: every how many layers one is sparse; 0 for none.
        top1: tokens go to one expert, not two.
        route_padding: padding goes to experts as well, and counts where capacity binds.
        expert_masking: what fairseq calls ``moe_eom``; ``final_masking`` is ``moe_fom``.
        eval_capacity_token_fraction: capacity at evaluation, where options ask for ``capacity="checkpoint"``.
        eval_capacity_max_length: it is of the longest sequence there can be, not of the tokens there are.
        add_bos_token: texts begin with ``<s>``, not with ``</s>`` as fairseq's language models do by default.
    """

    model_type = "fairseq_moe_lm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as Transformers has it

    vocab_size: int = 50264
    hidden_size: int = 1024
    embedding_size: int | None = None
    output_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    ffn_dim: int = 4096
    max_position_embeddings: int = 1024
    activation_function: str = "gelu"
    use_positions: bool = True
    learned_positions: bool = False
    scale_embedding: bool = True
    layernorm_embedding: bool = False
    pre_norm: bool = True
    final_norm: bool = True
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    layerdrop: float | int = 0.0
    init_std: float = 0.02
    moe_freq: int = 2
    num_experts: int = 512
    top1: bool = False
    fp32_gating: bool = True
    second_expert_policy: str = "all"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    route_padding: bool = True
    expert_masking: float | int = 0.0
    final_masking: float | int = 0.0
    eval_capacity_token_fraction: float | int = 0.25
    eval_capacity_max_length: bool = False
    add_bos_token: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 2
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    @property
    def num_experts_per_tok(self) -> int:
        """K."""
        return 1 if self.top1 else 2

    def is_sparse(self, layer: int) -> bool:
        """Whether ``layer``, counted from 0, has experts."""
        return self.moe_freq > 0 and (layer + 1) % self.moe_freq == 0
