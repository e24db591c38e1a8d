"""``convert(..., to="fairseq")``: there and back bit for bit, in one file or any number of rank files."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe_opt.checkpoints import (
    TensorRecord,
    convert,
    open_index,
    read_tensor,
    staging,
    torch_writer,
    writers,
)
from fairseq_moe_opt.checkpoints import to_fairseq as writing
from fairseq_moe_opt.errors import CheckpointError, OptionError
from tests.helpers.checkpoint_files import fairseq_state, namespaces_allowed, save_fairseq, save_sharded
from tests.helpers.goldens import FAIRSEQ_GOLDENS
from tests.helpers.text_samples import DICTIONARY, SPM

SOURCES = ("A_top2_eom", "F_multilingual")
LAYOUTS = (0, 1, 2, 4, 8)


def torch_load(path: Path) -> dict[str, Any]:
    with namespaces_allowed():
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def read_all(path: Path) -> dict[str, Tensor]:
    index = open_index(path)
    return {name: read_tensor(index[name]) for name in index}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, dtypes, shapes and bytes; numbers that are no numbers included."""
    return one.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        and tensor.view(torch.uint8).equal(other[name].view(torch.uint8))
        for name, tensor in one.items()
    )


@pytest.fixture(scope="module", params=SOURCES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A golden checkpoint and its Transformers folder."""
    source, folder = FAIRSEQ_GOLDENS / request.param / "checkpoint_last.pt", tmp_path_factory.mktemp("hf") / "model"
    convert(source, folder)
    return source, folder


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_fairseq_to_transformers_and_back(pair: tuple[Path, Path], tmp_path: Path, ranks: int) -> None:
    source, folder = pair
    done = convert(folder, tmp_path / "out" / "x.pt", to="fairseq", ranks=ranks)
    names = ["x.pt"] if ranks == 0 else ["x-shared.pt", *(f"x-rank-{rank}.pt" for rank in range(ranks))]
    assert [file.name for file in done.files] == names
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(names)
    assert same_bits(read_all(tmp_path / "out" / "x.pt"), read_all(source))
    before, after = (open_index(path).metadata["cfg"]["model"] for path in (source, tmp_path / "out" / "x.pt"))
    assert {name: after[name] for name in after if name in before} == {n: before[n] for n in after if n in before}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_transformers_to_fairseq_and_back(pair: tuple[Path, Path], tmp_path: Path, ranks: int) -> None:
    _, folder = pair
    convert(folder, tmp_path / "x.pt", to="fairseq", ranks=ranks)
    convert(tmp_path / "x.pt", tmp_path / "hf")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_model_that_transformers_saved_comes_back_byte_for_byte(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.helpers.nllb import tiny_model

    tiny_model(encoder_sparse_step=1, moe_token_dropout=0.1).save_pretrained(tmp_path / "hf", max_shard_size="100kB")
    convert(tmp_path / "hf", tmp_path / "x.pt", to="fairseq", ranks=4)
    convert(tmp_path / "x.pt", tmp_path / "again")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert same_bits(read_all(tmp_path / "again"), read_all(tmp_path / "hf"))
    before, after = (json.loads((tmp_path / where / "config.json").read_text()) for where in ("hf", "again"))
    # What only training knows, and what says who wrote the file.
    unknown = {"expert_capacity", "init_std", "output_router_logits", "transformers_version"}
    unknown |= {"router_aux_loss_coef", "router_z_loss_coef"}
    assert {name for name in before if before[name] != after.get(name)} <= unknown


def test_files_are_what_the_branches_trainer_writes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = pair
    convert(folder, tmp_path / "x.pt", to="fairseq", ranks=2)
    for part in ("shared", "rank-0", "rank-1"):
        ours = torch_load(tmp_path / f"x-{part}.pt")
        theirs = torch_load(source.with_name(f"checkpoint_last-{part}.pt"))
        assert list(ours) == ["args", "cfg", "criterion", "optimizer_history", "task_state", "extra_state", "model"]
        assert set(ours) == set(theirs)
        assert same_bits(ours["model"], theirs["model"])
        assert isinstance(ours["cfg"]["model"], argparse.Namespace)
        assert ours["cfg"]["model"]._name == ours["cfg"]["model"].arch == "transformer"
        assert type(ours["cfg"]["task"]) is type(theirs["cfg"]["task"])


def test_tied_weights_share_one_storage(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert(pair[1], tmp_path / "x.pt", to="fairseq")
    model = torch_load(tmp_path / "x.pt")["model"]
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
    assert len({model[name].data_ptr() for name in tied}) == 1


@pytest.mark.parametrize("golden", ["A_top2_eom", "C_top1", "D_cmr", "E_lm_moe_branch", "F_multilingual"])
def test_every_kind_of_fairseq_checkpoint_is_merged_and_spread_anew(golden: str, tmp_path: Path) -> None:
    source = FAIRSEQ_GOLDENS / golden / "checkpoint_last.pt"
    expected = read_all(source)
    convert(source, tmp_path / "one.pt", to="fairseq")
    for path, ranks in (("four.pt", 4), ("two.pt", 2)):
        convert(tmp_path / "one.pt", tmp_path / path, to="fairseq", ranks=ranks)
    for path in ("one.pt", "four.pt", "two.pt"):
        assert same_bits(read_all(tmp_path / path), expected)
    for part in ("shared", "rank-0", "rank-1"):
        ours = torch_load(tmp_path / f"two-{part}.pt")
        theirs = torch.load(source.with_name(f"checkpoint_last-{part}.pt"), weights_only=False)
        assert list(ours["model"]) == list(theirs["model"])
        assert same_bits(ours["model"], theirs["model"])
        # The rank that wrote a file is the one thing that all rank files now say alike.
        assert ours["optimizer_history"] == theirs["optimizer_history"]
        assert set(ours["cfg"]) == set(theirs["cfg"])
        assert ours["extra_state"]["train_iterator"] == theirs["extra_state"]["train_iterator"]
    if golden == "D_cmr":
        model = torch_load(tmp_path / "two-rank-1.pt")["model"]
        name = "encoder.layers.1.{}moe_layer.experts.3.fc1.weight"
        assert model[name.format("")].data_ptr() == model[name.format("cmr_layer.")].data_ptr()


def test_replicas_are_written_once_and_read_once(tmp_path: Path) -> None:
    convert(FAIRSEQ_GOLDENS / "A_top2_eom" / "checkpoint_last.pt", tmp_path / "x.pt", to="fairseq", ranks=2)
    for rank in range(2):
        shutil.copy(tmp_path / f"x-rank-{rank}.pt", tmp_path / f"x-rank-{rank + 2}.pt")
    assert open_index(tmp_path / "x.pt").metadata["replication_count"] == 2
    convert(tmp_path / "x.pt", tmp_path / "y.pt", to="fairseq", ranks=8)
    assert len(list(tmp_path.glob("y-rank-*.pt"))) == 8
    assert same_bits(read_all(tmp_path / "y.pt"), read_all(FAIRSEQ_GOLDENS / "A_top2_eom" / "checkpoint_last.pt"))


def test_dtype_is_converted_for_floats(tmp_path: Path) -> None:
    convert(FAIRSEQ_GOLDENS / "A_top2_eom" / "checkpoint_single.pt", tmp_path / "x.pt", to="fairseq", dtype="bfloat16")
    assert {tensor.dtype for tensor in read_all(tmp_path / "x.pt").values()} == {torch.bfloat16}


def test_a_bin_folder_with_copies_of_the_embedding(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = read_all(pair[1])
    embedding = tensors["model.shared.weight"]
    for name in ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"):
        tensors[name] = embedding.clone()
    shutil.copyfile(pair[1] / "config.json", tmp_path / "config.json")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    convert(tmp_path, tmp_path / "x.pt", to="fairseq")
    assert same_bits(read_all(tmp_path / "x.pt"), read_all(pair[0]))
    tensors["lm_head.weight"] += 1
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot express that lm_head\.weight differs from model\.shared"):
        convert(tmp_path, tmp_path / "y.pt", to="fairseq")


def test_old_format_files_are_read(tmp_path: Path) -> None:
    save_fairseq(tmp_path / "new.pt", fairseq_state())
    content = torch.load(tmp_path / "new.pt", weights_only=False)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pt", tmp_path / "x.pt", to="fairseq", ranks=4)
    assert same_bits(read_all(tmp_path / "x.pt"), fairseq_state())
    assert sorted(found.name for found in tmp_path.glob(".*")) == []


def test_the_optimizers_state_is_left_behind(tmp_path: Path) -> None:
    save_fairseq(tmp_path / "a.pt", fairseq_state())
    content = torch.load(tmp_path / "a.pt", weights_only=False)
    content["last_optimizer_state"] = {"state": {0: torch.ones(1000)}}
    torch.save(content, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.pt", to="fairseq")
    assert "last_optimizer_state" not in torch_load(tmp_path / "b.pt")


@pytest.mark.parametrize("ranks", [3, 5, 16])
def test_ranks_have_to_divide_the_experts(pair: tuple[Path, Path], tmp_path: Path, ranks: int) -> None:
    with pytest.raises(OptionError, match=rf"'ranks': {ranks} does not divide the 8 experts .*these do: 1, 2, 4, 8$"):
        convert(pair[1], tmp_path / "out" / "x.pt", to="fairseq", ranks=ranks)
    assert list(tmp_path.iterdir()) == []


def test_options_without_effect_and_wrong_names_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'ranks': only fairseq has rank files"):
        convert(pair[0], tmp_path / "hf", ranks=2)
    with pytest.raises(OptionError, match="'src_lang'"):
        convert(pair[1], tmp_path / "x.pt", to="fairseq", src_lang="eng_Latn")
    for name in ("x", "x-shared.pt", "x-rank-3.pt", "x.bin"):
        with pytest.raises(CheckpointError, match=r"name it x\.pt"):
            convert(pair[1], tmp_path / name, to="fairseq")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(pair[1], tmp_path / "no" / "where" / "x.pt", to="fairseq")
    dense = {name: tensor for name, tensor in fairseq_state().items() if "moe_layer" not in name}
    save_fairseq(tmp_path / "dense.pt", dense, moe_freq=0)
    with pytest.raises(OptionError, match="'ranks': the model has no experts"):
        convert(tmp_path / "dense.pt", tmp_path / "x.pt", to="fairseq", ranks=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "m2m_100"}, "has model_type 'm2m_100'; only nllb-moe"),
        ({"router_bias": True}, "a router with a bias"),
        ({"tie_word_embeddings": False}, "untied embeddings"),
        ({"pad_token_id": 0}, "another padding id"),
        ({"activation_function": "gelu_new"}, "activation_function 'gelu_new'"),
        ({"encoder_layers": None}, "lacks encoder_layers"),
    ],
)
def test_what_fairseq_cannot_express_is_said(
    pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    shutil.copytree(pair[1], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        convert(tmp_path / "hf", tmp_path / "x.pt", to="fairseq")
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        convert(tmp_path / "hf", tmp_path / "x.pt", to="fairseq")


def test_a_destination_that_is_there_under_any_name_is_left_alone(tmp_path: Path) -> None:
    path = save_sharded(tmp_path, 2, "x")
    source = save_fairseq(tmp_path / "y.pt", fairseq_state())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for target in (path, source):
        with pytest.raises(CheckpointError, match="exists already"):
            convert(source, target, to="fairseq")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


class DiskFullError(OSError):
    """A disk without room."""


@pytest.mark.parametrize("ranks", [0, 4])
def test_a_writer_that_fails_on_the_way_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    written = []

    def fail_later(path: Path, content: Any) -> None:
        path.write_bytes(b"half")
        written.append(path)
        if len(written) == max(ranks, 1):
            raise DiskFullError("no space left on device")

    monkeypatch.setattr(writing, "write_torch", fail_later)
    for target in (tmp_path / "x.pt", tmp_path / "new" / "x.pt"):
        written.clear()
        with pytest.raises(DiskFullError):
            convert(pair[1], target, to="fairseq", ranks=ranks)
        assert written and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "name", "room"), [("hf", "hf", writers), ("fairseq", "x.pt", torch_writer)])
def test_a_source_that_fails_on_the_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, name: str, room: ModuleType
) -> None:
    """The real writers, whose source breaks off at the tenth tensor."""
    read = []

    def fail_later(record: TensorRecord) -> Tensor:
        read.append(record)
        if len(read) == 10:
            raise CheckpointError(record.path, "is truncated")
        return read_tensor(record)

    monkeypatch.setattr(room, "read_tensor", fail_later)
    with pytest.raises(CheckpointError, match="is truncated"):
        convert(FAIRSEQ_GOLDENS / "A_top2_eom" / "checkpoint_single.pt", tmp_path / name, to=to)
    assert len(read) == 10 and list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_on_the_way_takes_the_others_back(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, moved = staging.os.rename, []

    def fail_third(source: Path, target: Path) -> None:
        if len(moved) == 2:
            raise DiskFullError("no space left on device")
        moved.append(target)
        rename(source, target)

    monkeypatch.setattr(staging.os, "rename", fail_third)
    with pytest.raises(DiskFullError):
        convert(pair[1], tmp_path / "x.pt", to="fairseq", ranks=4)
    assert len(moved) == 2 and list(tmp_path.iterdir()) == []


def test_dictionary_and_sentencepiece_model_go_along_both_ways(tmp_path: Path) -> None:
    """The demo's layout: languages in the dictionary, task translation."""
    pytest.importorskip("sentencepiece")
    embedding = torch.randn(8007, 8)
    tied = dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight"), embedding
    )
    task = {"_name": "translation", "source_lang": "src", "target_lang": "tgt"}
    (tmp_path / "a").mkdir()
    source = save_fairseq(tmp_path / "a" / "x.pt", fairseq_state() | tied, task=task)
    shutil.copy(SPM, tmp_path / "a" / "spm.model")
    shutil.copy(DICTIONARY, tmp_path / "a" / "dict.txt")
    assert convert(source, tmp_path / "hf").tokenizer == "unigram"
    done = convert(tmp_path / "hf", tmp_path / "b" / "x.pt", to="fairseq", ranks=2)
    assert done.tokenizer == "dict.txt and spm.model" and done.notes == ()
    for name, original in (("spm.model", SPM), ("dict.txt", DICTIONARY)):
        assert (tmp_path / "b" / name).read_bytes() == original.read_bytes()
    assert task.items() <= torch_load(tmp_path / "b" / "x-shared.pt")["cfg"]["task"].items()
    # Spread anew beside themselves they stay; another dictionary there is not overwritten.
    convert(tmp_path / "b" / "x.pt", tmp_path / "b" / "y.pt", to="fairseq")
    (tmp_path / "b" / "dict.txt").write_text("other 1\n")
    with pytest.raises(CheckpointError, match=r"b/dict\.txt: exists already and is another"):
        convert(tmp_path / "a" / "x.pt", tmp_path / "b" / "z.pt", to="fairseq")
    assert not (tmp_path / "b" / "z.pt").exists()


def test_a_dictionary_of_another_size_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(DICTIONARY, tmp_path / "dict.txt")
    with pytest.raises(CheckpointError, match=r"dict\.txt: gives \d+ symbols, but the embedding has 1\d\d rows"):
        convert(pair[1], tmp_path / "x.pt", to="fairseq", dictionary=tmp_path / "dict.txt")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["dict.txt"]


def test_the_dictionary_alone_goes_along(tmp_path: Path) -> None:
    words = FAIRSEQ_GOLDENS / "data" / "bin" / "dict.src.txt"
    for part in ("shared", "rank-0", "rank-1"):
        shutil.copy(FAIRSEQ_GOLDENS / "F_multilingual" / f"checkpoint_last-{part}.pt", tmp_path / f"x-{part}.pt")
    shutil.copy(words, tmp_path / "dict.txt")
    convert(tmp_path / "x.pt", tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "out" / "x.pt", to="fairseq")
    assert (tmp_path / "out" / "dict.txt").read_bytes() == words.read_bytes()
    assert len(done.notes) == 1 and "SentencePiece model cannot be made" in done.notes[0]
