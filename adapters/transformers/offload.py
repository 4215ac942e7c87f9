"""Weights that accelerate keeps on the CPU or on disk while their module is not running."""

from __future__ import annotations

from torch import Tensor, nn


def fetch(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a module with its values, also between the module's forwards.

    Args:
        module: Any module.
        name: Path of the tensor in it.

    Returns:
        The tensor; where accelerate has it offloaded, a copy on the device that the module runs on.
    """
    path, _, own_name = name.rpartition(".")
    owner = module.get_submodule(path)
    value: Tensor = getattr(owner, own_name)
    if value.is_meta and hasattr(owner, "_hf_hook"):
        from accelerate.utils import align_module_device  # its hook is there, so it is installed

        with align_module_device(owner):
            value = getattr(owner, own_name)
    return value
