"""The demo: runs to its end on few sentences, and fails when static and dynamic gating disagree."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "demo" / "run.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--sentences", "4", "--num-beams", "1", "--rounds", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "chrF",
        "fra_Latn",
        "deu_Latn",
        "spa_Latn",
        "reference",
        "times as fast",
        "gave the same tokens",
        "the same translations",
    ):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    assert len((tmp_path / "demo-output" / "spa_Latn.txt").read_text(encoding="utf-8").splitlines()) == 4
    report = json.loads((tmp_path / "demo-output" / "report.json").read_text(encoding="utf-8"))
    assert report["family"] == "nllb-moe"


def test_disagreement_fails(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {target: [demo.Pair("Open the file.", "Ouvrir", "x")] for target in demo.TARGETS}
    arguments = Namespace(model=demo.HERE / "model", rounds=1)
    tokenizer = demo.load_tokenizer(arguments.model)
    console = Console(record=True, width=100)
    assert demo.compare_gatings(console, arguments, tokenizer, pairs)
    right = demo.decode

    def wrong(model: object, work: object) -> object:
        return right(model, work) + (model.moe.options.gating == "static")  # type: ignore[attr-defined]

    monkeypatch.setattr(demo, "decode", wrong)
    assert not demo.compare_gatings(console, arguments, tokenizer, pairs)
    assert "DISAGREE in sentences [0]" in console.export_text()


def test_every_pair_is_read(demo: ModuleType) -> None:
    pairs = demo.read_pairs(demo.HERE / "demo.tsv.gz", 1000)
    assert {target: len(found) for target, found in pairs.items()} == dict.fromkeys(demo.TARGETS, 300)
    assert {pair.origin for found in pairs.values() for pair in found} == {"chromium", "django", "udhr"}
