"""A measured number in a text is in the file that a comment above its paragraph names.

``<!-- numbers: FILE.json#rows/3, FILE.json -->`` names parts of result files. ``set`` or ``paper`` alone says that all
numbers of a paragraph are settings (or properties), or the paper's; ``set 10 GiB`` beside a file says so of one number.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pages import PAGES, ROOT, Paragraph, numbers_in, paragraphs_of

WRITTEN = [page for page in PAGES if page.name != "reproduction.md"]
"""That one is drawn as a whole, and tested so."""
WHOLE = frozenset({"set", "paper"})


@cache
def content(file: str) -> Any:
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text


def part(source: str) -> Any:
    """What ``FILE#a/0/b`` names."""
    file, _, steps = source.partition("#")
    found = content(file)
    for step in filter(None, steps.split("/")):
        found = found[int(step)] if isinstance(found, list) else found[step]
    return found


def unsupported(paragraph: Paragraph) -> list[str]:
    """The numbers of ``paragraph`` that none of its sources has."""
    if WHOLE & set(paragraph.sources):
        return []
    settings = [source.removeprefix("set ") for source in paragraph.sources if source.startswith("set ")]
    files = [source for source in paragraph.sources if not source.startswith("set ")]
    numbers = [number for source in files for number in numbers_in(part(source))]
    measures = [one for one in paragraph.measures if " ".join(one.text.split()) not in settings]
    return [one.text for one in measures if not any(one.matches(number) for number in numbers)]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_measured_numbers_are_in_their_files(page: Path) -> None:
    missing = {
        paragraph.text[:60]: found
        for paragraph in paragraphs_of(page.read_text(encoding="utf-8"))
        if (found := unsupported(paragraph))
    }
    assert not missing


TEXT = """Loading takes {seconds} s and {share} % of the memory.
"""


@pytest.mark.parametrize(
    ("seconds", "share", "expected"),
    [("14.0", "11.2", []), ("14", "11", []), ("14.1", "11.2", ["14.1 s"]), ("14.0", "12", ["12 %"])],
)
def test_a_number_that_is_not_in_the_file_is_found(
    seconds: str, share: str, expected: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"rows": [{"seconds": 13.96}, {"miss_rate": 0.1118}]}), encoding="utf-8")
    (paragraph,) = paragraphs_of(f"<!-- numbers: {file} -->\n" + TEXT.format(seconds=seconds, share=share))
    assert unsupported(paragraph) == expected


def test_only_the_named_part_of_a_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"rows": [{"seconds": 13.96}, {"seconds": 5.0}]}), encoding="utf-8")
    (paragraph,) = paragraphs_of(f"<!-- numbers: {file}#rows/1 -->\nIt took 14.0 s, then 5 s.\n")
    assert unsupported(paragraph) == ["14.0 s"]


def test_a_setting_is_excused_by_its_own_words_only(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"seconds": 14.0}), encoding="utf-8")
    (paragraph,) = paragraphs_of(f"<!-- numbers: {file}, set 10 GiB -->\nWith 10 GiB 14 s, with 20 GiB 14 s.\n")
    assert unsupported(paragraph) == ["20 GiB"]


def test_a_number_without_a_source_is_found() -> None:
    (paragraph,) = paragraphs_of("It is 3.5 times as fast.\n")
    assert unsupported(paragraph) == ["3.5 times"]


def test_code_and_drawn_tables_are_left_to_other_tests() -> None:
    text = "```\n3.5 times\n```\n\n<!-- table: a from b -->\n| 5 s |\n<!-- end of table -->\n\n`expert_memory=25%`\n"
    assert [one.measures for one in paragraphs_of(text) if one.measures] == []
