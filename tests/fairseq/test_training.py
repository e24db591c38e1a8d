"""fairseq-train with the plugin: criteria, gradients, and checkpoints that every command line reads."""

from __future__ import annotations

import atexit
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq import checkpoint_utils, options
from fairseq.criterions import CRITERION_REGISTRY
from fairseq_cli import eval_lm, train, validate

import fairseq_moe_opt
from fairseq_moe_opt.build import LayerSpec
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.models._block import BlockSpec, MoEBlock
from fairseq_moe_opt.models._criteria import cmr_gate_loss, combined_gate_loss
from fairseq_moe_opt.models._losses import GateLosses
from fairseq_moe_opt.models._report import ModelHandle
from fairseq_moe_opt.moe import GShardTop2Router, Top1Router
from fairseq_moe_opt.options import MoEOptions
from tests.helpers.fairseq_runs import arrays, load_golden
from tests.helpers.goldens import FAIRSEQ_GOLDENS, read_json

fairseq_moe_opt.register_fairseq()

PLUGIN = str(Path(fairseq_moe_opt.__file__).parent)
DATA = FAIRSEQ_GOLDENS / "data"
EXPERTS = "--moe-freq 2 --moe-expert-count 4 --moe-second-expert-policy all --moe-gating-use-fp32"
COMMON = "--optimizer adam --lr 1e-3 --max-update 6 --cpu --train-subset test --valid-subset test"


def command(monkeypatch: pytest.MonkeyPatch, main: Any, *arguments: str) -> Any:
    """Run a command line of fairseq in this process."""
    monkeypatch.setattr(sys, "argv", ["fairseq", *arguments, "--user-dir", PLUGIN])
    return main()


def sample(golden: dict[str, torch.Tensor], batch: str = "b0") -> dict[str, Any]:
    target = golden[f"{batch}.target"]
    names = ("src_tokens", "src_lengths", "prev_output_tokens")
    net_input = {name: golden[f"{batch}.{name}"] for name in names}
    return {"net_input": net_input, "target": target, "ntokens": int((target != 1).sum())}


def criterion(name: str, task: Any, **values: Any) -> Any:
    defaults = {"sentence_avg": False, "moe_gate_loss_combine_method": "sum", "moe_gate_loss_transform": "none"}
    if name == "moe_label_smoothed_cross_entropy":
        defaults |= {"label_smoothing": 0.1, "cmr_gate_loss_p": 1.0, "cmr_gate_loss_wt": 0.0}
    return CRITERION_REGISTRY[name](task, **(defaults | values))


@pytest.mark.parametrize("method", ["sum", "average"])
def test_the_gate_loss_is_added_a_unit_of_sample_size(method: str) -> None:
    model, task = load_golden("A_top2_eom", "cap1.00")
    golden = arrays("A_top2_eom", "cap1.00")
    batch = sample(golden)
    values = {"moe_gate_loss_combine_method": method}
    without = criterion("moe_cross_entropy", task, moe_gate_loss_wt=0.0, **values)(model, batch)
    loss, size, logged = criterion("moe_cross_entropy", task, moe_gate_loss_wt=0.5, **values)(model, batch)
    layers = [float(value) for name, value in golden.items() if name.startswith("b0.") and name.endswith("l_aux")]
    expected = sum(layers) / (len(layers) if method == "average" else 1)
    assert len(layers) == 4
    assert float(loss - without[0]) == pytest.approx(0.5 * size * expected, rel=1e-4)
    assert float(logged["inner_loss"]) == pytest.approx(float(without[0]))


def test_the_conditional_gate_loss_is_the_distance_from_the_share() -> None:
    model, task = load_golden("D_cmr", "cap1.00")
    golden = arrays("D_cmr", "cap1.00")
    batch = sample(golden)
    name = "moe_label_smoothed_cross_entropy"
    without = criterion(name, task, moe_gate_loss_wt=0.0)(model, batch)
    loss, size, _ = criterion(name, task, moe_gate_loss_wt=0.0, cmr_gate_loss_p=0.8, cmr_gate_loss_wt=0.1)(model, batch)
    gates = [value for key, value in golden.items() if key.startswith("b0.") and key.endswith("gate_value")]
    counts = {"src_tokens": 2, "prev_output_tokens": 2}
    tokens = sum(layers * int((golden[f"b0.{side}"] != 1).sum()) for side, layers in counts.items())
    mean = sum(float(gate.sum()) for gate in gates) / tokens
    assert float(loss - without[0]) == pytest.approx(0.1 * size * abs(mean - 0.8), rel=1e-3)


def test_transforms_and_empty_lists() -> None:
    losses = [torch.tensor(2.0), torch.tensor(4.0)]
    assert float(combined_gate_loss(losses, "average", "none")) == 3.0
    assert float(combined_gate_loss(losses, "sum", "neg_log")) == pytest.approx(-math.log(6.0))
    assert combined_gate_loss([], "sum", "none") is None
    assert cmr_gate_loss(GateLosses(), 1.0) is None
    with pytest.raises(OptionError, match="moe_gate_loss_transform"):
        criterion("moe_cross_entropy", _task(), moe_gate_loss_wt=1.0, moe_gate_loss_transform="log")


