"""What a snapshot or a safetensors file holds, converted or not, by us or others: FP8, kept and why, scales, bytes.

The answer comes from headers alone, so a Hub repository is not downloaded; the record, where there is one, only adds
the reasons. What is wrong is said once for all tensors that share it.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checks.weight_errors import LayerError, layer_errors
from .format import layout
from .format.header import TensorInfo, read_header
from .format.record import Record, RecordedComponent, RecordedLora, read_record, record_problem
from .output.unfinished import Unfinished, find_unfinished, is_published
from .plan.recipe import ACTIVATION_SCHEMES
from .snapshot.access import HubAccess
from .snapshot.describing import describe
from .snapshot.files import Files
from .snapshot.fp8 import Fault, Fp8Component, read_fp8
from .snapshot.locate import check_variant, open_files
from .snapshot.modules import module_map
from .snapshot.snapshot import CONFIG, Component, Shard
from .telling.errors import ConvertError
from .telling.notebook import Brief, html_table, one_line
from .telling.quantities import byte_count, plural

_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALE_DTYPES = ("F32", "F16", "BF16", "F64", "F8_E8M0")
_OTHERS_SCALE = ".scale_weight"  # ComfyUI's name
_WEIGHT_SCALES = (layout.WEIGHT_SCALE, layout.WEIGHT_SCALE_INV, _OTHERS_SCALE)
_COMFYUI = (_OTHERS_SCALE, ".scale_input", ".comfy_quant", "scaled_fp8")
_SCALES = (*_WEIGHT_SCALES, layout.INPUT_SCALE, *_COMFYUI)

_Found = dict[tuple[str, str], list[str]]  # (one is wrong, several are wrong) -> which
_NO_SCALE = "FP8 weight has no scale", "FP8 weights have no scale"
_NO_FIT = "scale does not fit its weight", "scales do not fit their weights"
_NOT_NAMED = "FP8 weight is not in the metadata", "FP8 weights are not in the metadata"
_NO_WEIGHT = "FP8 layer by the metadata, whose weight is not", "FP8 layers by the metadata, whose weights are not"
# What is wrong with weights that metadata name, in words for all that share it, and how each of them is shown.
_OURS = {
    Fault.NO_SCALE: (_NO_SCALE, "{problem.name}"),
    Fault.SCALE: (_NO_FIT, "{problem.name} ({problem.found})"),
    Fault.SCALAR: (_NO_FIT, "{problem.name} ({problem.found})"),
    Fault.NOT_ROWS: (_NO_FIT, "{problem.name} ({problem.found})"),
    Fault.UNNAMED: (_NOT_NAMED, "{problem.name}"),
    Fault.NOT_WEIGHT: (_NOT_NAMED, "{problem.name}"),
    Fault.ABSENT: (_NO_WEIGHT, "{problem.module}"),
    Fault.NOT_CODES: (_NO_WEIGHT, "{problem.module}"),
}


@dataclass(frozen=True, repr=False)
class Group(Brief):
    """Tensors of one component that are alike. `what` is "fp8", "scale" or "kept".

    `scheme` is None where FP8 has no scale; for what another tool wrote it is "tensor", "channel" or "block".
    """

    what: str
    mode: str | None
    scheme: str | None
    kind: str | None
    dtype: str
    why: str
    tensors: int
    params: int
    bytes: int


@dataclass(frozen=True, repr=False)
class ComponentView(Brief):
    """One component as it is on disk. `problems` are sentences, one for each kind of problem.

    errors: what the codes of its FP8 modules miss of their source, where the record says so.
    """

    name: str
    class_name: str | None
    quant_method: str | None
    groups: tuple[Group, ...]
    problems: tuple[str, ...]
    errors: tuple[LayerError, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(g.bytes for g in self.groups)


@dataclass(frozen=True, repr=False)
class Inspection:
    """A whole snapshot, or one safetensors file.

    unfinished: tells of a conversion that stopped midway. target: for which reader it was written, if its record says.
    """

    path: str
    converted_by: str | None
    source: str | None
    components: tuple[ComponentView, ...]
    commit: str | None = None
    unfinished: Unfinished | None = None
    target: str | None = None
    merged_loras: tuple[RecordedLora, ...] = ()

    def __repr__(self) -> str:
        fp8 = sum(g.tensors for c in self.components for g in c.groups if g.what == "fp8")
        problems = plural(sum(len(c.problems) for c in self.components), "problem")
        return one_line(self, f"{self.title}; {plural(fp8, 'FP8 weight')}, {problems}")

    def _repr_html_(self) -> str:
        rows = [
            (c.name, c.class_name, " ".join(filter(None, (g.what, g.mode, g.scheme))), g.kind, g.dtype, g.tensors,
             byte_count(g.bytes))
            for c in self.components for g in c.groups
        ]  # fmt: skip
        header = ("component", "class", "what", "kind", "dtype", "tensors", "bytes")
        return html_table(self.title, header, rows, [problem for c in self.components for problem in c.problems])

    @property
    def title(self) -> str:
        """What it is, in one line."""
        commit = f" @ {self.commit[:12]}" if self.commit else ""
        made = self.converted_by or "not converted by fp8-convert"
        if self.unfinished is None:
            return f"{self.path}{commit}: {made}"
        advice = "run the same command again to finish it"
        if self.components:
            return f"{self.path}: {made}; a conversion that would replace it is {self.unfinished}: {advice}"
        return f"{self.path}: {self.unfinished}; {advice}"

    @property
    def ok(self) -> bool:
        """Whether it is whole and no problem was found."""
        return bool(self.components) and not any(c.problems for c in self.components)

    def worst(self, count: int | None = None) -> list[tuple[str, LayerError]]:
        """Components and layers by their SQNR by row, the lowest first; None for all of them."""
        layers = [(component.name, layer) for component in self.components for layer in component.errors]
        return sorted(layers, key=lambda named: named[1].badness, reverse=True)[:count]

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {"ok": self.ok, **asdict(self)}


def inspect(path: str | os.PathLike[str], *, options: HubAccess | None = None) -> Inspection:
    """Inspect a snapshot's folder or Hub id (which is not downloaded), a component's folder or a .safetensors file.

    The output of a conversion that was interrupted is not an error here: see `unfinished`. Raises ConvertError.
    """
    options = options or HubAccess()
    place = Path(path)
    if os.path.isfile(place) or (place.suffix == ".safetensors" and not os.path.isdir(place)):
        return _inspect_file(place)
    unfinished = find_unfinished(place)
    if unfinished is not None and not is_published(place):
        return Inspection(str(place), None, None, (), unfinished=unfinished)
    files = open_files(path, options)
    snapshot = describe(files, variant=options.variant, allow_converted=True)
    check_variant(snapshot, options)
    record, damaged = _record(files)
    recorded = record.components if record is not None else {}
    return Inspection(
        snapshot.label,
        "fp8-convert, with a damaged record: run verify" if damaged else _tool(record, snapshot.components),
        f"{record.source.repo} @ {record.source.commit}" if record is not None and record.source.repo else None,
        tuple(_view(c, recorded.get(c.name), alone=snapshot.single_files) for c in snapshot.components),
        snapshot.commit,
        unfinished,
        record.recipe.target if record is not None else None,
        () if record is None else record.recipe.merged_loras,
    )


def _inspect_file(path: Path) -> Inspection:
    """One safetensors file, whoever wrote it; what its modules are is not known."""
    if path.suffix != ".safetensors":
        raise ConvertError(f"{path} is not a .safetensors file; give one, or the folder of a snapshot.")
    header = read_header(path, str(path))
    shard = Shard(path.name, header.file_size, header)
    component = Component("", "", None, {}, path.stem, (shard,), None)
    view = _view(component, None, alone=True)
    return Inspection(str(path), _tool(None, [component]), None, (view,))


def _record(files: Files) -> tuple[Record | None, bool]:
    """The record and whether there is a damaged one, which is not used: its reasons cannot be believed."""
    if layout.RECORD_FILE not in files.sizes():
        return None, False
    try:
        raw = files.read(layout.RECORD_FILE, layout.MAX_RECORD_BYTES)
        if record_problem(raw, layout.RECORD_FILE) is None:
            return read_record(raw, layout.RECORD_FILE), False
    except ConvertError:
        pass
    return None, True


def _tool(record: Record | None, components: Iterable[Component]) -> str | None:
    """Who made it FP8, None if nobody did."""
    if record is not None:
        return f"fp8-convert {record.tool_version}"
    if any(layout.METADATA_KEY in s.header.metadata for c in components for s in c.shards):
        return f"fp8-convert; {layout.RECORD_FILE} is not here"  # a part of a snapshot
    tensors = [t for c in components for t in c.tensors]
    if any(t.name.endswith(_COMFYUI) for t in tensors):
        return "another tool, in ComfyUI's format"
    return "another tool" if any(t.dtype in _FP8 for t in tensors) else None


def _view(component: Component, record: RecordedComponent | None, *, alone: bool = False) -> ComponentView:
    """A component, or a file that stands `alone`, without a config."""
    kinds = module_map(component).kinds
    fp8 = _read(component)
    tensors = {t.name: t for t in component.tensors}
    scales = {t.name: _scale_of(t, tensors) for t in tensors.values() if _is_fp8(t)}
    are_scales = {scale.name for scale in scales.values() if scale is not None}
    config, problems = _config(component)
    ignored = _texts(config.get("ignored_layers"))
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in tensors.values():
        module = tensor.name.removesuffix(layout.WEIGHT)
        kind = kinds.get(module) if tensor.name.endswith(layout.WEIGHT) else None
        what, mode, scheme = "kept", None, None
        if tensor.name in scales:
            what, how = "fp8", fp8.stated.get(module)
            mode, scheme = (how.mode, how.scheme) if how else (None, _scheme(tensor, scales[tensor.name]))
        elif tensor.name in are_scales or tensor.name.endswith(_SCALES):
            what = "scale"
        why = _why(what, kind, tensor.dtype, record, module in ignored)
        total = sums[what, mode, scheme, kind, tensor.dtype, why]
        for i, value in enumerate((1, tensor.numel, tensor.nbytes)):
            total[i] += value
    groups = sorted((Group(*k, *v) for k, v in sums.items()), key=lambda g: (g.what, -g.bytes))
    problems += _sentences(_faults(tensors, scales, fp8))
    if not alone:
        problems += _contradictions(component, config, bool(scales))
    method = config.get("quant_method")
    method = method if isinstance(method, str) else None
    errors = layer_errors(component, record, fp8, single=alone) if record is not None else ()
    return ComponentView(component.name, component.class_name, method, tuple(groups), tuple(problems), errors)


def _read(component: Component) -> Fp8Component:
    """What the component's files say of its FP8 weights. Raises ConvertError for metadata that cannot be read."""
    fp8 = read_fp8(component)
    for problem in fp8.problems:
        if problem.fault is Fault.METADATA:
            raise ConvertError(f"{problem.file} {problem}; convert it again.")
    return fp8


