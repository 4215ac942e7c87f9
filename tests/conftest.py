"""What all tests share: a Hypothesis profile, Triton's interpreter where there is no GPU, and the gate on kernel tests.

The Hypothesis profile finds the same examples on every machine.
"""

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# To know that a test fails takes one failing example, not the smallest.
settings.register_profile("first-failure", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("ci")

collect_ignore = ["vllm", "outside"]  # in environments of their own: `make test-vllm`, `make judge`

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before anything imports triton, whose own functions ask for it when they are defined
    os.environ["TRITON_INTERPRET"] = "1"

KERNEL_TESTS: dict[str, int] = {
    "tests/adapters/test_kernels.py": 6,
    "tests/adapters/test_standins.py": 2,
    "tests/kernels/test_answer.py": 50,
    "tests/kernels/test_backends.py": 20,
    "tests/kernels/test_fused_experts.py": 50,
    "tests/kernels/test_fused_route.py": 40,
    "tests/kernels/test_fused_standins.py": 40,
    "tests/kernels/test_plan.py": 10,
    "tests/kernels/test_route.py": 24,
    "tests/kernels/test_tune.py": 50,
}
"""Files that run Triton kernels, and how many of their tests must have passed, at the least."""


class KernelGate:
    """Fails a run in which the kernels were not tested: skipped is not passed.

    It counts tests marked `kernel`. Of those marked `gpu` as well it only asks that they ran where there is one.

    Args:
        whole: Whether all tests run, so that each file has as many as it must.
    """

    def __init__(self, whole):
        self.outcomes = {file: Counter() for file in KERNEL_TESTS} if whole else {}
        self.whole = whole
        self.faults = []

    def pytest_runtest_logreport(self, report):
        counts = "kernel" in report.keywords and (HAS_GPU or "gpu" not in report.keywords)
        if counts and (report.when == "call" or report.outcome == "skipped"):
            outcomes = self.outcomes.setdefault(report.nodeid.partition("::")[0], Counter())
            outcomes[report.outcome] += 1
            outcomes["not for GPUs alone"] += "gpu" not in report.keywords

    def pytest_sessionfinish(self, session):
        for file, outcomes in self.outcomes.items():
            least = KERNEL_TESTS.get(file, 0) if self.whole else 0
            if self.whole and file not in KERNEL_TESTS and outcomes["not for GPUs alone"]:
                self.faults.append(f"{file} has tests marked kernel, and no line in KERNEL_TESTS")
            elif outcomes["skipped"]:
                self.faults.append(f"{file}: {outcomes['skipped']} skipped")
            elif outcomes["passed"] < least:
                self.faults.append(f"{file}: {outcomes['passed']} passed, at least {least} must")
        if self.faults and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.faults:
            terminalreporter.section("kernels were not tested", red=True)
            for fault in self.faults:
                terminalreporter.line(fault)
            terminalreporter.line("Without a GPU the kernels run in Triton's interpreter: see tests/conftest.py.")


def pytest_addoption(parser):
    parser.addoption("--need-gpu", action="store_true", help="fail without a GPU, and where a kernel's test is skipped")


def pytest_configure(config):
    option = config.option
    if option.need_gpu and not HAS_GPU:
        raise pytest.UsageError("--need-gpu: torch sees no GPU here")
    chosen = option.keyword or option.markexpr or option.collectonly or getattr(option, "lf", False)
    whole = not chosen and list(config.args) == list(config.getini("testpaths"))
    if (whole or option.need_gpu) and not hasattr(config, "workerinput"):  # a worker of xdist sees a part
        config.pluginmanager.register(KernelGate(whole), "kernel-gate")


def pytest_runtest_setup(item):
    if not HAS_GPU and item.get_closest_marker("gpu"):
        pytest.skip("needs a GPU")
