"""The ``moe-opt`` command. Importing it loads neither torch nor a host framework: commands do, when they run."""

from fairseq_moe_opt.cli import (  # noqa: F401 - they add their commands to the application
    generate_command,
    profile_command,
    reproduce_command,
    trace_commands,
)
from fairseq_moe_opt.cli.commands import app, main

__all__ = ["app", "main"]
