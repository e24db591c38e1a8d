"""Reader of fairseq checkpoints: one file, or the trainer's shared and rank files as one.

A distributed Mixture-of-Experts run writes ``x-shared.pt`` (everything but experts) and ``x-rank-N.pt``
(experts, numbered from 0 in each file). Rank ``r`` of files with ``L`` experts each holds the experts
``r * L ... r * L + L - 1``, so ``experts.k`` of file ``r`` becomes ``experts.{r * L + k}``. A run on more
ranks than experts stores replicas: with ``replication_count`` copies only the first ``1/replication_count``
of the files is read, as fairseq's ``nllb`` branch does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord
from fairseq_moe_opt.checkpoints.restricted import plain
from fairseq_moe_opt.checkpoints.torch_zip import TorchZip, only_tensors, open_torch_zip, tensor_records
from fairseq_moe_opt.errors import CheckpointError

FORMAT = "fairseq"
_NAME = re.compile(r"(?P<stem>.+?)(?:-shared|-rank-(?P<rank>\d+))?\.pt")
_FSDP_SHARD = re.compile(r".+-shard ?\d+\.pt")
_EXPERT = re.compile(r"(?P<before>.*\.experts\.)(?P<number>\d+)(?P<after>\..*)")
_GATE = ".moe_layer.gate.wg.weight"
# Options of cfg.model that are the same in every process of a run; others (ranks, ports, devices) may differ.
_RUN_OPTION = re.compile(r"(?:moe|cmr|encoder|decoder)_.*|arch|activation_fn|dropout|seed|use_moe_pad_mask")


@final
@dataclass(frozen=True)
class _Files:
    """The files of one checkpoint: ``shared`` (or the single file), and rank files by their number."""

    shared: Path
    ranks: Mapping[int, Path]


@final
@dataclass(frozen=True)
class _Part:
    """One opened file: its tensors, its configuration as plain data, and its number of updates."""

    path: Path
    tensors: Mapping[str, TensorRecord]
    cfg: Mapping[str, Any]
    num_updates: int | None


def supports_path(path: Path) -> bool:
    """Whether ``path`` is a ``.pt`` file, ``x.pt`` of a sharded ``x``, or a folder of ``checkpoint*.pt``."""
    if path.is_dir():
        return any(path.glob("checkpoint*.pt"))
    return path.suffix == ".pt" and (path.is_file() or bool(_siblings(path.parent, path.name[: -len(".pt")])))


def read_index(path: Path, replication_count: int | None = None) -> CheckpointIndex:
    """The index of a fairseq checkpoint, given as ``x.pt``, ``x-shared.pt``, a rank file or the folder.

    ``replication_count`` is the number of copies of each expert among the rank files; None takes it from the
    number of experts the router has. Metadata: ``cfg`` (plain dicts), ``rank_files``, ``replication_count``
    and ``num_updates``. Raises CheckpointError for a missing rank file, for rank files of different
    checkpoints, and for whatever is wrong in one file.
    """
    files = _locate(path)
    shared = _open_part(files.shared)
    parts = [_open_part(files.ranks[rank]) for rank in _without_gap(files)]
    _require_same_checkpoint(shared, parts)
    experts = expert_count(shared.tensors)
    copies = _replication(files.shared, parts, experts, replication_count)
    records = {**shared.tensors, **_merge(parts[: len(parts) // copies])}
    _require_experts(files.shared, records, experts)
    metadata = {
        "cfg": shared.cfg,
        "rank_files": len(parts),
        "replication_count": copies,
        "num_updates": shared.num_updates,
    }
    return CheckpointIndex(records, FORMAT, path, metadata)


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files of the checkpoint that ``path`` means: the shared (or only) one first, then the ranks."""
    files = _locate(path)
    return (files.shared, *(files.ranks[rank] for rank in sorted(files.ranks)))


