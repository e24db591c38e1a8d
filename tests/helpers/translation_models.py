"""Tiny random translation models and tokenizers, made here: no file, no network."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

CODES = ["eng_Latn", "fra_Latn", "deu_Latn"]
LETTERS = "abcdefghijklmnopqrstuvwxyz.,"
POSITIONS = 48
TEXTS = ["a cat", "the dog sat.", "b", "one more of them, longer"]
LANGUAGES = {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"}


def nllb_tokenizer() -> NllbTokenizer:
    """Letters as tokens, three languages: 36 ids."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return NllbTokenizer(vocab=vocab, merges=[], extra_special_tokens=CODES)


def nllb_moe(seed: int = 11) -> NllbMoeForConditionalGeneration:
    torch.manual_seed(seed)
    config = NllbMoeConfig(
        vocab_size=40,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_experts=8,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        max_position_embeddings=POSITIONS,
        init_std=0.6,
    )
    model = NllbMoeForConditionalGeneration(config).eval()
    model.generation_config.max_length = 12
    return model


def dense_model() -> M2M100ForConditionalGeneration:
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=POSITIONS,
    )
    return M2M100ForConditionalGeneration(config).eval()


def t5_model() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    settings = {"translation_en_to_fr": {"prefix": "to french ", "max_length": 6, "num_beams": 2}}
    config = T5Config(
        vocab_size=16,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        task_specific_params=settings,
    )
    return T5ForConditionalGeneration(config).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "to", "french", "cat", "dog", "."]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
