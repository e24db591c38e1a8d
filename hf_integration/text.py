"""What a translation has to know of its text: language codes, blank input, how many tokens a model takes."""

from __future__ import annotations

import difflib
import re
from typing import Any

from fairseq_moe_opt.errors import InputError

_TASK = re.compile(r"translation(?:_(?P<source>\w+?)_to_(?P<target>\w+))?")
_LISTED_IN_FULL = 8


def task_languages(task: str) -> tuple[str, str] | None:
    """Source and target of ``translation_SRC_to_TGT``, None of plain ``translation``.

    Codes may hold underscores themselves (``translation_eng_Latn_to_fra_Latn``). Raises InputError for
    another task.
    """
    match = _TASK.fullmatch(task)
    if match is None:
        raise InputError(f"task {task!r} is neither 'translation' nor of the form 'translation_SRC_to_TGT'")
    source, target = match.group("source", "target")
    return None if source is None else (source, target)


def language_codes(tokenizer: Any) -> tuple[str, ...]:
    """The codes a multilingual ``tokenizer`` knows.

    Converted checkpoints list them, mBART and M2M100 keep a table (and M2M100 the table's name under
    ``language_codes``), NLLB has them as special tokens without a role of their own.
    """
    listed = getattr(tokenizer, "language_codes", None)
    table = listed if isinstance(listed, (list, tuple)) else getattr(tokenizer, "lang_code_to_id", None)
    if table:
        return tuple(table)
    roles = {str(token) for token in tokenizer.special_tokens_map.values() if not isinstance(token, list)}
    special = dict.fromkeys(str(token) for token in tokenizer.all_special_tokens)
    return tuple(token for token in special if token not in roles and not token.startswith("<"))


def check_languages(tokenizer: Any, source: str | None, target: str | None) -> None:
    """InputError unless both are given and known to ``tokenizer``, or it needs none, as T5's or Marian's."""
    if not hasattr(tokenizer, "_build_translation_inputs"):
        return
    codes = language_codes(tokenizer)
    given = {"src_lang": source, "tgt_lang": target}
    missing = [name for name, code in given.items() if code is None]
    if missing:
        names = " and ".join(missing)
        raise InputError(f"this model translates between languages: give {names}; {_hint(None, codes)}")
    for name, code in given.items():
        if codes and code not in codes:
            raise InputError(f"{name} {code!r} is not a language of this model; {_hint(code, codes)}")


def close_codes(code: str, codes: tuple[str, ...], count: int = 3) -> tuple[str, ...]:
    """Up to ``count`` of ``codes`` like ``code``: beginning alike, then similar."""
    wanted = code.lower()
    lowered = {known.lower(): known for known in codes}
    similar = [lowered[match] for match in difflib.get_close_matches(wanted, lowered, n=count, cutoff=0.5)]
    return tuple(dict.fromkeys([*_beginning(wanted[:3], codes), *similar, *_beginning(wanted[:2], codes)]))[:count]


def task_settings(config: Any, task: str, source: str | None, target: str | None) -> dict[str, Any]:
    """What a model's ``config`` says of a pair of languages: T5's prefix and generation settings.

    Raises InputError for a pair it does not list. Without languages it is the first pair listed, as in
    Transformers 4. Models that list none, nearly all, have no such settings.
    """
    listed = getattr(config, "task_specific_params", None) or {}
    pairs = {name: settings for name, settings in listed.items() if name.startswith("translation")}
    if not pairs:
        return {}
    named = task if source is None and target is None else f"translation_{source}_to_{target}"
    wanted = next(iter(pairs)) if named == "translation" else named
    if wanted not in pairs:
        raise InputError(f"{wanted} is not among what this model was trained for: {', '.join(pairs)}")
    return dict(pairs[wanted])


def is_blank(text: str) -> bool:
    """Whether there is nothing in ``text`` to translate."""
    return not text.strip()


def source_limit(config: Any) -> int | None:
    """How many source tokens, language token and end token included, a model has positions for.

    None for models without absolute positions, such as T5, which set no limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _beginning(letters: str, codes: tuple[str, ...]) -> list[str]:
    return [known for known in codes if len(letters) > 1 and known.lower().startswith(letters)]


def _hint(code: str | None, codes: tuple[str, ...]) -> str:
    if len(codes) <= _LISTED_IN_FULL:
        return f"it knows {', '.join(codes)}"
    close = close_codes(code, codes) if code is not None else ()
    if close:
        return f"close to it: {', '.join(close)}"
    return f"it knows {len(codes)}, such as {', '.join(codes[:3])}"
