"""The record `fp8_convert.json` at a converted snapshot's root: what it was made from, how, and every digest.

It holds nothing that changes between two conversions of the same source with the same recipe and tool: no times,
no paths, no device, no thread counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import layout
from .errors import ConvertError
from .plan import ComponentPlan, Plan, rows
from .recipe import tool_version
from .target import Done

_SEAL = "record_sha256"


def make_record(plan: Plan, done: Mapping[str, Done]) -> dict[str, Any]:
    """The record of a finished conversion; `done` has every output file but the record itself."""
    shards = {s.path: s for s in plan.shards}
    return seal(
        {
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
    )


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a digest of itself, so that a damaged record is found too."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {**record, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_record(root: Path) -> dict[str, Any] | None:
    """The record of a converted snapshot, None if the folder has none. Raises ConvertError if it is no record."""
    path = root / layout.RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is damaged (not valid JSON); convert the snapshot again.") from error
    except OSError as error:
        raise ConvertError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if not isinstance(record, dict):
        raise ConvertError(f"{path} is damaged (not a JSON object); convert the snapshot again.")
    return record


def check_record(root: Path) -> Iterator[str]:
    """What is wrong with the record itself: it must be, byte for byte, what was written."""
    record = read_record(root) or {}
    unsealed = {k: v for k, v in record.items() if k != _SEAL}
    raw = (root / layout.RECORD_FILE).read_bytes()
    if record.get("format") != layout.RECORD_FORMAT:
        yield f"has the format {record.get('format')!r}; this version reads {layout.RECORD_FORMAT}"
    elif seal(unsealed) != record or layout.encode_json(record) != raw:
        yield "was changed since it was written"


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
