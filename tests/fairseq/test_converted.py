"""What ``moe-opt convert --to fairseq`` writes runs in fairseq, and gives what the original gives."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed")

import fairseq_moe_opt
from fairseq_moe_opt.checkpoints import CheckpointIndex, convert, read_tensor
from fairseq_moe_opt.errors import CheckpointError
from tests.helpers.checkpoint_files import fairseq_state
from tests.helpers.fairseq_runs import arrays, forced, load
from tests.helpers.goldens import FAIRSEQ_GOLDENS

DATA = FAIRSEQ_GOLDENS / "data" / "bin"
LM_DATA = FAIRSEQ_GOLDENS / "data" / "binlm"
MODEL = FAIRSEQ_GOLDENS / "A_top2_eom"
EXAMPLE = Path(__file__).parents[2] / "examples" / "demo" / "model"
PLUGIN = Path(fairseq_moe_opt.__file__).parent


@pytest.mark.parametrize("ranks", [0, 1, 4])
def test_there_and_back_gives_the_same_logits(tmp_path: Path, ranks: int) -> None:
    convert(MODEL / "checkpoint_last.pt", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "x.pt", to="fairseq", ranks=ranks)
    golden = arrays("A_top2_eom", "cap1.00")
    original, _ = load(MODEL / "checkpoint_last.pt", DATA)
    model, task = load(tmp_path / "x.pt", DATA)
    assert type(task).__name__ == "TranslationTask"
    assert torch.equal(forced(model, golden, "b1").logits, forced(original, golden, "b1").logits)


@pytest.mark.parametrize(
    ("golden", "data"), [("C_top1", DATA), ("D_cmr", DATA), ("E_lm_moe_branch", LM_DATA)], ids=lambda value: str(value)
)
def test_what_transformers_cannot_express_is_spread_anew(tmp_path: Path, golden: str, data: Path) -> None:
    source = FAIRSEQ_GOLDENS / golden / "checkpoint_last.pt"
    convert(source, tmp_path / "x.pt", to="fairseq", ranks=8)
    batch = arrays(golden, next(iter(sorted((source.parent / "tf").glob("*cap1.00.npz")))).stem)
    model, original = load(tmp_path / "x.pt", data)[0], load(source, data)[0]
    assert torch.equal(forced(model, batch, "b1").logits, forced(original, batch, "b1").logits)


def test_a_multilingual_model_keeps_its_task(tmp_path: Path) -> None:
    """NLLB's set-up in small: languages and tags are the task's, and it comes back with the checkpoint."""
    source = FAIRSEQ_GOLDENS / "F_multilingual" / "checkpoint_last.pt"
    convert(source, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "x.pt", to="fairseq", ranks=4)
    (model, task), (original, _) = load(tmp_path / "x.pt", DATA), load(source, DATA)
    assert type(task).__name__ == "TaggedTranslationTask"
    assert len(task.source_dictionary) == 133
    batch = arrays("A_top2_eom", "cap1.00")
    assert torch.equal(forced(model, batch, "b1").logits, forced(original, batch, "b1").logits)


def test_a_stock_nllb_folder_becomes_nllb_s_task(tmp_path: Path) -> None:
    """A model and an NllbTokenizer that Transformers saved: 33 symbols, 3 languages, then rows for the tags."""
    pytest.importorskip("transformers")
    from tests.helpers.nllb import logits
    from tests.helpers.translation_models import CODES, nllb_moe, nllb_tokenizer

    reference = nllb_moe()
    reference.save_pretrained(tmp_path / "hf")
    nllb_tokenizer().save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "out" / "x.pt", to="fairseq", ranks=2)
    assert done.tokenizer == "dict.txt" and "spm.model" in done.notes[0]
    for code in CODES:
        shutil.copy(tmp_path / "out" / "dict.txt", tmp_path / "out" / f"dict.{code}.txt")
    model, task = load(tmp_path / "out" / "x.pt", tmp_path / "out")
    dictionary = task.source_dictionary
    assert len(dictionary) == 40
    assert [dictionary.index(f"__{code}__") for code in CODES] == [34, 35, 36]
    assert dictionary.index("<SMT_BT_DATA>") == 39

    from hf_integration import optimize

    source = torch.tensor([[34, 5, 9, 2], [34, 7, 8, 2]])
    target = torch.tensor([[2, 35, 6], [2, 35, 9]])
    optimize(reference)
    expected = logits(
        reference, {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": target}
    )
    with torch.no_grad():
        ours = model(source, torch.tensor([4, 4]), target)[0]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_consolidated_fully_sharded_layout_loads(tmp_path: Path) -> None:
    """What fairseq's consolidation leaves: fp16, and only some of the entries."""
    for part in ("shared", "rank-0", "rank-1"):
        content = torch.load(MODEL / f"checkpoint_last-{part}.pt", weights_only=False)
        kept = {key: content[key] for key in ("model", "cfg", "extra_state", "optimizer_history", "args")}
        kept["model"] = {name: tensor.half() for name, tensor in kept["model"].items()}
        torch.save(kept, tmp_path / f"x-{part}.pt")
    golden = arrays("A_top2_eom", "cap1.00")
    model, _ = load(tmp_path / "x.pt", DATA)
    original, _ = load(MODEL / "checkpoint_last.pt", DATA)
    for parameter in original.parameters():
        parameter.data.copy_(parameter.data.half())
    expected = forced(original, golden, "b1").logits
    assert torch.equal(forced(model, golden, "b1").logits, expected)
    convert(tmp_path / "x.pt", tmp_path / "y.pt", to="fairseq")
    assert torch.equal(forced(load(tmp_path / "y.pt", DATA)[0], golden, "b1").logits, expected)


