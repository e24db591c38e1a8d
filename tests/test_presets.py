"""Presets: files of options, from the project and from the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.presets import preset_names, presets_folder, read_preset, with_preset


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_of_the_project_holds_options_that_fit_together(name: str) -> None:
    values = read_preset(name)
    options = MoEOptions.from_kwargs(**values)
    assert values and values.items() <= options.to_dict().items()


def test_the_presets_there_are() -> None:
    assert set(preset_names()) >= {"faithful", "static", "profile"}
    assert presets_folder().name == "presets"


def test_what_is_given_beside_a_preset_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "gating: static\ncapacity: checkpoint\nprofile: yes\n")
    found = with_preset({"preset": path, "capacity": "none"})
    assert found == {"gating": "static", "capacity": "none", "profile": True}
    assert with_preset({"capacity": "none"}) == {"capacity": "none"}
    assert with_preset({"preset": None}) == {}


def test_an_empty_preset_says_nothing(tmp_path: Path) -> None:
    assert read_preset(write(tmp_path / "empty.yml", "# nothing yet\n")) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gatting: static", ["'gatting'", "no such option"]),
        ("gating: eager", ["'gating'", "eager", "dynamic"]),
        ("profile: 3", ["'profile'", "true or false"]),
        ("gating: static\nkernel: loop", ["'kernel'", "no effect"]),
        ("- gating", ["list"]),
        ("gating: [", ["cannot be read"]),
    ],
)
def test_a_wrong_preset_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(OptionError, match=r"mine\.yaml") as caught:
        read_preset(path)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_a_preset_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"faithfull.*faithful, profile, static"):
        read_preset("faithfull")
    with pytest.raises(OptionError, match=r"gone\.yaml: no such file"):
        read_preset(tmp_path / "gone.yaml")
