"""Which tensors of a checkpoint make which parameter, by Transformers' own table of renamings and conversions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fairseq_moe_opt.checkpoints import CheckpointIndex, TensorRecord, read_tensor
from fairseq_moe_opt.errors import CheckpointError


@dataclass
class StoredParameter:
    """What one parameter is made of.

    Attributes:
        converter: what makes it of several tensors, or of one that looks different; None where it is stored as it is.
        sources: names in the checkpoint by the converter's pattern, each pattern's in the order of their numbers.
    """

    converter: WeightConverter | None = None
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def only(self) -> str:
        """The name of the one tensor that is the parameter."""
        ((name,),) = self.sources.values()
        return name

    def read(self, target: str, index: CheckpointIndex, model: PreTrainedModel) -> dict[str, Tensor]:
        """Convert, as Transformers would; gives ``target`` and what else comes out."""
        if self.converter is None:
            return {target: read_tensor(index[self.only])}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(target, name, pattern, read_tensor(index[name]))
        made: Mapping[str, Any] = converter.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def experts(self, index: CheckpointIndex) -> list[list[TensorRecord]] | None:
        """Records of the tensors that lie expert by expert, a list for each that an expert has; None for one stack.

        Raises CheckpointError for any other form: an expert cannot be read alone then.
        """
        if self.converter is None:
            return None
        operations = [(type(one), getattr(one, "dim", None)) for one in self.converter.operations]
        if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            raise CheckpointError(
                index.path,
                f"its experts are stored in a form ({self.converter.operations}) of which one expert cannot be read "
                "alone; load it with expert_memory='all'",
            )
        ordered = [self.sources.get(pattern, []) for pattern in self.converter.source_patterns]
        return [[index[name] for name in names] for names in ordered]


def stored_parameters(model: PreTrainedModel, index: CheckpointIndex) -> dict[str, StoredParameter]:
    """Of every parameter and buffer of ``model`` that ``index`` has something for, what."""
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    wanted = model.state_dict()
    found: dict[str, StoredParameter] = {}
    for name in sorted(index, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            continue
        entry = found.setdefault(target, StoredParameter(None if pattern is None else by_pattern[pattern]))
        entry.sources.setdefault(pattern or name, []).append(name)
    return found
