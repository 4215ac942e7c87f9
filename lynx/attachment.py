"""attach, detach and prune: putting a strategy to work on a model, and taking it off again."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from lynx.config import Config, resolve_config
from lynx.errors import AttachError, ConfigError, LynxWarning, PluginError, UnsupportedModelError
from lynx.handle import Handle
from lynx.layers import LayerFilter, MoESpec
from lynx.log import logger
from lynx.matching import standins_for
from lynx.plugins import registry
from lynx.selection import LayerSelection
from lynx.strategy import steered
from lynx.tpot import TpotControl

if TYPE_CHECKING:
    from lynx.adapter import Adapter, Discovery, FoundLayer
    from lynx.strategy import LayerInfo

_T = TypeVar("_T")
_handles: WeakKeyDictionary[nn.Module, Handle] = WeakKeyDictionary()


def attach(model: nn.Module, strategy: Any = None, /, **options: Any) -> Handle:
    """Put a selection strategy between the routers and the experts of a model.

    Every MoE layer is taken, or none and an error is raised. A model that is attached already gets the new strategy
    in place of the old one, and keeps the old one if the new one is refused. Prefill is left exact unless the strategy
    is an explicit ``phase-aware``.

    Args:
        model: The model; changed only by hooks that :func:`detach` takes out again.
        strategy: A strategy's name, an instance, a mapping with ``name``, or a :class:`lynx.Config`. Without one, the
            file that the environment variable ``LYNX_CONFIG`` names.
        **options: Options of the strategy, and keys of :class:`lynx.Config` (``min_tokens``, ``max_decode_q``,
            ``layers``, ``experts``, ``tpot_ms``), which override a config's own.

    Returns:
        A handle; also a context manager that detaches at its end.

    Raises:
        ConfigError: The strategy or an option is wrong.
        UnsupportedModelError: No adapter can take the model.
        AttachError: The model is attached through another module.

    Example:
        >>> import lynx
        >>> model = lynx.load_reference_model().model
        >>> with lynx.attach(model, "importance-threshold", ratio=0.4) as handle:
        ...     print(handle.layers)
        4
    """
    config = resolve_config(strategy, dict(options))
    discovery = discover(model, config.layers if isinstance(config.layers, MoESpec) else None)
    layers = _chosen(discovery, config)
    standins = standins_for(discovery.adapter, model, layers, config)
    selections = [
        (layer, LayerSelection(layer.info, config.strategy, config.min_tokens, answers))
        for layer, answers in zip(layers, standins, strict=True)
    ]
    previous = _handles.get(model)
    replaced = previous.installation if previous is not None else None
    control = _control(config, [selection for _, selection in selections])
    installation = discovery.adapter.prepare(model, config, selections, replaced)
    if control is not None and hasattr(installation, "time_by"):
        installation.time_by(control)
    # before anything is changed: a warning may be made an error
    if any(getattr(layer.router, "training", False) for layer in layers):
        warnings.warn(
            "the model is in training mode; selection is inactive until model.eval()", LynxWarning, stacklevel=2
        )
    if previous is not None:
        previous.detach()
    installation.start()
    handle = Handle(config, discovery.adapter.name, [selection for _, selection in selections], installation, control)
    _handles[model] = handle
    logger.info("lynx.attached", adapter=discovery.adapter.name, layers=len(layers), strategy=config.strategy.name)
    return handle


def detach(model: nn.Module) -> None:
    """Take Lynx off a model; outputs are again those of the model alone, bit for bit.

    Raises:
        AttachError: Nothing is attached to this model.
    """
    handle_of(model).detach()


def handle_of(model: nn.Module) -> Handle:
    """Return the handle of an attached model, for instance one that :func:`prune` attached.

    Raises:
        AttachError: Nothing is attached to this very model. A copy of an attached model, or a wrapper around it, has
            no handle.

    Example:
        >>> import lynx
        >>> model = lynx.prune("batch-union", top=3)(lynx.load_reference_model().model)
        >>> lynx.handle_of(model).layers
        4
    """
    handle = _handles.get(model)
    if handle is None or not handle.attached:
        raise AttachError(
            f"nothing is attached to this {type(model).__name__}; lynx.attach() was not called on this very object."
        )
    return handle


def prune(strategy: Any = None, /, **options: Any) -> Callable[[_T], _T]:
    """Attach a strategy with a decorator: to a loader, to a model class, or to a model.

    Takes the same arguments as :func:`attach`. A decorated function attaches to the model it returns (or to the first
    item, if it returns a tuple); a decorated class becomes a subclass whose own instances are attached, those of
    further subclasses are not; a model is attached and returned. :func:`handle_of` gives the handle.

    Example:
        >>> import lynx
        >>> @lynx.prune("batch-union", top=3)
        ... def load():
        ...     return lynx.load_reference_model().model
        >>> model = load()
        >>> lynx.detach(model)
    """
    resolve_config(strategy, dict(options))  # a wrong option is told where it is written, not when the model loads

    def decorate(target: Any) -> Any:
        if isinstance(target, nn.Module):
            attach(target, strategy, **options)
            return target
        if isinstance(target, type) and issubclass(target, nn.Module):
            return _pruned_class(target, strategy, options)
        if callable(target):
            return _pruned_loader(target, strategy, options)
        raise ConfigError(f"prune() decorates a loader, a model class or a model; got {type(target).__name__}.")

    return decorate


def discover(model: nn.Module, spec: MoESpec | None = None) -> Discovery:
    """Find out what would be attached to, without changing anything.

    Args:
        model: The model.
        spec: What its MoE blocks are made of, if they are written by hand and somebody says it.

    Raises:
        UnsupportedModelError: No adapter knows the model, or it has no MoE layer.
    """
    adapters = registry().adapters
    for adapter, package in adapters:
        describes = getattr(adapter, "discover_as", None) if spec is not None and isinstance(model, nn.Module) else None
        if describes is not None or (spec is None and _recognises(adapter, package, model)):
            discovery: Discovery = adapter.discover(model) if describes is None else describes(model, spec)
            if not discovery.layers:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has no MoE layer that the {adapter.name} adapter knows. "
                    f"Looked for: {discovery.looked_for}. Found: {_module_kinds(model)}."
                )
            return discovery
    names = ", ".join(adapter.name for adapter, _ in adapters)
    raise UnsupportedModelError(
        f"no adapter takes a {type(model).__module__}.{type(model).__name__}. Adapters asked: {names}. "
        f"Found: {_module_kinds(model)}."
    )


def _recognises(adapter: Adapter, package: str, model: nn.Module) -> bool:
    """Ask an adapter; one that fails is passed over, as every model is put to every adapter of every plugin."""
    try:
        return adapter.recognises(model)
    except Exception as error:
        if registry().strict:
            raise PluginError(f"adapter {adapter.name!r} of {package} failed to look at a model: {error}") from error
        reason = f"{type(error).__name__}: {error}"
        logger.error("lynx.adapter_failed", adapter=adapter.name, package=package, reason=reason)
        return False


def chosen_layers(layers: Sequence[LayerInfo], config: Config) -> list[LayerInfo]:
    """Apply a configuration's layer filter.

    Raises:
        ConfigError: It names a layer that is not there, or leaves none.
    """
    if not isinstance(config.layers, LayerFilter):
        return list(layers)
    known = {key for layer in layers for key in (layer.index, layer.name)}
    for key in (*config.layers.include, *config.layers.exclude):
        if key not in known:
            raise ConfigError(
                f"no MoE layer {key!r}; there are {len(layers)}, 0 to {len(layers) - 1}: "
                f"{', '.join(layer.name for layer in layers)}."
            )
    chosen = [layer for layer in layers if _passes(layer, config.layers)]
    if not chosen:
        raise ConfigError("`layers` leaves no MoE layer to attach to.")
    return chosen


def _chosen(discovery: Discovery, config: Config) -> list[FoundLayer]:
    """Apply the layer filter; refuse if a chosen layer cannot be taken."""
    chosen = chosen_layers([layer.info for layer in discovery.layers], config)
    layers = [layer for layer in discovery.layers if layer.info in chosen]
    for layer in layers:
        if layer.refused:
            raise UnsupportedModelError(f"layer {layer.info.name!r} cannot be taken: {layer.refused}")
    return layers


def _control(config: Config, selections: Sequence[LayerSelection]) -> TpotControl | None:
    """Make what holds a time per output token, if one is asked for."""
    if config.tpot_ms is None:
        return None
    found = [each for selection in selections for each in steered(selection.bound)]
    if not found:
        raise ConfigError(
            f"tpot_ms moves the targets of `target-active`, and {config.strategy.name!r} has none: give "
            "target-active with the fewest experts that you allow (share=0.6, for instance), alone or inside a "
            "wrapper; `lynx tune --target-tpot` finds fixed settings for a time."
        )
    return TpotControl(config.tpot_ms / 1e3, found, config.min_tokens)


def _passes(layer: LayerInfo, chosen: LayerFilter) -> bool:
    keys = {layer.index, layer.name}
    return (not chosen.include or bool(keys & set(chosen.include))) and not keys & set(chosen.exclude)


def _pruned_loader(load: Callable[..., Any], strategy: Any, options: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def pruned(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) and loaded else loaded
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{load.__qualname__}() returned {type(loaded).__name__}; prune() needs it to return a model."
            )
        attach(model, strategy, **options)
        return loaded

    return pruned


def _pruned_class(cls: type[nn.Module], strategy: Any, options: dict[str, Any]) -> type[nn.Module]:
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        # from_pretrained builds the model on the meta device and fills it later: it attaches itself, below
        if type(self) is pruned and not any(parameter.is_meta for parameter in self.parameters()):
            attach(self, strategy, **options)

    def from_pretrained(subclass: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super(pruned, subclass).from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model not in _handles:
            attach(model, strategy, **options)
        return loaded

    body: dict[str, Any] = {"__init__": __init__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    body["__qualname__"] = cls.__qualname__
    if hasattr(cls, "from_pretrained"):
        body["from_pretrained"] = classmethod(from_pretrained)
    pruned: Any = type(cls.__name__, (cls,), body)
    made: type[nn.Module] = pruned
    return made


def _module_kinds(model: Any, limit: int = 12) -> str:
    if not isinstance(model, nn.Module):
        return "not a torch module"
    kinds = dict.fromkeys(type(module).__name__ for module in model.modules())
    names = list(kinds)[:limit]
    return ", ".join(names) + (f" and {len(kinds) - limit} more kinds of modules" if len(kinds) > limit else "")
