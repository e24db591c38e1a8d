"""The restricted unpickler: nothing runs, what is foreign is refused by name, configuration comes out plain."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe_opt.checkpoints import open_index
from fairseq_moe_opt.checkpoints.restricted import load_restricted, plain
from fairseq_moe_opt.errors import CheckpointError

HERE = Path("x.pt")


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "function, arguments, name",
    [
        (os.system, ("echo no",), r"(posix|nt)\.system"),
        (eval, ("1 + 1",), r"(builtins|__builtin__)\.eval"),
        (getattr, ({}, "keys"), r"(builtins|__builtin__)\.getattr"),
        (bytearray, (10,), r"(builtins|__builtin__)\.bytearray"),
        (subprocess.Popen, (["true"],), r"(subprocess|commands)\.Popen"),
        (torch.load, ("x",), r"torch\.serialization\.load"),
        (collections.Counter, ("x",), r"collections\.Counter"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_global_is_refused_by_name(function: Any, arguments: Any, name: str, protocol: int) -> None:
    data = pickle.dumps({"model": Calls(function, *arguments)}, protocol)
    with pytest.raises(CheckpointError, match=f"{name}, which is not allowed"):
        load_restricted(data, HERE)


def test_foreign_pickle_in_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    torch.save({"model": {"x": torch.ones(1)}, "extra": Calls(os.mkdir, str(flag))}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: its pickle refers to (posix|nt)\.mkdir"):
        open_index(tmp_path / "x.pt")
    assert not flag.exists()


def test_namespace_stays_inert_and_becomes_plain() -> None:
    namespace = argparse.Namespace(layers=3, nested=argparse.Namespace(name="x"), langs=["a", "b"], none=None)
    loaded = load_restricted(pickle.dumps({"cfg": namespace}, 2), HERE)
    assert not isinstance(loaded["cfg"], argparse.Namespace)
    assert plain(loaded["cfg"]) == {"layers": 3, "nested": {"name": "x"}, "langs": ["a", "b"], "none": None}


def test_omegaconf_becomes_plain_without_being_imported() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"model": {"moe_freq": 2, "list": [1, "x", None]}, "flag": True})
    data = pickle.dumps(config, 2)
    assert plain(load_restricted(data, HERE)) == {"model": {"moe_freq": 2, "list": [1, "x", None]}, "flag": True}
    script = (
        "import sys; sys.modules['omegaconf'] = None\n"
        "from pathlib import Path\n"
        "from fairseq_moe_opt.checkpoints.restricted import load_restricted, plain\n"
        "print(plain(load_restricted(sys.stdin.buffer.read(), Path('x')))['model']['moe_freq'])"
    )
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert done.stdout.strip() == b"2"


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"no pickle at all", pickle.dumps([1, 2], 4)[:-3]])
def test_damaged_pickle_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged or foreign"):
        load_restricted(data, HERE)
