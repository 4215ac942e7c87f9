"""Where a figure comes from."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lynx


def origin(model: Any = None) -> dict[str, Any]:
    """Return versions, machine and time as plain data.

    Args:
        model: What was run; without one, the device is the processor.
    """
    import transformers

    return {
        "lynx": lynx.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(model.device) if _on_gpu(model) else processor(),
        **({} if model is None else {"dtype": str(model.dtype).removeprefix("torch.")}),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _on_gpu(model: Any) -> bool:
    return model is not None and model.device.type == "cuda"


def processor() -> str:
    """Name the processor as the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Size of the processor's last cache before memory, 0 where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text(encoding="ascii").strip().rstrip("K")) * 1024 for path in sizes), default=0)
