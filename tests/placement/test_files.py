"""The JSON file of a placement: what comes back, how it looks, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe_opt.errors import PlacementError
from fairseq_moe_opt.placement import Placement, read_placement, write_placement

PLACEMENT = Placement(
    {"encoder.3": ((0, 2), (1,)), "decoder.3": ((1, 0), (2, 1))}, 3, 2, "balanced", fingerprint="sha256:12ab"
)

TEXT = """{
 "format": "moe-placement",
 "version": 1,
 "fingerprint": "sha256:12ab",
 "num_experts": 3,
 "num_ranks": 2,
 "strategy": "balanced",
 "layers": {
  "encoder.3": [[0, 2], [1]],
  "decoder.3": [[1, 0], [2, 1]]
 }
}
"""


def test_written_as_one_line_a_layer(tmp_path: Path) -> None:
    write_placement(PLACEMENT, tmp_path / "p.json")
    assert (tmp_path / "p.json").read_text() == TEXT


def test_read_back_the_same(tmp_path: Path) -> None:
    write_placement(PLACEMENT, tmp_path / "p.json")
    assert read_placement(tmp_path / "p.json") == PLACEMENT
    assert read_placement(tmp_path / "p.json", fingerprint="sha256:12ab", num_experts=3, num_ranks=2) == PLACEMENT


def test_without_a_fingerprint_it_fits_every_model(tmp_path: Path) -> None:
    write_placement(Placement({"a": ((0,), (1,))}, 2, 2, "greedy"), tmp_path / "p.json")
    assert read_placement(tmp_path / "p.json", fingerprint="sha256:12ab").fingerprint == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fingerprint": "sha256:ff"}, "made for the model sha256:12ab; this one is sha256:ff"),
        ({"num_experts": 4}, "made for 3 experts; the model has 4"),
        ({"num_ranks": 8}, "made for 2 ranks; this job has 8"),
    ],
)
def test_made_for_something_else(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    write_placement(PLACEMENT, tmp_path / "p.json")
    with pytest.raises(PlacementError) as caught:
        read_placement(tmp_path / "p.json", **given)
    assert str(caught.value) == f"{tmp_path / 'p.json'}: {message}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "else"}, 'not a placement: "format" is not "moe-placement"'),
        ({"version": 2}, "its version is 2; this release reads 1"),
        ({"num_ranks": "2"}, "'num_ranks' must be int; got '2'"),
        ({"num_experts": True}, "'num_experts' must be int; got True"),
        ({"strategy": None}, "'strategy' must be str; got None"),
        ({"layers": [[0]]}, "'layers' must be dict; got [[0]]"),
        ({"layers": {"a": [[0, 1.5], [2]]}}, "layer 'a': must be a list of experts for every rank"),
        ({"layers": {"a": [0, 1]}}, "layer 'a': must be a list of experts for every rank"),
        ({"layers": {"a": [[0], [1]]}}, "layer 'a': expert 2 is on no rank"),
        ({"layers": {}}, "a placement needs at least one layer"),
    ],
)
def test_no_placement(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps({**json.loads(TEXT), **changed}))
    with pytest.raises(PlacementError) as caught:
        read_placement(tmp_path / "p.json")
    assert str(caught.value) == f"{tmp_path / 'p.json'}: {message}"


@pytest.mark.parametrize("content", ["", "[1, 2", "[]", "null", '"text"', "\x00\xff"])
def test_files_that_hold_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(PlacementError, match=r"p\.json: not a placement"):
        read_placement(tmp_path / "p.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"p\.json: cannot be read: No such file"):
        read_placement(tmp_path / "p.json")
