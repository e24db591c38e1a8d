"""Where and when something was measured."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import fairseq_moe_opt

_CPUINFO = Path("/proc/cpuinfo")


def describe() -> dict[str, str]:
    """Processor, cores, versions, date; as text."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq_moe_opt": fairseq_moe_opt.__version__,
    }


def _processor() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
