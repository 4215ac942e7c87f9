"""The command line, as a user's shell sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

import lynx
import lynx.kernels
from lynx.cli import doctor, main
from lynx.kernels import BackendChoice, ExpertWeights, backends


@dataclass
class Finished:
    """What a command left behind."""

    stdout: str
    stderr: str


Runs = Callable[..., Finished]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runs:
    """Run ``lynx`` in this process, in a folder of its own, and expect an exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str, code: int = 0) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        finished = Finished(*capsys.readouterr())
        assert (ended.value.code or 0) == code, finished
        return finished

    return run


def save(config, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


def small_mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
    )


def test_help_loads_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom lynx.cli import main\ntry:\n    main(['--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0
    assert process.stdout.strip().endswith("False")
    for command in ("demo", "strategies", "inspect", "doctor"):
        assert command in process.stdout


def test_strategies_lists_all(run: Runs) -> None:
    rows = json.loads(run("strategies", "--json").stdout)
    names = {row["name"] for row in rows}
    assert {
        "batch-union",
        "importance-threshold",
        "top-budget",
        "phase-aware",
        "popularity",
        "affinity-binning",
    } <= names
    table = run("strategies").stdout
    assert all(name in table for name in names)


def test_one_strategy_with_its_options(run: Runs) -> None:
    one = json.loads(run("strategies", "top-budget", "--json").stdout)
    options = {option["name"]: option["default"] for option in one["options"]}
    assert options == {
        "protect": "1",
        "refill": '"re-pick"',
        "floor": "0.0",
        "budget": "required",
        "utility": '"normalised-own-mass"',
    }
    assert "arXiv" in run("strategies", "top-budget").stdout


def test_unknown_strategy_is_misuse(run: Runs) -> None:
    process = run("strategies", "top-bugdet", code=2)
    assert "Did you mean 'top-budget'?" in process.stderr
    assert process.stdout == ""


def test_unknown_command_is_misuse(run: Runs) -> None:
    run("prune-everything", code=2)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lynx", "--debug", "strategies", "nope"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode != 0
    assert "ConfigError" in process.stderr
    assert "Traceback" in process.stderr


def test_inspect_reference_model(run: Runs) -> None:
    found = json.loads(run("inspect", "reference", "--json").stdout)
    assert found["adapter"] == "transformers"
    assert len(found["layers"]) >= 4
    first = found["layers"][0]
    assert first["num_experts"] >= 32
    assert first["top_k"] >= 4
    assert first["rule"] == {"score": "softmax", "renormalise": True, "scale": 1.0, "repick": True}
    assert first["refused"] == ""


def test_inspect_a_config_without_weights(run: Runs, tmp_path: Path) -> None:
    folder = save(small_mixtral(), tmp_path / "mixtral")
    found = json.loads(run("inspect", folder, "--json").stdout)
    assert found["model"] == "MixtralForCausalLM"
    assert [layer["num_experts"] for layer in found["layers"]] == [6, 6, 6]
    assert found["layers"][0]["expert_bytes"] == 3 * 32 * 48 * 4
    assert "model.layers.2.mlp.gate" in run("inspect", folder).stdout


def test_inspect_says_why_not(run: Runs, tmp_path: Path) -> None:
    folder = save(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1), tmp_path / "llama"
    )
    process = run("inspect", folder, code=1)
    assert "no MoE layer" in process.stderr
    assert "Looked for" in process.stderr
    assert "LlamaMLP" in process.stderr


HAND_WRITTEN = """
import torch
from torch import nn

class MoE(nn.Module):
    def __init__(self, k=2):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(32, 8)
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(8)])

    def forward(self, x):
        rows = x.reshape(-1, 32)
        weights, ids = self.gate(rows).sigmoid().topk(self.k, dim=-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(rows[token])
        return out.view_as(x)

def build():
    return nn.Sequential(MoE(), MoE(3))

def reads():
    return nn.Sequential(MoE(int(torch.ones(()).item()) + 1))

def number():
    return 3

def sized(width):
    return nn.Linear(width, width)
"""


def test_inspect_a_hand_written_model(run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "handmade.py").write_text(HAND_WRITTEN)
    for source in ("handmade.py:build", "handmade:build"):
        found = json.loads(run("inspect", source, "--json").stdout)
        assert (found["adapter"], found["experts"]) == ("pytorch", "the model's own modules")
        assert [layer["top_k"] for layer in found["layers"]] == [2, 3]
        first = found["layers"][0]
        assert first["rule"] == {"score": "sigmoid", "renormalise": False, "scale": 1.0, "repick": True}
        assert first["notes"][:2] == ["router `gate`", "8 modules in `experts`"]
    assert "8 modules in" in run("inspect", "handmade.py:build").stdout
    (tmp_path / "lynx.yaml").write_text("strategy: exact\nlayers: {blocks: '1', score: softmax}\n")
    process = run("inspect", "handmade.py:build", "--config", "lynx.yaml", code=1)
    assert "the spec says score='softmax', but the block does score='sigmoid'" in process.stderr
    assert json.loads(run("inspect", "handmade.py:reads", "--json").stdout)["layers"][0]["top_k"] == 2
    monkeypatch.delitem(sys.modules, "handmade")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("handmade.py:biuld", "has no function 'biuld'. Did you mean 'build'?"),
        ("handmade.py:number", "number() returned int"),
        ("handmade.py:sized", "sized() takes arguments"),
        ("gone.py:build", "cannot import 'gone.py'"),
        ("gone_module:build", "cannot import 'gone_module'"),
    ],
)
def test_inspect_what_makes_no_model(run: Runs, tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "handmade.py").write_text(HAND_WRITTEN)
    assert reason in " ".join(run("inspect", source, code=2).stderr.split())


