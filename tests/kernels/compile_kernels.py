"""Compile every shipped kernel for GPUs that need not be there, and hold each to its budget.

    python compile_kernels.py            # all configurations: `make kernels`
    python compile_kernels.py --fast     # one of each group, the one with the most registers: part of `make test`
    python compile_kernels.py --update   # write what was measured as the new budget

Registers decide how many warps hide the memory's latency, and a spill puts memory traffic where none should be: both
get worse without a test noticing. Nothing is run, so no GPU is needed; the compilers come with triton.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BUDGET = Path(__file__).with_name("budget.json")
MAX_SPILL = 16
REGISTERS_STEP = 8  # both vendors hand out registers in eights, so a budget between costs nothing


class Card(NamedTuple):
    """What is compiled for, and the shared memory in bytes that one block can have there."""

    target: GPUTarget
    shared: int


CARDS = {
    "cuda:80": Card(GPUTarget("cuda", 80, 32), 163 * 1024),
    "cuda:90": Card(GPUTarget("cuda", 90, 32), 227 * 1024),
    "cuda:100": Card(GPUTarget("cuda", 100, 32), 227 * 1024),
    "hip:gfx942": Card(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Usage(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        registers: Per thread; on AMD vector registers, those for matrix products included.
        spill: Bytes per thread that live in memory for want of registers.
        shared: Bytes of shared memory per block.
        seconds: How long the compiler took.
        error: Why there are no figures, or "".
    """

    registers: int = 0
    spill: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str = ""


def compile_one(configuration, card):
    """Compile one shipped configuration and read what it takes."""
    names, signature, attributes = configuration.kernel.arg_names, {}, {}
    for name, kind in configuration.signature.items():
        signature[name], _, divisor = kind.partition(":")
        # as the launcher marks aligned pointers and multiples of 16; on AMD's cards also tensors of less than 2 GB
        marks = [["tt.divisibility", int(divisor)]] if divisor else []
        if kind.startswith("*") and card.target.backend == "hip":
            marks.append(["tt.pointer_range", 32])
        if marks:
            attributes[(names.index(name),)] = marks
    source = ASTSource(configuration.kernel, signature, dict(configuration.constexprs), attributes)
    started = time.perf_counter()
    compiled = triton.compile(source, target=card.target, options=dict(configuration.options))
    seconds = time.perf_counter() - started
    read = read_cubin if card.target.backend == "cuda" else read_amdgcn
    registers, spill = read(compiled)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    error = f"takes {tensor_memory} columns of tensor memory, there are 512" if tensor_memory > 512 else ""
    return Usage(registers, spill, compiled.metadata.shared, seconds, error)


