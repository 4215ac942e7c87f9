"""An adapter in one file: Lynx on the engines of tally."""

import sys
import weakref

import lynx
from lynx.adapter import Discovery, FoundLayer


class OnRoute:
    """Stands at a layer's seam: an object that can be pickled, not a closure."""

    def __init__(self, engine, selection, shared):
        self.engine, self.selection, self.shared = engine, selection, shared

    def __call__(self, logits, ids, weights):
        """Return ids and weights after selection."""
        engine = self.engine
        if self.shared["paused"] or engine.training:
            return ids, weights
        routing = lynx.Routing.of(logits, ids, weights, self.selection.info.rule)  # all rows open, all in decode
        if engine.reading:
            routing.phase.fill_(int(lynx.Phase.PREFILL))  # which stays exact, unless the strategy says otherwise
        else:
            routing.role.masked_fill_(~engine.busy, int(lynx.Role.PADDING))
        result = self.selection(routing)
        return result.ids, result.weights


class TallyInstallation:
    """What stands in one engine, until it is removed."""

    experts = "model"  # tally runs what is left

    def __init__(self, engine, pairs):
        self._shared = {"paused": False}
        self._planned = (engine, pairs)
        self._layers = []

    @property
    def paused(self):
        """Whether the engine's own routing is let through."""
        return self._shared["paused"]

    @paused.setter
    def paused(self, value):
        self._shared["paused"] = value

    def start(self):
        """Stand at every seam."""
        (engine, pairs), self._planned = self._planned, None
        for layer, selection in pairs:
            selection.place(layer.router.router.weight.device)
            layer.router.on_route = OnRoute(engine, selection, self._shared)
            self._layers.append(weakref.ref(layer.router))  # the handle must not keep the engine alive

    def remove(self):
        """Leave them as they were."""
        while self._layers:
            moe = self._layers.pop()()
            if moe is not None:
                moe.on_route = None

    def teacher_forced(self, prompt_columns):
        """Refuse what the engine cannot do."""
        raise lynx.AttachError("an engine of tally has no whole-sequence forward.")

    def priorities(self, values, copies):
        """Refuse what the engine does not tell apart."""
        raise lynx.AttachError("an engine of tally has no order of sequences that a user could know.")


class TallyAdapter:
    """Takes engines of tally."""

    name = "tally"

    def recognises(self, model):
        """Say whether it is one, without importing tally for somebody who does not use it."""
        tally = sys.modules.get("tally")
        return tally is not None and isinstance(model, tally.Engine)

    def discover(self, model):
        """Say what its layers are; changes nothing."""
        rule = lynx.WeightRule("softmax", renormalise=False)
        layers = []
        for index, moe in enumerate(model.layers):
            expert = moe.experts[0].weight
            info = lynx.LayerInfo(
                name=f"layers.{index}",
                index=index,
                num_experts=len(moe.experts),
                top_k=moe.k,
                rule=rule,
                expert_bytes=expert.numel() * expert.element_size(),
                num_layers=len(model.layers),
            )
            layers.append(FoundLayer(info, moe))
        return Discovery(self, tuple(layers), looked_for="the layers of a tally.Engine", experts="tally")

    def prepare(self, model, config, selections, replaced):
        """Raise what stands against attaching; changes nothing."""
        if config.experts == "lynx":
            raise lynx.ConfigError("experts='lynx' is not for tally; leave it out.")
        for layer, _ in selections:
            if layer.router.on_route is not None and replaced is None:
                raise lynx.AttachError(f"{layer.info.name} has something at its seam on_route already.")
        return TallyInstallation(model, selections)


@lynx.hookimpl
def lynx_adapters():
    """Return what this plugin adds."""
    return [TallyAdapter()]
