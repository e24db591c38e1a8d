"""Buffered experts in fairseq: the same tokens and numbers as with all of them in memory, and clear refusals."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq import options
from fairseq.dataclass.configs import FairseqConfig

import fairseq_moe_opt
from fairseq_moe_opt.buffering import POLICIES
from fairseq_moe_opt.checkpoints import TensorRecord, convert, read_tensor
from fairseq_moe_opt.errors import CheckpointError, KernelError, MoEError, OptionError
from fairseq_moe_opt.moe.trace import read_trace
from fairseq_moe_opt.options import MoEOptions
from tests.helpers.fairseq_runs import MODELS, arrays, data_folder, forced, generate, golden_names, load, load_golden
from tests.helpers.goldens import FAIRSEQ_GOLDENS

PLUGIN = Path(fairseq_moe_opt.__file__).parent
MODEL = FAIRSEQ_GOLDENS / "A_top2_eom"
SINGLE = MODEL / "checkpoint_single.pt"
DATA = FAIRSEQ_GOLDENS / "data" / "bin"
EXAMPLE = Path(__file__).parents[2] / "examples" / "demo" / "model"
LOSSLESS = {name: next(one for one in golden_names(name) if one.startswith("cap1.00")) for name in MODELS}
"""A golden of each model whose capacity drops nothing."""

BUDGETS: list[dict[str, Any]] = [
    *({"moe_expert_memory": "30%", "moe_eviction": policy} for policy in sorted(POLICIES)),
    {"moe_expert_memory": "100%"},
    {"moe_expert_memory": "50%", "moe_prefetch": "off", "moe_gating": "static"},
    {"moe_expert_memory": "50%", "moe_prefetch": "previous", "moe_expert_pool": "layer"},
    {"moe_expert_memory": "20%", "moe_host_memory": "40%"},
    {"moe_expert_memory": "20%", "moe_host_memory": "page-cache", "moe_kernel": "naive"},
]


def how_of(wanted: dict[str, Any]) -> dict[str, Any]:
    """The part of the options that resident experts have too."""
    return {name: value for name, value in wanted.items() if name in {"moe_gating", "moe_kernel"}}


def everything(model: Any, task: Any, golden: dict[str, Tensor]) -> list[Any]:
    """Logits of both batches, and hypotheses of greedy and beam search with their scores."""
    found: list[Any] = [forced(model, golden, batch).logits for batch in ("b0", "b1")]
    for beam in (1, 4):
        for hypotheses in generate(model, task, golden, "b1", beam):
            found += [(each["tokens"].tolist(), float(each["score"])) for each in hypotheses]
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("wanted", BUDGETS, ids=lambda wanted: "-".join(wanted.values()))
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_hypotheses_are_those_of_the_resident_model(name: str, wanted: dict[str, Any]) -> None:
    golden = arrays(name, LOSSLESS[name])
    expected = everything(*load_golden(name, LOSSLESS[name], **how_of(wanted)), golden)
    model, task = load_golden(name, LOSSLESS[name], **wanted)
    for _ in range(2):
        assert same(everything(model, task, golden), expected)
    buffer = model.moe.report().buffer
    assert buffer.arena_bytes == buffer.slots * buffer.slot_bytes
    assert buffer.slots <= buffer.experts * int(wanted["moe_expert_memory"].removesuffix("%")) / 100


def test_a_capacity_that_binds_drops_the_same() -> None:
    golden = arrays("A_top2_eom", "cap0.10")
    expected = everything(*load_golden("A_top2_eom", "cap0.10"), golden)
    assert same(everything(*load_golden("A_top2_eom", "cap0.10", moe_expert_memory="25%"), golden), expected)


@pytest.mark.parametrize("budget", ["10%", "25%", "60%"])
def test_the_demo_model_in_rank_files(tmp_path: Path, budget: str) -> None:
    convert(EXAMPLE, tmp_path / "x.pt", to="fairseq", ranks=4)
    for code in ("eng_Latn", "fra_Latn", "deu_Latn", "spa_Latn"):
        shutil.copy(tmp_path / "dict.txt", tmp_path / f"dict.{code}.txt")
    generator = torch.Generator().manual_seed(3)
    batch: dict[str, Tensor] = {}
    for name in ("b0", "b1"):
        batch[f"{name}.src_tokens"] = torch.randint(4, 1000, (3, 12), generator=generator)
        batch[f"{name}.src_lengths"] = torch.tensor([12, 12, 12])
        batch[f"{name}.prev_output_tokens"] = torch.randint(4, 1000, (3, 9), generator=generator)
    languages = {"source_lang": "eng_Latn", "target_lang": "fra_Latn"}
    expected = everything(*load(tmp_path / "x.pt", tmp_path, **languages), batch)
    assert same(everything(*load(tmp_path / "x.pt", tmp_path, **languages, moe_expert_memory=budget), batch), expected)


def test_no_expert_is_in_memory() -> None:
    model, _ = load(SINGLE, DATA, moe_expert_memory="25%")
    held = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert held == {name for name, _ in model.named_parameters() if ".experts." in name}
    resident, _ = load(SINGLE, DATA)
    assert model.moe.report().expert_bytes == resident.moe.report().expert_bytes
    assert sum(one.numel() for one in model.parameters()) == sum(one.numel() for one in resident.parameters())


def test_half_precision_after_loading() -> None:
    golden = arrays("A_top2_eom", "cap1.00")
    resident, model = load(SINGLE, DATA)[0].half(), load(SINGLE, DATA, moe_expert_memory="25%")[0].half()
    assert torch.equal(forced(model, golden, "b1").logits, forced(resident, golden, "b1").logits)
    assert model.moe.report().expert_bytes == resident.moe.report().expert_bytes
    before = model.moe.report().buffer.slot_bytes
    model.float()
    assert model.moe.report().buffer.slot_bytes > 1.5 * before


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_experts_of_another_dtype(name: str) -> None:
    """Bits do not depend on the budget; numbers are near those of the checkpoint's own dtype."""
    golden = arrays("A_top2_eom", "cap1.00")
    floats = forced(load(SINGLE, DATA)[0], golden, "b1").logits
    whole, part = (load(SINGLE, DATA, moe_expert_memory=budget, moe_expert_dtype=name)[0] for budget in ("100%", "25%"))
    logits = forced(part, golden, "b1").logits
    assert torch.equal(logits, forced(whole, golden, "b1").logits)
    assert 0 < float((logits - floats).abs().max()) < 0.05 * float(floats.abs().max())
    resident, _ = load(SINGLE, DATA)
    assert part.moe.report().expert_bytes < 0.6 * resident.moe.report().expert_bytes


