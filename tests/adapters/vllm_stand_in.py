"""Stand-ins for the parts of vLLM that the adapter touches; real engines are in tests/vllm."""

import enum
import itertools
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import nn


class CUDAGraphMode(enum.Enum):
    NONE = 0
    PIECEWISE = 1
    FULL = 2


class RoutingMethodType(enum.Enum):
    Renormalize = 1
    Custom = 2


class Router:
    """As vLLM's: top-k of softmax scores, or of grouped sigmoid scores with a bias."""

    def __init__(self, top_k, global_num_experts, renormalize=True, bias=None, groups=1, kept=1, scale=1.0):
        self.top_k, self.global_num_experts, self.renormalize = top_k, global_num_experts, renormalize
        self.e_score_correction_bias, self.num_expert_group, self.topk_group = bias, groups, kept
        self.scale = scale

    @property
    def routing_method_type(self):
        return RoutingMethodType.Renormalize

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        scores = router_logits.float()
        scores = scores.softmax(-1) if self.e_score_correction_bias is None else scores.sigmoid()
        choice = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        if self.num_expert_group > 1:
            grouped = choice.unflatten(-1, (self.num_expert_group, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
            kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
            choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
        ids = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale, ids.to(torch.int32)


class ZeroExpertRouter(Router):
    """The last experts give nothing: their slots leave with expert 0 and weight 0."""

    num_logical_experts = 12

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = super()._compute_routing(hidden_states, router_logits, indices_type)
        zero = ids >= self.num_logical_experts
        return weights.masked_fill(zero, 0.0), ids.masked_fill(zero, 0)


class UnquantizedFusedMoEMethod:
    """Runs experts as they are."""

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None):
        w13, w2 = layer.w13_weight.mT[topk_ids.long()], layer.w2_weight.mT[topk_ids.long()]  # laid out for kernels
        gate, up = torch.einsum("th,tkih->tki", x, w13).chunk(2, -1)
        return torch.einsum("tk,tki,tkhi->th", topk_weights, nn.functional.silu(gate) * up, w2)


class RoutedExperts(nn.Module):
    """The experts of a layer; their weights are turned when they are laid out."""

    apply_router_weight_on_input = False

    def __init__(self, experts):
        super().__init__()
        self.quant_method = UnquantizedFusedMoEMethod()
        self.w13_weight = nn.Parameter(torch.randn(experts, 4, 8), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.randn(experts, 8, 2), requires_grad=False)

    def forward_modular(self, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None):
        return self.quant_method.apply(self, x, topk_weights, topk_ids, shared_experts, shared_experts_input)


def process_weights_after_loading(model, model_config, target_device):
    """Lay weights out for kernels, which do not take them as they are loaded."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.w13_weight.data = module.w13_weight.data.mT.contiguous()
            module.w2_weight.data = module.w2_weight.data.mT.contiguous()


class Layer(nn.Module):
    """An MoE layer of vLLM, as far as Lynx looks at it."""

    routed_input_transform = routed_output_transform = None

    def __init__(self, router, monolithic=False):
        super().__init__()
        self.router, self.is_monolithic = router, monolithic
        E = router.global_num_experts
        self.moe_config = SimpleNamespace(
            hidden_dim=8,
            hidden_dim_unpadded=8,
            intermediate_size_per_partition=2,
            intermediate_size_per_partition_unpadded=2,
            num_experts=E,
            num_local_experts=E,
            num_logical_experts=E,
            is_sequence_parallel=False,
            is_lora_enabled=False,
            is_act_and_mul=True,
            has_bias=False,
            tp_size=1,
            ep_size=1,
        )
        self.routed_experts = RoutedExperts(E)

    def run(self, hidden, logits):
        """What the layer makes of rows, as vLLM's runner calls its parts."""
        weights, ids = self.router._compute_routing(hidden, logits, None)
        return self.routed_experts.forward_modular(x=hidden, topk_weights=weights, topk_ids=ids)


def engine(additional=None, **parallel):
    """vLLM's configuration."""
    return SimpleNamespace(
        additional_config=additional or {},
        model_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(data_parallel_size=1, **parallel),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE, mode=0),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=32),
        use_v2_model_runner=False,
    )


