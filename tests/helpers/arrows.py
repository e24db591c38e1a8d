"""The rules of the source tree as pure functions: source in, violations out, so each can be shown to fail.

A *room* is a part of the project with rules on what it may import; the table ``MAY_IMPORT`` is the picture of
the arrows. A module that belongs to no room of the table is a violation: a new folder has to be entered here.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath

ENGINE, HF = "fairseq_moe_opt", "hf_integration"
LAUNCH = f"{HF}.launch"

# The lowest stones: they know at most each other.
BOTTOM = frozenset(
    {
        "errors",
        "sizes",
        "moe.types",
        "moe.protocols",
        "moe.quantization",
        "moe.trace",
        "moe.cache_report",
        "moe.exchange_report",
    }
)
# Rooms that stand beside each other on the lowest stones and do not know of each other.
SIBLINGS = frozenset({"moe", "buffering", "placement", "parallel", "checkpoints", "profiling"})
HOSTS: Mapping[str, frozenset[str]] = {
    "fairseq": frozenset({"models", "tasks"}),
    "transformers": frozenset({HF, LAUNCH}),
}

_MIDDLE = frozenset({"options", "presets", "build", "rank_caches"})
_BELOW_TOP = BOTTOM | SIBLINGS | _MIDDLE | {"package", "environment"}

MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "errors": frozenset(),
    "sizes": frozenset({"errors"}),
    "moe.types": frozenset({"errors"}),
    "moe.exchange_report": frozenset({"errors"}),
    "moe.protocols": frozenset({"errors", "moe.types", "moe.exchange_report"}),
    "moe.quantization": frozenset({"errors", "moe.types"}),  # one rule for layers, converters and stores
    "moe.trace": frozenset({"errors", "moe.types"}),
    "moe.cache_report": frozenset({"errors", "moe.types"}),
    **{room: BOTTOM for room in SIBLINGS},
    "environment": frozenset({"errors"}),
    "options": BOTTOM,
    "presets": BOTTOM | {"options"},
    "build": BOTTOM | SIBLINGS | {"options"},
    "rank_caches": BOTTOM | SIBLINGS,  # what placement does to caches: of two siblings, so above both
    "package": frozenset({"errors", "options"}),  # fairseq_moe_opt/__init__.py: names for type checkers
    "reproduction": BOTTOM | SIBLINGS | _MIDDLE | {"package"},  # as users run the engine, without a host framework
    "models": _BELOW_TOP,
    "tasks": _BELOW_TOP | {"models"},
    HF: _BELOW_TOP,
    "cli": _BELOW_TOP | {HF, "reproduction"},
    LAUNCH: _BELOW_TOP | {HF, "cli"},  # a command line of its own, with the commands of cli
}

# What the forward pass of a layer may take from outside the project.
ENGINE_THIRD_PARTY = frozenset({"torch"})
BACKEND_THIRD_PARTY: Mapping[str, frozenset[str]] = {
    "fairseq_moe_opt/moe/kernels/triton_code.py": frozenset({"triton"})
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
_MUTABLE_CALLS = frozenset({"list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict"})
_MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_READ_ONLY = frozenset({"Mapping", "Sequence", "Collection", "Iterable", "Container"})

Check = Callable[[str, str], list[str]]


def module_name(path: str) -> str:
    """Dotted name of the module in ``path``, which is relative to the root of the tree."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room that ``module`` (a dotted name, which may go on into a name of the module) belongs to."""
    if module == LAUNCH or module.startswith(f"{LAUNCH}."):
        return LAUNCH
    if module == HF or module.startswith(f"{HF}."):
        return HF
    if module == ENGINE:
        return "package"
    parts = module.split(".")
    inside = ".".join(parts[1:3])
    return inside if inside in BOTTOM else parts[1]


