"""moe-opt reproduce from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run

PLAN = Path(__file__).parents[1] / "reproduction" / "plan.yaml"


def test_sections_go_to_a_folder_and_a_page(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder, page = tmp_path / "docs" / "reproduction", tmp_path / "docs" / "reproduction.md"
    places = ("-o", folder, "--page", page, "--plan", PLAN, "--model", checkpoint)
    done = run("reproduce", "--quick", *places, "--only", "static_memory", "--only", "activation")
    assert done.code == 0, done.err
    assert f"{page}: written" in done.out
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(results["sections"]) == ["static_memory", "activation"]
    text = page.read_text(encoding="utf-8")
    assert "(reproduction/activation.png)" in text and (folder / "activation.png").is_file()
    assert "demo checkpoint, its own text: E 8" in text  # recorded from the checkpoint that was given


def test_what_is_wrong_is_one_line(run: Run, tmp_path: Path) -> None:
    done = run("reproduce", "-o", tmp_path / "out", "--only", "speed")
    assert done.code == 2 and "'speed' is not one of" in done.error_line
    done = run("reproduce", "-o", tmp_path / "out", "--plan", tmp_path / "none.yaml")
    assert done.code == 2 and "cannot be read" in done.error_line
    assert not (tmp_path / "out").exists()
