"""Which way of running experts is taken, and why the others are not."""

import importlib.util
import os
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynx.kernels.gates import GATES
from lynx.kernels.weights import ExpertWeights

Backend = Literal["reference", "grouped_mm", "triton", "loop"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# Above this many tokens nearly every expert is active and arithmetic counts, for which torch's products are made.
MAX_TOKENS = 256

_VARIABLE = "LYNX_KERNELS"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN: tuple[type, ...] = (torch.Tensor, nn.Parameter)  # subclasses (quantised weights) bring their own product

_capabilities: dict[torch.device, tuple[int, int]] = {}
_trials: dict[torch.device, str] = {}  # devices on which a first launch was tried, and with what it failed


class BackendChoice(NamedTuple):
    """A backend and, in a few words, why it was chosen."""

    backend: Backend
    reason: str


_OURS = BackendChoice("triton", f"Lynx's kernels, for at most {MAX_TOKENS} tokens")


def requested() -> Backend | Literal["auto"]:
    """Return what the environment variable ``LYNX_KERNELS`` asks for; "auto" where it is not set.

    Raises:
        ValueError: It holds none of the words that exist.
    """
    return checked(os.environ.get(_VARIABLE, "auto") or "auto", _VARIABLE)


def checked(word: str, origin: str = "backend") -> Backend | Literal["auto"]:
    """Return `word` if it is "auto" or a backend.

    Raises:
        ValueError: It is neither; `origin` says in the message where it stood.
    """
    if word != "auto" and word not in BACKENDS:
        raise ValueError(f"Unknown {origin}={word!r}. Known: {', '.join(sorted(('auto', *BACKENDS)))}.")
    return cast(Backend | Literal["auto"], word)


def choose_backend(experts: ExpertWeights, tokens: int | None = None) -> BackendChoice:
    """Say which backend `run_experts` takes for these weights under "auto", and why.

    Args:
        experts: One layer's experts.
        tokens: T, or None for as few as at decode.

    Raises:
        ValueError: ``LYNX_KERNELS`` asks for a backend that does not exist or cannot run these experts.
    """
    word = requested()
    if word != "auto":
        return forced(word, experts, tokens, _VARIABLE)
    if experts.down.device.type != "cuda":
        return choose_product(experts)
    reason = why_not("triton", experts, tokens)
    if not reason:
        return _OURS
    product = choose_product(experts)
    return BackendChoice(product.backend, f"{product.reason}; not triton, as {reason}")


def forced(backend: Backend, experts: ExpertWeights, tokens: int | None, origin: str = "backend") -> BackendChoice:
    """Take the backend that was asked for; but what "triton" has no kernel for, it leaves to torch's products.

    That is so call by call: more than `MAX_TOKENS` tokens (a prefill), or gradients that are recorded.

    Raises:
        ValueError: It cannot run these experts here.
    """
    reason = _why_never(backend, experts)
    if reason:
        raise ValueError(f"{origin}={backend!r} cannot run these experts: {reason}.")
    reason = _why_not_now(backend, experts, tokens)
    if reason:
        return BackendChoice(choose_product(experts).backend, reason)
    return BackendChoice(backend, f"asked for by {origin}")


def why_not(backend: Backend, experts: ExpertWeights, tokens: int | None = None) -> str:
    """Say in a few words why a backend cannot run these experts here; empty if it can.

    Args:
        backend: One of `Backend`.
        experts: One layer's experts.
        tokens: T, or None for as few as at decode.
    """
    return _why_never(backend, experts) or _why_not_now(backend, experts, tokens)


def recorded(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded of what is computed from these tensors; Lynx's kernels have none."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: slow, but on any machine."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def try_kernels(device: torch.device) -> str:
    """Launch the smallest of the kernels on a device, once, and say with what that failed; empty if it ran.

    Triton needs a C compiler and parts of the driver that may not be there, which shows at the first launch and no
    earlier. After a failure `why_not` says so, and "auto" takes torch's products. Waits for the device: this is for the
    time of attaching.
    """
    if device not in _trials:
        _trials[device] = _first_launch(device)
    return _trials[device]


def try_at_first_call(device: torch.device) -> None:
    """Do what `try_kernels` does, for what was not tried at attach: not while a graph is traced or captured."""
    if torch.compiler.is_compiling() or device in _trials or why_no_kernels(device):
        return
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        try_kernels(device)


def why_no_kernels(device: torch.device) -> str:
    """Say in a few words why Lynx's kernels do not run on a device, whatever they are given; empty if they do."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is None and capability_of(device) < (8, 0):
            return f"the kernels need compute capability 8.0, this device has {capability_of(device)}"
    elif device.type != "cpu":
        return f"the kernels do not run on {device.type}"
    elif not interpreted():
        return "the kernels need a GPU (or TRITON_INTERPRET=1, which is slow)"
    if failure := _trials.get(device):
        return failure
    return ""


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return a card's compute capability; torch looks it up anew each time, which takes as long as all else here."""
    if torch.compiler.is_compiling():  # which takes torch's answer for a constant, and would trace what is remembered
        return torch.cuda.get_device_capability(device)
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


def choose_product(experts: ExpertWeights) -> BackendChoice:
    """Choose among the ways that go by torch's own products."""
    weight = experts.down
    reason = why_not("grouped_mm", experts)
    if torch.compiler.is_compiling():
        if weight.dtype != torch.bfloat16 or reason:
            return BackendChoice("loop", "torch.compile takes grouped_mm in bfloat16 only; the loop breaks the graph")
        if weight.device.type == "cpu":
            return BackendChoice("grouped_mm", "torch.compile takes grouped_mm whole and would break on the loop")
    if weight.device.type == "cpu":
        return BackendChoice("loop", "on a CPU row counts are read for free, and small matrix products win")
    if reason:
        return BackendChoice("loop", reason)
    if capability_of(weight.device) < (9, 0) or weight.dtype != torch.bfloat16:
        return BackendChoice("grouped_mm", "torch's general grouped_mm (the fast one takes bfloat16 from 9.0 on)")
    return BackendChoice("grouped_mm", "CUDA with bfloat16: static shapes, no wait for the device")


def _first_launch(device: torch.device) -> str:
    try:
        # imported here: it loads triton, which may be what fails
        from lynx.kernels.fused import launch

        ids, weights = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones(1, 1, device=device)
        launch.plan(ids, weights, 1).cpu()
    except Exception as error:  # whatever a compiler, a linker or a driver may raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return f"a first launch on {device} failed ({words[:200]})"
    return ""


def _why_never(backend: Backend, experts: ExpertWeights) -> str:
    """Say why a backend can run these experts at no size, whatever else the call asks for."""
    match backend:
        case "triton":
            return _why_not_triton(experts)
        case "grouped_mm":
            return _why_not_grouped(experts)
        case _:
            return ""


def _why_not_now(backend: Backend, experts: ExpertWeights, tokens: int | None) -> str:
    """Say why a backend that can run these experts has nothing for this call."""
    if backend != "triton":
        return ""
    if tokens is not None and tokens > MAX_TOKENS:
        return f"the kernels are for at most {MAX_TOKENS} tokens, not {tokens}"
    if recorded(experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias):
        return "gradients are recorded, and the kernels have none (use torch.no_grad)"
    return ""


def _why_not_grouped(experts: ExpertWeights) -> str:
    weight = experts.down
    if weight.device.type not in ("cpu", "cuda"):
        return f"grouped_mm is not known to work on {weight.device.type}"
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm (2.10 and later do)"
    if weight.device.type == "cuda" and capability_of(weight.device) < (8, 0):
        return f"grouped_mm needs compute capability 8.0, this device has {capability_of(weight.device)}"
    if any(size * weight.element_size() % 16 for size in weight.shape[1:]):
        return "grouped_mm needs H and I that are multiples of 16 bytes"
    return ""


def _why_not_triton(experts: ExpertWeights) -> str:
    up, down, gate = experts.gate_up, experts.down, experts.gate
    device = down.device
    if reason := why_no_kernels(device):
        return reason
    if experts.post_norm is not None:
        return "each expert's output is normed before it is weighted"
    if type(up) not in _PLAIN or type(down) not in _PLAIN:
        return f"the weights are {type(up).__name__} and {type(down).__name__}"
    if down.dtype not in _TRITON_DTYPES or up.dtype != down.dtype:
        return f"the weights are {up.dtype} and {down.dtype}, not bfloat16, float16 or float32"
    if not (_in_one_piece(up) and _in_one_piece(down)):
        return "an expert's weights do not lie in one piece of less than 2**31 elements"
    if gate is not None:
        if gate not in GATES:
            return f"gate={gate!r} is none of the formulas in lynx.kernels.gates"
        columns = experts.expert_size * (2 if GATES[gate].gated else 1)
        if columns != experts.up_size:
            return f"gate={gate!r} takes {columns} columns, the up projection gives {experts.up_size}"
    return ""


def _in_one_piece(matrices: Tensor) -> bool:
    """Whether each of the matrices `(E, n, m)` is contiguous, and small enough for offsets of 32 bits."""
    _, n, m = matrices.shape
    _, to_row, to_column = matrices.stride()  # of no meaning where there is but one row or column
    return (to_row == m or n == 1) and (to_column == 1 or m == 1) and n * m < 2**31
