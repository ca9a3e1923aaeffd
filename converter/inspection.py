"""What a snapshot holds, converted or not: per component and module kind FP8, kept and why, scales and bytes.

The answer comes from the shards' own headers; the record, where there is one, only adds the reasons.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import layout
from .errors import ConvertError
from .header import TensorInfo
from .modules import module_map
from .record import check_record, read_record
from .source import Component, LocalFiles, describe, require_folder

_SCALES = (layout.WEIGHT_SCALE, layout.WEIGHT_SCALE_INV, layout.INPUT_SCALE)


@dataclass(frozen=True)
class Group:
    """Tensors of one component that are alike. `what` is "fp8", "scale" or "kept"."""

    what: str
    mode: str | None
    scheme: str | None
    kind: str | None
    dtype: str
    why: str
    tensors: int
    params: int
    bytes: int


@dataclass(frozen=True)
class ComponentView:
    """One component as it lies on disk. `problems` are FP8 weights that no reader could use."""

    name: str
    class_name: str | None
    quant_method: str | None
    groups: tuple[Group, ...]
    problems: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(g.bytes for g in self.groups)


@dataclass(frozen=True)
class Inspection:
    """A whole snapshot."""

    path: str
    converted_by: str | None
    source: str | None
    components: tuple[ComponentView, ...]

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return asdict(self)


def inspect(path: str | Path) -> Inspection:
    """Inspect a snapshot's folder, or one component's. Raises ConvertError."""
    root = Path(path)
    require_folder(root)
    record, damaged = _record(root)
    snapshot = describe(LocalFiles(root), allow_converted=True)
    recorded = record.get("components", {})
    source = record.get("source", {})
    views = tuple(_view(c, recorded.get(c.name, {})) for c in snapshot.components)
    return Inspection(
        str(root),
        "fp8-convert, with a damaged record: run verify" if damaged else _tool(record, views),
        source.get("repo") and f"{source['repo']} @ {source.get('commit')}",
        views,
    )


def _record(root: Path) -> tuple[dict[str, Any], bool]:
    """The record and whether there is a damaged one, which is not used: its reasons cannot be believed."""
    try:
        record = read_record(root)
        damaged = record is not None and check_record(root) is not None
    except ConvertError:
        record, damaged = None, True
    return ({} if damaged else record or {}), damaged


def _tool(record: dict[str, Any], views: tuple[ComponentView, ...]) -> str | None:
    if "tool_version" in record:
        return f"fp8-convert {record['tool_version']}"
    ours = any(group.mode is not None for view in views for group in view.groups)  # a component of a snapshot
    return f"fp8-convert; {layout.RECORD_FILE} is not here" if ours else None


def _view(component: Component, record: dict[str, Any]) -> ComponentView:
    kinds = module_map(component).kinds
    modules: dict[str, tuple[str, str]] = {}
    for shard in component.shards:
        try:
            modules |= layout.decode_modules(shard.header.metadata)
        except ValueError as error:
            raise ConvertError(
                f"{shard.path} has unreadable fp8_convert metadata ({error!s:.200}); convert it again."
            ) from error
    names = {t.name for t in component.tensors}
    config = component.config.get(layout.CONFIG_KEY)
    config = config if isinstance(config, dict) else {}
    ignored = config.get("ignored_layers")
    ignored = ignored if isinstance(ignored, list) else []
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    problems = []
    for tensor in component.tensors:
        module = tensor.name.removesuffix(layout.WEIGHT)
        kind = kinds.get(module) if tensor.name.endswith(layout.WEIGHT) else None
        what, mode, scheme = _classify(tensor, modules)
        why = _why(what, kind, tensor.dtype, record, module in ignored)
        total = sums[what, mode, scheme, kind, tensor.dtype, why]
        for i, value in enumerate((1, tensor.numel, tensor.nbytes)):
            total[i] += value
        if tensor.dtype == "F8_E4M3" and not any(module + s in names for s in _SCALES[:2]):
            problems.append(f"{tensor.name} has no scale")
    groups = sorted((Group(*k, *v) for k, v in sums.items()), key=lambda g: (g.what, -g.bytes))
    return ComponentView(
        component.name, component.class_name, config.get("quant_method"), tuple(groups), tuple(problems)
    )


def _classify(tensor: TensorInfo, modules: dict[str, tuple[str, str]]) -> tuple[str, str | None, str | None]:
    """(what, mode, scheme) of a tensor."""
    if tensor.name.endswith(_SCALES):
        return "scale", None, None
    if tensor.dtype != "F8_E4M3":
        return "kept", None, None
    mode, scheme = modules.get(tensor.name.removesuffix(layout.WEIGHT), (None, None))
    return "fp8", mode, scheme


def _why(what: str, kind: str | None, dtype: str, record: dict[str, Any], ignored: bool) -> str:
    """The rules that kept tensors of this kind and dtype, as the record counts them, else what the config tells."""
    if what != "kept":
        return ""
    counts: dict[str, int] = defaultdict(int)
    for d in record.get("decisions", []):
        if (d["rule"], d["kind"]) == ("component", None):  # kept as a whole, whatever is in it
            return str(d["why"])
        if d["mode"] is None and d["kind"] == kind and dtype in d["dtypes"]:
            counts[d["rule"]] += d["dtypes"][dtype]
    if counts:
        return "; ".join(f"{rule} ({count})" for rule, count in counts.items())
    return "ignored_layers" if ignored else ""