def imported_names(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of ``source``; those in functions and literal dynamic ones too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def _absolute(path: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = list(PurePosixPath(path).parent.parts)
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Name):
        return function.id
    return function.attr if isinstance(function, ast.Attribute) else ""


def check_arrows(path: str, source: str) -> list[str]:
    """Imports within the project that go against the table."""
    room = room_of(module_name(path))
    if room not in MAY_IMPORT:
        return [f"{path}: belongs to no room of the table"]
    found = []
    for line, name in imported_names(path, source):
        if name.split(".")[0] not in {ENGINE, HF}:
            continue
        target = room_of(name)
        if target not in MAY_IMPORT and name.startswith(f"{ENGINE}.") and name.count(".") == 1:
            target = "package"  # a name of fairseq_moe_opt/__init__.py
        if target != room and target not in MAY_IMPORT[room]:
            found.append(f"{path}:{line}: {room} imports {name} of {target}")
    return found


def check_hosts(path: str, source: str) -> list[str]:
    """A host framework imported outside the rooms it belongs to."""
    room = room_of(module_name(path))
    return [
        f"{path}:{line}: {room} imports {name}"
        for line, name in imported_names(path, source)
        if name.split(".")[0] in HOSTS and room not in HOSTS[name.split(".")[0]]
    ]


def check_engine_needs_torch_alone(path: str, source: str) -> list[str]:
    """Third-party imports of ``moe/`` other than torch, and than the one that a backend file is there for."""
    if not path.startswith(f"{ENGINE}/moe/"):
        return []
    known = ENGINE_THIRD_PARTY | BACKEND_THIRD_PARTY.get(path, frozenset()) | set(sys.stdlib_module_names) | {ENGINE}
    return [
        f"{path}:{line}: the engine imports {name}"
        for line, name in imported_names(path, source)
        if name.split(".")[0] not in known
    ]


def check_lazy_command_line(path: str, source: str) -> list[str]:
    """Imports of the Transformers side when the command line itself is imported."""
    if path != f"{ENGINE}/cli.py" and not path.startswith(f"{ENGINE}/cli/"):
        return []
    body = ast.parse(source).body
    lines = {node.lineno for node in body if isinstance(node, (ast.Import, ast.ImportFrom))}
    return [
        f"{path}:{line}: {name} is imported before a command needs it"
        for line, name in imported_names(path, source)
        if line in lines and name.split(".")[0] == HF
    ]


def check_no_print(path: str, source: str) -> list[str]:
    """Calls of ``print`` outside the command line and the launcher."""
    if {"cli", "launch"} & set(PurePosixPath(path).with_suffix("").parts):
        return []
    return [
        f"{path}:{node.lineno}: print"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def check_no_global_state(path: str, source: str) -> list[str]:
    """``global`` statements, and module-level containers that are neither typed read-only nor a registry."""
    tree = ast.parse(source)
    found = [f"{path}:{node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and _is_mutable(node.value):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if name != "__all__" and not name.endswith("REGISTRY") and not _is_read_only(node):
                found.append(f"{path}:{node.lineno}: {name} is mutable: annotate it as Mapping or Sequence")
    return found


def _is_mutable(value: ast.expr | None) -> bool:
    return isinstance(value, _MUTABLE_NODES) or (isinstance(value, ast.Call) and _called(value) in _MUTABLE_CALLS)


def _is_read_only(node: ast.Assign | ast.AnnAssign) -> bool:
    if isinstance(node, ast.Assign):
        return False
    annotation = node.annotation.value if isinstance(node.annotation, ast.Subscript) else node.annotation
    return ast.unparse(annotation).split(".")[-1] in _READ_ONLY


def check_no_assert(path: str, source: str) -> list[str]:
    """``assert`` statements, which vanish under ``python -O`` and give no advice."""
    return [f"{path}:{node.lineno}: assert" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def check_sizes(path: str, source: str) -> list[str]:
    """Files and functions too long to be read in one go."""
    lines = len(source.splitlines())
    found = [f"{path}: {lines} of {MAX_FILE_LINES} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} of {MAX_FUNCTION_LINES} lines")
    return found


CHECKS: Mapping[str, Check] = {
    "arrows": check_arrows,
    "hosts": check_hosts,
    "engine needs torch alone": check_engine_needs_torch_alone,
    "lazy command line": check_lazy_command_line,
    "no print": check_no_print,
    "no global state": check_no_global_state,
    "no assert": check_no_assert,
    "sizes": check_sizes,
}
