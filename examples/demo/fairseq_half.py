"""The demo's fairseq half: the same model in fairseq's own layout, run by ``fairseq-generate``.

Converts the demo's Transformers folder, binarises sentences as the pieces that its tokenizer makes, runs fairseq's
command line once with static and once with dynamic gating, and compares the greedy hypotheses: of the two, and with
those that Transformers gives. fairseq runs in processes of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fairseq_moe_opt
from fairseq_moe_opt.checkpoints import convert
from hf_integration import from_pretrained
from hf_integration.translate import pad_rows

GATINGS = ("static", "dynamic")
MAX_TOKENS = 200
"""Longest translation on both sides, the end token not counted; fairseq's own default."""

_HYPOTHESIS = re.compile(r"^H-(\d+)\t[^\t]*\t(.*)$", re.MULTILINE)
_SPEED = re.compile(r"\(([\d.,]+) sentences/s")


@dataclass(frozen=True)
class Task:
    """What is translated.

    Attributes:
        model: the Transformers folder.
        pairs: sentences and their reference translations.
        source, target: languages.
        languages: all of the model's.
        batch_size: sentences computed together.
        threads: CPU threads.
    """

    model: Path
    pairs: Sequence[tuple[str, str]]
    source: str
    target: str
    languages: Sequence[str]
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Generated:
    """One run of ``fairseq-generate``: pieces of every hypothesis, and the sentences a second of its last line."""

    hypotheses: list[str]
    sentences_per_second: float


class FairseqError(Exception):
    """A command of fairseq failed; the message ends with the end of what it printed."""


def is_installed() -> bool:
    """Whether fairseq is there."""
    return find_spec("fairseq") is not None


def compare(console: Console, task: Task, tokenizer: Any) -> bool:
    """Run both gatings and print what came of it; whether their hypotheses are equal."""
    with tempfile.TemporaryDirectory(prefix="moe-demo-") as name:
        folder = Path(name)
        checkpoint = to_fairseq(task.model, folder / "model")
        data = binarise(folder, checkpoint.parent / "dict.txt", task, tokenizer)
        generated = {gating: generate(data, checkpoint, gating, task, tokenizer) for gating in GATINGS}
    show(console, task, generated, greedy_with_transformers(task, tokenizer))
    return generated["static"].hypotheses == generated["dynamic"].hypotheses


def to_fairseq(model: Path, folder: Path) -> Path:
    """Convert the Transformers folder to a fairseq checkpoint with ``dict.txt`` beside it; the checkpoint's path."""
    folder.mkdir(parents=True)
    checkpoint = folder / "checkpoint.pt"
    convert(model, checkpoint, to="fairseq")
    return checkpoint


def binarise(folder: Path, dictionary: Path, task: Task, tokenizer: Any) -> Path:
    """The text in pieces through ``fairseq-preprocess``; the folder of its data.

    fairseq adds languages and end tokens itself, at generation.
    """
    prefix, data = folder / "test", folder / "data"
    for language, texts in zip((task.source, task.target), zip(*task.pairs, strict=True), strict=True):
        lines = [" ".join(tokenizer.tokenize(text)) for text in texts]
        Path(f"{prefix}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    run_fairseq(
        "preprocess",
        *("--source-lang", task.source, "--target-lang", task.target, "--testpref", str(prefix)),
        *("--srcdict", str(dictionary), "--joined-dictionary", "--destdir", str(data)),
    )
    return data


def generate(data: Path, checkpoint: Path, gating: str, task: Task, tokenizer: Any) -> Generated:
    """Translate greedily with ``fairseq-generate``: NLLB's task, its languages in the order of their ids."""
    languages = sorted(task.languages, key=tokenizer.convert_tokens_to_ids)
    printed = run_fairseq(
        "generate",
        str(data),
        *("--user-dir", str(Path(fairseq_moe_opt.__file__).parent)),
        *("--path", str(checkpoint), "--moe-gating", gating),
        *("--task", "translation_multi_simple_epoch", "--langs", ",".join(languages)),
        *("--lang-pairs", f"{task.source}-{task.target}"),
        *("--source-lang", task.source, "--target-lang", task.target),
        *("--encoder-langtok", "src", "--decoder-langtok"),
        *("--beam", "1", "--max-len-b", str(MAX_TOKENS)),
        *("--batch-size", str(task.batch_size), "--required-batch-size-multiple", "1", "--cpu"),
        threads=task.threads,
    )
    speed = _SPEED.search(printed)
    if speed is None:
        raise FairseqError(f"fairseq-generate did not say how fast it was:\n{_end_of(printed)}")
    found = {int(number): pieces for number, pieces in _HYPOTHESIS.findall(printed)}
    return Generated([found[number] for number in sorted(found)], float(speed.group(1).replace(",", "")))


def run_fairseq(name: str, *arguments: str, threads: int = 1) -> str:
    """Run ``fairseq-NAME`` and return what it printed; FairseqError when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"fairseq_cli.{name}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    if done.returncode != 0:
        raise FairseqError(f"fairseq-{name} failed:\n{_end_of(done.stdout)}")
    return done.stdout


def _end_of(printed: str) -> str:
    return "\n".join(printed.splitlines()[-5:])


def greedy_with_transformers(task: Task, tokenizer: Any) -> list[str]:
    """The pieces of every greedy hypothesis, as ``fairseq-generate`` prints them: without the language token."""
    model: Any = from_pretrained(task.model, dtype="float32")
    encoded = tokenizer._build_translation_inputs(
        [sentence for sentence, _ in task.pairs], return_tensors=None, src_lang=task.source, tgt_lang=task.target
    )
    ids = encoded["input_ids"]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    hypotheses = [""] * len(ids)
    for first in range(0, len(order), task.batch_size):
        places = order[first : first + task.batch_size]
        padded, mask = pad_rows([ids[place] for place in places], tokenizer.pad_token_id)
        output: torch.Tensor = model.generate(
            input_ids=padded,
            attention_mask=mask,
            forced_bos_token_id=encoded["forced_bos_token_id"],
            num_beams=1,
            max_new_tokens=MAX_TOKENS,
        )
        # Every row begins with the token that decoding starts from, then the language.
        for place, row in zip(places, output[:, 2:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            hypotheses[place] = " ".join(tokenizer.convert_ids_to_tokens(row[:end]))
    return hypotheses


def show(console: Console, task: Task, generated: dict[str, Generated], transformers: Sequence[str]) -> None:
    """Both speeds side by side, and which hypotheses are equal."""
    title = f"fairseq-generate, beam 1, {len(task.pairs)} sentences to {task.target}, batch {task.batch_size}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in ("sentences a second (fairseq's own count)", *GATINGS, "dynamic is"):
        table.add_column(name, justify="left" if name.startswith("sentences") else "right", no_wrap=True)
    speeds = [generated[gating].sentences_per_second for gating in GATINGS]
    table.add_row("generating", *(f"{speed:.1f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f} times as fast")
    console.print(table)
    static, dynamic = (generated[gating].hypotheses for gating in GATINGS)
    report(console, "static and dynamic gating in fairseq", static, dynamic)
    report(console, "fairseq and Transformers, both greedy", dynamic, transformers)
    console.print()


def report(console: Console, sides: str, one: Sequence[str], two: Sequence[str]) -> None:
    """Whether two lists of hypotheses are equal, or which are not."""
    if list(one) == list(two):
        console.print(f"{sides}: the same hypotheses, token for token", highlight=False)
        return
    differing = [number for number, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]]
    console.print(f"{sides} DISAGREE in sentences {differing}", style="bold red", highlight=False)
