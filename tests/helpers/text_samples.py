"""Strings on which tokenizers disagree, and SentencePiece's ids for them in fairseq's numbering."""

from __future__ import annotations

import gzip
import unicodedata
from pathlib import Path

from tests.helpers.goldens import DATA

SPM = DATA / "demo_small" / "spm.model"
DICTIONARY = DATA / "demo_small" / "dict.txt"
DEMO = DATA.parents[1] / "examples" / "demo"
LANGUAGES = ["eng_Latn", "fra_Latn", "deu_Latn", "spa_Latn"]

SPACES = ["", " ", "   ", "a", " a", "a ", "  a  b ", "\t", "\n", "a\nb", "a\r\nb", "\u3000a\u00a0b\u2009c", "a\u200bb"]
SPACES += ["▁", "▁a", "a▁", "a ▁", "a▁b", "▁▁", " ▁ ", "a  ▁▁ b"]
CONTROLS = [
    "\x00",
    "\x01",
    "a\x01b",
    "\x01½",
    "e\x01\u0301",
    "\x7f",
    "\ufeffx",
    "\ufffd",
    "\u00ad",
    "\ufdd0",
    "x\ufdd1y",
]
LITERALS = [
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "fra_Latn",
    "a fra_Latn b</s>",
    "a</s>b",
    "<<unk>>",
    "<unk><unk>",
    "__fra__",
]
SYMBOLS = [
    "☃",
    "☃☃ ☃",
    "a☃☃",
    "👨‍👩‍👧 family 👍🏽",
    "🇫🇷",
    "½ 1/2 ①②",
    "①\u0301",
    "\u0323½",
    "½\u200d",
    "ﬁ ﬂ ǆ",
    "… ™ Ω Å",
]
FULL_WIDTH = "".join(chr(ord(letter) + 0xFEE0) for letter in "hello") + " \uff37"
SCRIPTS = [
    "日本語 テスト",
    "ｶﾞｷﾞ ﾊﾟ",
    FULL_WIDTH,
    "한국어",
    "\u1112\u1161\u11ab",
    "中文字符",
    "नमस्ते",
    "กำ ด้วย",
    "שָׁלוֹם",
]
SCRIPTS += ["مُحَمَّدٌ شّ", "Привет", "İ ß", "\U0010ffff"]
MARKS = [
    "e\u0301",
    "Vie\u0323\u0302t",
    "e\u0302\u0301",
    "a\u0323\u0301",
    "a\u0301\u0323",
    "â\u0323",
    "ﬁ\u0301",
    "ü\u0304",
]
LONG = ["1" * 100, "ab " * 500, "x" * 1000]
ODD = [*SPACES, *CONTROLS, *LITERALS, *SYMBOLS, *SCRIPTS, *MARKS, *LONG]


def demo_lines() -> list[str]:
    """English and target sentences of the example's text, and the same decomposed (NFD)."""
    with gzip.open(DEMO / "demo.tsv.gz", "rt", encoding="utf-8") as stream:
        fields = [line.rstrip("\n").split("\t") for line in stream]
    lines = [text for row in fields for text in row[1:3]]
    return [*lines, *(unicodedata.normalize("NFD", line) for line in lines[::5])]


def sentencepiece_ids(texts: list[str], model: Path = SPM, dictionary: Path = DICTIONARY) -> list[list[int]]:
    """What fairseq makes of each text: SentencePiece's pieces looked up in the dictionary, 3 for unknown."""
    import sentencepiece

    names = [line.rsplit(" ", 1)[0] for line in dictionary.read_text(encoding="utf-8").split("\n") if line]
    ids = {name: number for number, name in enumerate(names, start=4)}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    unknown = processor.unk_id()
    return [
        [3 if piece == unknown else ids[processor.id_to_piece(piece)] for piece in processor.encode(text)]
        for text in texts
    ]
