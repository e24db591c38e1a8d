"""A task that Transformers dropped, put back into its registry, and the inverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from transformers import pipelines

from fairseq_moe_opt.errors import InputError
from hf_integration.patching import Patches
from hf_integration.text import task_languages

TASK = "translation"
_MARK = "_hf_integration_patches"  # on the registry itself: no state of ours outlives it


def install_task(entry: Mapping[str, Any]) -> None:
    """Make ``entry`` the task ``translation`` of Transformers; a second call does nothing.

    ``register_pipeline`` is not used: it marks the class, and ``save_pretrained`` of a pipeline would then
    write this package's source into the folder. ``REMOVED_TASKS``, where the release has it, is consulted
    before the registry.
    """
    registry = pipelines.PIPELINE_REGISTRY
    if _MARK in vars(registry):
        return
    patches = Patches()
    patches.on_undo(_PutBack.of(registry.supported_tasks, TASK))
    registry.supported_tasks[TASK] = dict(entry)
    removed = getattr(pipelines, "REMOVED_TASKS", None)
    if removed is not None and TASK in removed:
        patches.on_undo(_PutBack.of(removed, TASK))
        del removed[TASK]
    patches.set_attribute(registry, "check_task", _CheckTask(registry.check_task, registry.supported_tasks))
    patches.set_attribute(registry, _MARK, patches)


def remove_task() -> None:
    """Make Transformers' registry what it was; a second call does nothing."""
    patches = vars(pipelines.PIPELINE_REGISTRY).get(_MARK)
    if patches is not None:
        patches.undo()


def is_installed() -> bool:
    """Whether the task is in place."""
    return _MARK in vars(pipelines.PIPELINE_REGISTRY)


@dataclass(frozen=True)
class _CheckTask:
    """``PipelineRegistry.check_task`` that also knows ``translation_SRC_to_TGT``, as Transformers 4's did."""

    original: Callable[[str], Any]
    tasks: Mapping[str, Any]

    def __call__(self, task: str) -> Any:
        if task in self.tasks or not task.startswith(f"{TASK}_"):
            return self.original(task)
        try:
            languages = task_languages(task)
        except InputError as error:
            raise KeyError(str(error)) from error
        return TASK, self.tasks[TASK], languages


@dataclass(frozen=True)
class _PutBack:
    """Restores one key of a mapping to its value and place, or to its absence; other keys are left alone."""

    mapping: MutableMapping[str, Any]
    key: str
    had: bool
    value: Any
    after: tuple[str, ...]

    @classmethod
    def of(cls, mapping: MutableMapping[str, Any], key: str) -> _PutBack:
        keys = list(mapping)
        after = tuple(keys[keys.index(key) + 1 :]) if key in mapping else ()
        return cls(mapping, key, key in mapping, mapping.get(key), after)

    def __call__(self) -> None:
        self.mapping.pop(self.key, None)
        if not self.had:
            return
        moved = {name: self.mapping.pop(name) for name in list(self.mapping) if name in self.after}
        self.mapping[self.key] = self.value
        self.mapping.update(moved)
