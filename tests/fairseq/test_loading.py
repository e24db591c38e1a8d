"""Checkpoints and options on their way through fairseq's loader."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq import checkpoint_utils, options
from fairseq.models.transformer.transformer_legacy import TransformerModel

import fairseq_moe_opt
from fairseq_moe_opt.errors import CheckpointError, NoMoELayerError, OptionError
from tests.helpers.fairseq_runs import arrays, forced, load
from tests.helpers.goldens import FAIRSEQ_GOLDENS, TOLERANCE, real_difference

MODEL = FAIRSEQ_GOLDENS / "A_top2_eom"
DATA = FAIRSEQ_GOLDENS / "data" / "bin"
GENERATE = [str(DATA), "--path", "x.pt"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint; gives the path that does not exist."""
    for part in ("shared", "rank-0", "rank-1"):
        shutil.copy(MODEL / f"checkpoint_last-{part}.pt", tmp_path / f"x-{part}.pt")
    return tmp_path / "x.pt"


def state_of(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def test_options_come_from_overrides_and_are_in_the_report() -> None:
    model, _ = load(MODEL / "checkpoint_last.pt", DATA, moe_gating="static", moe_profile=True)
    assert model.moe.options.gating == "static"
    assert model.moe.options.capacity == "none"
    report = model.moe.report().to_dict()
    assert report["options"] == model.moe.options.to_dict()
    json.dumps(report)


def test_an_explicit_capacity_argument_implies_the_checkpoints_capacity() -> None:
    model, _ = load(MODEL / "checkpoint_last.pt", DATA, moe_eval_capacity_token_fraction=0.1)
    assert model.moe.options.capacity == "checkpoint"
    assert model.moe.report().options["capacity_implied_by"] == "moe_eval_capacity_token_fraction"


def test_an_explicit_capacity_option_wins_over_the_implied_one() -> None:
    model, _ = load(MODEL / "checkpoint_last.pt", DATA, moe_eval_capacity_token_fraction=0.1, moe_capacity="none")
    assert model.moe.options.capacity == "none"
    assert "capacity_implied_by" not in model.moe.report().options


def test_a_preset_among_the_overrides_gives_way_to_them(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("gating: static\ncapacity: none\n", encoding="utf-8")
    model, _ = load(MODEL / "checkpoint_last.pt", DATA, moe_preset=str(preset), moe_eval_capacity_token_fraction=0.1)
    assert (model.moe.options.gating, model.moe.options.capacity) == ("static", "none")
    model, _ = load(MODEL / "checkpoint_last.pt", DATA, moe_preset=str(preset), moe_gating="dynamic")
    assert model.moe.options.gating == "dynamic"
    preset.write_text("gatting: static\n", encoding="utf-8")
    with pytest.raises(OptionError, match=r"'moe_preset'.*mine\.yaml.*'gatting'"):
        load(MODEL / "checkpoint_last.pt", DATA, moe_preset=str(preset))
    preset.write_text("dense: torch\n", encoding="utf-8")
    with pytest.raises(
        OptionError, match=r"'moe_preset'.*mine\.yaml.*'dense', which has no effect on fairseq's models"
    ):
        load(MODEL / "checkpoint_last.pt", DATA, moe_preset=str(preset))


def test_options_of_the_training_run_are_forgotten(files: Path, tmp_path: Path) -> None:
    state = state_of(MODEL / "checkpoint_single.pt")
    state["cfg"]["model"].moe_gating, state["cfg"]["model"].moe_report = "static", "elsewhere.json"
    torch.save(state, tmp_path / "single.pt")
    model, _ = load(tmp_path / "single.pt", DATA)
    assert model.moe.options.gating == "dynamic"
    assert model.moe.options.report is None


@pytest.mark.parametrize("name", ["x.pt", "x-shared.pt", "x-rank-1.pt"])
def test_any_name_of_the_checkpoint_will_do(files: Path, name: str) -> None:
    model, _ = load(files.with_name(name), DATA, moe_eval_capacity_token_fraction=1.0)
    golden = arrays("A_top2_eom", "cap1.00")
    logits = forced(model, golden, "b1").logits
    assert real_difference(logits, golden["b1.logits"], golden["b1.prev_output_tokens"] != 1) <= TOLERANCE


def test_replicas_are_read_once(files: Path) -> None:
    """Four rank files of which two hold copies, as a run on more processes than experts leaves them."""
    for rank in (2, 3):
        shutil.copy(files.with_name(f"x-rank-{rank - 2}.pt"), files.with_name(f"x-rank-{rank}.pt"))
    for given in ({}, {"replication_count": 2}):
        model, _ = load(files, DATA, **given)
        assert len(model.moe.blocks[0].experts) == 8


def test_the_sharded_state_is_what_the_single_file_holds() -> None:
    sharded = checkpoint_utils.load_checkpoint_to_cpu(str(MODEL / "checkpoint_last-shared.pt"))
    single = checkpoint_utils.load_checkpoint_to_cpu(str(MODEL / "checkpoint_single.pt"))
    assert sharded["model"].keys() == single["model"].keys()
    assert all(torch.equal(sharded["model"][name], tensor) for name, tensor in single["model"].items())
    assert type(sharded["cfg"]["model"]) is type(single["cfg"]["model"])
    assert sharded["extra_state"]["train_iterator"] == single["extra_state"]["train_iterator"]


def test_a_missing_rank_file_is_named(files: Path) -> None:
    files.with_name("x-rank-0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"x-rank-0\.pt"):
        load(files, DATA)


def test_a_missing_last_rank_file_is_noticed(files: Path) -> None:
    files.with_name("x-rank-1.pt").unlink()
    with pytest.raises(CheckpointError, match="rank file"):
        load(files, DATA)


def test_a_missing_shared_file_is_named(files: Path) -> None:
    files.with_name("x-shared.pt").unlink()
    with pytest.raises(CheckpointError, match=r"x-shared\.pt"):
        load(files, DATA)


def test_a_rank_file_of_another_checkpoint_is_named(files: Path) -> None:
    shutil.copy(FAIRSEQ_GOLDENS / "D_cmr" / "checkpoint_last-rank-1.pt", files.with_name("x-rank-1.pt"))
    with pytest.raises(CheckpointError, match=r"x-rank-1\.pt.*another checkpoint"):
        load(files, DATA)


@pytest.mark.parametrize("name", ["x-rank-1.pt", "single.pt"])
def test_a_truncated_file_is_named(files: Path, name: str) -> None:
    target = files.with_name(name)
    if name == "single.pt":
        shutil.copy(MODEL / "checkpoint_single.pt", target)
    target.write_bytes(target.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(files if name.startswith("x") else target, DATA)


class Foreign:
    """A class that no checkpoint may hold."""


@pytest.mark.parametrize("name", ["x-shared.pt", "single.pt"])
def test_a_foreign_class_is_refused_by_name(files: Path, name: str) -> None:
    state = state_of(MODEL / ("checkpoint_single.pt" if name == "single.pt" else "checkpoint_last-shared.pt"))
    state["extra_state"]["surprise"] = Foreign()
    torch.save(state, files.with_name(name))
    with pytest.raises(CheckpointError, match=r"(x-shared|single)\.pt.*Foreign"):
        load(files if name.startswith("x") else files.with_name(name), DATA)


def test_a_dictionary_of_another_size_is_one_clear_line(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "bin")
    for side in ("src", "tgt"):
        with (tmp_path / "bin" / f"dict.{side}.txt").open("a", encoding="utf-8") as stream:
            stream.write("another 1\n")
    with pytest.raises(OptionError, match=r"128 .*129 ") as caught:
        load(MODEL / "checkpoint_last.pt", tmp_path / "bin")
    assert "\n" not in str(caught.value)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match="moe_capasity"):
        load(MODEL / "checkpoint_last.pt", DATA, moe_capasity="none")


def test_a_dense_checkpoint_loads_as_before_and_takes_no_runtime_option(tmp_path: Path) -> None:
    state = state_of(MODEL / "checkpoint_single.pt")
    state["cfg"]["model"].moe_freq = 0
    _, task = load(MODEL / "checkpoint_last.pt", DATA)
    dense = task.build_model(state["cfg"]["model"])
    state["model"] = dense.state_dict()
    path = tmp_path / "dense.pt"
    torch.save(state, path)
    model, _ = load(path, DATA)
    assert type(model) is TransformerModel
    with pytest.raises(NoMoELayerError, match=r"dense\.pt.*moe_gating"):
        load(path, DATA, moe_gating="static")


def parse(*arguments: str) -> Any:
    return options.parse_args_and_arch(options.get_generation_parser(), [*GENERATE, *arguments])


def test_flags_travel_in_the_overrides() -> None:
    args = parse("--moe-gating", "static", "--moe-profile", "--model-overrides", "{'moe_eom': 0.0}")
    assert json.loads(args.model_overrides.replace("'", '"').replace("True", "true")) == {
        "moe_eom": 0.0,
        "moe_gating": "static",
        "moe_profile": True,
    }
    assert not hasattr(args, "moe_gating")


@pytest.mark.parametrize("flag", ["--moe-eval-capacity-token-fraction=0.1", "--moe-eval-capacity-max-seqlen"])
def test_a_capacity_flag_implies_the_checkpoints_capacity(flag: str) -> None:
    name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
    overrides = ast.literal_eval(parse(flag).model_overrides)
    model, _ = load(MODEL / "checkpoint_last.pt", DATA, **overrides)
    assert model.moe.report().options["capacity_implied_by"] == name
    assert model.moe.options.capacity == "checkpoint"


@pytest.mark.parametrize("where", ["flag", "override"])
def test_a_preset_of_a_command_line_gives_way_to_flags(where: str) -> None:
    preset = ["--moe-preset", "static"] if where == "flag" else ["--model-overrides", "{'moe_preset': 'static'}"]
    overrides = ast.literal_eval(parse(*preset, "--moe-capacity", "none").model_overrides)
    assert overrides == {"moe_gating": "static", "moe_capacity": "none"}


def test_training_takes_a_preset_too(caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--arch", "transformer", "--moe-preset", "static", "--moe-capacity", "none", "--moe-local-drop", "0.1"]
    args = options.parse_args_and_arch(options.get_training_parser(), [str(DATA), *flags])
    assert (args.moe_gating, args.moe_capacity) == ("static", "none")
    (warning,) = [entry.getMessage() for entry in caplog.records if "no effect" in entry.getMessage()]
    assert warning.startswith("--moe-local-drop") and "one process" in warning


def test_overrides_without_flags_stay_as_they_are() -> None:
    assert parse("--model-overrides", "{'moe_eom':0.0}").model_overrides == "{'moe_eom':0.0}"
    assert parse().model_overrides == "{}"


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (64, 16)])
def test_a_published_number_of_processes_is_the_most_that_there_are(
    cores: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    args = parse("--is-moe", "--distributed-world-size", "16", "--distributed-port", "29500", "--cpu")
    assert args.distributed_world_size == processes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--moe-gating", "eager"), "--moe-gating"),
        (("--model-overrides", "{'moe_gating': 'eager'}"), "moe_gating"),
        (("--moe-gating", "static", "--moe-kernel", "loop"), "moe_kernel"),
        (("--model-overrides", "{'moe_gating'"), "model_overrides"),
        (("--moe-preset", "nothing"), "moe_preset"),
    ],
)
def test_a_wrong_flag_ends_the_command_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_registering_again_changes_nothing() -> None:
    before = (options.parse_args_and_arch, checkpoint_utils.load_checkpoint_to_cpu)
    fairseq_moe_opt.register_fairseq()
    assert (options.parse_args_and_arch, checkpoint_utils.load_checkpoint_to_cpu) == before


def test_importing_the_package_loads_no_host() -> None:
    code = "import sys, fairseq_moe_opt; print([m for m in ('torch', 'fairseq', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
