"""The ``moe-opt`` command. Importing it loads neither torch nor a host framework: commands do, when they run."""

from fairseq_moe_opt.cli import profile_command, reproduce_command, trace_commands  # noqa: F401 - they add commands
from fairseq_moe_opt.cli.commands import app, main

__all__ = ["app", "main"]