def test_the_report_and_the_trace(tmp_path: Path) -> None:
    golden = arrays("A_top2_eom", "cap1.00")
    path = tmp_path / "trace.json"
    model, task = load(SINGLE, DATA, moe_expert_memory="40%", moe_prefetch="off", moe_trace=str(path))
    generate(model, task, golden, "b1", 2)
    report = model.moe.report()
    size = report.expert_bytes // report.buffer.experts
    for layer in report.layers:
        assert layer.cache.hits + layer.cache.misses == round(layer.active_experts * layer.calls) > 0
        assert layer.cache.bytes_read == {"file": layer.cache.misses * size}
    assert json.loads(json.dumps(report.to_dict()))["buffer"]["slots"] == report.buffer.slots
    model.moe._write(str(tmp_path / "report.json"), str(path), model)
    assert json.loads((tmp_path / "report.json").read_text())["layers"][0]["cache"]["misses"] > 0
    trace = read_trace(path)
    assert [layer.name for layer in trace.layers] == [block.spec.layer.name for block in model.moe.blocks]
    warm, task = load(SINGLE, DATA, moe_expert_memory="40%", moe_prefetch="off", moe_warm_start=str(path))
    generate(warm, task, golden, "b1", 2)
    misses = [sum(layer.cache.misses for layer in one.moe.report().layers) for one in (warm, model)]
    assert misses[0] < misses[1]