def test_inspect_missing_folder_is_misuse(run: Runs) -> None:
    assert "does not exist" in run("inspect", "nowhere", code=2).stderr


def test_doctor(run: Runs) -> None:
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["versions"]["lynx-moe"] == lynx.__version__
    assert facts["strategies"]["batch-union"] == "lynx-moe"
    assert facts["adapters"] == dict.fromkeys(("vllm", "sglang", "transformers", "pytorch"), "lynx-moe")
    assert any(name.startswith("experts on cpu") for name in facts["execution paths"])
    markdown = run("doctor", "--markdown").stdout
    assert markdown.startswith("### versions")
    assert f"| lynx-moe | {lynx.__version__} |" in markdown
    assert "execution paths" in run("doctor").stdout


def test_doctor_says_that_vllm_is_not_there(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it starts an engine is tried in tests/vllm."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "")  # what the command sets is taken back
    assert "vLLM is not installed here" in run("doctor", "--vllm", "some/model", code=2).stderr


def paths_of(run: Runs) -> dict[str, str]:
    return json.loads(run("doctor", "--json").stdout)["execution paths"]


def test_doctor_shows_what_runs_for_each_dtype_and_device(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons that hold for some dtypes name them."""

    def choose(experts: ExpertWeights) -> BackendChoice:
        dtype = experts.down.dtype
        return BackendChoice("grouped_mm" if dtype == torch.bfloat16 else "loop", f"for {dtype}")

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("LYNX_KERNELS", raising=False)
    monkeypatch.setattr(lynx.kernels, "choose_backend", choose)
    paths = paths_of(run)
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        assert paths[f"experts on {device}, bfloat16"] == "grouped_mm: for torch.bfloat16"
        for dtype in ("float16", "float32"):
            assert paths[f"experts on {device}, {dtype}"] == f"loop: for torch.{dtype}"
        assert f"not taken on {device}, float16, float32: grouped_mm" in paths
        assert f"not taken on {device}, bfloat16: loop" in paths
        assert f"not taken on {device}: reference" in paths
        assert f"selection on {device}" in paths
    assert paths["not taken on cpu: triton"].startswith("the kernels need a GPU")


def test_doctor_tries_a_launch(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_trials", {torch.device("cpu"): "a first launch on cpu failed (no compiler)"})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LYNX_KERNELS", "triton")
    paths = paths_of(run)
    assert paths["experts on cpu, float16"].startswith(
        "REFUSED: LYNX_KERNELS='triton' cannot run these experts: a first"
    )
    assert paths["not taken on cpu: triton"] == "a first launch on cpu failed (no compiler)"
    assert paths["selection on cpu"] == "torch: a first launch on cpu failed (no compiler)"


def test_doctor_finds_triton_under_another_distribution(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm builds of torch bring it as pytorch-triton-rocm."""

    def nowhere(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", nowhere)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.4.0+rocm"))
    assert (doctor._version("triton"), doctor._version("vllm")) == ("3.4.0+rocm", "not installed")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doctor._version("triton") == "not installed"


def test_doctor_names_a_broken_plugin(tmp_path: Path) -> None:
    info = tmp_path / "site" / "broken_lynx_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-lynx-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lynx]\nbroken = no_such_module_at_all\n")
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "lynx", "doctor", "--json"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    plugins = json.loads(process.stdout)["plugins"]
    assert plugins["broken (broken-lynx-plugin)"].startswith("BROKEN: ModuleNotFoundError")
    assert plugins["lynx.strategies"] == "lynx-moe"


@pytest.mark.parametrize("flag", ["--quik", "--plott"])
def test_demo_refuses_unknown_flags(flag: str, run: Runs) -> None:
    run("demo", flag, code=2)
