"""The tokenizer of converted language models: what continues a text is decoded with the space before its first word.

Transformers' text generation decodes a continuation by itself, and a plain backend drops that space: it cannot know
that the text does not begin there. Without this package ``AutoTokenizer`` falls back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from hf_integration.fairseq_lm.configuration import FairseqMoELMConfig

_SPACE = "\u2581"


class MoELanguageModelTokenizer(TokenizersBackend):
    """A SentencePiece tokenizer: a text is ``</s> tokens``, or ``<s> tokens`` where the model was trained so.

    Text is text: a control symbol written in it is cut into pieces as SentencePiece does it.
    """

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leaves ``tokenizer_file`` as it is, so that the backend is loaded and not rebuilt."""
        return kwargs

    def _decode(self, token_ids: int | Sequence[int], *args: Any, **kwargs: Any) -> str:
        """The text; a first token that does not follow the beginning of a text keeps its space."""
        text: str = super()._decode(token_ids, *args, **kwargs)
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        begins = not ids or ids[0] in self.all_special_ids
        if begins or not str(self.convert_ids_to_tokens(ids[0])).startswith(_SPACE):
            return text
        return f" {text}"


def register_tokenizer() -> None:
    """Lets ``AutoTokenizer`` find the class; may be repeated."""
    AutoTokenizer.register(FairseqMoELMConfig, fast_tokenizer_class=MoELanguageModelTokenizer, exist_ok=True)


register_tokenizer()
