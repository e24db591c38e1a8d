"""The demo: runs to its end on few sentences, and fails when static and dynamic gating disagree in either half."""

from __future__ import annotations

import gzip
import importlib.util
import json
import lzma
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

from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceVisit
from fairseq_moe_opt.placement import read_placement

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "demo" / "run.py"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    # As for a script, whose own folder comes first.
    sys.path.insert(0, str(SCRIPT.parent))
    yield load_script("demo/run.py")
    sys.path.remove(str(SCRIPT.parent))


def load_script(name: str) -> ModuleType:
    """The module that a script of the examples is."""
    path = ROOT / "examples" / name
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "opener"), [("a.tsv", open), ("a.tsv.gz", gzip.open), ("a.tsv.xz", lzma.open)])
def test_tables_are_read_as_they_are(demo: ModuleType, tmp_path: Path, name: str, opener: Any) -> None:
    path = tmp_path / name
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write('b\t"Say "no"\tx\na\ty\u2028z\tw\nb\t1\t2\t3\n')
    rows = list(demo.read_rows(path))
    assert rows == [["b", '"Say "no"', "x"], ["a", "y\u2028z", "w"], ["b", "1", "2", "3"]]
    assert list(demo.by_language(rows).items()) == [("b", [rows[0][1:], rows[2][1:]]), ("a", [rows[1][1:]])]


def test_the_other_scripts_read_the_same_tables(demo: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "a.tsv"
    table.write_text("b\tone\t1\torigin\na\ttwo\t2\nb\tthree\t3\n", encoding="utf-8")
    score, tuning, training = map(load_script, ("demo/score.py", "fine_tuning/prepare.py", "demo/prepare.py"))
    assert list(score.read_pairs(table, None, None).items()) == [
        ("a", [("two", "2")]),
        ("b", [("one", "1"), ("three", "3")]),
    ]
    assert score.read_pairs(table, ["b", "c"], 2) == {"b": [("one", "1")]}
    assert tuning.read_pairs(table, "b") == [("one", "1"), ("three", "3")] and tuning.read_pairs(table, "c") == []
    assert [(one.language, one.english) for one in training.pairs_of(table)] == [
        ("b", "one"),
        ("a", "two"),
        ("b", "three"),
    ]


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
        "2 processes and one gave the same translations",
    ):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    assert len((tmp_path / "demo-output" / "spa_Latn.txt").read_text(encoding="utf-8").splitlines()) == 4
    report = json.loads((tmp_path / "demo-output" / "report.json").read_text(encoding="utf-8"))
    assert report["family"] == "nllb-moe"
    loads = done.stdout[done.stdout.index("expert rows of the trace's second half") :].splitlines()
    assert [line.split()[:2] for line in loads if "contiguous" in line or "balanced" in line] == [
        [phase, strategy] for strategy in ("contiguous", "balanced") for phase in ("encoder", "decoder")
    ]
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


def test_buffered_experts_that_disagree_fail(demo: ModuleType) -> None:
    tokenizer = demo.load_tokenizer(demo.HERE / "model")
    arguments = Namespace(model=demo.HERE / "model", num_beams=1, batch_size=2)
    pairs = [demo.Pair("Open the file.", "", "x"), demo.Pair("Close the window.", "", "x")]
    model = demo.from_pretrained(arguments.model, dtype="float32")
    english = [pair.english for pair in pairs]
    how = {"generation": {"num_beams": 1}}
    right = list(demo.translate_lines(model, tokenizer, english, demo.SOURCE, demo.TARGETS[-1], **how))
    console = Console(record=True, width=110)
    assert demo.compare_buffered(console, arguments, tokenizer, pairs, right)
    text = console.export_text()
    assert "16 of 64 experts in memory" in text and "same translations" in text
    assert not demo.compare_buffered(console, arguments, tokenizer, pairs, [right[0], "other"])
    assert "DISAGREE" in console.export_text()


def ranks_work(demo: ModuleType, folder: Path) -> Any:
    return demo.ranks_run.Translation(
        model=demo.HERE / "model",
        folder=folder,
        sentences=["Open the file.", "Close all windows"],
        languages=(demo.SOURCE, demo.TARGETS[0]),
        num_beams=1,
        batch_size=2,
        expected=["Ouvrir", "Fermer"],
    )


