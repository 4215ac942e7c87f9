"""These tests start engines of vLLM, in an environment of their own: `make test-vllm`.

Each engine is a process of its own, started once for all tests that look at it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def environment(**changes):
    """The environment of an engine; None takes a variable out."""
    merged = {name: value for name, value in os.environ.items() if name not in ("LYNX_CONFIG", "PYTHONPATH")}
    merged |= ENVIRONMENT | {"VLLM_CACHE_ROOT": os.environ["LYNX_VLLM_CACHE"]} | changes
    return {name: value for name, value in merged.items() if value is not None}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The reference model as vLLM loads it; compiled code is kept apart from the user's."""
    from reference import save

    os.environ["LYNX_VLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def offline(folder, tmp_path_factory):
    """Run offline.py; what it wrote, and its log."""

    def run(fails=False, model=folder, **wish):
        out = tmp_path_factory.mktemp("out") / "result.json"
        command = [sys.executable, str(HERE / "offline.py"), str(model), str(out), json.dumps(wish)]
        done = subprocess.run(
            command, env=environment(**wish.get("environment", {})), capture_output=True, text=True, timeout=900
        )
        log = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, log[-6000:]
        assert out.exists() != fails
        return (None if fails else json.loads(out.read_text())), log

    return run


@pytest.fixture(scope="session")
def stock(offline):
    """vLLM without Lynx's configuration: the plugin is installed and must do nothing."""
    result, log = offline()
    assert "Lynx is armed" not in log
    return result["tokens"]
