"""Which backend is taken, what is said about the others, and what `LYNX_KERNELS` asks for."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cases import DEVICE, assert_close_to_reference, halves_gate, make_batch, make_experts, make_fusable, rms_norm
from torch import nn

from lynx.kernels import ExpertWeights, backends, choose_backend, reference_experts, run_experts, why_not
from lynx.kernels.backends import BACKENDS, MAX_TOKENS, requested
from lynx.kernels.fused import launch, layer

pytestmark = pytest.mark.kernel


@dataclass(frozen=True)
class Device:
    type: str


class Weight:
    """What is asked of a weight, on a device that need not be there."""

    def __init__(self, *shape: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, whole: bool = True):
        self.shape, self.device, self.dtype, self.whole, self.requires_grad = shape, Device(device), dtype, whole, False

    def element_size(self) -> int:
        return self.dtype.itemsize

    def stride(self) -> tuple[int, ...]:
        _, n, m = self.shape
        return (n * m, m, 1) if self.whole else (n * m, 1, n)


def make(I: int = 8, **options) -> ExpertWeights:  # noqa: E741
    up, down = Weight(4, 2 * I, 16, **options), Weight(4, 16, I, **options)
    return ExpertWeights(up, down, torch.relu, gate="swiglu")  # type: ignore[arg-type]


@pytest.fixture
def card(monkeypatch):
    """A card of capability 9.0, on which nothing can be run."""
    monkeypatch.setattr(backends, "_PLAIN", (*backends._PLAIN, Weight))
    monkeypatch.setattr(backends, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_trials", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("LYNX_KERNELS", raising=False)


@pytest.fixture
def launched(monkeypatch):
    """The token counts of the calls that reached the kernels."""
    seen, plain = [], layer.run_fused

    def spy(hidden, *rest):
        seen.append(hidden.shape[0])
        return plain(hidden, *rest)

    monkeypatch.setattr(layer, "run_fused", spy)
    return seen


def test_a_gpu_takes_the_kernels_up_to_their_size(card) -> None:
    assert MAX_TOKENS == 256
    for tokens, backend in ((None, "triton"), (0, "triton"), (256, "triton"), (257, "grouped_mm")):
        assert choose_backend(make(), tokens).backend == backend
    assert why_not("triton", make(), 257) == "the kernels are for at most 256 tokens, not 257"
    assert choose_backend(make(), 257).reason.endswith("; not triton, as " + why_not("triton", make(), 257))
    assert not any(why_not(backend, make(), 256) for backend in BACKENDS)
    assert choose_backend(make(device="cpu"), 1).backend == "loop"
    assert choose_backend(make(device="mps"), 1).backend == "loop"


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (make(device="mps"), "do not run on mps"),
        (make(dtype=torch.float64), "float64"),
        (make(whole=False), "one piece"),
        (make(I=2**27), "one piece"),
        (replace(make(), post_norm=rms_norm), "normed"),
        (replace(make(), gate="relu2"), "gate='relu2' takes 8 columns, the up projection gives 16"),
        (replace(make(), down=Weight(4, 16, 8, dtype=torch.float16)), "torch.bfloat16 and torch.float16"),
        (replace(make(), down=nn.Linear(1, 1)), "Linear"),
    ],
)
def test_what_the_kernels_cannot_run(card, monkeypatch, experts: ExpertWeights, reason: str) -> None:
    if isinstance(experts.down, nn.Linear):
        experts.down.device = Device("cuda")
    assert reason in why_not("triton", experts)
    if experts.gate_up.device.type == "cuda" and not isinstance(experts.down, nn.Linear):
        assert choose_backend(experts, 1).backend != "triton"
    monkeypatch.setenv("LYNX_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"LYNX_KERNELS='triton' cannot run these experts: "):
        choose_backend(experts, 1)


def test_what_keeps_a_card_from_the_kernels(card, monkeypatch) -> None:
    monkeypatch.setattr(backends, "capability_of", lambda device: (7, 5))
    assert "8.0" in why_not("triton", make())
    assert "8.0" in why_not("grouped_mm", make())
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose numbers mean something else
    assert not why_not("triton", make())
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert why_not("triton", make()) == "triton is not installed"


def test_a_card_is_asked_for_its_capability_once(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(backends, "_capabilities", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    for device in (torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 0)):
        assert backends.capability_of(device) == (9, 0)
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_whether_a_matrix_lies_in_one_piece() -> None:
    whole = make_fusable("swiglu", False, False, 3, 16, 8)
    assert not why_not("triton", replace(whole, down=torch.stack([whole.down] * 2, 1)[:, 0]))
    for down in (whole.down.mT.contiguous().mT, torch.cat([whole.down] * 2, -1)[..., :8]):
        assert "one piece" in why_not("triton", replace(whole, down=down))
    thin = make_fusable("swiglu", False, False, 3, 16, 1)
    strided = torch.stack([thin.down] * 2, -1)[..., 0]  # one column: its stride leads nowhere
    assert strided.stride() == (32, 2, 2)
    assert "one piece" in why_not("triton", replace(thin, down=strided))
    assert not why_not("triton", replace(thin, down=thin.down.as_strided((3, 16, 1), (16, 1, 7))))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_no_experts_give_zeros(backend: str) -> None:
    experts, (hidden, ids, weights) = make_fusable("swiglu", False, False, 0, 16, 8), make_batch(3, 2, 4, 16)
    assert not run_experts(hidden, ids, weights, experts, backend).any()


def test_a_device_on_which_nothing_launches_is_left_to_torch(card, monkeypatch) -> None:
    """It is tried once; what is said of the failure is one line."""
    tried = []

    def fail(*_):
        tried.append(1)
        raise RuntimeError("Failed to find C compiler.\n  Please specify via CC environment variable.")

    monkeypatch.setattr(launch, "plan", fail)
    here = make_fusable("swiglu", False, False, 4, 16, 8).down.device
    reason = f"a first launch on {here} failed (RuntimeError: Failed to find C compiler. Please specify via CC "
    assert [backends.try_kernels(here).startswith(reason) for _ in range(2)] == [True] * 2
    assert len(tried) == 1
    broken = make()
    backends._trials[broken.down.device] = "a first launch failed"
    assert why_not("triton", broken) == "a first launch failed"
    chosen = choose_backend(broken, 1)
    assert chosen.backend == "grouped_mm"
    assert chosen.reason.endswith("; not triton, as a first launch failed")
    monkeypatch.setenv("LYNX_KERNELS", "triton")
    with pytest.raises(ValueError, match="LYNX_KERNELS='triton' cannot run these experts: a first launch failed"):
        choose_backend(broken, 1)


def test_a_device_on_which_kernels_launch_passes(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_trials", {})
    experts = make_fusable("swiglu", False, False, 4, 16, 8)
    assert backends.try_kernels(experts.down.device) == ""
    assert not why_not("triton", experts)


def test_a_cpu_runs_the_kernels_in_the_interpreter_only(monkeypatch) -> None:
    experts = make_fusable("swiglu", False, False, 4, 16, 8)
    on_cpu = replace(experts, gate_up=experts.gate_up.cpu(), down=experts.down.cpu())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not why_not("triton", on_cpu)
    monkeypatch.delenv("LYNX_KERNELS", raising=False)
    assert choose_backend(on_cpu, 1).backend == "loop"  # but not unless it is asked to
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in why_not("triton", on_cpu)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_an_unknown_gate_is_refused(backend: str) -> None:
    experts = replace(make_fusable("swiglu", False, False, 4, 16, 8), gate="swish")
    with pytest.raises(ValueError, match="Unknown gate='swish'"):
        run_experts(*make_batch(2, 1, 4, 16), experts, backend)
    assert why_not("triton", experts) == "gate='swish' is none of the formulas in lynx.kernels.gates"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_variable_picks_and_the_argument_wins(monkeypatch, launched, backend: str) -> None:
    experts = make_fusable("swiglu", False, False, 4, 16, 8)
    batch = make_batch(3, 2, 4, 16)
    monkeypatch.setenv("LYNX_KERNELS", backend)
    assert choose_backend(experts, 3) == (backend, "asked for by LYNX_KERNELS")
    assert_close_to_reference(run_experts(*batch, experts), *batch, experts)
    assert launched == [3] * (backend == "triton")
    run_experts(*batch, experts, "loop" if backend == "triton" else "triton")
    assert launched == [3]


def test_the_variable_must_be_a_word_that_exists(monkeypatch) -> None:
    experts = make_fusable("swiglu", False, False, 4, 16, 8)
    for nothing in ("", "auto"):
        monkeypatch.setenv("LYNX_KERNELS", nothing)
        assert requested() == "auto"
    monkeypatch.setenv("LYNX_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"LYNX_KERNELS='cuda'. Known: auto, grouped_mm, loop, reference, triton\."):
        run_experts(*make_batch(2, 1, 4, 16), experts)
    run_experts(*make_batch(2, 1, 4, 16), experts, "loop")


def test_larger_batches_are_left_to_torch(monkeypatch, launched) -> None:
    experts = make_fusable("swiglu", False, False, 4, 16, 8)
    monkeypatch.setenv("LYNX_KERNELS", "triton")
    for T in (256, 257):
        hidden, ids, weights = make_batch(T, 1, 4, 16)
        for asked in ("triton", "auto"):
            output = run_experts(hidden, ids, weights, experts, asked)
            torch.testing.assert_close(output, run_experts(hidden, ids, weights, experts, "loop"))
    assert launched == [256, 256]


@pytest.mark.parametrize("wanted", ["hidden", "weights", "gate_up", "down", "gate_up_bias", "down_bias"])
def test_gradients_are_left_to_torch(launched, wanted: str) -> None:
    experts = make_fusable("gpt_oss", True, True, 4, 16, 8)
    hidden, ids, weights = make_batch(3, 2, 4, 16)
    variable = {"hidden": hidden, "weights": weights}.get(wanted, getattr(experts, wanted, None))
    variable.requires_grad_()
    (expected,) = torch.autograd.grad(reference_experts(hidden, ids, weights, experts).sum(), variable)
    (gradient,) = torch.autograd.grad(run_experts(hidden, ids, weights, experts, "triton").sum(), variable)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not launched
    with torch.no_grad():
        run_experts(hidden, ids, weights, experts, "triton")
    assert launched == [3]


def test_gradients_of_an_own_activation_are_left_to_torch(launched, monkeypatch) -> None:
    """What it is called on has no gradients, so only its result tells."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((), 1.5, device=DEVICE))

        def forward(self, rows):
            return halves_gate(rows) * self.scale

    down, reached = launch.down, []
    monkeypatch.setattr(launch, "down", lambda *given: reached.append(1) or down(*given))
    activation = Scaled()
    experts = replace(make_experts("gated", 4, 16, 8), activation=activation)
    batch = make_batch(3, 2, 4, 16)
    (expected,) = torch.autograd.grad(reference_experts(*batch, experts).sum(), activation.scale)
    (gradient,) = torch.autograd.grad(run_experts(*batch, experts, "triton").sum(), activation.scale)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
    assert not reached
    with torch.no_grad():
        run_experts(*batch, experts, "triton")
    assert reached


@pytest.mark.parametrize("layout", ["gated", "no gate", "transposed", "normed"])
def test_the_reference_is_a_backend(layout: str) -> None:
    experts = make_experts(layout, 4, 16, 8)
    batch = make_batch(5, 2, 4, 16, lost=0.3)
    output = run_experts(*batch, experts, "reference")
    assert output.dtype == batch[0].dtype
    assert torch.equal(output, reference_experts(*batch, experts).float())


def test_importing_the_kernels_does_not_load_triton() -> None:
    code = "import sys, lynx.kernels as k; assert 'triton' not in sys.modules; print(k.choose_backend.__name__)"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert (done.returncode, done.stdout, done.stderr) == (0, "choose_backend\n", "")


def test_the_device_of_these_tests_runs_all_backends() -> None:
    experts = make_fusable("swiglu", False, False, 4, 16, 8)
    assert experts.down.device.type == DEVICE
    assert [why_not(backend, experts, 1) for backend in BACKENDS] == [""] * 4
