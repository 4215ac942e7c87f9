"""What vLLM loads by its entry point: makes room for hooks where routers are made, and attaches when a model is there.

Nothing is changed in an engine for which Lynx is not configured.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from lynx.adapters.serving import log_when_served
from lynx.adapters.vllm import metrics, runner
from lynx.adapters.vllm.answers import note_experts
from lynx.adapters.vllm.routers import make_room, see
from lynx.attachment import attach, discover
from lynx.config import Config, load_config
from lynx.errors import ConfigError, UnsupportedModelError

OLDEST = (0, 30)
_KEY = "lynx"  # in vLLM's additional_config
_MARK = "_lynx"


def register() -> None:
    """Entry point in the group ``vllm.general_plugins``; vLLM calls it in every process, and may more than once."""
    try:
        from vllm.model_executor.layers.fused_moe import layer
        from vllm.model_executor.layers.fused_moe.router import router_factory
        from vllm.model_executor.model_loader import base_loader
    except ImportError as error:
        if os.environ.get("LYNX_CONFIG"):
            import vllm

            raise UnsupportedModelError(
                f"Lynx is configured, but vLLM {vllm.__version__} is not one that it knows ({error}); "
                f"install {'.'.join(map(str, OLDEST))} or later."
            ) from error
        logging.getLogger("vllm.lynx").warning("Lynx does not know this vLLM (%s) and will not be on", error)
        return

    if not hasattr(router_factory.create_fused_moe_router, _MARK):
        factory = _with_room(router_factory.create_fused_moe_router)
        router_factory.create_fused_moe_router = factory
        layer.create_fused_moe_router = factory
    loader = base_loader.BaseModelLoader
    if not hasattr(loader.load_model, _MARK):
        loader.load_model = _then_attach(loader.load_model)
    lay_out = getattr(base_loader, "process_weights_after_loading", None)
    if lay_out is not None and not hasattr(lay_out, _MARK):
        base_loader.process_weights_after_loading = _noting_experts(lay_out)


def configuration(additional: Any) -> Config | None:
    """Read Lynx's configuration of an engine.

    Args:
        additional: vLLM's ``additional_config``: under ``"lynx"`` a mapping or the path of a file. Without it, the file
            that ``LYNX_CONFIG`` names.

    Returns:
        The configuration, or None where Lynx is not asked for.

    Raises:
        ConfigError: What is there is wrong.
    """
    given = additional.get(_KEY) if isinstance(additional, Mapping) else None
    given = given if given is not None else os.environ.get("LYNX_CONFIG")
    if not given:
        return None
    if not isinstance(given, (str, Mapping)):
        raise ConfigError(f"additional_config['{_KEY}'] is a mapping or a path; got {type(given).__name__}.")
    return load_config(given)


def _with_room(create: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(create)
    def create_fused_moe_router(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        router = create(*args, **kwargs)
        engine = get_current_vllm_config()
        config = configuration(engine.additional_config)
        if config is not None:
            _check_engine(engine)
            # Into the key of vLLM's compile cache: code compiled for another configuration must not be found.
            engine.additional_config = {**engine.additional_config, _KEY: config.dump()}
            make_room(router)
        return router

    setattr(create_fused_moe_router, _MARK, True)
    return create_fused_moe_router


def _then_attach(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(self, vllm_config, model_config, *args, **kwargs)
        config = configuration(vllm_config.additional_config)
        if config is not None:
            if not _is_draft(vllm_config, model_config):
                _arm(model, config, vllm_config)
            see(model)
        return model

    setattr(load_model, _MARK, True)
    return load_model


def _noting_experts(lay_out: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(lay_out)
    def process_weights_after_loading(model: Any, *args: Any, **kwargs: Any) -> Any:
        note_experts(model)
        return lay_out(model, *args, **kwargs)

    setattr(process_weights_after_loading, _MARK, True)
    return process_weights_after_loading


def _is_draft(engine: Any, model_config: Any) -> bool:
    """Whether a model is one that proposes tokens; such a model stays as it is."""
    speculative = getattr(engine, "speculative_config", None)
    proposes = speculative is not None and model_config is getattr(speculative, "draft_model_config", None)
    return proposes or model_config is not engine.model_config


def _arm(model: Any, config: Config, engine: Any) -> None:
    import vllm
    from vllm.logger import init_logger

    events = logging.getLogger("lynx")
    if all(isinstance(handler, logging.NullHandler) for handler in [*events.handlers, *logging.getLogger().handlers]):
        events.handlers += logging.getLogger("vllm").handlers  # else nobody would hear of what is left exact
        events.setLevel(logging.INFO)
    runner.watch(model, engine, next(model.parameters()).device)
    handle = attach(model, config)
    runner.loaded(model, engine)
    say = init_logger("vllm.lynx").info
    say("Lynx is armed: %d MoE layers, strategy %s, vLLM %s", handle.layers, config.strategy.name, vllm.__version__)
    for name, reason in handle.in_torch.items():
        say("Lynx selects in torch, the first layer being %s: %s", name, reason)
        break
    for note in dict.fromkeys(note for layer in discover(model).layers for note in layer.notes):
        say("Lynx: %s", note)
    unseen = metrics.export(handle, engine)
    if unseen:
        say("Lynx's counters: %s", unseen)
    log_when_served(handle)


def _check_engine(engine: Any) -> None:
    """Refuse what would be wrong or do nothing, before any weight is loaded."""
    import vllm
    from vllm import envs
    from vllm.platforms import current_platform

    parallel = engine.parallel_config
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    for reason, what in (
        (version < OLDEST, f"vLLM {vllm.__version__} is older than {'.'.join(map(str, OLDEST))}; install a newer one"),
        (
            current_platform.is_out_of_tree(),
            "this platform is not one of vLLM's own, and how it prepares a step is not known; do not configure Lynx",
        ),
        (
            getattr(envs, "VLLM_BATCH_INVARIANT", False),
            "VLLM_BATCH_INVARIANT asks that a request does not depend on its batch, and under Lynx it does; unset one",
        ),
        (
            parallel.data_parallel_size > 1,
            "with data parallelism a rank's rows cannot be told from those of others yet; use tensor parallelism",
        ),
        (
            getattr(getattr(engine, "cache_config", None), "kv_sharing_fast_prefill", False),
            "with --kv-sharing-fast-prefill some layers see a part of a step's rows; leave it out",
        ),
        (
            (engine.additional_config or {}).get("decode_backend") == "latency_specialized",
            "the latency-specialised decode backend goes past routers in small steps; leave `decode_backend` out",
        ),
        (
            getattr(envs, "VLLM_ROCM_MONO_DECODE", False),
            "VLLM_ROCM_MONO_DECODE goes past routers in decode; unset one of the two",
        ),
        (
            getattr(parallel, "use_sequence_parallel_moe", False),
            "with sequence-parallel MoE a rank's rows are not those of its requests; turn it off",
        ),
        (
            getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False),
            "with micro-batches the rows of a step are split; leave --enable-dbo and --ubatch-size out",
        ),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "with prefill context parallelism a rank sees the rows of others; leave it out",
        ),
        (
            getattr(parallel, "pipeline_parallel_size", 1) > 1,
            "with pipeline parallelism each stage would count its layers from 0; use tensor parallelism",
        ),
        (
            getattr(engine.model_config, "enable_sleep_mode", False),
            "what Lynx keeps on the device would be lost in sleep; leave --enable-sleep-mode out",
        ),
    ):
        if reason:
            raise UnsupportedModelError(f"Lynx is configured, but {what}.")
