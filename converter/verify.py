"""`verify`: is a converted snapshot still what was written, is it consistent, and is it what its source gives?

Three questions, each answered by findings: do all bytes have the record's digests; do headers, scales, indices and
configs fit together as readers need them; and, with the source, are codes and scales those of the formula.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import layout
from .errors import ConvertError
from .header import Header, TensorInfo, read_header
from .locate import SourceOptions, fetch, open_source
from .manifest import load_manifest
from .modules import module_map
from .plan import Plan, ShardPlan, make_plan
from .progress import Progress, Silent
from .reading import open_for_reading, read_exactly
from .recipe import Recipe
from .record import check_record, read_record
from .source import CONFIG, Component, LocalFiles, describe, require_folder
from .stream import Engine, measure, stream_shard
from .target import STAGING
from .writing import file_sha256

_SCALE_BYTES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Finding:
    """Something wrong with one file."""

    path: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """What was checked, and what is wrong with it."""

    path: str
    files: int
    tensors: int
    compared_with: str | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    path: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    manifest: str | None = None,
    options: SourceOptions | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a converted snapshot; with `source` (a folder or a Hub id), also against what it was made from.

    manifest: the manifest it was converted with, where that was one of your own. Raises ConvertError where there is
    nothing to verify: no converted snapshot, or a source that cannot be read.
    """
    root = Path(path)
    progress = progress or Silent()
    require_folder(root)
    record = read_record(root)
    if record is None:
        advice = "run its conversion again" if (root / STAGING).exists() else "give the folder that fp8-convert wrote"
        raise ConvertError(
            f"{root} has no {layout.RECORD_FILE}, so it is no snapshot that fp8-convert finished; {advice}."
        )
    findings = list(check_record(root))
    if findings:  # nothing else can be believed
        problems = tuple(Finding(layout.RECORD_FILE, problem) for problem in findings)
        return Verification(str(root), 1, 0, None, problems)
    progress.start(sum(entry["size"] for entry in record["files"].values()))
    found = [*_check_files(root, record, progress)]
    progress.close()
    tensors = 0
    if not found:
        snapshot = describe(LocalFiles(root), allow_converted=True)
        for component in snapshot.components:
            tensors += sum(1 for _ in component.tensors)
            found += _check_component(root, component)
        if source is not None:
            found += _compare(root, record, source, manifest, options or SourceOptions(), progress)
    compared = None if source is None else os.fspath(source)
    return Verification(str(root), len(record["files"]) + 1, tensors, compared, tuple(found))


def _check_files(root: Path, record: Mapping[str, Any], progress: Progress) -> Iterator[Finding]:
    """Sizes and digests of all that the record lists, and files that it does not list."""
    files: Mapping[str, Mapping[str, Any]] = record["files"]
    for name, entry in files.items():
        file = root / name
        if not file.is_file():
            yield Finding(name, "is missing")
        elif file.stat().st_size != entry["size"]:
            yield Finding(name, f"has {file.stat().st_size} bytes instead of {entry['size']}")
        else:
            fd = open_for_reading(file, name)
            try:
                digest = file_sha256(fd)
            except OSError as error:
                yield Finding(name, f"cannot be read ({error.strerror})")
            else:
                if digest != entry["sha256"]:
                    yield Finding(name, "has another sha256 than the record says")
            finally:
                os.close(fd)
        progress.advance(entry["size"])
    for name in LocalFiles(root).sizes():
        if name not in files and name != layout.RECORD_FILE and name.endswith((".safetensors", ".json")):
            yield Finding(name, "is not in the record")