def test_the_losses_by_hand() -> None:
    """Gates of 3 + 1 over 4 + 4 tokens: half of each token, 0.3 from a share of 0.8."""
    losses = GateLosses(cmr_share=[torch.tensor(3.0), torch.tensor(1.0)], cmr_tokens=[torch.tensor(4), 4])
    assert float(cmr_gate_loss(losses, 0.8)) == pytest.approx(0.3)
    with torch.no_grad():
        # Both rows to expert 0 of 2, with probabilities 0.75 and 0.25: E^2 * mean(0.75 * 1, 0.25 * 0) = 1.5.
        logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
        routing = Top1Router(2).route(logits, with_aux_loss=True)
        assert float(routing.aux_loss) == pytest.approx(1.5)
        # A row of padding counts in the means, not among the choices: 4 * mean(0.75 * 0.5, 0.25 * 0) = 0.75.
        routing = Top1Router(2).route(logits, torch.tensor([False, True]), with_aux_loss=True)
        assert float(routing.aux_loss) == pytest.approx(0.75)


def _task() -> Any:
    return load_golden("A_top2_eom", "cap1.00")[1]


def test_gradients_reach_gates_and_experts() -> None:
    model, task = load_golden("A_top2_eom", "cap1.00")
    loss, _, _ = criterion("moe_cross_entropy", task, moe_gate_loss_wt=0.01)(
        model.train(), sample(arrays("A_top2_eom", "cap1.00"))
    )
    loss.backward()
    for block in model.moe.blocks:
        assert float(block.gate.wg.weight.grad.abs().sum()) > 0
        assert any(expert.fc1.weight.grad is not None for expert in block.experts)


def written(folder: Path) -> set[str]:
    """Names of the files in a folder."""
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", ["transformer_tiny", "transformer_moe"])
def test_a_trained_model_loses_no_expert(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches' trainer loses all experts of an undistributed run: two files of one name."""
    shape = "--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32"
    shape += " --encoder-attention-heads 2 --decoder-attention-heads 2 --share-all-embeddings"
    arguments = f"-s src -t tgt --arch {architecture} {shape} {EXPERTS} --moe-cmr --moe-eom 0.2 --moe-fom 0.1 {COMMON}"
    arguments += " --criterion moe_label_smoothed_cross_entropy --moe-gate-loss-wt 0.01 --max-tokens 600"
    folder = ["--save-dir", str(tmp_path), "--no-epoch-checkpoints"]
    command(monkeypatch, train.cli_main, str(DATA / "bin"), *arguments.split(), *folder)
    path = tmp_path / "checkpoint_last.pt"
    assert written(tmp_path) == {
        f"checkpoint_{name}-{part}.pt" for name in ("best", "last") for part in ("shared", "rank-0")
    }
    shared, experts = (torch.load(tmp_path / f"checkpoint_last-{part}.pt")["model"] for part in ("shared", "rank-0"))
    assert all(".experts." in name for name in experts) and not [name for name in shared if ".experts." in name]
    assert "encoder.layers.1.cmr_layer.moe_layer.experts.3.fc1.weight" in experts
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides={"moe_gating": "static"})
    assert len(models[0].moe.blocks) == 2
    assert models[0].moe.options.gating == "static"
    evaluation = ["--path", str(path), "--cpu", "--batch-size", "8", "--valid-subset", "test"]
    report = tmp_path / "report.json"
    more = ["--batch-size-valid", "20", "--moe-preset", "static", "--moe-report", str(report)]
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda call, *values: at_exit.append((call, values)))
    command(monkeypatch, validate.cli_main, str(DATA / "bin"), *evaluation, *more)
    for call, values in at_exit:
        if isinstance(getattr(call, "__self__", None), ModelHandle):
            call(*values)
    found = read_json(report)
    assert found["options"] | {"gating": "static", "capacity": "checkpoint", "report": str(report)} == found["options"]
    # 48 sentences in 6 batches of 8, each filled up to 20.
    assert found["layers"][0]["calls"] == 6
    assert found["layers"][0]["tokens"] > 6 * 20 * 4


