"""The demo's fairseq half: the same model in fairseq's own layout, run by ``fairseq-generate``.

Converts the demo's Transformers folder, writes sentences as the pieces that its tokenizer makes, runs fairseq's command
line once with static and once with dynamic gating, and compares the greedy hypotheses: of the two, and with those that
Transformers gives. fairseq runs in processes of its own.
"""

from __future__ import annotations

import os
import re
import shutil
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
        sentences: the source text.
        source, target: languages.
        batch_size: sentences computed together.
        threads: CPU threads.
    """

    model: Path
    sentences: Sequence[str]
    source: str
    target: str
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Generated:
    """One run of ``fairseq-generate``: pieces of every hypothesis, and the sentences a second of its last line."""

    hypotheses: list[str]
    sentences_per_second: float


class FairseqError(Exception):
    """``fairseq-generate`` failed; the message is the end of what it printed."""


def is_installed() -> bool:
    """Whether fairseq is there."""
    return find_spec("fairseq") is not None


def compare(console: Console, task: Task, tokenizer: Any) -> bool:
    """Run both gatings and print what came of it; whether their hypotheses are equal."""
    encoded = tokenizer._build_translation_inputs(
        list(task.sentences), return_tensors=None, src_lang=task.source, tgt_lang=task.target
    )
    ids = encoded["input_ids"]
    pieces = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    with tempfile.TemporaryDirectory(prefix="moe-demo-") as name:
        folder = Path(name)
        checkpoint = to_fairseq(task.model, folder / "model")
        write_data(folder / "data", checkpoint.parent / "dict.txt", pieces, task.target)
        generated = {gating: generate(folder / "data", checkpoint, gating, task) for gating in GATINGS}
    transformers = greedy_with_transformers(task, tokenizer, ids, encoded["forced_bos_token_id"])
    show(console, task, generated, transformers)
    return generated["static"].hypotheses == generated["dynamic"].hypotheses


def to_fairseq(model: Path, folder: Path) -> Path:
    """Convert the Transformers folder to a fairseq checkpoint with ``dict.txt`` beside it; the checkpoint's path."""
    folder.mkdir(parents=True)
    checkpoint = folder / "checkpoint.pt"
    convert(model, checkpoint, to="fairseq")
    return checkpoint


def write_data(folder: Path, dictionary: Path, rows: Sequence[Sequence[str]], target: str) -> None:
    """Text for ``--dataset-impl raw``: the pieces of each source, of each target only the language it begins with."""
    folder.mkdir()
    for side in ("src", "tgt"):
        shutil.copyfile(dictionary, folder / f"dict.{side}.txt")
    # Without the end token, which fairseq puts behind every line itself.
    sources = [" ".join(row[:-1]) for row in rows]
    for side, lines in (("src", sources), ("tgt", [target] * len(rows))):
        (folder / f"test.src-tgt.{side}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def command(data: Path, checkpoint: Path, gating: str, batch_size: int) -> list[str]:
    """The arguments of ``fairseq-generate``: greedy, the first token of the target forced."""
    return [
        str(data),
        *("--user-dir", str(Path(fairseq_moe_opt.__file__).parent)),
        *("--path", str(checkpoint), "--moe-gating", gating),
        *("--task", "translation", "-s", "src", "-t", "tgt", "--dataset-impl", "raw"),
        *("--beam", "1", "--prefix-size", "1", "--max-len-b", str(MAX_TOKENS)),
        *("--batch-size", str(batch_size), "--required-batch-size-multiple", "1", "--cpu"),
    ]


def generate(data: Path, checkpoint: Path, gating: str, task: Task) -> Generated:
    """Run ``fairseq-generate``; FairseqError when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.generate", *command(data, checkpoint, gating, task.batch_size)],
        env={**os.environ, "OMP_NUM_THREADS": str(task.threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    speed = _SPEED.search(done.stdout)
    if done.returncode != 0 or speed is None:
        raise FairseqError("\n".join(done.stdout.splitlines()[-5:]))
    found = {int(number): pieces for number, pieces in _HYPOTHESIS.findall(done.stdout)}
    return Generated([found[number] for number in sorted(found)], float(speed.group(1).replace(",", "")))


def greedy_with_transformers(task: Task, tokenizer: Any, ids: Sequence[Sequence[int]], forced: int) -> list[str]:
    """The pieces of every greedy hypothesis, as ``fairseq-generate`` prints them."""
    model: Any = from_pretrained(task.model, dtype="float32")
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    hypotheses = [""] * len(ids)
    for first in range(0, len(order), task.batch_size):
        places = order[first : first + task.batch_size]
        padded, mask = pad_rows([ids[place] for place in places], tokenizer.pad_token_id)
        output: torch.Tensor = model.generate(
            input_ids=padded,
            attention_mask=mask,
            forced_bos_token_id=forced,
            num_beams=1,
            max_new_tokens=MAX_TOKENS,
        )
        # The first token of every row is the one that decoding starts from.
        for place, row in zip(places, output[:, 1:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            hypotheses[place] = " ".join(tokenizer.convert_ids_to_tokens(row[:end]))
    return hypotheses


def show(console: Console, task: Task, generated: dict[str, Generated], transformers: Sequence[str]) -> None:
    """Both speeds side by side, and which hypotheses are equal."""
    title = f"fairseq-generate, beam 1, {len(task.sentences)} sentences to {task.target}, batch {task.batch_size}"
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
