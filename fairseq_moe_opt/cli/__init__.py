"""The ``moe-opt`` command. Importing it loads neither torch nor a host framework: commands do, when they run."""

from fairseq_moe_opt.cli import generate_command, trace_commands  # noqa: F401 - add their commands to the application
from fairseq_moe_opt.cli.commands import app, main

__all__ = ["app", "main"]
