"""The built-in adapters, one host a file or folder, registered as a third party's would be."""

from __future__ import annotations

from lynx.adapter import Adapter
from lynx.adapters.pytorch.adapter import PytorchAdapter
from lynx.adapters.sglang.adapter import SglangAdapter
from lynx.adapters.transformers.adapter import TransformersAdapter
from lynx.adapters.vllm.adapter import VllmAdapter
from lynx.hookspecs import hookimpl


@hookimpl
def lynx_adapters() -> list[Adapter]:
    """Return the built-in adapters."""
    return [VllmAdapter(), SglangAdapter(), TransformersAdapter(), PytorchAdapter()]