def _check_component(root: Path, component: Component) -> Iterator[Finding]:
    """What readers rely on: every FP8 weight with its scale, every scale usable, the config in agreement."""
    config = component.config.get(layout.CONFIG_KEY)
    by_name = {t.name: (t, s) for s in component.shards for t in s.header.tensors}
    modules: dict[str, tuple[str, str]] = {}
    for shard in component.shards:
        try:
            here = layout.decode_modules(shard.header.metadata)
        except ValueError as error:
            yield Finding(shard.path, f"has unreadable fp8_convert metadata ({error})")
            continue
        names = {t.name for t in shard.header.tensors}
        for module in here:
            if module + layout.WEIGHT not in names:
                yield Finding(shard.path, f"its metadata name {module}, whose weight it does not hold")
        modules |= here
    for name, (tensor, shard) in by_name.items():
        module = name.removesuffix(layout.WEIGHT)
        if tensor.dtype == "F8_E4M3" and module not in modules:
            yield Finding(shard.path, f"{name} is FP8 and the metadata do not name it")
        if name.endswith((layout.WEIGHT_SCALE, layout.WEIGHT_SCALE_INV, layout.INPUT_SCALE)):
            owner = name.rpartition(".")[0]
            if owner not in modules:
                yield Finding(shard.path, f"{name} is a scale without an FP8 weight")
            elif not _usable(root / shard.path, shard.header, tensor):
                yield Finding(shard.path, f"{name} holds a scale that is not finite and positive")
    for module, (mode, scheme) in modules.items():
        entry = by_name.get(module + layout.WEIGHT)
        if entry is None:
            continue
        yield from _check_weight(module, mode, scheme, entry[0], entry[1].path, by_name)
    if modules and not isinstance(config, dict):
        yield Finding(component.path(CONFIG), f"has no {layout.CONFIG_KEY}, so readers would take codes for weights")
    elif isinstance(config, dict):
        yield from _check_config(component, config, modules)


def _check_weight(
    module: str, mode: str, scheme: str, weight: TensorInfo, path: str, by_name: Mapping[str, tuple[TensorInfo, Any]]
) -> Iterator[Finding]:
    block = layout.scheme_block(scheme)
    if weight.dtype != "F8_E4M3":
        yield Finding(path, f"{weight.name} is {weight.dtype}, and the metadata say {mode} {scheme}")
        return
    key = layout.scale_key(module, block)
    if key not in by_name:
        yield Finding(path, f"{weight.name} has no scale {key}")
        return
    scale = by_name[key][0]
    expected = layout.scale_shape(weight.shape, block)
    if scale.dtype != "F32" or scale.shape != expected:
        yield Finding(path, f"{key} is {scale.dtype} {list(scale.shape)} instead of F32 {list(expected)}")


def _check_config(
    component: Component, config: Mapping[str, Any], modules: Mapping[str, tuple[str, str]]
) -> Iterator[Finding]:
    path = component.path(CONFIG)
    expected = layout.quantization_config(native=False, activation_scheme="dynamic", ignored_layers=[], block=None)
    if set(config) != set(expected):
        yield Finding(path, f"{layout.CONFIG_KEY} has the keys {sorted(config)} instead of {sorted(expected)}")
        return
    kinds = module_map(component).kinds
    linears = {name for name, kind in kinds.items() if kind == "Linear"}
    if set(config["ignored_layers"]) != linears - set(modules):
        yield Finding(path, "ignored_layers are not exactly the linear layers that are not FP8")
    native = len(set(modules.values())) > 1 or any(kinds.get(m) != "Linear" for m in modules)
    method = layout.QUANT_METHOD_NATIVE if native else layout.QUANT_METHOD
    if config["quant_method"] != method:
        yield Finding(path, f"quant_method is {config['quant_method']!r} instead of {method!r}")
    static = config["activation_scheme"] == "static"
    names = {t.name for t in component.tensors}
    for module, (mode, _) in modules.items():
        if static and mode == layout.W8A8 and module + layout.INPUT_SCALE not in names:
            yield Finding(path, f"activations are static and {module} has no input_scale")