def test_ranks_that_disagree_or_fail(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = [TraceLayer(f"model.{phase}.layers.1.ffn", phase, 4) for phase in ("encoder", "decoder")]
    visits = [TraceVisit(layer.name, (0, 1, 3), 4, (6, 1, 1)) for layer in layers for _ in range(2)]
    trace, console = Trace(tuple(layers), tuple(visits)), Console(record=True, width=110)
    report = {"layers": [{"exchange": {"slot_rows": [3, 4]}}]}
    said = subprocess.CompletedProcess([], 0, "", "")

    def launch(work: Any) -> Any:
        assert read_placement(work.folder / "placement.json", num_ranks=2).fingerprint == trace.fingerprint
        (work.folder / "ranks.txt").write_text("Ouvrir\nFermez\n", encoding="utf-8")
        for rank in range(2):
            (work.folder / f"ranks.rank-{rank}.json").write_text(json.dumps(report), encoding="utf-8")
        return said

    monkeypatch.setattr(demo.ranks_run, "launch", launch)
    assert not demo.ranks_run.compare(console, ranks_work(demo, tmp_path), trace)
    text = console.export_text()
    # Of 8 rows 7 are of experts 0 and 1, and rank 0 has both in order; the best is 6 of them on one rank.
    assert "87.5%" in text and "75.0%" in text and "50.0% and 50.0% of 14 expert rows" in text
    assert "2 processes and one DISAGREE" in text
    said.returncode, said.stderr = 1, "first\nmoe-opt: why it failed\n"
    assert not demo.ranks_run.compare(console, ranks_work(demo, tmp_path), trace)
    assert "moe-opt: why it failed" in console.export_text()


def test_every_pair_is_read(demo: ModuleType) -> None:
    pairs = demo.read_pairs(demo.HERE / "demo.tsv.gz", 1000)
    assert {target: len(found) for target, found in pairs.items()} == dict.fromkeys(demo.TARGETS, 300)
    assert {pair.origin for found in pairs.values() for pair in found} == {"chromium", "django", "udhr"}


def fairseq_task(demo: ModuleType) -> Any:
    return demo.fairseq_half.Task(
        model=demo.HERE / "model",
        pairs=[("Open the file.", "Ouvrir le fichier."), ("Close all windows", "Fermer toutes les fenêtres")],
        source="eng_Latn",
        target="fra_Latn",
        languages=(demo.SOURCE, *demo.TARGETS),
        batch_size=2,
        threads=1,
    )


def test_disagreement_in_fairseq_fails(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    half, task = demo.fairseq_half, fairseq_task(demo)
    tokenizer = demo.load_tokenizer(task.model)
    right = half.greedy_with_transformers(task, tokenizer)

    def generate(data: Path, checkpoint: Path, gating: str, task: Any, tokenizer: Any) -> Any:
        static = gating == "static"
        return half.Generated([*right[:1], "\u2581other"] if static else right, 1.0 if static else 2.5)

    monkeypatch.setattr(half, "binarise", lambda folder, *_: folder)
    monkeypatch.setattr(half, "generate", generate)
    console = Console(record=True, width=100)
    assert not half.compare(console, task, tokenizer)
    text = console.export_text()
    assert "static and dynamic gating in fairseq DISAGREE in sentences [1]" in text
    assert "fairseq and Transformers, both greedy: the same hypotheses" in text
    assert "2.50 times as fast" in text


@pytest.mark.slow
def test_a_failing_fairseq_is_reported(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed")
    half = demo.fairseq_half
    monkeypatch.setattr(half, "binarise", lambda *_: half.run_fairseq("preprocess", "--workers", "many"))
    arguments = Namespace(model=demo.HERE / "model", batch_size=2, threads=1)
    pairs = {target: [demo.Pair("Open the file.", "Ouvrir", "x")] for target in demo.TARGETS}
    console = Console(record=True, width=200)
    assert not demo.run_fairseq_half(console, arguments, tokenizer=None, pairs=pairs)
    text = console.export_text()
    assert "fairseq-preprocess failed" in text
    assert "--workers: invalid int value: 'many'" in text


def test_without_fairseq_its_half_is_left_out(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.fairseq_half, "is_installed", lambda: False)
    console = Console(record=True, width=200)
    assert demo.run_fairseq_half(console, Namespace(), None, {})
    assert "`make demo` installs it" in console.export_text()


def test_fairseq_is_given_the_pieces(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    half, task = demo.fairseq_half, fairseq_task(demo)
    tokenizer = demo.load_tokenizer(task.model)
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(half, "run_fairseq", lambda *command: commands.append(command))
    assert half.binarise(tmp_path, tmp_path / "dict.txt", task, tokenizer) == tmp_path / "data"
    lines = (tmp_path / "test.eng_Latn").read_text("utf-8").splitlines()
    assert lines == [" ".join(tokenizer.tokenize(english)) for english, _ in task.pairs]
    assert lines[0].replace(" ", "").replace("\u2581", " ").strip() == "Open the file."
    assert len((tmp_path / "test.fra_Latn").read_text("utf-8").splitlines()) == 2
    ((name, *arguments),) = commands
    assert name == "preprocess"
    assert arguments[arguments.index("--testpref") + 1] == str(tmp_path / "test")
