"""The record `fp8_convert.json` at a converted snapshot's root: what it was made from, how, and every digest.

It holds nothing that changes between two conversions of the same source with the same recipe and tool: no times,
no paths, no device, no thread counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import layout
from .plan import ComponentPlan, Plan, rows
from .recipe import tool_version
from .target import Done


def make_record(plan: Plan, done: Mapping[str, Done]) -> dict[str, Any]:
    """The record of a finished conversion; `done` has every output file but the record itself."""
    shards = {s.path: s for s in plan.shards}
    return {
        "format": layout.RECORD_FORMAT,
        "tool": "fp8-convert",
        "tool_version": tool_version(),
        "source": {
            "repo": plan.snapshot.repo,
            "commit": plan.snapshot.commit,
            "pipeline": plan.snapshot.pipeline,
        },
        "recipe": plan.recipe.to_json(),
        "recipe_sha256": plan.recipe.sha256(),
        "components": {c.source.name: _component(c) for c in plan.components},
        "shards": {
            path: {
                "size": done[path].size,
                "sha256": done[path].sha256,
                "source": shards[path].source.path,
                "source_size": done[path].source_size,
                "source_sha256": done[path].source_sha256,
            }
            for path in sorted(shards)
        },
        "files": {p: {"size": d.size, "sha256": d.sha256} for p, d in sorted(done.items())},
    }


def _component(component: ComponentPlan) -> dict[str, Any]:
    before, after = component.weight_bytes
    return {
        "class": component.source.class_name,
        "fp8_modules": {
            mode: sum(t.decision.mode == mode for t in component.tensors) for mode in (layout.W8A8, layout.STORAGE)
        },
        "bytes_before": before,
        "bytes_after": after,
        "decisions": [
            {
                "mode": r.mode,
                "scheme": r.scheme,
                "kind": r.kind,
                "rule": r.rule,
                "why": r.why,
                "tensors": r.count,
                "params": r.params,
                "bytes_before": r.bytes_before,
                "bytes_after": r.bytes_after,
            }
            for r in rows(component)
        ],
    }
