"""What SGLang loads by its entry point: hooks around its routing, and one that attaches when a model is there.

Not run on an engine yet. Nothing is changed in an engine for which Lynx is not configured.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from lynx.adapters.serving import log_when_served
from lynx.adapters.sglang import hook
from lynx.adapters.sglang.adapter import SglangInstallation
from lynx.attachment import attach, handle_of
from lynx.config import load_config
from lynx.errors import UnsupportedModelError
from lynx.log import logger

OLDEST = (0, 5, 23)
NOT_RUN = "this adapter has not been run on an engine yet"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_MARK = "_lynx"


def register() -> None:
    """Entry point in the group ``sglang.srt.plugins``; SGLang calls it in every process.

    The configuration is read when a model is loaded: what is raised there ends the server, while SGLang goes on
    without a plugin that raises here.
    """
    if not os.environ.get("LYNX_CONFIG"):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if hasattr(HookRegistry, _MARK):
        return
    HookRegistry.register(hook.SEAM, hook.around, HookType.AROUND)
    HookRegistry.register(f"{_RUNNER}.load_model", then_attach, HookType.AFTER)
    HookRegistry.register(f"{_RUNNER}.init_cuda_graphs", then_check, HookType.AFTER)
    setattr(HookRegistry, _MARK, True)


def then_attach(result: Any, runner: Any, *args: Any, **named: Any) -> None:
    """Attach to what a ``ModelRunner`` of SGLang has loaded, before any graph is captured; draft models stay.

    Raises:
        ConfigError: The configuration is wrong.
        UnsupportedModelError: The engine or the model cannot be taken.
    """
    path = os.environ.get("LYNX_CONFIG")
    if not path or runner.is_draft_worker:
        return
    import sglang

    config = load_config(path)
    _check_engine(sglang.__version__)
    handle = attach(runner.model, config)
    say = logging.getLogger("sglang.lynx").info
    words = "Lynx is armed: %d MoE layers, strategy %s, SGLang %s (%s)"
    say(words, handle.layers, config.strategy.name, sglang.__version__, NOT_RUN)
    for name, reason in handle.in_torch.items():
        say("Lynx selects in torch, the first layer being %s: %s", name, reason)
        break
    log_when_served(handle)


def then_check(result: Any, runner: Any, *args: Any, **named: Any) -> None:
    """Look, after the graphs of decode were captured, whether the layers' routing came by; set the counters to zero.

    Raises:
        UnsupportedModelError: No layer's did: this model routes in another way.
    """
    if runner.is_draft_worker or getattr(runner, "decode_cuda_graph_runner", None) is None:
        return
    handle = handle_of(runner.model)
    missed = handle.installation.missed if isinstance(handle.installation, SglangInstallation) else []
    if len(missed) == handle.layers:
        raise UnsupportedModelError(
            f"Lynx is configured, but no MoE layer of {type(runner.model).__name__} routes through {hook.SEAM}: a "
            "kernel of its own does. Turn that kernel off, or unset LYNX_CONFIG."
        )
    if missed:
        logger.warning("lynx.layers_not_reached", layers=len(missed), first=missed[0])
    handle.reset()


def _check_engine(version: str) -> None:
    """Refuse what would be wrong or do nothing."""
    parts = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:3])
    if parts < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UnsupportedModelError(
            f"Lynx is configured, but SGLang {version} is older than {oldest}; install a newer one."
        )
    from sglang.srt.runtime_context import get_exec, get_parallel

    for reason, what in (
        (
            get_exec().deterministic.enable_deterministic_inference,
            "--enable-deterministic-inference asks that a request does not depend on its batch, and under Lynx it "
            "does; leave one out",
        ),
        (
            get_parallel().attn_dp_size > 1,
            "with data-parallel attention an MoE layer sees the rows of other ranks too; leave --attn-dp-size (or "
            "--enable-dp-attention) out",
        ),
    ):
        if reason:
            raise UnsupportedModelError(f"Lynx is configured, but {what}.")