def open_file(path: Path) -> TorchZip:
    """One file's pickle, whose ``content`` has a ``model`` entry; CheckpointError for any other kind of file."""
    archive = open_torch_zip(path)
    if not isinstance(archive.content, Mapping) or not isinstance(archive.content.get("model"), Mapping):
        raise CheckpointError(path, "is not a fairseq checkpoint: it has no `model` entry")
    return archive


def is_part(path: Path) -> bool:
    """Whether a name is that of a shared or rank file."""
    match = _NAME.fullmatch(path.name)
    return match is not None and path.name != f"{match['stem']}.pt"


def is_expert(name: str) -> bool:
    """The branches' rule on which tensors go into rank files; the gates (``gate.wg``) do not."""
    return "expert" in name and "expert_centroids" not in name


def split_expert(name: str) -> tuple[str, int, str] | None:
    """An expert's tensor name as what stands before its number, the number, and what follows; None for others."""
    match = _EXPERT.fullmatch(name)
    return (match["before"], int(match["number"]), match["after"]) if match else None


def folder_of(path: Path) -> Path:
    """The folder in which a checkpoint's files lie, whichever way it is given."""
    return path if path.is_dir() else path.parent


def _siblings(folder: Path, stem: str) -> list[Path]:
    """The shared and rank files of checkpoint ``stem`` in a folder."""
    if not folder.is_dir():
        return []
    wanted = re.compile(re.escape(stem) + r"-(?:shared|rank-\d+)\.pt")
    return sorted(found for found in folder.iterdir() if wanted.fullmatch(found.name))


def _locate(path: Path) -> _Files:
    """Finds the files of the one checkpoint that ``path`` means."""
    if path.is_dir():
        return _locate_stem(path, _only_stem(path), path)
    if _FSDP_SHARD.fullmatch(path.name):
        raise CheckpointError(path, "is one shard of a fully sharded run; consolidate it with fairseq's tool first")
    match = _NAME.fullmatch(path.name)
    stem = match["stem"] if match else path.stem
    if path.is_file() and path.name == f"{stem}.pt":
        return _Files(path, {})
    return _locate_stem(path.parent, stem, path)


def _only_stem(folder: Path) -> str:
    """The name of the only checkpoint in a folder, without suffixes."""
    matches = [_NAME.fullmatch(found.name) for found in sorted(folder.glob("checkpoint*.pt"))]
    stems = list(dict.fromkeys(match["stem"] for match in matches if match))
    if len(stems) != 1:
        names = ", ".join(f"{stem}.pt" for stem in stems)
        raise CheckpointError(folder, f"holds {len(stems)} fairseq checkpoints; name one of them: {names}")
    return stems[0]


def _locate_stem(folder: Path, stem: str, given: Path) -> _Files:
    single, shared = folder / f"{stem}.pt", folder / f"{stem}-shared.pt"
    if given.is_dir() and single.is_file():
        return _Files(single, {})
    if not shared.is_file():
        raise CheckpointError(given, f"{shared.name} is missing: the rank files alone are not a checkpoint")
    ranks = {}
    for found in _siblings(folder, stem):
        match = _NAME.fullmatch(found.name)
        if match and match["rank"] is not None:
            ranks[int(match["rank"])] = found
    return _Files(shared, ranks)


def _without_gap(files: _Files) -> list[int]:
    """The rank numbers in order; a number left out means a missing file."""
    numbers = sorted(files.ranks)
    missing = sorted(set(range(len(numbers))) - set(numbers))
    if missing:
        name = files.shared.name.replace("-shared", f"-rank-{missing[0]}")
        raise CheckpointError(files.shared, f"rank file {name} is missing (ranks up to {numbers[-1]} exist)")
    return numbers


def _open_part(path: Path) -> _Part:
    archive = open_file(path)
    content = archive.content
    tensors = tensor_records(archive, only_tensors(content["model"]))
    return _Part(path, tensors, _plain_cfg(content), _num_updates(content))