def _is_fp8(tensor: TensorInfo) -> bool:
    """Whether it holds FP8 codes of weights; other formats have scales in FP8."""
    return tensor.dtype in _FP8 and not tensor.name.endswith(_SCALES)


def _scale_of(weight: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The scale beside an FP8 weight, under any name that tools give it."""
    module = weight.name.removesuffix(layout.WEIGHT)
    names = (*(module + s for s in (*_WEIGHT_SCALES, ".scale")), weight.name + "_scale", weight.name + "_scale_inv")
    return next((tensors[name] for name in names if name in tensors), None)


def _scheme(weight: TensorInfo, scale: TensorInfo | None) -> str | None:
    """How another tool's scale covers its weight."""
    if scale is None:
        return None
    if scale.numel == 1:
        return "tensor"
    return "channel" if scale.numel == math.prod(weight.shape[:1]) else "block"


def _faults(
    tensors: Mapping[str, TensorInfo],
    scales: Mapping[str, TensorInfo | None],
    fp8: Fp8Component,
) -> _Found:
    """FP8 weights that readers could not use, and what has lost its weight."""
    found: _Found = defaultdict(list)
    if fp8.stated:
        for problem in fp8.problems:
            if problem.fault in _OURS:
                words, example = _OURS[problem.fault]
                found[words].append(example.format(problem=problem))
    else:
        for name, scale in scales.items():
            if scale is None:
                found[_NO_SCALE].append(name)
            elif not _fits(tensors[name], scale):
                found[_NO_FIT].append(f"{scale.name} ({scale.dtype} {list(scale.shape)})")
    for name in tensors:
        suffix = next((s for s in _WEIGHT_SCALES if name.endswith(s)), None)
        if suffix is not None and _is_orphan(name.removesuffix(suffix), tensors):
            found["scale has no quantised weight", "scales have no quantised weight"].append(name)
    return found


def _fits(weight: TensorInfo, scale: TensorInfo) -> bool:
    """Whether a scale's dtype and shape are such as some tool writes."""
    if scale.dtype not in _SCALE_DTYPES:
        return False
    blocks = len(scale.shape) == len(weight.shape) and all(
        0 < s <= w for s, w in zip(scale.shape, weight.shape, strict=True)
    )
    return scale.numel == 1 or blocks or scale.shape == weight.shape[:1]


def _is_orphan(module: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a scale's module has no weight that a scale could be for."""
    if any(module + suffix in tensors for suffix in (".weight_packed", ".qweight")):
        return False
    weight = tensors.get(module + layout.WEIGHT)
    return weight is None or weight.dtype in ("BF16", "F16", "F32", "F64")


def _sentences(found: _Found) -> Iterator[str]:
    """One sentence per kind of problem, with a count and an example."""
    for (one, several), names in found.items():
        example = f"{names[0]:.120}"
        yield f"1 {one}: {example}" if len(names) == 1 else f"{len(names)} {several}, such as {example}"


def _config(component: Component) -> tuple[Mapping[str, Any], list[str]]:
    """What config.json has under quantization_config, as far as it can be used, and what is wrong with it."""
    config = component.config.get(layout.CONFIG_KEY)
    if config is None:
        return {}, []
    if not isinstance(config, dict):
        return {}, [f"{layout.CONFIG_KEY} in {component.path(CONFIG)} is {config!r:.60} instead of an object"]
    block = config.get("weight_block_size")
    checks = {"quant_method": isinstance(config.get("quant_method"), str)}
    if config.get("quant_method") in (layout.QUANT_METHOD, layout.QUANT_METHOD_NATIVE):
        ignored = config.get("ignored_layers", [])
        checks |= {
            "activation_scheme": config.get("activation_scheme", "dynamic") in ACTIVATION_SCHEMES,
            "ignored_layers": ignored is None or (isinstance(ignored, list) and len(_texts(ignored)) == len(ignored)),
            "weight_block_size": block is None
            or (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)),
        }
    where = f"{layout.CONFIG_KEY} in {component.path(CONFIG)}"
    return config, [
        f"{where} has the {key} {config[key]!r:.60}" if key in config else f"{where} has no {key}"
        for key, right in checks.items()
        if not right
    ]


def _texts(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _contradictions(component: Component, config: Mapping[str, Any], fp8: bool) -> Iterator[str]:
    """Where config.json and shards tell readers different things."""
    if fp8 and component.config.get(layout.CONFIG_KEY) is None:
        yield f"{component.path(CONFIG)} has no {layout.CONFIG_KEY}, so readers would take FP8 codes for weights"
    method = config.get("quant_method")
    if not fp8 and method in (layout.QUANT_METHOD, layout.QUANT_METHOD_NATIVE):
        yield f"{component.path(CONFIG)} has the quant_method {method}, and no weight is FP8"


def _why(what: str, kind: str | None, dtype: str, record: RecordedComponent | None, ignored: bool) -> str:
    """The rules that kept tensors of this kind and dtype, as the record counts them, else what the config tells."""
    if what != "kept":
        return ""
    counts: dict[str, int] = defaultdict(int)
    for d in record.decisions if record is not None else ():
        if (d.rule, d.kind) == ("component", None):  # kept as a whole, whatever is in it
            return d.why
        if d.mode is None and d.kind == kind and dtype in d.dtypes and d.bytes_after:
            counts[d.rule] += d.dtypes[dtype]
    if counts:
        return "; ".join(f"{rule} ({count})" for rule, count in counts.items())
    return "ignored_layers" if ignored else ""
