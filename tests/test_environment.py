"""The installation: packages, names, versions, and the libraries that have to live together."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import fairseq_moe_opt
from fairseq_moe_opt.environment import check_torchaudio
from fairseq_moe_opt.errors import MoEError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_ROOTS = ("fairseq_moe_opt", "hf_integration")
HAS_FAIRSEQ = importlib.util.find_spec("fairseq") is not None


def run_python(script: str, *, path: Sequence[Path | str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """``script`` in a fresh interpreter of this environment, ``path`` in front of its sys.path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def listed_packages() -> list[str]:
    """``PACKAGES`` of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES":
            return list(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no PACKAGES")


def source_files(root: Path) -> set[Path]:
    """The Python files of both packages below ``root``, relative to it."""
    return {path.relative_to(root) for name in PACKAGE_ROOTS for path in (root / name).rglob("*.py")}


def folders_with_code() -> list[str]:
    """Dotted names of the folders that hold Python files."""
    return sorted({".".join(path.parent.parts) for path in source_files(ROOT)})


def test_setup_lists_every_package() -> None:
    assert sorted(listed_packages()) == folders_with_code()


def test_every_package_has_an_init() -> None:
    inits = [ROOT / name.replace(".", "/") / "__init__.py" for name in folders_with_code()]
    assert [path for path in inits if not path.exists()] == []


def test_public_names_exist_and_others_do_not() -> None:
    for name in fairseq_moe_opt.__all__:
        assert getattr(fairseq_moe_opt, name) is not None
    assert set(fairseq_moe_opt.__all__) <= set(dir(fairseq_moe_opt))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fairseq_moe_opt.nonsense


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, built from a copy of its sources and installed into an empty folder."""
    if any(importlib.util.find_spec(tool) is None for tool in ("pip", "setuptools", "wheel")):
        pytest.skip("building the project needs pip, setuptools and wheel")
    tree, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("installed")
    for name in (*PACKAGE_ROOTS, "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_the_installed_project_has_every_file(installed: Path) -> None:
    assert source_files(installed) == source_files(ROOT)
    assert all((installed / name / "py.typed").exists() for name in PACKAGE_ROOTS)


def test_the_installed_project_finds_its_presets(installed: Path, tmp_path: Path) -> None:
    script = "from fairseq_moe_opt import presets; print(presets.presets_folder(), *presets.preset_names())"
    done = run_python(script, path=[installed], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, *names = done.stdout.split()
    assert Path(folder).is_relative_to(installed)
    assert sorted(names) == sorted(path.stem for path in (ROOT / "configs" / "presets").glob("*.yaml")) != []


def test_the_installed_project_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    script = """
import importlib.metadata, fairseq_moe_opt, fairseq_moe_opt.moe
print(fairseq_moe_opt.__file__)
print(importlib.metadata.version("fairseq-moe-opt") == fairseq_moe_opt.__version__)
print([e.value for e in importlib.metadata.distribution("fairseq-moe-opt").entry_points])
"""
    done = run_python(script, path=[installed], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    origin, same_version, commands = done.stdout.splitlines()
    assert origin == str(installed / "fairseq_moe_opt" / "__init__.py")
    assert (same_version, commands) == ("True", "['fairseq_moe_opt.cli:main']")


CHECK = """
from fairseq_moe_opt.environment import check_torchaudio
from fairseq_moe_opt.errors import MoEError
try:
    check_torchaudio()
except MoEError as error:
    print("REFUSED", error)
else:
    print("FINE")
"""


def check_beside(torchaudio: str, folder: Path) -> str:
    """What the check says in an interpreter that finds a torchaudio with this source."""
    (folder / "torchaudio").mkdir()
    (folder / "torchaudio" / "__init__.py").write_text(torchaudio, encoding="utf-8")
    done = run_python(CHECK, path=[folder, ROOT], cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "failure",
    [
        'raise OSError("libcudart.so.13: cannot open shared object file")',
        'raise RuntimeError("built with CUDA 13\\nand more lines\\nof it")',
        'raise ImportError("undefined symbol")',
        "raise RuntimeError",
    ],
)
def test_a_broken_torchaudio_gets_one_line(failure: str, tmp_path: Path) -> None:
    said = check_beside(failure, tmp_path)
    assert said.startswith("REFUSED torchaudio is installed but cannot be loaded")
    assert said.endswith("pip uninstall torchaudio\n")
    assert said.count("\n") == 1


def test_a_working_torchaudio_is_left_alone(tmp_path: Path) -> None:
    assert check_beside("__version__ = '1'", tmp_path) == "FINE\n"


def test_hf_integration_says_it_before_transformers_fails(tmp_path: Path) -> None:
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text('raise OSError("libcudart.so.13")', encoding="utf-8")
    done = run_python("import hf_integration", path=[tmp_path, ROOT], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip uninstall torchaudio")


def test_no_torchaudio_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    check_torchaudio()


def test_the_error_is_one_of_the_projects_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchaudio.py").write_text('raise OSError("no library")', encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    with pytest.raises(MoEError, match=r"\(no library\).*pip uninstall torchaudio"):
        check_torchaudio()


def test_transformers_4_gets_one_line(tmp_path: Path) -> None:
    """Its release as the installation states it; nothing of Transformers has to be imported for that."""
    (tmp_path / "transformers-4.57.1.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n"
    (tmp_path / "transformers-4.57.1.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    done = run_python("import hf_integration", path=[tmp_path, ROOT], cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == (
        "fairseq_moe_opt.errors.MoEError: Transformers 4.57.1 is installed, and 5.6 or newer is needed: "
        "pip install 'transformers>=5.6,<6'"
    )


@pytest.mark.skipif(not HAS_FAIRSEQ, reason="fairseq is not installed (the fairseq extra, and one line more)")
@pytest.mark.slow
def test_nllb_moe_and_fairseq_live_in_one_environment(tmp_path: Path) -> None:
    script = """
from transformers import NllbMoeForConditionalGeneration
import fairseq.checkpoint_utils, fairseq.models.transformer
print(NllbMoeForConditionalGeneration.__name__, fairseq.models.transformer.TransformerModel.__name__)
"""
    done = run_python(script, path=[], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "NllbMoeForConditionalGeneration TransformerModel"


def test_torchaudio_is_never_asked_for() -> None:
    """Neither by setup.py nor by the pins; as a word in a comment it is welcome."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    words = [str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "hydra-core==1.3.2" in words
    assert "hydra-core==1.3.2" in pins
    assert [asked for asked in (*words, *pins) if asked.startswith("torchaudio")] == []
