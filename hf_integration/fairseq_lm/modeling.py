"""fairseq's decoder-only transformer as a Transformers model, with fairseq's own names of its parts.

What fairseq does and Transformers' GPT-like models do not: positions are counted from ``padding_idx + 1``, and texts
begin with ``</s>``. A sparse layer's own forward is a plain loop over experts; ``hf_integration.optimize`` puts the
engine's layer in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.moe import CapacityRule, GShardTop2Router, Top1Router
from hf_integration.fairseq_lm.configuration import FairseqMoELMConfig


def layer_router(config: FairseqMoELMConfig, capacity: CapacityRule | None) -> GShardTop2Router | Top1Router:
    """The router of every sparse layer; without ``capacity`` it drops nothing."""
    if config.top1:
        return Top1Router(config.num_experts, capacity, config.fp32_gating)
    return GShardTop2Router(
        num_experts=config.num_experts,
        capacity=capacity,
        second_expert_policy=config.second_expert_policy,
        normalize_before_dropping=config.normalize_before_dropping,
        batch_prioritized=config.batch_prioritized,
        fp32_gating=config.fp32_gating,
    )


class LearnedPositions(nn.Embedding):
    """A table of positions; the first ``padding_idx + 1`` rows are not used."""

    def __init__(self, count: int, width: int, padding_idx: int) -> None:
        super().__init__(count + padding_idx + 1, width)
        self.count, self.offset = count, padding_idx + 1

    def forward(self, position_ids: Tensor) -> Tensor:
        """(B, T) positions from 0 to (B, T, D); InputError for one that is not in the table."""
        if position_ids.device.type == "cpu" and position_ids.numel() and int(position_ids.max()) >= self.count:
            raise InputError(
                f"the text has more tokens than the {self.count} positions of this model: shorten the prompt, or "
                "generate fewer tokens"
            )
        return super().forward(position_ids + self.offset)


class SinusoidalPositions(nn.Module):
    """fairseq's sines and cosines, computed when they are asked for: there is no longest text."""

    def __init__(self, width: int, padding_idx: int) -> None:
        super().__init__()
        self.width, self.offset = width, padding_idx + 1

    def forward(self, position_ids: Tensor) -> Tensor:
        """(B, T) positions from 0 to (B, T, D) in float32."""
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float32, device=position_ids.device)
        angles = (position_ids + self.offset).float().unsqueeze(-1) * torch.exp(steps * -(math.log(10000) / (half - 1)))
        table = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
        return nn.functional.pad(table, (0, self.width % 2))


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Self-attention over what the cache holds and the new tokens."""

    def __init__(self, config: FairseqMoELMConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to the same, and the weights where the implementation has them."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, _eager_attention
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.out_proj(output.reshape(hidden.shape)), weights


class Gate(nn.Module):
    """Tokens (T, D) to logits (T, E)."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(width, num_experts, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits in the tokens' dtype."""
        logits: Tensor = self.wg(tokens)
        return logits


