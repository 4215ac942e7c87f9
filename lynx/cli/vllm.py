"""``lynx doctor --vllm``: start an engine on a model and say what Lynx took of it."""

from __future__ import annotations

import os
from typing import Any

import lynx
from lynx.config import load_config
from lynx.errors import ConfigError, UnsupportedModelError


def examine_engine(model: str) -> dict[str, dict[str, str]]:
    """Start an engine of vLLM with random weights in this process, armed, and return what is there as titled rows.

    The configuration is the file that ``LYNX_CONFIG`` names, or ``exact`` without one. Its stand-ins are left out, as
    random weights are not those that they were made for.

    Args:
        model: What ``vllm serve`` would be given.

    Raises:
        ConfigError: vLLM is not installed.
        LynxError: Lynx refuses the model or the configuration.
    """
    # Before vLLM is imported: the layers must be in this process, and standard output is for what was asked.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"vLLM is not installed here ({error}); run this in the environment of the server."
        ) from error
    config = load_config(os.environ.get("LYNX_CONFIG") or {"strategy": {"name": "exact"}})
    wish = config.model_copy(update={"standins": None}).dump()
    engine = vllm.LLM(model, load_format="dummy", enforce_eager=True, max_num_seqs=8, additional_config={"lynx": wish})
    facts: dict[str, dict[str, str]] = engine.apply_model(_facts)[0]
    return {"vllm": {"version": vllm.__version__, "model": model}} | facts


def _facts(model: Any) -> dict[str, dict[str, str]]:
    handle, discovery = lynx.handle_of(model), lynx.attachment.discover(model)
    layers = {}
    for layer in discovery.layers:
        rule = layer.info.rule
        words = f"{layer.info.num_experts} experts, {layer.info.top_k} per token, {rule.score}"
        words += ", renormalised" if rule.renormalise else ""
        words += f", times {rule.scale:g}" if rule.scale != 1.0 else ""
        layers[layer.info.name] = "; ".join([words, *layer.notes])
    armed = {
        "layers": str(handle.layers),
        "strategy": handle.config.strategy.name,
        "selection": next(iter(handle.in_torch.values()), "") or "one kernel",
    }
    if hasattr(discovery.adapter, "experts_hash"):
        armed["stand-ins"] = _why_no_standins(discovery, model) or "taken, if they were made for these experts"
    return {"armed": armed, "MoE layers": layers}


def _why_no_standins(discovery: Any, model: Any) -> str:
    try:
        for layer in discovery.layers:
            discovery.adapter.experts_hash(model, layer)
    except UnsupportedModelError as error:
        return str(error)
    return ""
