"""Every line of evidence of the shipped manifests names what it rests on, and the summary counts it right."""

from __future__ import annotations

import re

import own_manifests
import pytest

from fp8_convert.converter.plan.evidence import evidence
from fp8_convert.converter.plan.manifest import SECTIONS, parse_manifest, shipped

# A source; or another line ("as …"); or a fact that one sees in the class, or in the runtime, that is named.
SOURCED = re.compile(
    r"#\d+|\w+\.(?:md|py)\b|_keep_in_fp32_modules|_skip_layerwise_casting_patterns|safe_quant_config"
    r"|our reasoning|our choice|\bas\b|\bsame\b|vLLM|SGLang|PixArt|Qwen3Model"
)


@pytest.mark.parametrize("name", shipped())
def test_every_line_names_what_it_rests_on(name: str) -> None:
    for table in shipped()[name].components:
        lines = [rule.why for section in SECTIONS for rule in table.rules(section)]
        lines += [group.why for group in table.fusion_groups]
        for why in (*lines, *([table.why] if table.mode == "keep" else [])):
            assert SOURCED.search(why), why


def test_the_summary_of_a_manifest() -> None:
    text = (
        own_manifests.text()
        + """
[[components.transformer.never_layers]]
pattern = "a"
why = "vllm-omni#1414 and #3998, after some/where#7 (x_transformer.py)"
[[components.transformer.ignored_layers]]
pattern = "b"
why = "vllm-omni#3998 (our reasoning)"
"""
    )
    found = evidence(parse_manifest(text.encode(), "own.toml"))
    assert found.lines == 3
    assert found.sources == ("vllm-omni#3998", "some/where#7", "vllm-omni#1414", "x_transformer.py")
    assert found.ours == 1
    assert str(found).endswith("; 1 of our own reasoning")
    assert str(evidence(parse_manifest(own_manifests.text().encode(), "own.toml"))) == (
        "1 line: no source; 0 of our own reasoning"
    )


def test_a_proposals_evidence_is_a_measurement() -> None:
    rule = (
        '[[components.transformer.ignored_layers]]\npattern = "b"\nwhy = "fp8-convert sensitivity: 5.1% of the error"\n'
    )
    found = evidence(parse_manifest((own_manifests.text() + rule).encode(), "own.toml"))
    assert found.sources == ("fp8-convert sensitivity",)
    assert found.ours == 0
