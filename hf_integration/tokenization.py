"""The tokenizer of converted unigram NLLB-MoE checkpoints: SentencePiece's ids, NLLB's language handling.

``NllbTokenizer`` rebuilds every vocabulary as BPE, which gives wrong ids for a unigram model without a word;
this class keeps the backend that ``tokenizer.json`` describes. Without this package, ``AutoTokenizer`` falls
back to the plain backend, which gives the same ids for the source language baked into the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import processors
from tokenizers.models import Unigram
from transformers import AutoTokenizer, BatchEncoding, PreTrainedConfig
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from fairseq_moe_opt.errors import InputError


class MoETranslationTokenizer(TokenizersBackend):
    """A unigram translation tokenizer: source ``src_lang tokens </s>``, target ``tgt_lang tokens </s>``.

    ``src_lang`` and ``tgt_lang`` may be set at any time; an unknown code raises InputError.
    Text is text: a control symbol or language code written in a sentence is cut into pieces as SentencePiece
    does it (``split_special_tokens``).
    """

    model = Unigram

    def __init__(
        self,
        *args: Any,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        language_codes: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self._src_lang: str | None = None
        self._tgt_lang: str | None = None
        self.language_codes = list(language_codes)
        super().__init__(*args, src_lang=src_lang, tgt_lang=tgt_lang, language_codes=self.language_codes, **kwargs)
        self._src_lang = self._known(src_lang)
        self._tgt_lang = self._known(tgt_lang)
        self._switch_to_input_mode()

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leaves ``tokenizer_file`` as it is, so that the backend is loaded and not rebuilt."""
        return kwargs

    @property
    def src_lang(self) -> str | None:
        """The language code put before the source; None before the first is chosen."""
        return self._src_lang

    @src_lang.setter
    def src_lang(self, code: str | None) -> None:
        self._src_lang = self._known(code)
        self._switch_to_input_mode()

    @property
    def tgt_lang(self) -> str | None:
        """The language code put before ``text_target``; the source language where it is None."""
        return self._tgt_lang

    @tgt_lang.setter
    def tgt_lang(self, code: str | None) -> None:
        self._tgt_lang = self._known(code)

    def lang_id(self, code: str) -> int:
        """The id of a language code, as ``forced_bos_token_id`` takes it; InputError for an unknown one."""
        self._known(code)
        return int(self.convert_tokens_to_ids(code))

    def _known(self, code: str | None) -> str | None:
        if code is not None and code not in self.language_codes:
            known = ", ".join(self.language_codes) or "none"
            raise InputError(f"unknown language code {code!r}; this tokenizer knows: {known}")
        return code

    def _build_translation_inputs(
        self,
        raw_inputs: Any,
        return_tensors: str,
        src_lang: str | None,
        tgt_lang: str | None,
        **extra_kwargs: Any,
    ) -> BatchEncoding:
        """What a translation pipeline asks for: encoder inputs, and the target language as first token."""
        if src_lang is None or tgt_lang is None:
            raise InputError("translation needs src_lang and tgt_lang; known: " + ", ".join(self.language_codes))
        self.src_lang = src_lang
        inputs = self(raw_inputs, add_special_tokens=True, return_tensors=return_tensors, **extra_kwargs)
        inputs["forced_bos_token_id"] = self.lang_id(tgt_lang)
        return inputs

    def _switch_to_input_mode(self) -> None:
        """Makes the template that of the source; Transformers calls it around ``text_target``."""
        self._set_language(self._src_lang)

    def _switch_to_target_mode(self) -> None:
        """Makes the template that of the target."""
        self._set_language(self._tgt_lang if self._tgt_lang is not None else self._src_lang)

    def _set_language(self, code: str | None) -> None:
        eos = str(self.eos_token)
        before = [] if code is None else [code]
        special = [(eos, self.eos_token_id)]
        if code is not None and code != eos:
            special.append((code, self.convert_tokens_to_ids(code)))
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", eos], pair=[*before, "$A", "$B", eos], special_tokens=special
        )


class _MoETranslationTokenizerConfig(PreTrainedConfig):
    """Only a key to register the tokenizer under: NLLB-MoE's own config would take BPE folders as well."""

    model_type = "moe-translation-tokenizer"


def register_tokenizer() -> None:
    """Lets ``AutoTokenizer`` find the class that ``tokenizer_config.json`` names; may be repeated."""
    AutoTokenizer.register(_MoETranslationTokenizerConfig, fast_tokenizer_class=MoETranslationTokenizer, exist_ok=True)


register_tokenizer()