class StandIn:
    """The modules, and what a test may set in them."""

    def __init__(self, monkeypatch):
        self.config, self.context, self.said = engine(), None, []

        def make(name, **values):
            module = ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
            return module

        def create_fused_moe_router(kind=Router, **options):
            return kind(**options)

        class BaseModelLoader:
            def load_model(self, vllm_config, model_config, prefix=""):
                model = vllm_config.load()
                sys.modules[BaseModelLoader.__module__].process_weights_after_loading(model, model_config, "cpu")
                return model.eval()

        class FirstRunner:
            def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
                return "prepared"

            def execute_model(self, scheduler_output):
                return "executed"

            def get_model(self):
                return self.model

        class SecondRunner:
            def prepare_inputs(self, scheduler_output, batch_req_state, batch_desc):
                return self.batch

            execute_model, get_model = FirstRunner.execute_model, FirstRunner.get_model

        class Worker:
            vllm_config, work = None, None

            def compile_or_warm_up_model(self):
                return self.work()

        self.gauges = gauges = {}

        class Gauge:
            def __init__(self, name, words, labels, multiprocess_mode):
                self.name = name

            def labels(self, *labels):
                return SimpleNamespace(set=lambda value: gauges.update({(self.name, *labels): value}))

        make("prometheus_client", Gauge=Gauge)
        self.vllm = make("vllm", __version__="0.32.0")
        make("vllm.config", CUDAGraphMode=CUDAGraphMode, get_current_vllm_config=lambda: self.config)
        make(
            "vllm.forward_context",
            get_forward_context=lambda: self.context,
            is_forward_context_available=lambda: self.context is not None,
        )
        self.platform = SimpleNamespace(is_out_of_tree=lambda: False)
        make("vllm.platforms", current_platform=self.platform)
        self.envs = make("vllm.envs", VLLM_BATCH_INVARIANT=False)
        logger = SimpleNamespace(info=lambda words, *values: self.said.append(words % values))
        make("vllm.logger", init_logger=lambda name: logger)
        for name in (
            "vllm.model_executor",
            "vllm.model_executor.layers",
            "vllm.model_executor.layers.fused_moe",
            "vllm.model_executor.layers.fused_moe.router",
            "vllm.model_executor.model_loader",
            "vllm.v1",
            "vllm.v1.worker",
            "vllm.v1.worker.gpu",
        ):
            make(name)
        moe = "vllm.model_executor.layers.fused_moe"
        make(f"{moe}.config", RoutingMethodType=RoutingMethodType)
        self.factory = make(f"{moe}.router.router_factory", create_fused_moe_router=create_fused_moe_router)
        self.layer = make(f"{moe}.layer", create_fused_moe_router=create_fused_moe_router)
        make(f"{moe}.routed_experts", RoutedExperts=RoutedExperts)
        make(f"{moe}.unquantized_fused_moe_method", UnquantizedFusedMoEMethod=UnquantizedFusedMoEMethod)
        BaseModelLoader.__module__ = "vllm.model_executor.model_loader.base_loader"
        self.loader = make(
            BaseModelLoader.__module__,
            BaseModelLoader=BaseModelLoader,
            process_weights_after_loading=process_weights_after_loading,
        )
        first = make("vllm.v1.worker.gpu_model_runner", GPUModelRunner=FirstRunner)
        self.worker = make("vllm.v1.worker.gpu_worker", Worker=Worker).Worker()
        second = make("vllm.v1.worker.gpu.model_runner", GPUModelRunner=SecondRunner)
        self.modules = {False: first, True: second}
        self.runner = None

    def load(self, *routers, monolithic=False):
        """Make a model through the wrapped factory and the wrapped loader."""

        def build():
            made = [self.layer.create_fused_moe_router(**options) for options in routers]
            layers = nn.ModuleList(Layer(router, monolithic) for router in made)
            return nn.ModuleDict({"head": nn.Linear(1, 1), "experts": layers})

        self.config.load = build
        self.runner = self.modules[self.config.use_v2_model_runner].GPUModelRunner()
        self.runner.model = self.loader.BaseModelLoader().load_model(self.config, self.config.model_config)
        self.worker.model_runner, self.worker.vllm_config = self.runner, self.config
        return self.runner.model

    @contextmanager
    def step(self, starts, lengths, mode=CUDAGraphMode.NONE, wishes=(), **more):
        """Prepare a step and be in its forward.

        A request whose query is as long as all of it, or is more than a token, is at its prompt. `wishes` are extra
        arguments that the first requests came with.
        """
        query = [end - start for start, end in itertools.pairwise(starts)]
        given = [*zip(query, lengths, strict=True)]
        prompts = [length if new == length or new > 1 else 1 for new, length in given]
        self.prepare(query, [length - new for new, length in given], prompts, wishes, **more)
        self.context = SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=mode)
        yield
        self.context = None

    def prepare(self, query, computed, prompts, wishes=(), drafts=()):
        """Have the runner prepare a step, and return what it returns."""
        names = [f"request {n}" for n in range(len(query))]
        new = [
            SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=wish))
            for name, wish in zip(names, wishes, strict=False)
        ]
        step = SimpleNamespace(
            scheduled_new_reqs=new,
            num_scheduled_tokens=dict(zip(names, query, strict=True)),
            scheduled_spec_decode_tokens=drafts,
        )
        query, computed, prompts = np.array(query), np.array(computed), np.array(prompts)
        if self.config.use_v2_model_runner:
            self.runner.req_states = SimpleNamespace(req_id_to_index=dict.fromkeys(names))
            self.runner.batch = SimpleNamespace(
                req_ids=names, num_scheduled_tokens=query, num_computed_tokens_np=computed, prefill_len_np=prompts
            )
            return self.runner.prepare_inputs(step, None, batch_desc=None)
        self.runner.requests = dict.fromkeys(names)
        room = np.zeros(3, dtype=int)  # the arrays are longer than the batch
        self.runner.input_batch = SimpleNamespace(
            req_ids=names,
            num_reqs=len(names),
            num_computed_tokens_cpu=np.concatenate([computed, room]),
            num_prompt_tokens=np.concatenate([prompts, room]),
        )
        return self.runner._prepare_inputs(step, query)


def route(layer, tokens, seed=0):
    """Route random tokens: the router's own decision, and the one that leaves it."""
    logits = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))
    own = Router._compute_routing(layer.router, torch.zeros(tokens, 8), logits, None)
    return own, layer.router._compute_routing(torch.zeros(tokens, 8), logits, None)
