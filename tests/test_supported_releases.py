"""What setup.py asks for, the pins of both ends, and the machines that `make test-compat` stands for agree."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers.releases import CHECKED_WITH

ROOT = Path(__file__).resolve().parents[1]


def requirements() -> dict[str, Requirement]:
    """By lower-case name: what setup.py asks for, in CORE and every extra."""
    found: dict[str, Requirement] = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"CORE", "HF", "FAIRSEQ", "PLOTS", "DEV"}:
            for text in ast.literal_eval(node.value):
                found[Requirement(text).name.lower()] = Requirement(text)
    assert {"torch", "transformers", "hydra-core", "matplotlib", "pytest"} <= set(found)
    return found


def pins(name: str) -> dict[str, Version]:
    """By lower-case name: the releases in a file of constraints."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): Version(release) for name, release in pairs}


def floor(requirement: Requirement) -> Version | None:
    floors = [one.version for one in requirement.specifier if one.operator in (">=", "==")]
    return Version(floors[0]) if floors else None


def test_the_oldest_pins_are_the_floors_of_setup() -> None:
    """To the parts that the floor states: a pin of 4.21.1 is the oldest there is of ``>=4``."""
    oldest = pins("constraints-oldest.txt")
    for name, requirement in requirements().items():
        lowest = floor(requirement)
        if lowest is None or name == "triton":  # torch asks for one exact triton
            continue
        assert name in oldest, f"constraints-oldest.txt lacks {name}"
        assert oldest[name].release[: len(lowest.release)] == lowest.release, name


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_pins_are_allowed(name: str) -> None:
    pinned = pins(name)
    for requirement in requirements().values():
        if requirement.name.lower() in pinned:
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_the_makefile_installs_the_pinned_torch() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"TORCH := torch=={pins('constraints.txt')['torch']}\n" in text
    assert f"TORCH=torch=={pins('constraints-oldest.txt')['torch']} CONSTRAINTS=constraints-oldest.txt\n" in text


def test_the_families_were_checked_at_both_ends() -> None:
    oldest, newest = pins("constraints-oldest.txt")["transformers"], pins("constraints.txt")["transformers"]
    assert Version(CHECKED_WITH[0]) == oldest
    assert newest in map(Version, CHECKED_WITH)


LAYER = """
import os
import torch
from tests.helpers.compare import assert_close_relative
from tests.helpers.language_models import language_model, logits_of
from hf_integration import optimize
model = language_model("Olmoe")
model.set_experts_implementation("eager")
expected = logits_of(model)
handle = optimize(model)
assert_close_relative(logits_of(model), expected)
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"
print(torch.backends.cpu.get_cpu_capability(), cores, *{layer.kernels for layer in handle.report().layers})
"""


def run_model(script: str = LAYER, **environment: str) -> list[str]:
    """What a fresh process prints that computes a small model both ways."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split(" ", 2)


@pytest.mark.slow
def test_a_model_on_an_old_cpu() -> None:
    capability, _, _ = run_model(ATEN_CPU_CAPABILITY="default")
    assert capability == "DEFAULT"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot keep a process to one core")
def test_a_model_on_one_core_without_the_compiled_kernel() -> None:
    """The report names the loop."""
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    _, cores, kernels = run_model(one + LAYER, MOE_OPT_FUSED="0")
    assert (cores, kernels) == ("1", "('loop',)")
