"""What is judged: eight families, each with the name of its test case, and the ways in which Lynx is attached."""

from __future__ import annotations

from typing import Any

FAMILIES = {
    "mixtral": "TestMixtral",
    "qwen3_moe": "TestQwen3Moe",
    "olmoe": "TestOlmoe",
    "deepseek_v3": "TestDeepseekV3",
    "gpt_oss": "TestGptOss",
    "granitemoe": "TestGraniteMoe",
    "glm4_moe": "TestGlm4Moe",
    "jamba": "TestJamba",
}


def everywhere(strategy: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A strategy in prefill and decode, and in steps of one token: wherever a router can be rewritten, it is."""
    both = {"name": "phase-aware", "prefill": strategy, "decode": strategy}
    return {"strategy": both, "options": {"min_tokens": 1, **options}}


WAYS: dict[str, dict[str, Any]] = {
    "exact": everywhere({"name": "exact"}, experts="model"),
    "exact, Lynx's experts": everywhere({"name": "exact"}, experts="lynx"),
}

CONTROL = everywhere({"name": "top-budget", "budget": 1, "protect": 0}, experts="model")
"""One expert for the batch, so tests must notice; a judge that lets it pass would let anything pass."""

EXPECTED: dict[str, dict[str, str]] = {
    "exact, Lynx's experts": {
        "test_eager_matches_batched_and_grouped_inference": "it waits for a call of the model's own implementation"
    }
}
"""Tests that must differ, by way and beginning of the name, each with the reason."""