def _usable(path: Path, header: Header, scale: TensorInfo) -> bool:
    if scale.dtype != "F32":
        return True  # reported with its shape
    fd = open_for_reading(path, str(path))
    try:
        for start in range(scale.start, scale.end, _SCALE_BYTES_AT_ONCE):
            data = bytearray(min(_SCALE_BYTES_AT_ONCE, scale.end - start))
            read_exactly(fd, memoryview(data), header.data_start + start, str(path))
            values = np.frombuffer(data, np.float32)
            if not (np.isfinite(values).all() and (values > 0).all()):
                return False
        return True
    finally:
        os.close(fd)


def _compare(
    root: Path,
    record: Mapping[str, Any],
    source: str | os.PathLike[str],
    manifest: str | None,
    options: SourceOptions,
    progress: Progress,
) -> Iterator[Finding]:
    """Convert the source again in memory and compare header, codes and scales."""
    snapshot = fetch(open_source(source, options), options)
    plan = make_plan(snapshot, _recipe(root, record, manifest))
    progress.start(plan.bytes_to_read)
    with Engine(workers=max(1, (os.cpu_count() or 2) - 1)) as engine:
        for shard in plan.shards:
            if shard.path not in record["shards"]:
                yield Finding(shard.path, "is missing, though the source gives it")
                continue
            yield from _compare_shard(root, shard, plan, engine)
            progress.advance(shard.source.size)
    progress.close()
    for path in sorted(set(record["shards"]) - {s.path for s in plan.shards}):
        yield Finding(path, "is not what the source gives")
    for path, data in plan.files.items():
        if not (root / path).is_file() or (root / path).read_bytes() != data:
            yield Finding(path, "differs from what the source gives")


def _compare_shard(root: Path, shard: ShardPlan, plan: Plan, engine: Engine) -> Iterator[Finding]:
    fd = open_for_reading(root / shard.path, shard.path)
    try:
        header = bytearray(len(shard.header))
        read_exactly(fd, memoryview(header), 0, shard.path)
        if header != shard.header:
            yield Finding(shard.path, "has another header than the source gives")
            return
        siblings = [s for s in plan.shards if s.component == shard.component]
        amaxes = measure(siblings, shard.schedule.measured, engine)
        position = len(header)
        wrong: dict[str, None] = {}
        for chunk in stream_shard(shard, engine, amaxes=amaxes, input_scales=plan.input_scales):
            written = torch.empty(chunk.data.numel(), dtype=torch.uint8)
            read_exactly(fd, written.numpy().data, position, shard.path)
            position += chunk.data.numel()
            if not torch.equal(written, chunk.data):
                wrong[chunk.name] = None
        for name in wrong:
            yield Finding(shard.path, f"{name} differs from what the source gives")
    finally:
        os.close(fd)


def _recipe(root: Path, record: Mapping[str, Any], manifest: str | None) -> Recipe:
    """The recipe that the record states."""
    stated = record["recipe"]
    chosen = load_manifest(manifest or stated["manifest"])
    if chosen.sha256 != stated["manifest_sha256"]:
        raise ConvertError(
            f"{root} was converted with another version of the manifest {stated['manifest']}; pass that one with "
            "--manifest."
        )
    block = stated["weight_block_size"]
    return Recipe(
        manifest=chosen,
        ignored_layers=tuple(stated["ignored_layers"]),
        components=tuple(stated["components"]),
        compact=stated["compact"],
        block=tuple(block) if block else None,
        activation_scheme=stated["activation_scheme"],
        input_scales=_stored_input_scales(root, record) if stated["input_scales_sha256"] else None,
    )


def _stored_input_scales(root: Path, record: Mapping[str, Any]) -> dict[str, float]:
    scales = {}
    for path in record["shards"]:
        header = read_header(root / path, path)
        fd = open_for_reading(root / path, path)
        try:
            for tensor in header.tensors:
                if tensor.name.endswith(layout.INPUT_SCALE):
                    data = bytearray(4)
                    read_exactly(fd, memoryview(data), header.data_start + tensor.start, path)
                    scales[tensor.name.removesuffix(layout.INPUT_SCALE)] = float(np.frombuffer(data, np.float32)[0])
        finally:
            os.close(fd)
    return scales
