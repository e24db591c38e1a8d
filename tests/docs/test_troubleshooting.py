"""docs/troubleshooting.md: the messages it lists are messages of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([^`]+)` \|", flags=re.MULTILINE)
STAND_IN = re.compile(r"\b(?:[A-Z]{3,}|N|M)\b")
MESSAGES = ROW.findall(PAGE)
UNKNOWN = "\0"


def strings_of(path: Path) -> Iterator[str]:
    """Every string of a module; a part that is put in at run time is UNKNOWN."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else UNKNOWN for part in node.values)
            yield "".join(map(str, parts))


TEXTS = [
    text
    for package in ("fairseq_moe_opt", "hf_integration")
    for path in sorted((ROOT / package).rglob("*.py"))
    for text in strings_of(path)
]


def is_said(message: str) -> bool:
    """Whether a string of the code has ``message``, with anything for its words in capitals."""
    pattern = re.compile(UNKNOWN.join(re.escape(part) for part in STAND_IN.split(message)))
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_listed_message_is_in_the_code(message: str) -> None:
    assert is_said(message)


def test_a_message_that_nobody_says_is_found() -> None:
    assert len(MESSAGES) > 20
    assert not is_said("the flux capacitor is discharged")
    assert is_said("made for N ranks; this job has M")
    assert not is_said("made for N ranks; this boat has M")
