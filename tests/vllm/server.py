"""vLLM's server on the loopback interface, and requests to it as clients send them."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

LONGEST_START = 300


class Server:
    """A running server.

    Args:
        folder: The model.
        log: Where its output goes.
        environment: Its environment.
        config: What `--additional-config` says, if anything.
    """

    def __init__(self, folder, log, environment, config=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # What `vllm serve` runs. The command itself asks for the metadata of a package "vllm", which repacks lack.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            "reference",
            "--dtype",
            "float32",
        ]
        command += ["--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager", "--no-enable-prefix-caching"]
        if config is not None:
            command += ["--additional-config", json.dumps(config)]
        self._log = Path(log)
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )

    @property
    def log(self):
        """What it has said so far."""
        return self._log.read_text(errors="replace")

    def wait(self):
        """Wait until it takes requests; False if it ends instead."""
        deadline = time.monotonic() + LONGEST_START
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return False
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return True
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log[-4000:])

    def complete(self, prompt, exact=False, stream=False, max_tokens=112):
        """Ask for a completion; its text."""
        wish = {"model": "reference", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": stream}
        if exact:
            wish["vllm_xargs"] = {"lynx": "exact"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(wish).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            if not stream:
                return json.load(answer)["choices"][0]["text"]
            parts = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
            assert parts[-1] == "[DONE]"
            return "".join(json.loads(part)["choices"][0]["text"] for part in parts[:-1])

    def metrics(self):
        """What Prometheus would be told."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            return answer.read().decode()

    def kill_engine(self):
        """End the engine core, which does the work, as a crash would."""
        import psutil

        children = psutil.Process(self._process.pid).children(recursive=True)
        core = next(child for child in children if "EngineCore" in child.name() or "EngineCore" in str(child.cmdline()))
        core.send_signal(signal.SIGKILL)

    def stop(self):
        """End it; returns its exit status."""
        import psutil

        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._process.terminate()
        try:
            status = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        for child in family:
            if child.is_running():
                child.kill()
        return status
