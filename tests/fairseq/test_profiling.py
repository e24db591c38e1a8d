"""``--moe-profile DIR`` in fairseq: from the flag to the page."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed")
pytest.importorskip("matplotlib")

from fairseq import options

import fairseq_moe_opt
from fairseq_moe_opt.profiling.clock import ATTENTION, EXPERTS, REST
from tests.helpers.fairseq_runs import LANGUAGE_MODEL, data_folder, load
from tests.helpers.goldens import FAIRSEQ_GOLDENS

MODEL = FAIRSEQ_GOLDENS / "A_top2_eom" / "checkpoint_last.pt"
DATA = FAIRSEQ_GOLDENS / "data" / "bin"
USER_DIR = Path(fairseq_moe_opt.__file__).parent


@pytest.mark.parametrize(("flags", "expected"), [(["--moe-profile"], True), (["--moe-profile", "here"], "here")])
def test_the_flag_takes_a_folder_or_nothing(flags: list[str], expected: object) -> None:
    args = options.parse_args_and_arch(options.get_generation_parser(), [str(DATA), "--path", "x.pt", *flags])
    assert ast.literal_eval(args.model_overrides)["moe_profile"] == expected


def test_generating_writes_a_profile_of_both_sides(tmp_path: Path) -> None:
    code = "import sys; from fairseq_cli.generate import cli_main; sys.exit(cli_main())"
    arguments = [str(DATA), "--user-dir", str(USER_DIR), "--task", "translation", "-s", "src", "-t", "tgt"]
    arguments += ["--path", str(MODEL), "--batch-size", "4", "--beam", "2", "--cpu", "--max-len-b", "10"]
    arguments += ["--moe-profile", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "profile.json").read_text(encoding="utf-8"))
    (one,) = content["inputs"]
    for phase in ("encoder", "decoder"):
        found = one["phases"][phase]
        assert found["forwards"] > 0 and abs(found["components_sum_difference"]) < 0.05
        assert all(found["components"][name] > 0 for name in (EXPERTS, ATTENTION, REST))
    assert (
        content["about"]["model"].startswith(str(MODEL.with_suffix("")))
        and content["layers"][0]["capacity_fraction"] is not None
    )
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_language_model_is_all_decoder_and_off_leaves_nothing(tmp_path: Path) -> None:
    file = FAIRSEQ_GOLDENS / LANGUAGE_MODEL / "checkpoint_last.pt"
    model, task = load(file, data_folder(LANGUAGE_MODEL), moe_profile=str(tmp_path / "out"))
    plain, _ = load(file, data_folder(LANGUAGE_MODEL))
    ids = task.dictionary.encode_line("a b c", append_eos=True, add_if_not_exist=False).long()[None]
    expected = plain(ids)[0]
    for _ in range(3):
        assert model(ids)[0].equal(expected)
    profile = model.moe.profile()
    assert profile.phases == ("decoder",)
    # The second of three forwards was recorded instead of timed.
    assert len(profile.inputs[0].times.forwards["decoder"]) == 2 and set(profile.timelines) == {"decoder"}
    model.moe._profiler.detach()
    assert plain.moe.profile() is None
    for one in (plain, model):
        assert all("forward" not in vars(module) for module in one.modules())
        assert all(block.engine.counters.watch is None and not block._observers for block in one.moe.blocks)
