"""The arrows of the source tree, held by machine; each rule is shown to catch what it is there for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.arrows import CHECKS, ENGINE, HF, MAY_IMPORT, check_arrows, room_of

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for package in (ENGINE, HF) for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("rule", CHECKS)
def test_the_tree_keeps_the_rule(rule: str) -> None:
    check = CHECKS[rule]
    found = [
        violation
        for path in SOURCES
        for violation in check(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert len(SOURCES) > 20
    assert not found, "\n".join(found)


BROKEN = [
    ("arrows", "fairseq_moe_opt/moe/layer.py", "from fairseq_moe_opt.checkpoints import open_index"),
    ("arrows", "fairseq_moe_opt/moe/layer.py", "from fairseq_moe_opt import checkpoints"),
    ("arrows", "fairseq_moe_opt/moe/layer.py", "from ..checkpoints.records import TensorRecord"),
    ("arrows", "fairseq_moe_opt/moe/layer.py", "from fairseq_moe_opt.options import MoEOptions"),
    ("arrows", "fairseq_moe_opt/moe/layer.py", "from fairseq_moe_opt import MoEOptions"),
    ("arrows", "fairseq_moe_opt/moe/types.py", "from fairseq_moe_opt.moe.dispatch import plan"),
    ("arrows", "fairseq_moe_opt/moe/protocols.py", "import fairseq_moe_opt.moe.layer"),
    ("arrows", "fairseq_moe_opt/checkpoints/records.py", "from fairseq_moe_opt.moe import MoELayer"),
    ("arrows", "fairseq_moe_opt/profiling/timers.py", "def f():\n    from fairseq_moe_opt.moe import layer"),
    ("arrows", "fairseq_moe_opt/options.py", "import fairseq_moe_opt.build"),
    ("arrows", "fairseq_moe_opt/build/layers.py", "import hf_integration"),
    (
        "arrows",
        "fairseq_moe_opt/build/layers.py",
        'import_module("hf_integration.optimize")',
    ),
    ("arrows", "fairseq_moe_opt/models/nllb.py", "from hf_integration import optimize"),
    ("arrows", "hf_integration/optimize.py", "from fairseq_moe_opt.cli import main"),
    ("arrows", "hf_integration/optimize.py", "from fairseq_moe_opt.models import nllb"),
    ("arrows", "hf_integration/optimize.py", "from hf_integration.launch import translate"),
    ("arrows", "fairseq_moe_opt/errors.py", "from fairseq_moe_opt.moe.types import Routing"),
    ("arrows", "fairseq_moe_opt/newroom/thing.py", ""),
    ("hosts", "fairseq_moe_opt/moe/layer.py", "import transformers"),
    ("hosts", "fairseq_moe_opt/cli.py", "def f():\n    from transformers.utils import logging"),
    ("hosts", "fairseq_moe_opt/checkpoints/fairseq.py", "from fairseq.data import Dictionary"),
    ("hosts", "fairseq_moe_opt/models/nllb.py", "import transformers"),
    ("hosts", "hf_integration/optimize.py", "import fairseq"),
    ("engine needs torch alone", "fairseq_moe_opt/moe/routing.py", "import numpy as np"),
    (
        "engine needs torch alone",
        "fairseq_moe_opt/moe/kernels/loop.py",
        "def f():\n    import safetensors",
    ),
    ("lazy command line", "fairseq_moe_opt/cli.py", "from hf_integration import from_pretrained"),
    ("no print", "fairseq_moe_opt/moe/layer.py", "def f():\n    print(1)"),
    ("no print", "fairseq_moe_opt/client.py", "print(1)"),
    ("no global state", "fairseq_moe_opt/moe/layer.py", "_CACHE = {}"),
    ("no global state", "fairseq_moe_opt/moe/layer.py", "_CACHE: dict[str, int] = dict()"),
    ("no global state", "fairseq_moe_opt/moe/layer.py", "_losses = collections.deque()"),
    ("no global state", "fairseq_moe_opt/moe/layer.py", "def f():\n    global x\n    x = 1"),
    ("no assert", "fairseq_moe_opt/moe/layer.py", "def f(x):\n    assert x"),
    ("sizes", "fairseq_moe_opt/moe/layer.py", "x = 1\n" * 401),
    ("sizes", "fairseq_moe_opt/moe/layer.py", "def f():\n" + "    x = 1\n" * 80),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_the_rule_catches(rule: str, path: str, source: str) -> None:
    assert len(CHECKS[rule](path, source)) == 1


KEPT = [
    ("arrows", "fairseq_moe_opt/checkpoints/records.py", "from fairseq_moe_opt.moe.types import ExpertKey"),
    (
        "arrows",
        "fairseq_moe_opt/moe/layer.py",
        "from fairseq_moe_opt import moe\nfrom . import routing",
    ),
    ("arrows", "fairseq_moe_opt/build/layers.py", "from fairseq_moe_opt import moe, checkpoints, options"),
    ("arrows", "hf_integration/loading.py", "from fairseq_moe_opt import __version__, MoEOptions"),
    ("arrows", "fairseq_moe_opt/cli.py", "def f():\n    import hf_integration"),
    ("hosts", "hf_integration/optimize.py", "from transformers import AutoConfig"),
    ("hosts", "fairseq_moe_opt/models/nllb.py", "import fairseq"),
    ("hosts", "fairseq_moe_opt/checkpoints/opening.py", "from fairseq_moe_opt.checkpoints import fairseq"),
    ("engine needs torch alone", "fairseq_moe_opt/moe/routing.py", "import math\nfrom torch import Tensor"),
    ("lazy command line", "fairseq_moe_opt/cli.py", "def f():\n    import hf_integration"),
    ("no print", "fairseq_moe_opt/cli.py", "print(1)"),
    ("no global state", "fairseq_moe_opt/moe/layer.py", "_REGISTRY: dict[str, int] = {}\n__all__ = []"),
    ("no global state", "fairseq_moe_opt/moe/layer.py", "NAMES: Mapping[str, int] = {}\nSIZES = (1, 2)"),
    ("sizes", "fairseq_moe_opt/moe/layer.py", "def f():\n" + "    x = 1\n" * 79),
]


@pytest.mark.parametrize(("rule", "path", "source"), KEPT)
def test_the_rule_lets_pass(rule: str, path: str, source: str) -> None:
    assert CHECKS[rule](path, source) == []


def test_no_two_rooms_know_each_other() -> None:
    mutual = [
        (one, other) for one, allowed in MAY_IMPORT.items() for other in allowed if one in MAY_IMPORT.get(other, ())
    ]
    assert mutual == []


def test_rooms_are_told_apart() -> None:
    assert room_of("fairseq_moe_opt.moe.types.Routing") == "moe.types"
    assert room_of("fairseq_moe_opt.moe.kernels.loop") == "moe"
    assert room_of("hf_integration.families.nllb_moe") == "hf_integration"
    assert check_arrows("fairseq_moe_opt/moe/types.py", "from fairseq_moe_opt.errors import MoEError") == []


LOADED = """
import sys
{statement}
print(*sorted({{"torch", "fairseq", "transformers", "numpy", "hf_integration"}} & set(sys.modules)))
"""


def loaded_by(statement: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after ``statement``."""
    script = LOADED.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import fairseq_moe_opt") == []


def test_options_and_errors_load_nothing_heavy() -> None:
    assert loaded_by("from fairseq_moe_opt import MoEOptions, MoEError; MoEOptions()") == []


def test_the_engine_loads_torch_and_no_host() -> None:
    statement = "import fairseq_moe_opt.moe, fairseq_moe_opt.build, fairseq_moe_opt.checkpoints"
    assert set(loaded_by(statement)) - {"numpy"} == {"torch"}


def test_what_is_loaded_is_seen() -> None:
    assert "numpy" in loaded_by("import numpy")