class FeedForward(nn.Module):
    """``fc2(act(fc1 x))``: one expert."""

    def __init__(self, config: FairseqMoELMConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.hidden_size)
        self.activation = ACT2FN[config.activation_function]
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to the same."""
        hidden = nn.functional.dropout(self.activation(self.fc1(hidden)), self.activation_dropout, self.training)
        return nn.functional.dropout(self.fc2(hidden), self.dropout, self.training)


class SparseLayer(nn.Module):
    """The experts of one layer and their gate. Nothing is dropped, whatever the checkpoint's capacity."""

    def __init__(self, config: FairseqMoELMConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = Gate(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))
        self._router = layer_router(config, capacity=None)
        self._expert_masking, self._final_masking = config.expert_masking, config.final_masking

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) to the same, one expert after the other."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        routing = self._router.route(self.gate(tokens), training=self.training, model_dtype=tokens.dtype)
        weight = self._masked(routing.weight.unsqueeze(-1), self._expert_masking)
        output = torch.zeros_like(tokens)
        for expert in routing.expert_index.unique().tolist():
            if expert < self.num_experts:  # the one after the last is a choice that goes nowhere
                rows, choices = torch.where(routing.expert_index == expert)
                results = self.experts[expert](tokens[rows]) * weight[rows, choices]
                output = output.index_add(0, rows, results)
        return self._masked(output, self._final_masking).view(hidden.shape)

    def _masked(self, values: Tensor, probability: float) -> Tensor:
        """fairseq's masking of whole rows in training, and its expectation otherwise."""
        if not self.training:
            return values * (1 - probability)
        return values * (torch.rand_like(values[..., :1]) >= probability)


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward network, dense or sparse, each with its layer norm before or after it."""

    def __init__(self, config: FairseqMoELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.pre_norm, self.dropout = config.pre_norm, config.dropout
        self.self_attn = Attention(config, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        if config.is_sparse(layer_idx):
            self.moe_layer = SparseLayer(config)
        else:
            self.ffn = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to the same, and the attention's weights."""
        attended, weights = self.self_attn(
            self._before(self.self_attn_layer_norm, hidden), attention_mask, past_key_values, **kwargs
        )
        attended = nn.functional.dropout(attended, self.dropout, self.training)
        hidden = self._after(self.self_attn_layer_norm, hidden + attended)
        network = self.moe_layer if hasattr(self, "moe_layer") else self.ffn
        hidden = hidden + network(self._before(self.final_layer_norm, hidden))
        return self._after(self.final_layer_norm, hidden), weights

    def _before(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        return norm(hidden) if self.pre_norm else hidden

    def _after(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        return hidden if self.pre_norm else norm(hidden)


class FairseqMoELMPreTrainedModel(PreTrainedModel):
    """What both classes below have in common."""

    config_class = FairseqMoELMConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class FairseqMoELMModel(FairseqMoELMPreTrainedModel):
    """The decoder without the projection to the vocabulary."""

    def __init__(self, config: FairseqMoELMConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        inner, outer = config.embedding_size or width, config.output_size or width
        padding = config.pad_token_id if config.pad_token_id is not None else 1
        self.embed_scale = math.sqrt(width) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, inner, padding)
        self.project_in_dim = None if inner == width else nn.Linear(inner, width, bias=False)
        self.embed_positions: nn.Module | None = None
        if config.use_positions and config.learned_positions:
            self.embed_positions = LearnedPositions(config.max_position_embeddings, width, padding)
        elif config.use_positions:
            self.embed_positions = SinusoidalPositions(width, padding)
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else None
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(width) if config.pre_norm and config.final_norm else None
        self.project_out_dim = None if outer == width else nn.Linear(width, outer, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Ids (B, T) to hidden states (B, T, D); the mask is of all tokens so far, padding on any side."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if (self.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = _positions(attention_mask, embeddings, before)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden = self._embed(embeddings, position_ids)
        states, attentions = [hidden], []
        for layer in self.layers:
            hidden, weights = layer(hidden, attention_mask=mask, past_key_values=past_key_values, **kwargs)
            states.append(hidden)
            attentions.append(weights)
        if self.layer_norm is not None:
            hidden = states[-1] = self.layer_norm(hidden)
        if self.project_out_dim is not None:
            hidden = self.project_out_dim(hidden)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if wants_states else None,
            attentions=tuple(attentions) if wants_attentions else None,
        )

    def _embed(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        hidden = embeddings * self.embed_scale
        if self.project_in_dim is not None:
            hidden = self.project_in_dim(hidden)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(position_ids).to(hidden)
        if self.layernorm_embedding is not None:
            hidden = self.layernorm_embedding(hidden)
        return nn.functional.dropout(hidden, self.config.dropout, self.training)


class FairseqMoELMForCausalLM(FairseqMoELMPreTrainedModel, GenerationMixin):
    """A language model."""

    _tied_weights_keys = {"lm_head.weight": "decoder.embed_tokens.weight"}  # noqa: RUF012 - as Transformers has it

    def __init__(self, config: FairseqMoELMConfig) -> None:
        super().__init__(config)
        self.decoder = FairseqMoELMModel(config)
        self.lm_head = nn.Linear(config.output_size or config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), of the last ``logits_to_keep`` tokens where that is not 0, and the loss of ``labels``."""
        found = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )


def _positions(attention_mask: Tensor | None, embeddings: Tensor, before: int) -> Tensor:
    """(B, T) or (1, T): tokens count from 0, padding does not count."""
    length = embeddings.shape[1]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(before, before + length, device=embeddings.device).unsqueeze(0)
    counted = attention_mask.long().cumsum(-1) - 1
    return counted.clamp(min=0)[:, -length:]


def register_models() -> None:
    """Let Transformers' Auto classes find these; may be repeated."""
    AutoConfig.register(FairseqMoELMConfig.model_type, FairseqMoELMConfig, exist_ok=True)
    AutoModel.register(FairseqMoELMConfig, FairseqMoELMModel, exist_ok=True)
    AutoModelForCausalLM.register(FairseqMoELMConfig, FairseqMoELMForCausalLM, exist_ok=True)