def read_cubin(compiled):
    """Registers and the stack frame: our kernels have no arrays and no calls, so what lies there was spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def read_amdgcn(compiled):
    """Registers and scratch memory, from the notes of the assembly."""
    notes = re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", compiled.asm["amdgcn"], re.MULTILINE)
    found = {name: int(value) for name, value in notes}
    return found["vgpr_count"], max(found["private_segment_fixed_size"], 4 * found["vgpr_spill_count"])


def fast_subset(shipped, budget):
    """Of each group of a target the configuration with the most registers.

    A group is a kernel and, of the second part of the name, what is no number: a kind of experts, or nothing.
    """
    groups = {}
    for target, name in shipped:
        kernel, kind = name.split("/")[:2]
        groups.setdefault((target, kernel, re.sub(r"\d+", "", kind)), []).append((target, name))
    return [max(group, key=lambda key: entry_of(budget, key).get("registers", 0)) for group in groups.values()]


def entry_of(budget, key):
    """The budget of a configuration, or an empty one."""
    return budget["targets"].get(key[0], {}).get(key[1], {})


def faults(key, usage, budget):
    """Say what is wrong with one configuration: a list of a few words each."""
    if usage.error:
        return [usage.error]
    entry, shared = entry_of(budget, key), CARDS[key[0]].shared
    found = []
    if usage.shared > shared:
        found.append(f"{usage.shared} bytes of shared memory, the card has {shared}")
    if usage.spill > MAX_SPILL:
        found.append(f"{usage.spill} bytes spilled, {MAX_SPILL} are the most")
    if not entry:
        return [*found, "has no budget"]
    if usage.registers > entry["registers"] and budget["triton"] == triton.__version__:
        found.append(f"{usage.registers} registers, its budget is {entry['registers']}")
    if entry["spill"] < usage.spill <= MAX_SPILL:
        found.append(f"{usage.spill} bytes spilled, its budget is {entry['spill']}")
    return found


def new_budget(usages):
    """What was measured, as a budget. Spills above the limit are left out: no budget makes them right."""
    targets = {target: {} for target in CARDS}
    for (target, name), usage in sorted(usages.items()):
        if not usage.error and usage.spill <= MAX_SPILL:
            registers = -(-usage.registers // REGISTERS_STEP) * REGISTERS_STEP
            targets[target][name] = {"registers": registers, "spill": usage.spill}
    return {"triton": triton.__version__, "targets": targets}


def write(budget, path):
    """Write a budget with one configuration a line."""
    text = json.dumps(budget, indent=2)
    path.write_text(re.sub(r"\{\s+(\"registers\": \d+),\s+(\"spill\": \d+)\s+\}", r"{\1, \2}", text) + "\n", "utf-8")


def work(key):
    """Compile one configuration in a worker process, which has `SHIPPED` from its parent."""
    try:
        return key, compile_one(SHIPPED[key], CARDS[key[0]])
    except Exception as error:  # whatever a compiler raises is a fault of this configuration
        return key, Usage(error=f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-300:]}")


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a fixed subset with every kernel and layout on every card")
    parser.add_argument("--only", default="", metavar="REGEX", help="configurations whose 'target name' matches")
    parser.add_argument("--update", action="store_true", help="write what was measured as the new budget")
    parser.add_argument("--budget", type=Path, default=BUDGET, metavar="FILE")
    parser.add_argument("--shipped", default="lynx.kernels.fused.shipped", metavar="MODULE", help="what is compiled")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.update and (options.fast or options.only):
        parser.error("--update takes all configurations")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    return options


def main():
    """Compile, compare, print; returns the exit status."""
    options, started = parse(), time.perf_counter()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    shipped = importlib.import_module(options.shipped).shipped
    for target in CARDS:
        for configuration in shipped(target):
            if (target, configuration.name) in SHIPPED:
                raise SystemExit(f"{options.shipped} lists {configuration.name} twice for {target}")
            SHIPPED[target, configuration.name] = configuration

    budget = {"triton": triton.__version__, "targets": {}}
    if options.budget.exists() and not options.update:
        budget = json.loads(options.budget.read_text("utf-8"))
    keys = fast_subset(SHIPPED, budget) if options.fast else list(SHIPPED)
    keys = [key for key in keys if re.search(options.only, " ".join(key))]
    usages = compile_all(keys, options.jobs)
    if options.update:
        budget = new_budget(usages)
        write(budget, options.budget)

    wrong = {key: faults(key, usages[key], budget) for key in keys}
    wrong |= {key: ["has no budget"] for key in SHIPPED if key not in usages and not entry_of(budget, key)}
    for target, entries in budget["targets"].items():
        for name, entry in entries.items():
            if (target, name) not in SHIPPED:
                wrong[target, name] = ["has a budget and is not shipped"]
            elif entry["spill"] > MAX_SPILL:
                found = wrong.setdefault((target, name), [])
                found.append(f"its budget allows {entry['spill']} bytes of spills, {MAX_SPILL} are the most")
    wrong = {key: found for key, found in wrong.items() if found}

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(keys, usages, budget, wrong))
    for key, found in wrong.items():
        print(f"{' '.join(key)}: {'; '.join(found)}")
    if budget["triton"] != triton.__version__:
        made, here = budget["triton"], triton.__version__
        print(f"Registers were not compared: compilers differ, and the budget was made with triton {made}, not {here}.")
    done = f"{len(keys)} of {len(SHIPPED)} configurations in {time.perf_counter() - started:.0f} s"
    print(f"{done}, triton {triton.__version__}: {f'{len(wrong)} wrong' if wrong else 'all within budget'}.")
    return 1 if wrong or not keys else 0


def compile_all(keys, jobs):
    """Compile in parallel; a fresh cache, so that nothing is read that was compiled from another text."""
    usages, progress = {}, sys.stderr.isatty()
    with tempfile.TemporaryDirectory(prefix="lynx-kernels-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            for key, usage in pool.imap_unordered(work, keys):
                usages[key] = usage
                if progress:
                    print(f"\r{len(usages)} of {len(keys)}", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    return usages


def table(keys, usages, budget, wrong):
    """One line per configuration."""
    shown = Table(title="Registers and spilled bytes per thread, shared memory per block")
    shown.add_column("target")
    shown.add_column("configuration", overflow="fold")
    for column in ("registers", "budget", "spill", "shared", "seconds"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for key in keys:
        usage, allowed = usages[key], entry_of(budget, key).get("registers", "-")
        figures = [usage.registers, allowed, usage.spill, usage.shared, f"{usage.seconds:.1f}"]
        shown.add_row(*key, *map(str, figures), "wrong" if key in wrong else "")
    return shown


SHIPPED = {}
"""Configurations by target and name."""

if __name__ == "__main__":
    sys.exit(main())
