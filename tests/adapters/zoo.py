"""Every MoE family of the installed transformers, found by structure, each as a tiny model with random weights."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from zoo_options import CLASSES, DENOISING, NO_DECODE, NOT_MOE, OPTIONS, SIZES

__all__ = ["DENOISING", "NO_DECODE", "build", "families", "model_class"]

MODELS = Path(transformers.__file__).parent / "models"
# What a modeling module calls its experts, routers and MoE blocks
_CLASS = re.compile(r"^class \w*?(Experts|Router|Gating|MoE|Moe|MoeBlock|MoEBlock|MoeMLP|SparseMLP)\(", re.MULTILINE)
_INSIDE = re.compile(r'model_type="(\w+)"')
_ENDINGS = ("ForConditionalGeneration", "ForCausalLM", "ForTokenClassification", "Model")
_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


@cache
def families() -> tuple[str, ...]:
    """Return the names of all folders of transformers' models with MoE layers.

    A family has a class called experts, router or MoE in its own modeling module, or a family that has one inside by
    default, as multimodal models have.
    """
    files = {path.parent.name: path for path in sorted(MODELS.glob("*/modeling_*.py"))}
    own = {name for name, path in files.items() if _CLASS.search(path.read_text(encoding="utf-8"))} - set(NOT_MOE)
    around = set()
    for name in set(files) - own:
        config = MODELS / name / f"configuration_{name}.py"
        if config.exists() and own & set(_INSIDE.findall(config.read_text(encoding="utf-8"))):
            around.add(name)
    return tuple(sorted(own | around))


def model_class(family: str) -> Any:
    """Return the class that is built: the outermost one that generates, if there is one."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if hasattr(module, CLASSES.get(family, "")):
        return getattr(module, CLASSES[family])
    found = [getattr(module, name) for name in module.__all__]
    models = [cls for cls in found if inspect.isclass(cls) and issubclass(cls, PreTrainedModel)]
    return next(cls for ending in _ENDINGS for cls in models if cls.__name__.endswith(ending))


def build(family: str, **changes: Any) -> Any:
    """Make a tiny model in eval mode; the same weights on every call."""
    cls = model_class(family)
    config_class = cls.config_class
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config_class(**_options(config_class(), OPTIONS.get(family, {}) | changes))).eval()
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith(_BIASES):
                tensor.data.normal_(0.0, 0.2)
            elif path.endswith("per_expert_scale"):
                tensor.data.uniform_(0.5, 2.0)
            elif path.endswith("router_mlp.out_proj.weight"):
                tensor.data.normal_(0.0, 4.0)  # behind three layers, little is left to tell tokens apart by
            elif path.endswith("tid2eid"):
                tensor.data.random_(0, 8)
    return model


def _options(default: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Make a configuration small: known sizes where it has them, then what is said of the family; nested ones alike."""
    names = set(vars(default)) | set(default.attribute_map)
    options = {name: value for name, value in SIZES.items() if name in names}
    if "sparse" in (getattr(default, "mlp_layer_types", None) or ()):
        options["mlp_layer_types"] = ["dense", *["sparse"] * (SIZES["num_hidden_layers"] - 1)]
    for name in type(default).sub_configs or {}:
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            options[name] = _options(inner, changes.get(name) or {})
            if inner.model_type:
                options[name]["model_type"] = inner.model_type
    nested = {
        name for name, value in changes.items() if isinstance(value, dict) and isinstance(options.get(name), dict)
    }
    return options | {name: value for name, value in changes.items() if name not in nested}