def test_a_shard_of_a_fully_sharded_run_is_refused(tmp_path: Path) -> None:
    shutil.copy(MODEL / "checkpoint_single.pt", tmp_path / "x-shared-shard0.pt")
    with pytest.raises(CheckpointError, match=r"x-shared-shard0\.pt: is one shard of a fully sharded run; consolidate"):
        load(tmp_path / "x-shared-shard0.pt", DATA)


@pytest.mark.parametrize("given", [{}, {"replication_count": 2}])
def test_two_copies_of_each_expert(tmp_path: Path, given: dict[str, int]) -> None:
    convert(MODEL / "checkpoint_last.pt", tmp_path / "x.pt", to="fairseq", ranks=2)
    for rank in (2, 3):
        shutil.copy(tmp_path / f"x-rank-{rank - 2}.pt", tmp_path / f"x-rank-{rank}.pt")
    golden = arrays("A_top2_eom", "cap1.00")
    model, original = load(tmp_path / "x.pt", DATA, **given)[0], load(MODEL / "checkpoint_last.pt", DATA)[0]
    assert torch.equal(forced(model, golden, "b1").logits, forced(original, golden, "b1").logits)


def test_the_model_knows_where_its_experts_lie(tmp_path: Path) -> None:
    convert(MODEL / "checkpoint_last.pt", tmp_path / "x.pt", to="fairseq", ranks=4)
    model, _ = load(tmp_path / "x.pt", DATA)
    index = model.moe.checkpoint
    assert isinstance(index, CheckpointIndex)
    name = "encoder.layers.1.moe_layer.experts.6.fc2.weight"
    assert index[name].path.name == "x-rank-3.pt"
    assert torch.equal(read_tensor(index[name]), model.state_dict()[name])


def test_a_model_that_does_not_fit_its_options_is_one_line(tmp_path: Path) -> None:
    convert(MODEL / "checkpoint_last.pt", tmp_path / "x.pt", to="fairseq")
    for overrides in ({"moe_expert_count": 4}, {"encoder_layers": 5}, {"encoder_ffn_embed_dim": 64}):
        with pytest.raises(CheckpointError, match=r"x\.pt: does not fit the model its options describe") as caught:
            load(tmp_path / "x.pt", DATA, **overrides)
        assert "\n" not in str(caught.value)


MEASURE = """
import sys
from pathlib import Path

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

import fairseq_moe_opt
from fairseq import checkpoint_utils

fairseq_moe_opt.register_fairseq()
path, data = sys.argv[1:]
size = sum(part.stat().st_size for part in Path(path).parent.glob("*.pt"))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
loaded = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": data})
print(size, max(status("VmHWM"), status("VmRSS")) - before)
"""
CONVERT = """
import sys
from pathlib import Path

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

from fairseq_moe_opt.checkpoints import convert

source, target, ranks = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
done = convert(source, target, to="fairseq", ranks=int(ranks))
print(done.nbytes, max(status("VmHWM"), status("VmRSS")) - before)
"""


