"""SentencePiece's compiled normalisation table, decoded, and what of it the tokenizers library misses.

SentencePiece replaces, from left to right, the longest source that the table has. The tokenizers library's
``Precompiled`` looks at one grapheme cluster at a time instead: in a cluster shorter than six bytes it
replaces the whole cluster by the target of its *shortest* source (a mark after it is lost), and in a longer
one it sees single characters only (a mark is never composed). ``normalizer_steps`` makes it agree: clusters
are taken apart, so that single characters are replaced, and then composed by NFC, except where SentencePiece
would not compose. Sources with an empty target (control characters) become a guard as well, because
``Precompiled`` miscounts offsets when it deletes and can then fail on an index.
"""

from __future__ import annotations

import base64
import re
import struct
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

# Noncharacters: reserved for a program's own use, in no text, and never part of another's grapheme cluster.
GUARD = "\ufdd0"
SPLIT = "\ufdd1"
# What a guard found in a user's text becomes: unknown to every model, as the guard itself would have been.
FOREIGN = "\ufdd2"
_LEAF = 1 << 31
# Characters that join the grapheme cluster before them although they are no marks: joiners, skin tones, am.
_JOINING = "\u200c\u200d\u0e33\u0eb3\U0001f3fb-\U0001f3ff"


def decode_charsmap(charsmap: bytes) -> dict[str, str]:
    """Every source and its target; the table is a double-array trie of UTF-8 keys, then the targets."""
    (size,) = struct.unpack_from("<I", charsmap)
    units = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
    targets = charsmap[4 + size :]
    table: dict[str, str] = {}
    for key, start in _trie_entries(units):
        table[key.decode("utf-8")] = targets[start : targets.index(b"\0", start)].decode("utf-8")
    return table


def normalizer_steps(charsmap: bytes) -> list[dict[str, Any]]:
    """Normalizers of a ``tokenizer.json`` that act as SentencePiece's table does; guards are left in."""
    table = decode_charsmap(charsmap)
    deleted = {source for source, target in table.items() if len(source) == 1 and not target}
    pairs = {pair for source in table for pair in pairwise(source)}
    followers = {second for _, second in pairs}
    steps = [replace_step(f"[{GUARD}{SPLIT}]", FOREIGN)]
    if pairs:
        steps.append(replace_step(_guard_pattern(table, pairs), GUARD))
        # Not at the start: there is nothing to split from, and the library miscounts an insertion there.
        joined = f"(?!\\A)(?=[{_char_class(followers)}{_JOINING}\\p{{M}}])|(?<=\\r)(?=\\n)"
        steps.append(replace_step(joined, SPLIT))
    if deleted:
        steps.append(replace_step(f"[{_char_class(deleted)}]", GUARD))
    steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")})
    if pairs:
        steps += [replace_step(SPLIT, ""), {"type": "NFC"}]
    return steps


def replace_step(pattern: str, content: str) -> dict[str, Any]:
    """A ``Replace`` normalizer of a ``tokenizer.json`` with a regular expression."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _guard_pattern(table: Mapping[str, str], pairs: set[tuple[str, str]]) -> str:
    """Matches between two characters that NFC could join or reorder although the table has no such source.

    Only characters that are a mark, decompose, or have a longer target can be the first of such a pair: NFC
    joins any other character with a mark only into something that the table has as well.
    """
    risky = {chr(code) for code in range(0x80, sys.maxunicode + 1) if _decomposes(chr(code))}
    risky |= {source for source, target in table.items() if len(source) == 1 and len(target) > 1}
    risky |= {second for _, second in pairs if unicodedata.combining(table.get(second, second)[:1] or " ")}
    firsts: dict[str, set[str]] = defaultdict(set)
    for first, second in pairs:
        if first in risky or unicodedata.category(first).startswith("M"):
            firsts[second].add(first)
    seconds: dict[frozenset[str], set[str]] = defaultdict(set)
    for second, allowed in firsts.items():
        seconds[frozenset(allowed)].add(second)
    allowed_pairs = "|".join(
        f"(?<=[{_char_class(allowed)}])[{_char_class(marks)}]"
        for allowed, marks in sorted(seconds.items(), key=lambda item: sorted(item[0]))
    )
    followers = _char_class({second for _, second in pairs})
    unless = f"(?!{allowed_pairs})" if allowed_pairs else ""
    return f"(?<=[{_char_class(risky)}\\p{{M}}])(?=[{followers}\\p{{M}}]){unless}"


def _decomposes(character: str) -> bool:
    """Whether a character is more than one in NFD; Hangul is composed by rule and needs no guard."""
    return not "가" <= character <= "힣" and len(unicodedata.normalize("NFD", character)) > 1


def _char_class(characters: Iterable[str]) -> str:
    """The inside of a bracket expression, with runs of neighbours as ranges."""
    codes = sorted(ord(character) for character in characters)
    runs: list[list[int]] = []
    for code in codes:
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(_escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}" for low, high in runs)


def _escaped(code: int) -> str:
    return re.escape(chr(code)) if code < 0x80 else chr(code)


def _trie_entries(units: tuple[int, ...]) -> Iterator[tuple[bytes, int]]:
    """Walks a darts-clone double array: yields each key with its value.

    The child of a node for byte ``b`` is unit ``base ^ b`` and carries ``b`` as its label, so all children of
    all bases are found in one pass instead of 255 trials a node.
    """
    labels: dict[int, list[int]] = defaultdict(list)
    for position, unit in enumerate(units):
        if not unit & _LEAF and unit & 0xFF:
            labels[position ^ (unit & 0xFF)].append(unit & 0xFF)
    pending = [(0, b"")]
    while pending:
        node, key = pending.pop()
        unit = units[node]
        base = node ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6))
        if (unit >> 8) & 1:
            yield key, units[base] & (_LEAF - 1)
        pending.extend((base ^ byte, key + bytes((byte,))) for byte in labels.get(base, ()))
