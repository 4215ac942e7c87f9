"""``lynx trace``."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from lynx.cli.evaluate import examples_of
from lynx.cli.progress import progress_bar
from lynx.measuring.subject import load_subject
from lynx.measuring.trace import passes, record


def run_trace(
    model: str,
    data: Path | None,
    out: Path,
    columns: int,
    prompts: bool,
    batch: int,
    place: tuple[str | None, str],
    as_json: bool,
) -> None:
    """Record, and say what was recorded."""
    subject = load_subject(model, True, *place)
    examples = examples_of(data, subject)
    with progress_bar(passes(examples, batch)) as advance:
        trace = record(
            subject,
            examples,
            out,
            columns=columns,
            prompts=prompts,
            batch=batch,
            advance=lambda: advance("recording"),
        )
    size, domains = out.stat().st_size, Counter(each.domain for each in trace.sequences)
    if as_json:
        recorded = {
            "trace": str(out),
            "bytes": size,
            "tokens": trace.tokens,
            "sequences": len(trace.sequences),
            "domains": domains,
            "layers": [asdict(info) for info in trace.layers],
            "conditions": trace.conditions,
        }
        print(json.dumps(recorded, indent=2))
        return
    kinds = sorted({(info.num_experts, info.top_k) for info in trace.layers})
    print(f"{out}: {size / 1e6:.1f} MB")
    print(f"{trace.tokens} tokens of {len(trace.sequences)} sequences: {_listed(domains)}")
    print(f"{len(trace.layers)} layers: {', '.join(f'{k} of {experts} experts' for experts, k in kinds)}")


def _listed(domains: Counter[str]) -> str:
    return ", ".join(f"{count} {name or 'of no named domain'}" for name, count in domains.most_common())