def measure(script: str, *arguments: object) -> tuple[int, int]:
    """Bytes of a checkpoint, and how much a fresh process grew at most."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    size, growth = map(int, result.stdout.splitlines()[-1].split())
    return size, growth


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.04 GiB of Transformers' safetensors: two sparse layers of 64 experts, d 512, ffn 2048."""
    transformers = pytest.importorskip("transformers")
    from tests.helpers.nllb import tiny_config

    folder = tmp_path_factory.mktemp("large") / "hf"
    wide = {"d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "num_experts": 64, "vocab_size": 128}
    with torch.device("meta"):
        model = transformers.NllbMoeForConditionalGeneration(tiny_config(**wide))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_()
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="400MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("ranks", [0, 4])
def test_loading_holds_the_checkpoint_once_and_writing_one_tensor(
    large_folder: Path, tmp_path: Path, ranks: int
) -> None:
    size, growth = measure(CONVERT, large_folder, tmp_path / "x.pt", ranks)
    assert size > 2**30
    assert growth <= 0.1 * size, f"converting grew by {growth / size:.2f}x the checkpoint"
    size, growth = measure(MEASURE, tmp_path / "x.pt", DATA)
    assert growth <= 1.15 * size, f"loading grew by {growth / size:.2f}x the checkpoint"
    assert growth >= 0.9 * size, "the model holds less than the checkpoint: nothing was measured"


def dense_file(path: Path, **changes: Any) -> dict[str, Any]:
    """What another maker's dense checkpoint may hold."""
    content = {
        "args": None,
        "cfg": {"model": argparse.Namespace(_name="other", arch="other"), "task": {"_name": "translation"}},
        "model": {"feature_extractor.weight": torch.randn(4, 3)},
        "optimizer_history": [{"num_updates": 3, "lr_scheduler_state": {}, "optimizer_name": "x"}],
        "extra_state": {"train_iterator": {"epoch": 2}},
        **changes,
    }
    torch.save(content, path)
    return content


class Odd:
    """A class of another plugin, which its user has allowed."""


def test_dense_files_of_other_makers_load_as_before(tmp_path: Path) -> None:
    from fairseq import checkpoint_utils

    content = dense_file(tmp_path / "w2v.pt", odd=Odd())
    with pytest.raises(CheckpointError, match=r"w2v\.pt: its pickle refers to .*Odd, which is not allowed"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "w2v.pt"))
    with torch.serialization.safe_globals([Odd, argparse.Namespace]):
        state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "w2v.pt"))
    torch.serialization.add_safe_globals([argparse.Namespace])
    assert type(state["model"]) is dict and type(state["odd"]) is Odd
    assert torch.equal(state["model"]["feature_extractor.weight"], content["model"]["feature_extractor.weight"])
    dense_file(tmp_path / "moe.pt", odd=Odd(), model=fairseq_state())
    allowed = torch.serialization.safe_globals([Odd, argparse.Namespace])
    with allowed, pytest.raises(CheckpointError, match=r"moe\.pt: its pickle refers to .*Odd"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "moe.pt"))
    torch.serialization.add_safe_globals([argparse.Namespace])


def test_old_format_files(tmp_path: Path) -> None:
    """A dense one loads in fairseq's way; one with experts has to be converted, which the error says."""
    from fairseq import checkpoint_utils

    for name, model in (("dense.pt", {"a": torch.ones(2)}), ("moe.pt", fairseq_state())):
        content = dense_file(tmp_path / name, model=model)
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=False)
    assert checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "dense.pt"))["model"]["a"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"moe\.pt: is in PyTorch's old non-zip format.*moe-opt convert"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "moe.pt"))


def test_a_state_with_experts_pickles_as_a_plain_dictionary(tmp_path: Path) -> None:
    from fairseq import checkpoint_utils

    state = checkpoint_utils.load_checkpoint_to_cpu(str(MODEL / "checkpoint_last-shared.pt"))
    torch.save({"model": state["model"]}, tmp_path / "copy.pt")
    copied = torch.load(tmp_path / "copy.pt", weights_only=True)["model"]
    assert isinstance(copied, dict) and copied.keys() == state["model"].keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in state["model"].items())


def test_the_example_model_translates_in_fairseq(tmp_path: Path) -> None:
    """Its folder has tokenizer files alone: dictionary, SentencePiece model and task are made from them."""
    pytest.importorskip("sentencepiece")
    convert(EXAMPLE, tmp_path / "x.pt", to="fairseq", ranks=4)
    command = [sys.executable, "-m", "fairseq_cli.interactive", tmp_path, "--user-dir", PLUGIN, "--cpu"]
    command += ["--path", tmp_path / "x.pt", "--task", "translation_multi_simple_epoch", "--beam", "1"]
    command += ["--langs", "eng_Latn,fra_Latn,deu_Latn,spa_Latn", "--lang-pairs", "eng_Latn-fra_Latn"]
    command += ["-s", "eng_Latn", "-t", "fra_Latn", "--encoder-langtok", "src", "--decoder-langtok"]
    command += ["--fixed-dictionary", tmp_path / "dict.txt"]
    command += ["--bpe", "sentencepiece", "--sentencepiece-model", tmp_path / "spm.model"]
    text = "Open the file\nVertical Space\n"
    done = subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True, check=True)
    translated = [line.split("\t")[2] for line in done.stdout.splitlines() if line.startswith("D-")]

    from hf_integration import pipeline

    translator = pipeline("translation", model=str(EXAMPLE), src_lang="eng_Latn", tgt_lang="fra_Latn", num_beams=1)
    assert translated == [result["translation_text"] for result in translator(text.splitlines())]
    assert all(translated)
