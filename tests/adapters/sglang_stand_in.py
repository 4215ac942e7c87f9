"""Stand-ins for the parts of SGLang that the adapter touches, after the source of 0.5.23; no engine has run it yet."""

import enum
import pkgutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

E, K, H = 16, 4, 8
Mode = enum.Enum("ForwardMode", "EXTEND DECODE MIXED IDLE TARGET_VERIFY DRAFT_EXTEND_V2 SPLIT_PREFILL DLLM_EXTEND")
Format = enum.Enum("TopKOutputFormat", "STANDARD TRITON_KERNEL BYPASSED PACKED")
HookType = enum.Enum("HookType", "BEFORE AFTER AROUND REPLACE")


@dataclass
class TopKConfig:
    top_k: int = K
    use_grouped_topk: bool = False
    topk_group: int | None = None
    num_expert_group: int | None = None
    renormalize: bool = True
    correction_bias: torch.Tensor | None = None
    routed_scaling_factor: float = 1.0
    output_format: Format | None = Format.STANDARD
    scoring_func: str = "softmax"
    num_shared_topk_slots: int = 0
    allow_routed_experts_capture: bool = True


class Standard(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Packed(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor
    packed_topk_ids: torch.Tensor


@dataclass
class ForwardBatch:
    forward_mode: Mode
    out_cache_loc: torch.Tensor | None
    num_token_non_padded: torch.Tensor | None = None

    def moe_num_token_non_padded(self):
        return self.num_token_non_padded


def choose(logits, config):
    """As SGLang's: top-k of scores, of biased ones, or of those of the best groups; then slots of shared experts."""
    scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
    choice = scores if config.correction_bias is None else scores + config.correction_bias
    if config.use_grouped_topk:
        grouped = choice.unflatten(-1, (config.num_expert_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    ids = choice.topk(config.top_k - config.num_shared_topk_slots, dim=-1).indices
    weights = scores.gather(-1, ids)
    weights = (
        weights / weights.sum(-1, keepdim=True) if config.renormalize else weights
    ) * config.routed_scaling_factor
    for slot in range(config.num_shared_topk_slots):
        ids = torch.cat([ids, torch.full((len(ids), 1), E + slot)], 1)
        weights = torch.cat([weights, torch.ones(len(ids), 1)], 1)
    return weights, ids.to(torch.int32)


class StandIn:
    """The modules of SGLang that the adapter touches, and what a test may set in them."""

    def __init__(self, monkeypatch):
        def make(name, **values):
            module = ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
            return module

        for package in ("", ".srt", ".srt.plugins", ".srt.layers", ".srt.layers.moe", ".srt.model_executor"):
            make(f"sglang{package}")
        self.sglang = sys.modules["sglang"]
        self.sglang.__version__ = "0.5.23"
        self.exec = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
        self.parallel, self.context = SimpleNamespace(attn_dp_size=1), None
        make("sglang.srt.runtime_context", get_exec=lambda: self.exec, get_parallel=lambda: self.parallel)
        make(
            "sglang.srt.model_executor.forward_context",
            get_forward_context=lambda: self.context,
            has_forward_context=lambda: self.context is not None,
        )
        self.mapped = []  # what EPLB and the padding mask were given

        def _post_process_topk_ids(
            topk_ids, topk_weights, topk_config, router_logits, layer_id, num_token_non_padded=None, **rest
        ):
            self.mapped.append(topk_ids.clone())
            if num_token_non_padded is not None:
                topk_ids.masked_fill_((torch.arange(len(topk_ids)) >= num_token_non_padded).unsqueeze(-1), -1)
            return topk_ids, topk_weights, None

        def select_experts(hidden_states, router_logits, topk_config, *, layer_id=None, num_token_non_padded=None):
            weights, ids = self.choose(router_logits, topk_config)
            ids, weights, _ = self.topk._post_process_topk_ids(
                topk_ids=ids,
                topk_weights=weights,
                topk_config=topk_config,
                router_logits=router_logits,
                layer_id=layer_id,
                num_token_non_padded=num_token_non_padded,
                expert_location_dispatch_info=None,
            )
            given = Standard(weights, ids, router_logits)
            return Packed(*given, ids) if self.packs else given

        class TopK(nn.Module):
            def __init__(self, layer_id, is_draft=False, **config):
                super().__init__()
                self.layer_id, self.is_draft, self.topk_config = layer_id, is_draft, TopKConfig(**config)

            def forward(module, hidden_states, router_logits):
                bound = self.context and self.context.moe_num_token_non_padded()
                return self.topk.select_experts(
                    hidden_states,
                    router_logits,
                    module.topk_config,
                    layer_id=module.layer_id,
                    num_token_non_padded=bound,
                )

        class HookRegistry:
            registered = ()

            @classmethod
            def register(cls, target, hook, hook_type):
                cls.registered += ((target, hook, hook_type),)

            @classmethod
            def apply_hooks(cls):
                for target, given, kind in cls.registered:
                    home, _, name = target.rpartition(".")
                    setattr(pkgutil.resolve_name(home), name, wrapped(pkgutil.resolve_name(target), given, kind))

        def wrapped(original, given, kind):
            @wraps(original)
            def wrapper(*args, **named):
                if kind is HookType.AROUND:
                    return given(original, *args, **named)
                result = original(*args, **named)
                new = given(result, *args, **named)
                return result if new is None else new

            return wrapper

        class ModelRunner:
            def __init__(runner, model, is_draft_worker=False):
                runner.model, runner.is_draft_worker, runner.step = model, is_draft_worker, self.step

            def load_model(runner):
                runner.model.eval()

            def init_cuda_graphs(runner, captured=lambda: None):
                runner.decode_cuda_graph_runner = object()
                captured()

        self.choose, self.packs, self.TopK = choose, False, TopK
        self.topk = make(
            "sglang.srt.layers.moe.topk",
            select_experts=select_experts,
            TopK=TopK,
            _post_process_topk_ids=_post_process_topk_ids,
        )
        self.HashTopK = type("HashTopK", (nn.Module,), {})
        make("sglang.srt.layers.moe.hash_topk", HashTopK=self.HashTopK)
        self.registry = HookRegistry
        make("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=HookType)
        self.runner = make("sglang.srt.model_executor.model_runner", ModelRunner=ModelRunner).ModelRunner

    def build(self, *configs, gate=True):
        blocks = []
        for layer_id, config in enumerate(configs):
            block = nn.Module()
            if gate:
                block.gate = nn.Linear(H, E, bias=False)
            block.topk = config if isinstance(config, nn.Module) else self.TopK(layer_id, **config)
            block.experts = nn.Module()
            block.experts.w13 = nn.Parameter(torch.zeros(E, 2, 3))
            blocks.append(block)
        return nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    def load(self, *configs, **options):
        runner = self.runner(self.build(*configs, **options))
        runner.load_model()
        return runner

    @contextmanager
    def step(self, mode, slots, non_padded=None):
        batch = ForwardBatch(mode, torch.tensor(list(slots)), None if non_padded is None else torch.tensor(non_padded))
        self.context = SimpleNamespace(moe_num_token_non_padded=batch.moe_num_token_non_padded)
        yield
        self.context = None
