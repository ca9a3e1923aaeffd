"""The record `fp8_convert.json` at a converted snapshot's root: what it was made from, how, and every digest.

It holds nothing that changes between two conversions of the same source with the same recipe and tool: no times,
no paths, no device, no thread counts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ..format import layout
from ..format.untrusted import parse_json, read_whole
from ..plan.plan import ComponentPlan, Plan
from ..plan.recipe import tool_version
from ..plan.showing import Row, rows
from ..telling.errors import ConvertError

if TYPE_CHECKING:
    from .journal import Done

SEAL = "record_sha256"

# What readers of a record rely on: a type, (alternatives), [items], {key: value} or {str: value} for any names.
_TEXT_OR_NONE = (str, NoneType)
_SHAPE: Mapping[Any, Any] = {
    "tool_version": str,
    "recipe_sha256": str,
    "source": {"repo": _TEXT_OR_NONE, "commit": _TEXT_OR_NONE, "pipeline": _TEXT_OR_NONE},
    "recipe": {
        "manifest": str,
        "manifest_sha256": str,
        "ignored_layers": [str],
        "components": [str],
        "compact": bool,
        "weight_block_size": ([int], NoneType),
        "activation_scheme": str,
        "max_shard_size": (int, NoneType),
        "input_scales_sha256": _TEXT_OR_NONE,
    },
    "components": {
        str: {
            "class": _TEXT_OR_NONE,
            "fp8_modules": {str: int},
            "shared_scales": [[str]],
            "decisions": [
                {"mode": _TEXT_OR_NONE, "kind": _TEXT_OR_NONE, "rule": str, "why": str, "dtypes": {str: int}}
            ],
        }
    },
    "shards": {str: {"size": int, "sha256": str, "source": str, "source_size": int, "source_sha256": str}},
    "files": {str: {"size": int, "sha256": str}},
}


def make_record(plan: Plan, done: Mapping[str, Done]) -> dict[str, Any]:
    """The record of a finished conversion; `done` has every output file but the record itself."""
    sources = {file.path: shard.source for shard in plan.shards for file in shard.files}
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
                    "source": sources[path].path,
                    "source_size": done[path].source_size,
                    "source_sha256": done[path].source_sha256,
                }
                for path in sorted(sources)
            },
            "files": {p: {"size": d.size, "sha256": d.sha256} for p, d in sorted(done.items())},
        }
    )


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a digest of itself, so that a damaged record is found too."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {**record, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_record(root: Path) -> dict[str, Any] | None:
    """The record of a converted snapshot, None if the folder has none.

    Its types and paths are checked, its digests are not. Raises ConvertError if it is no record that can be used.
    """
    path = root / layout.RECORD_FILE
    if not path.is_file():
        return None
    record = _parse(path, _read(path))
    if problem := _problem(record):
        raise ConvertError(f"{path} {problem}; convert the snapshot again.")
    return record


def check_record(root: Path) -> str | None:
    """What is wrong with the record itself, None if it is, byte for byte, what was written.

    Raises ConvertError if it is no JSON or cannot be read.
    """
    path = root / layout.RECORD_FILE
    raw = _read(path)
    record = _parse(path, raw)
    if problem := _problem(record):
        return problem
    try:
        as_written = seal({k: v for k, v in record.items() if k != SEAL}) == record
        as_written = as_written and layout.encode_json(record) == raw
    except (ValueError, RecursionError):  # what no encoder writes, such as half a surrogate pair
        as_written = False
    return None if as_written else "was changed since it was written"


def _read(path: Path) -> bytes:
    return read_whole(path, str(path), layout.MAX_RECORD_BYTES)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        record = parse_json(raw)
    except ValueError as error:
        raise ConvertError(f"{path} is damaged (it {error}); convert the snapshot again.") from error
    if not isinstance(record, dict):
        raise ConvertError(f"{path} is damaged (not a JSON object); convert the snapshot again.")
    return record


def _problem(record: Mapping[str, Any]) -> str | None:
    """What keeps readers from using a record, None if nothing does."""
    if (stated := record.get("format")) != layout.RECORD_FORMAT:
        return f"has the format {stated!r:.40}, and this version reads {layout.RECORD_FORMAT}"
    what = next(_misfits(record, _SHAPE, "the record"), None) or next(_contradictions(record), None)
    return f"is damaged ({what})" if what else None


def _misfits(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Where a value is not of its shape; `where` names it."""
    if isinstance(shape, tuple):
        fits = any(next(_misfits(value, s, where), None) is None for s in shape)
    elif isinstance(shape, type):
        fits = type(value) is shape and (not isinstance(value, int) or 0 <= value < 2**63)
    else:
        fits = isinstance(value, type(shape))
    if not fits:
        yield f"{where} is {value!r:.40}"
    elif isinstance(shape, list):
        for item in value:
            yield from _misfits(item, shape[0], f"an item of {where}")
    elif isinstance(shape, dict):
        for name in value if str in shape else shape:
            if name not in value:
                yield f"{where} lacks {name}"
            else:
                yield from _misfits(value[name], shape.get(str) or shape[name], f"{name!r:.80} of {where}")


def _contradictions(record: Mapping[str, Any]) -> Iterator[str]:
    """Names that are no paths below the snapshot, and parts that do not fit together."""
    components, shards, files = record["components"], record["shards"], record["files"]
    for path in (*filter(None, components), *files):
        if not path.isprintable() or any(part in ("", ".", "..") for part in path.split("/")):
            yield f"it names {path!r:.80}, which is no path of a snapshot"
    for path, entry in shards.items():
        if {k: files.get(path, {}).get(k) for k in ("size", "sha256")} != {k: entry[k] for k in ("size", "sha256")}:
            yield f"its shards and files disagree about {path!r:.80}"
        elif path.rpartition("/")[0] not in components:
            yield f"the shard {path!r:.80} is of no component"
    block = record["recipe"]["weight_block_size"]
    if block is not None and len(block) != 2:
        yield f"its weight_block_size is {block!r:.40}"


def _component(component: ComponentPlan) -> dict[str, Any]:
    before, after = component.weight_bytes
    return {
        "class": component.source.class_name,
        "fp8_modules": {
            mode: sum(t.decision.mode == mode for t in component.tensors) for mode in (layout.W8A8, layout.STORAGE)
        },
        "bytes_before": before,
        "bytes_after": after,
        "shared_scales": _shared_scales(component),
        "decisions": [
            {
                "mode": r.mode,
                "scheme": r.scheme,
                "kind": r.kind,
                "rule": r.rule,
                "why": r.why,
                "tensors": r.count,
                "dtypes": _dtypes(component, r),
                "params": r.params,
                "bytes_before": r.bytes_before,
                "bytes_after": r.bytes_after,
            }
            for r in rows(component)
        ],
    }


def _shared_scales(component: ComponentPlan) -> list[list[str]]:
    """The modules of every fusion group that is converted with one scale per tensor: they have the same one."""
    groups: dict[str, list[str]] = {}
    for tensor in component.tensors:
        if tensor.decision.group is not None:
            groups.setdefault(tensor.decision.group, []).append(tensor.module)
    return sorted(sorted(modules) for modules in groups.values())


def _dtypes(component: ComponentPlan, row: Row) -> dict[str, int]:
    """How many of a row's tensors have each source dtype."""
    alike = attrgetter("mode", "scheme", "kind", "rule", "why")
    return dict(sorted(Counter(t.info.dtype for t in component.tensors if alike(t.decision) == alike(row)).items()))
