"""The OpenAI-compatible server with Lynx: concurrent clients, requests that ask for exact routing, crashes."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import environment
from reference import EOS, problems
from server import Server

UNION = {"lynx": {"strategy": {"name": "batch-union", "top": 1}}}


@pytest.fixture
def serve(folder, tmp_path):
    """Start servers, and end them with the test."""
    started = []

    def start(config, **variables):
        started.append(Server(folder, tmp_path / f"server{len(started)}.log", environment(**variables), config))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def texts(stock):
    """What vLLM alone answers to the first problems."""
    return [bytes(token for token in answer if token != EOS).decode() for answer in stock]


def ask_all(server, texts):
    """16 clients at the same time, with prompts of different lengths; odd ones stream, every third is exact."""
    chosen = problems()[: len(texts)]
    with ThreadPoolExecutor(len(chosen)) as clients:
        asked = [
            clients.submit(server.complete, problem.prompt, exact=place % 3 == 0, stream=place % 2 == 1)
            for place, problem in enumerate(chosen)
        ]
    return [answer.result() for answer in asked]


def test_concurrent_clients(serve, texts):
    server = serve(UNION)
    assert server.wait(), server.log[-4000:]
    assert server.log.count("Lynx is armed: 4 MoE layers, strategy batch-union") == 1
    answers = ask_all(server, texts)
    for place, answer in enumerate(answers):
        assert answer
        if place % 3 == 0:
            assert answer == texts[place]
    assert answers != texts


def test_counters_are_on_the_servers_metrics(serve, texts, tmp_path):
    shared = tmp_path / "metrics"
    shared.mkdir()
    server = serve(UNION, PROMETHEUS_MULTIPROC_DIR=str(shared))
    assert server.wait(), server.log[-4000:]
    ask_all(server, texts)
    time.sleep(11)  # they are read every ten seconds, by a step
    ask_all(server, texts)
    labels = r'\{layer="model\.layers\.0\.mlp\.experts",phase="decode"\}'
    found = dict(re.findall(rf"^lynx_(\w+){labels} (\S+)$", server.metrics(), re.MULTILINE))
    assert float(found["steps"]) > 0
    assert 0 < float(found["active_after"]) < float(found["active_before"])
    assert 0 < float(found["kept_mass_worst"]) < float(found["kept_mass_mean"]) <= 1


def test_a_killed_engine_leaves_nothing_half_armed(serve, texts):
    server = serve(UNION)
    assert server.wait(), server.log[-4000:]
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(server.complete, problem.prompt, max_tokens=300) for problem in problems()[:4]]
        server.kill_engine()
    assert any(request.exception() is not None for request in asked)
    server.stop()
    again = serve({"lynx": {"strategy": {"name": "exact"}}})
    assert again.wait(), again.log[-4000:]
    assert again.log.count("Lynx is armed: 4 MoE layers, strategy exact") == 1
    assert ask_all(again, texts) == texts


def test_what_cannot_be_is_refused_before_traffic(serve):
    server = serve({"lynx": {"strategy": {"name": "batch-union", "top": 9}}})
    assert not server.wait()
    assert server.stop() != 0
    assert "top=9" in server.log
    assert "Lynx is armed" not in server.log
