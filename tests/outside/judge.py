"""Run transformers' own tests on plain models and on models with Lynx attached, and print where they differ.

    make judge
    make judge ARGS="mixtral olmoe"

`exact` is attached in decode and in prefill, to every model that a test makes. The tests come from the source
distribution of the transformers that is installed. It ends with 1 if a test came out differently, if a model was not
attached, if nothing was selected, or if a strategy that prunes goes unnoticed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from comparison import Comparison, Outcomes, compare, differing, results
from judged import CONTROL, EXPECTED, FAMILIES, WAYS
from session import run
from source import download, unpack

import lynx


def main() -> int:
    """Judge, print, and say whether anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], help="all if none is named")
    parser.add_argument("--scratch", type=Path, help="an empty folder to work in and to leave as it is")
    parser.add_argument("--distribution", type=Path, help="a source distribution that is already here")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        distribution = options.distribution or download(transformers.__version__, scratch)
        stand_ins = unpack(distribution, scratch)
        print(f"lynx {lynx.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
        print(f"{distribution.name}; not in it, so empty: {', '.join(stand_ins) or 'nothing'}")
        started = time.monotonic()
        result = judge(scratch, list(options.families or FAMILIES))
        print(f"{time.monotonic() - started:.0f} s on {os.cpu_count()} CPUs")
        return result


def judge(scratch: Path, families: list[str]) -> int:
    """Compare all ways of attaching with plain models, and hold the comparison itself to a control."""
    cases = [FAMILIES[family] for family in families]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # of processes that each run one session
        plain_run = pool.submit(run, scratch, cases, None)
        runs = {way: pool.submit(run, scratch, cases, attach) for way, attach in WAYS.items()}
        control_run = pool.submit(run, scratch, cases[:1], CONTROL)
        plain = plain_run.result()
        print(f"\nplain: {_count(plain)}")
        for test, outcome in plain.items():
            if outcome.result == "failed":
                print(f"  fails by itself: {test} ({outcome.reason})")
        faults = []
        for way, attached_run in runs.items():
            faults += _compare(scratch, way, families, plain, attached_run.result())
        control = control_run.result()
    noticed = differing(_of(plain, families[0]), control)
    theirs = [test.partition("::")[2] for test in noticed if "::test_ours" not in test]
    print(f"\ncontrol, one expert for the batch, on {families[0]}: {len(noticed)} tests come out differently, ", end="")
    print(f"{len(theirs)} of them transformers' own")
    for test in theirs:
        print(f"  {test}")
    if not theirs or len(theirs) == len(noticed):
        faults.append("a strategy that prunes went unnoticed, by transformers' tests or by ours")
    print("\n" + "\n".join(faults or ["no test tells attached models from plain ones"]))
    return 1 if faults else 0


def _compare(scratch: Path, way: str, families: list[str], plain: Outcomes, attached: Outcomes) -> list[str]:
    """Print one way of attaching, and return its faults."""
    print(f"\n{way}: {_count(attached)}")
    print("               plain                   attached                          models  steps in  steps in")
    print("  family       passed failed skipped   passed failed skipped  different  attached   prefill    decode")
    expected, faults = EXPECTED.get(way, {}), []

    def again(tests: list[str]) -> tuple[Outcomes, Outcomes]:
        return run(scratch, tests, None), run(scratch, tests, WAYS[way])

    for family in families:
        found = compare(_of(plain, family), _of(attached, family), expected, again)
        faults += [f"{way}: {fault}" for fault in found.faults]
        _print(family, found)
    for beginning, reason in expected.items():
        print(f"  in parentheses, must be different: {beginning}: {reason}")
    return faults


def _print(family: str, found: Comparison) -> None:
    columns = [
        "{passed:>6} {failed:>6} {skipped:>7}".format_map(results(outcomes))
        for outcomes in (found.plain, found.attached)
    ]
    counted = found.counted
    different = f"{len(found.different)}" + (f" (+{len(found.expected)})" if found.expected else "")
    print(f"  {family:<12} {columns[0]}   {columns[1]}  {different:>9}  ", end="")
    print(f"{counted['attached']:>8}  {counted['prefill']:>8}  {counted['decode']:>8}")
    for test in found.flaky:
        print(f"    flaky, the same when run again: {test}")


def _of(outcomes: Outcomes, family: str) -> Outcomes:
    return {test: outcome for test, outcome in outcomes.items() if test.startswith(f"{FAMILIES[family]}::")}


def _count(outcomes: Outcomes) -> str:
    return ", ".join(f"{count} {result}" for result, count in sorted(results(outcomes).items()))


if __name__ == "__main__":
    sys.exit(main())