def _plain_cfg(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration by sections; checkpoints older than the sections have one ``args`` for all."""
    cfg = plain(content.get("cfg"))
    if isinstance(cfg, dict):
        return cfg
    args = plain(content.get("args"))
    return {"model": args, "task": args} if isinstance(args, dict) else {}


def _num_updates(content: Mapping[str, Any]) -> int | None:
    history = content.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, Mapping) else None
    return updates if isinstance(updates, int) else None


def _require_same_checkpoint(shared: _Part, parts: list[_Part]) -> None:
    """Refuses rank files that visibly belong to another run or another moment of the run."""
    for part in parts:
        if None not in (part.num_updates, shared.num_updates) and part.num_updates != shared.num_updates:
            raise CheckpointError(
                part.path,
                f"is of another checkpoint: {part.num_updates} updates, {shared.path.name} has {shared.num_updates}",
            )
        if option := _differing_option(shared, part):
            raise CheckpointError(part.path, f"is of another checkpoint than {shared.path.name}: {option}")
        if _signature(part) != _signature(parts[0]):
            raise CheckpointError(
                part.path,
                f"is of another checkpoint: its experts differ in number or shape from {parts[0].path.name}",
            )


def _differing_option(shared: _Part, part: _Part) -> str | None:
    """The first option of the run that two files disagree about, with both values."""
    one, other = (found.cfg.get("model") or {} for found in (shared, part))
    for name in sorted(set(one) & set(other)):
        if _RUN_OPTION.fullmatch(str(name)) and one[name] != other[name]:
            return f"{name} is {other[name]!r}, not {one[name]!r}"
    return None


def _signature(part: _Part) -> dict[str, tuple[object, ...]]:
    return {name: (record.dtype, record.shape) for name, record in part.tensors.items()}


def expert_count(tensors: Mapping[str, TensorRecord]) -> int:
    """How many experts the routers choose from; 0 for a dense model."""
    return max((record.shape[0] for name, record in tensors.items() if name.endswith(_GATE)), default=0)


def _local_count(part: _Part) -> int:
    """How many experts of each layer one rank file holds."""
    numbers = {parts[1] for name in part.tensors if (parts := split_expert(name))}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(part.path, f"its experts are not numbered 0 to {len(numbers) - 1}")
    return len(numbers)


def _replication(path: Path, parts: list[_Part], experts: int, wanted: int | None) -> int:
    """The number of copies of each expert among the rank files, checked against the router's experts."""
    if not parts:
        return 1
    held = len(parts) * _local_count(parts[0])
    copies = wanted if wanted is not None else max(held // experts, 1) if experts else 1
    if copies < 1 or len(parts) % copies or held != copies * experts:
        says = f" with {wanted} copies of each" if wanted is not None else ""
        raise CheckpointError(
            path,
            f"its {len(parts)} rank file(s) hold {held} experts a layer, but the routers have {experts}{says}"
            ": a rank file is missing or of another checkpoint",
        )
    return copies


def _merge(parts: Iterable[_Part]) -> dict[str, TensorRecord]:
    """The experts of all rank files under their global numbers."""
    merged: dict[str, TensorRecord] = {}
    for rank, part in enumerate(parts):
        local = _local_count(part)
        for name, record in part.tensors.items():
            if parts_of_name := split_expert(name):
                before, number, after = parts_of_name
                name = f"{before}{rank * local + number}{after}"
            merged[name] = replace(record, name=name)
    return merged


def _require_experts(path: Path, records: Mapping[str, TensorRecord], experts: int) -> None:
    """Every router's experts must all be there: a shared file alone is not a model."""
    for gate in (name for name in records if name.endswith(_GATE)):
        layer = gate[: -len("gate.wg.weight")]
        missing = [k for k in range(experts) if f"{layer}experts.{k}.fc1.weight" not in records]
        if missing:
            raise CheckpointError(
                path,
                f"lacks {len(missing)} of {experts} experts of {layer[:-1]} (expert {missing[0]} first): "
                "the rank files are missing or incomplete",
            )
