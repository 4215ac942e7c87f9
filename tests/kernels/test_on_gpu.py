"""What only a GPU can show of the experts' kernels: captured graphs, and bits over many repeats."""

import pytest
import torch
from cases import DEVICE, make_batch, make_fusable

from lynx.kernels import run_experts

pytestmark = [pytest.mark.kernel, pytest.mark.gpu]
CASES = [("swiglu", False, False), ("gpt_oss", True, True), (None, False, False)]


@pytest.mark.parametrize(("gate", "transposed", "bias"), CASES)
@pytest.mark.parametrize("T", [1, 16, 64])
def test_a_captured_graph_serves_other_routings(gate: str | None, transposed: bool, bias: bool, T: int) -> None:
    experts = make_fusable(gate, transposed, bias, 16, 256, 128, torch.bfloat16)
    batch = make_batch(T, 4, 16, 256, torch.bfloat16)
    run_experts(*batch, experts, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run_experts(*batch, experts, "triton")
    for seed, lost in enumerate((0.0, 0.4, 0.9, 1.0)):
        for tensor, new in zip(batch, make_batch(T, 4, 16, 256, torch.bfloat16, lost=lost, seed=seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        assert torch.equal(output, run_experts(*batch, experts, "triton"))


@pytest.mark.parametrize(("gate", "transposed", "bias"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_hundred_repeats_give_the_same_bits(
    gate: str | None, transposed: bool, bias: bool, dtype: torch.dtype
) -> None:
    experts = make_fusable(gate, transposed, bias, 32, 512, 256, dtype)
    batch = make_batch(64, 4, 32, 512, dtype, lost=0.3)
    first = run_experts(*batch, experts, "triton")
    noise = torch.empty(2**26, device=DEVICE)
    for _ in range(100):
        noise.normal_()  # other work beside, and other contents of the memory that buffers come from
        assert torch.equal(run_experts(*batch, experts, "triton"), first)