def test_run_as_makes_another_buffer() -> None:
    golden = arrays("A_top2_eom", "cap1.00")
    model, _ = load(SINGLE, DATA, moe_expert_memory="25%")
    before = forced(model, golden, "b1").logits
    slots = model.moe.report().buffer.slots
    model.moe.run_as(MoEOptions(expert_memory="50%", eviction="lifo"))
    assert torch.equal(forced(model, golden, "b1").logits, before)
    assert model.moe.report().buffer.slots == 2 * slots
    assert model.moe.report().buffer.policy == "lifo"
    with pytest.raises(OptionError, match=r"'all': the experts of this model are in the checkpoint's files"):
        model.moe.run_as(MoEOptions())
    assert torch.equal(forced(model, golden, "b1").logits, before)
    resident, _ = load(SINGLE, DATA)
    with pytest.raises(OptionError, match=r"'25%': the experts of this model are in memory since it was loaded"):
        resident.moe.run_as(MoEOptions(expert_memory="25%"))


def test_two_models_and_two_threads() -> None:
    golden = arrays("A_top2_eom", "cap1.00")
    expected = forced(load(SINGLE, DATA)[0], golden, "b1").logits
    models = [load(SINGLE, DATA, moe_expert_memory=budget)[0] for budget in ("15%", "60%")]
    found: list[bool] = []

    def run(model: Any) -> None:
        for _ in range(4):
            found.append(torch.equal(forced(model, golden, "b1").logits, expected))

    threads = [threading.Thread(target=run, args=(models[number % 2],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 16


def test_a_copy_shares_the_experts() -> None:
    golden = arrays("D_cmr", LOSSLESS["D_cmr"])
    model, _ = load_golden("D_cmr", LOSSLESS["D_cmr"], moe_expert_memory="25%")
    expected = forced(model, golden, "b1").logits
    assert torch.equal(forced(copy.deepcopy(model), golden, "b1").logits, expected)


def test_what_it_cannot_do_is_said() -> None:
    golden = arrays("A_top2_eom", "cap1.00")
    model, _ = load(SINGLE, DATA, moe_expert_memory="25%")
    with pytest.raises(MoEError, match="no complete state dict to save"):
        model.state_dict()
    with pytest.raises(MoEError, match="cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(OptionError, match=r"moe_expert_memory.*'25%': buffered experts are read from a checkpoint's"):
        model.load_state_dict(load(SINGLE, DATA)[0].state_dict())
    with pytest.raises(KernelError, match=r"gradients are wanted, but buffered experts.*torch\.no_grad"):
        model(golden["b1.src_tokens"], golden["b1.src_lengths"], golden["b1.prev_output_tokens"])


def test_a_model_without_a_checkpoint_says_so() -> None:
    state = torch.load(SINGLE, weights_only=False)
    _, task = load(SINGLE, DATA)
    state["cfg"]["model"].moe_expert_memory = "25%"
    model = task.build_model(state["cfg"]["model"])
    golden = arrays("A_top2_eom", "cap1.00")
    with pytest.raises(MoEError, match=r"encoder\.layers\.\d+\.moe_layer: .* no checkpoint has been loaded"):
        forced(model.eval(), golden, "b1")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"moe_expert_memory": "many"}, r"'moe_expert_memory': 'many' is not a size like 2GiB"),
    "no effect": ({"moe_eviction": "lifo"}, r"'moe_eviction': 'lifo' has no effect with expert_memory='all'"),
    "dtype": ({"moe_expert_dtype": "int8"}, r"'moe_expert_dtype': .* give moe_expert_memory too, 100% for all"),
    "packed": ({"moe_expert_memory": "25%", "moe_kernel": "grouped_mm"}, "use kernel='loop'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_options_are_refused_before_a_weight_is_read(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("fairseq_moe_opt.checkpoints.lazy.read_tensor", fail)
    wanted, message = REFUSED[case]
    with pytest.raises(OptionError, match=message):
        load(SINGLE, DATA, **wanted)


def test_experts_of_another_shape_are_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(SINGLE, weights_only=False)
    name = next(one for one in state["model"] if ".experts.3.fc1.weight" in one)
    state["model"][name] = state["model"][name][:-1].clone()
    torch.save(state, tmp_path / "x.pt")
    read: list[str] = []

    def note(record: TensorRecord, *into: Tensor) -> Tensor:
        read.append(record.name)
        return read_tensor(record, *into)

    monkeypatch.setattr("fairseq_moe_opt.checkpoints.lazy.read_tensor", note)
    with pytest.raises(CheckpointError, match=r"x\.pt.*experts\.3\.fc1\.weight"):
        load(tmp_path / "x.pt", DATA, moe_expert_memory="25%")
    assert not [name for name in read if not name.endswith("version")]


def test_a_budget_for_less_than_one_expert_names_the_smallest() -> None:
    model, other = (load(SINGLE, DATA, moe_expert_memory=budget)[0] for budget in ("1000", "50%"))
    size = other.moe.report().buffer.slot_bytes
    with pytest.raises(OptionError, match=rf"no room for one expert: the smallest possible is {size} bytes"):
        model.prepare_for_inference_(OmegaConf.structured(FairseqConfig()))


def test_training_with_a_budget_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        options.parse_args_and_arch(
            options.get_training_parser(), [str(DATA), "--arch", "transformer", "--moe-expert-memory", "25%"]
        )
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'moe_expert_memory': '25%': training needs all experts in memory" in last


def test_a_fault_of_a_rank_file_passes(tmp_path: Path) -> None:
    for part in ("shared", "rank-0", "rank-1"):
        shutil.copy(MODEL / f"checkpoint_last-{part}.pt", tmp_path / f"x-{part}.pt")
    golden = arrays("A_top2_eom", "cap1.00")
    model, _ = load(tmp_path / "x.pt", DATA, moe_expert_memory="20%")
    expected = forced(model, golden, "b1").logits
    path = tmp_path / "x-rank-1.pt"
    good = path.read_bytes()
    for fault in ("short", "gone", "a folder"):
        path.unlink()
        if fault == "short":
            path.write_bytes(good[: len(good) // 2])
        elif fault == "a folder":
            path.mkdir()
        with pytest.raises(CheckpointError, match=r"x-rank-1\.pt: .*expert [4-7] of encoder\.layers\.\d+\.moe_layer"):
            forced(model, golden, "b1")
        path.rmdir() if path.is_dir() else None
        path.write_bytes(good)
        assert torch.equal(forced(model, golden, "b1").logits, expected)


def written(report: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


COMMANDS = {
    "generate": (
        "fairseq_cli.generate",
        MODEL / "checkpoint_last.pt",
        DATA,
        "--batch-size 8 --beam 2 --max-len-a 1.5 --max-len-b 10",
    ),
    "interactive": ("fairseq_cli.interactive", MODEL / "checkpoint_last.pt", DATA, "--beam 2 --buffer-size 4"),
    "eval-lm": (
        "fairseq_cli.eval_lm",
        FAIRSEQ_GOLDENS / "E_lm_moe_branch" / "checkpoint_last.pt",
        data_folder("E_lm_moe_branch"),
        "--gen-subset test --tokens-per-sample 32 --batch-size 4 --output-word-probs",
    ),
    "validate": ("fairseq_cli.validate", SINGLE, DATA, "--valid-subset test --batch-size 8"),
}
"""Module, checkpoint, data and flags of every command that loads a checkpoint."""


def run(command: str, *more: str) -> list[str]:
    """What a command prints of its results, in a process of its own."""
    module, path, data, flags = COMMANDS[command]
    line = [sys.executable, "-m", module, str(data), "--path", str(path), "--user-dir", str(PLUGIN), "--cpu"]
    environment = {**os.environ, "PYTHONPATH": str(PLUGIN.parent), "OMP_NUM_THREADS": "1"}
    text = "w1 w2 w3\nw4 w5\n" if command == "interactive" else ""
    done = subprocess.run(
        [*line, *flags.split(), *more], input=text, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    results = re.compile(r"[HDP]-\d+\t.*|.*Loss \(base 2\).*|.*\| valid .*loss.*|\d+ \w+ \[.*")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if results.fullmatch(line)]
    return [re.sub(r"^\S+ \S+ \||wps [\d.]+|wall \d+|\| .*?in [\d.]+s.*", "", line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_lines(command: str, tmp_path: Path) -> None:
    flags = ("--moe-expert-memory", "25%", "--moe-eviction", "lifo", "--moe-prefetch", "previous")
    files = ("--moe-report", str(tmp_path / "report.json"), "--moe-trace", str(tmp_path / "trace.json"))
    expected = run(command)
    assert expected
    assert run(command, *flags, *files) == expected
    report = written(tmp_path / "report.json")
    assert report["buffer"]["policy"] == "lifo" and report["buffer"]["slots"] * 4 <= report["buffer"]["experts"]
    assert all(layer["cache"]["misses"] for layer in report["layers"])
    assert read_trace(tmp_path / "trace.json").visits


def test_info_and_cache_speak_of_fairseq_checkpoints(tmp_path: Path) -> None:
    """Also where CMR holds every expert under two names."""
    from typer.testing import CliRunner

    from fairseq_moe_opt.cli.commands import app

    golden, path = arrays("D_cmr", LOSSLESS["D_cmr"]), tmp_path / "trace.json"
    model, task = load_golden("D_cmr", LOSSLESS["D_cmr"], moe_expert_memory="25%", moe_trace=str(path))
    for batch in ("b0", "b1"):
        generate(model, task, golden, batch, 2)
    model.moe._write(None, str(path), model)
    checkpoint = str(FAIRSEQ_GOLDENS / "D_cmr" / "checkpoint_last.pt")
    done = CliRunner().invoke(app, ["info", checkpoint, "--expert-memory", "25%", "--trace", str(path), "--json"])
    assert done.exit_code == 0, done.output
    plan, buffer = json.loads(done.stdout)["buffer"], model.moe.report().buffer
    assert (plan["slots"], plan["experts"]) == (buffer.slots, buffer.experts)
    assert 2 * plan["slot_bytes"] == buffer.slot_bytes  # it is stored in half precision, and was loaded in single
    assert 0 < plan["miss_rate"] < 1 and plan["bytes_per_token"] > 0
    done = CliRunner().invoke(app, ["cache", checkpoint, "--trace", str(path), "--json"])
    assert done.exit_code == 0, done.output
    rates = json.loads(done.stdout)["rows"][4]["miss_rates"]
    assert all(rates["belady"] <= rate for rate in rates.values())
    other = str(FAIRSEQ_GOLDENS / "E_lm_moe_branch" / "checkpoint_last.pt")
    done = CliRunner().invoke(app, ["info", other, "--expert-memory", "25%", "--trace", str(path)])
    assert isinstance(done.exception, CheckpointError) or done.exit_code == 2
    assert "another model" in f"{done.exception} {done.output}"


MEMORY = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import fairseq_moe_opt
fairseq_moe_opt.register_fairseq()
from tests.helpers.fairseq_runs import forced, load

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

golden = {
    "b.src_tokens": torch.randint(4, 128, (4, 16)),
    "b.src_lengths": torch.tensor([16] * 4),
    "b.prev_output_tokens": torch.randint(4, 128, (4, 12)),
}
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
before = peak()
model, _ = load(sys.argv[1], sys.argv[2], moe_expert_memory="25%")
for _ in range(3):
    forced(model, golden, "b")
grown = peak() - before
report = model.moe.report()
dense = sum(p.numel() * 4 for p in model.parameters() if not p.is_meta)
print(json.dumps([grown, report.expert_bytes, report.buffer.arena_bytes, report.buffer.workspace_bytes, dense]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_bounded_from_the_first_byte(tmp_path: Path) -> None:
    """Experts of 260 MiB with a quarter of the memory: the process grows by that, the rest of the model and slack."""
    state = torch.load(SINGLE, weights_only=False)
    width = 16384
    for side in ("encoder", "decoder"):
        state["cfg"]["model"].__dict__[f"{side}_ffn_embed_dim"] = width
    generator = torch.Generator().manual_seed(1)
    sizes = {"fc1.weight": (width, 64), "fc1.bias": (width,), "fc2.weight": (64, width)}
    for name, tensor in list(state["model"].items()):
        shape = next((size for end, size in sizes.items() if name.endswith(end)), None)
        if shape is not None:
            state["model"][name] = torch.randn(shape, generator=generator) * tensor.std() / 8
    torch.save(state, tmp_path / "x.pt")
    del state
    environment = {**os.environ, "PYTHONPATH": str(PLUGIN.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "x.pt"), str(DATA)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    grown, experts, arena, workspace, dense = json.loads(done.stdout.splitlines()[-1])
    assert experts > 250 * 2**20 and arena <= experts / 4 and workspace == 0
    assert arena <= grown <= arena + workspace + dense + 64 * 2**20
    assert grown < experts / 2 + dense
