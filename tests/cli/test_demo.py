"""The demo: runs to its end on few sentences, and fails when static and dynamic gating disagree in either half."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "demo" / "run.py"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    # As for a script, whose own folder comes first.
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("demo_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--sentences", "4", "--num-beams", "1", "--rounds", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    for words in ("chrF", "fra_Latn", "deu_Latn", "spa_Latn", "reference", "times as fast", "gave the same tokens"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    assert len((tmp_path / "demo-output" / "spa_Latn.txt").read_text(encoding="utf-8").splitlines()) == 4
    report = json.loads((tmp_path / "demo-output" / "report.json").read_text(encoding="utf-8"))
    assert report["family"] == "nllb-moe"
    if find_spec("fairseq") is None:
        assert "fairseq is not installed" in done.stdout
        return
    half = done.stdout[done.stdout.index("fairseq-generate, beam 1, 4 sentences to fra_Latn") :]
    assert "static and dynamic gating in fairseq: the same hypotheses" in half
    assert "fairseq and Transformers, both greedy: the same hypotheses" in half


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


def fairseq_task(demo: ModuleType) -> Any:
    sentences = ["Open the file.", "Close all windows"]
    return demo.fairseq_half.Task(demo.HERE / "model", sentences, "eng_Latn", "fra_Latn", batch_size=2, threads=1)


def test_disagreement_in_fairseq_fails(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    half, task = demo.fairseq_half, fairseq_task(demo)
    tokenizer = demo.load_tokenizer(task.model)
    console = Console(record=True, width=100)
    encoded = tokenizer._build_translation_inputs(
        task.sentences, return_tensors=None, src_lang=task.source, tgt_lang=task.target
    )
    right = half.greedy_with_transformers(task, tokenizer, encoded["input_ids"], encoded["forced_bos_token_id"])

    def generate(data: Path, checkpoint: Path, gating: str, task: Any) -> Any:
        hypotheses = [*right[:1], "fra_Latn \u2581other"] if gating == "static" else right
        return half.Generated(hypotheses, 1.0 if gating == "static" else 2.5)

    monkeypatch.setattr(half, "generate", generate)
    assert not half.compare(console, task, tokenizer)
    text = console.export_text()
    assert "static and dynamic gating in fairseq DISAGREE in sentences [1]" in text
    assert "fairseq and Transformers, both greedy: the same hypotheses" in text
    assert "2.50 times as fast" in text


def test_a_failing_fairseq_is_reported(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed")
    monkeypatch.setattr(demo.fairseq_half, "MAX_TOKENS", "many")
    arguments = Namespace(model=demo.HERE / "model", batch_size=2, threads=1)
    pairs = {target: [demo.Pair("Open the file.", "Ouvrir", "x")] for target in demo.TARGETS}
    console = Console(record=True, width=200)
    assert not demo.run_fairseq_half(console, arguments, demo.load_tokenizer(arguments.model), pairs)
    assert "--max-len-b" in console.export_text()


def test_without_fairseq_its_half_is_left_out(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.fairseq_half, "is_installed", lambda: False)
    console = Console(record=True, width=200)
    assert demo.run_fairseq_half(console, Namespace(), None, {})
    assert "`make demo` installs it" in console.export_text()


def test_fairseq_gets_the_pieces_without_the_end_token(demo: ModuleType, tmp_path: Path) -> None:
    dictionary = ROOT / "tests" / "data" / "demo_small" / "dict.txt"
    rows = [["eng_Latn", "\u2581O", "pen", "</s>"], ["eng_Latn", "<unk>", "</s>"]]
    demo.fairseq_half.write_data(tmp_path / "data", dictionary, rows, "spa_Latn")
    assert (tmp_path / "data" / "test.src-tgt.src").read_text("utf-8") == "eng_Latn \u2581O pen\neng_Latn <unk>\n"
    assert (tmp_path / "data" / "test.src-tgt.tgt").read_text("utf-8") == "spa_Latn\nspa_Latn\n"
    assert (tmp_path / "data" / "dict.tgt.txt").read_bytes() == dictionary.read_bytes()