def train_tiny(monkeypatch: pytest.MonkeyPatch, folder: Path, updates: int, *more: str) -> None:
    """A tiny translation model, dropout and expert masking included, trained up to an update."""
    shape = "--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32"
    arguments = f"-s src -t tgt --arch transformer_tiny {shape} --share-all-embeddings {EXPERTS} --moe-eom 0.2"
    arguments += f" --optimizer adam --lr 1e-3 --max-update {updates} --cpu --train-subset test --valid-subset test"
    arguments += " --criterion moe_label_smoothed_cross_entropy --moe-gate-loss-wt 0.01 --max-tokens 300"
    command(monkeypatch, train.cli_main, str(DATA / "bin"), *arguments.split(), "--save-dir", str(folder), *more)


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizer state and experts come back from the two files: stopping half-way changes no weight."""
    every = ["--no-epoch-checkpoints"]
    train_tiny(monkeypatch, tmp_path / "once", 8, *every)
    for updates in (4, 8):
        train_tiny(monkeypatch, tmp_path / "twice", updates, *every)
    states = [
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / run / "checkpoint_last.pt")) for run in ("once", "twice")
    ]
    assert states[1]["optimizer_history"][-1]["num_updates"] == 8
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name


def test_old_checkpoints_are_removed_with_their_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = "--save-interval-updates 1 --keep-interval-updates 1 --no-epoch-checkpoints --no-last-checkpoints"
    train_tiny(monkeypatch, tmp_path, 3, *keep.split(), "--disable-validation")
    kept = {name for name in written(tmp_path) if "best" not in name}
    assert len(kept) == 2
    assert len({name.rpartition("-shared")[0] or name.rpartition("-rank-0")[0] for name in kept}) == 1


def test_a_dense_model_is_one_file_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny(monkeypatch, tmp_path, 1, "--moe-freq", "0", "--no-epoch-checkpoints")
    # fairseq keeps the best loss in a global: whether this run has the best one depends on earlier tests.
    assert {"checkpoint_last.pt"} <= written(tmp_path) <= {"checkpoint_last.pt", "checkpoint_best.pt"}


def test_fine_tuning_starts_from_rank_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 0 the result is the branches' checkpoint itself."""
    shape = "--max-source-positions 64 --max-target-positions 64 --share-all-embeddings"
    for side in ("encoder", "decoder"):
        shape += f" --{side}-layers 4 --{side}-embed-dim 64 --{side}-ffn-embed-dim 128 --{side}-attention-heads 4"
        shape += f" --{side}-normalize-before"
    experts = EXPERTS.replace("count 4", "count 8")
    arguments = f"-s src -t tgt --arch transformer {shape} {experts} {COMMON} --lr 0 --max-update 1 --max-tokens 600"
    start = ["--finetune-from-model", str(FAIRSEQ_GOLDENS / "A_top2_eom" / "checkpoint_last.pt")]
    folder = ["--save-dir", str(tmp_path), "--no-epoch-checkpoints", "--criterion", "moe_cross_entropy"]
    command(monkeypatch, train.cli_main, str(DATA / "bin"), *arguments.split(), *start, *folder)
    tuned = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))["model"]
    original = checkpoint_utils.load_checkpoint_to_cpu(start[1].replace("last.pt", "single.pt"))["model"]
    same = [name for name in tuned if name in original and torch.equal(tuned[name], original[name])]
    assert {name for name in tuned if "expert" in name} <= set(same)
    assert len(same) > 280


@pytest.mark.parametrize("architecture", ["transformer_lm_gpt", "transformer_lm_moe_15b"])
def test_a_language_model_trains_and_is_evaluated(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2"
    arguments = f"--task language_modeling --arch {architecture} {shape} --tokens-per-sample 32 {EXPERTS} {COMMON}"
    arguments += " --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --batch-size 4"
    folder = ["--save-dir", str(tmp_path), "--no-epoch-checkpoints"]
    command(monkeypatch, train.cli_main, str(DATA / "binlm"), *arguments.split(), *folder)
    path = tmp_path / "checkpoint_last.pt"
    evaluation = [
        "--path",
        str(path),
        "--cpu",
        "--tokens-per-sample",
        "32",
        "--batch-size",
        "4",
        "--gen-subset",
        "test",
    ]
    command(monkeypatch, eval_lm.cli_main, str(DATA / "binlm"), *evaluation, "--moe-gating", "static")
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    (block,) = models[0].moe.blocks
    assert len(block.experts) == 4


def test_training_refuses_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = options.get_training_parser()
    with pytest.raises(SystemExit):
        options.parse_args_and_arch(parser, [str(DATA / "bin"), "--arch", "transformer", "--moe-capacity", "some"])
    assert "--moe-capacity" in capsys.readouterr().err


@pytest.mark.parametrize("top1", [False, True])
def test_gradients_through_dynamic_dispatch_are_right(top1: bool) -> None:
    """Against finite differences, and against the padded static computation, in double precision."""

    def block(gating: str) -> MoEBlock:
        torch.manual_seed(5)
        router = Top1Router(4, None, False) if top1 else GShardTop2Router(4, fp32_gating=False)
        spec = LayerSpec("encoder.layers.0.moe_layer", "encoder", router, "gelu")
        return MoEBlock(BlockSpec(spec, 6, 8), MoEOptions(gating=gating)).double()

    hidden = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    dynamic, static = block("dynamic"), block("static")
    assert torch.autograd.gradcheck(lambda x: dynamic(x, padding), (hidden,))
    for one in (dynamic, static):
        one(hidden, padding).square().sum().backward()
    for ours, theirs in zip(dynamic.parameters(), static.parameters(), strict=True):
        mine = torch.zeros_like(ours) if ours.grad is None else ours.grad
        other = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)
