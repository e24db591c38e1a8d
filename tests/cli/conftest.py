"""A tiny checkpoint with a tokenizer on disk, and a way to run the command line in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fairseq_moe_opt.cli import main
from tests.helpers.translation_models import nllb_moe, nllb_tokenizer

LANGUAGES = ("--src-lang", "eng_Latn", "--tgt-lang", "fra_Latn")


@dataclass(frozen=True)
class Done:
    """Exit code and both streams of one run."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """Standard error, which has to be one line that names the program."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("moe-opt: ")
        return lines[0]


Run = Callable[..., Done]


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("info", path)``; ``stdin=`` gives bytes to standard input."""

    def call(*arguments: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfdbinary.readouterr()
        return Done(code, captured.out.decode("utf-8"), captured.err.decode("utf-8"))

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random NLLB-MoE in float32, 8 experts, 2 + 2 layers of which one each is sparse, with NLLB's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    nllb_moe().save_pretrained(folder)
    nllb_tokenizer().save_pretrained(folder)
    return folder
