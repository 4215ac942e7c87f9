"""Launch settings of the kernels, one small file per generation of GPUs in `configs/`.

A file names for each kernel a list of settings in ascending order of `up_to`, the most tokens T that they are for; the
last of a list serves all above. Float32 weights have their own two lists: they take twice the room, and their products
have no matrix units. `made` says how the file came to be, `measured` whether on a card.

An expert has at most T rows, and its weights are read once per tile of rows. So up to 64 tokens a tile takes all rows
that there can be: pruning moves slots to fewer experts, and rows that are not there cost no reads.

`programs_per_processor` changes no bit of a result. The tiles of a projection may change how it is rounded: on a card
they decide in what order a product is summed.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import torch

Settings = Mapping[str, int]

DEFAULT = "default"
GENERATIONS = ("cuda_80", "cuda_90", "cuda_100", "hip_gfx942", DEFAULT)
KERNELS = (
    "gate_up",
    "gate_up_float32",
    "down",
    "down_float32",
    "combine",
    "plan",
    "route",
    "standin_inner",
    "standin_outer",
)


@cache
def generation_of(device: torch.device) -> str:
    """Name the file that fits a device; "default" for a card that none was made for, and for CPUs."""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip is not None:
        name = "hip_" + torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        # 8.6 and 8.9 have less shared memory than 8.0; 10.x all have what 10.0 has
        name = f"cuda_{major}{0 if major == 10 else minor}"
    return name if name in GENERATIONS else DEFAULT


@cache
def table(generation: str) -> dict[str, Any]:
    """Return a generation's file, as it lies."""
    text = files("lynx.kernels").joinpath("configs", f"{generation}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@cache
def settings(kernel: str, tokens: int, generation: str) -> Settings:
    """Return the launch settings of a kernel.

    Args:
        kernel: One of `KERNELS`.
        tokens: T.
        generation: One of `GENERATIONS`.
    """
    rows = table(generation)[kernel]
    found = next((row for row in rows if tokens <= row["up_to"]), rows[-1])
    return {name: value for name, value in found.items() if name != "up_to"}


@cache
def num_processors(device: torch.device) -> int:
    """How many multiprocessors a device has; 1 for Triton's interpreter, which runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
