"""`verify`: is a converted snapshot still what was written, is it consistent, and is it what its source gives?

Three questions, each answered by findings: do all bytes have the record's digests; do headers, scales, indices and
configs fit together as readers need them; and, with the source, are codes and scales those of the formula. Damage is
no reason to stop: what can still be read is still checked. Nothing in the folder is trusted, the record neither.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .checks.comparison import compare, described, open_original, recorded_classes, recorded_manifest
from .checks.finding import Finding
from .format import layout
from .format.header import Header, TensorInfo, read_header
from .format.layout import STAGING
from .format.untrusted import parse_json, read_whole
from .output.record import check_record, read_record
from .output.writing import file_sha256
from .plan.recipe import ACTIVATION_SCHEMES
from .snapshot.access import SourceOptions
from .snapshot.modules import module_map
from .snapshot.source import CONFIG, Component, LocalFiles, Shard, describe, require_folder
from .telling.errors import ConvertError
from .telling.notebook import html_table, one_line
from .telling.progress import Progress, Silent
from .telling.quantities import plural

_SCALE_BYTES_AT_ONCE = 1 << 20


@dataclass(frozen=True, repr=False)
class Verification:
    """What was checked, and what is wrong with it. `notes` tell what could not be checked."""

    path: str
    files: int
    tensors: int
    compared_with: str | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return one_line(self, self.verdict)

    def _repr_html_(self) -> str:
        return html_table(self.verdict, ("file", "finding"), [(f.path, f.problem) for f in self.findings])

    @property
    def verdict(self) -> str:
        """Whether all is well, and what was looked at, in one line."""
        against = f", compared with {self.compared_with}" if self.compared_with else ""
        verdict = "ok" if self.ok else plural(len(self.findings), "finding")
        return f"{self.path}: {verdict} ({self.files} files, {self.tensors} tensors{against})"

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
    nothing to verify: no converted snapshot, or a source or manifest that cannot be read or is another one's.
    """
    root = Path(path)
    progress = progress or Silent()
    options = options or SourceOptions()
    require_folder(root)
    if not (root / layout.RECORD_FILE).is_file():
        advice = "run its conversion again" if (root / STAGING).exists() else "give the folder that fp8-convert wrote"
        raise ConvertError(
            f"{root} has no {layout.RECORD_FILE}, so it is no snapshot that fp8-convert finished; {advice}."
        )
    if problem := check_record(root):  # nothing else can be believed
        return Verification(str(root), 1, 0, None, (Finding(layout.RECORD_FILE, problem),))
    record = read_record(root)
    assert record is not None
    original = None
    if source is not None:  # before the long work: what is wrong with the options is said at once
        original = open_original(root, record, source, options), recorded_manifest(root, record, manifest)
    progress.start(sum(entry["size"] for entry in record["files"].values()))
    found = [*_check_files(root, record, progress)]
    progress.close()
    shards = _check_structure(root, record, found)
    if original is not None:
        found += compare(root, record, *original, {f.path for f in found}, progress)
    tensors = sum(len(s.header.tensors) for s in shards)
    compared, notes = (None, ()) if original is None else described(original[0], record)
    return Verification(str(root), len(record["files"]) + 1, tensors, compared, tuple(found), notes)


def _check_files(root: Path, record: Mapping[str, Any], progress: Progress) -> Iterator[Finding]:
    """Sizes and digests of all that the record lists, and files that it does not list."""
    files: Mapping[str, Mapping[str, Any]] = record["files"]
    for name, entry in files.items():
        if problem := _damage(root / name, entry):
            yield Finding(name, problem)
        progress.advance(entry["size"])
    yield from _unlisted(root, {*files, layout.RECORD_FILE})


def _unlisted(root: Path, listed: Collection[str]) -> Iterator[Finding]:
    """Every file that is not listed, dot files included; a folder without any listed file is one finding."""
    folders = {parent.as_posix() for path in listed for parent in PurePosixPath(path).parents}
    seen: set[tuple[int, int]] = set()
    for where, below, names in os.walk(root, followlinks=True):  # a reader follows links too
        here = Path(where).relative_to(root).as_posix()
        about = os.stat(where)
        if (about.st_dev, about.st_ino) in seen:  # a link to a folder that was looked at
            below.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        prefix = "" if here == "." else f"{here}/"
        for name in sorted(names):
            if prefix + name not in listed:
                yield Finding(prefix + name, "is not in the record")
        for name in sorted(below):
            if prefix + name not in folders:
                below.remove(name)
                if count := sum(len(files) for _, _, files in os.walk(Path(where, name))):
                    yield Finding(f"{prefix}{name}/", f"is not in the record ({count} files)")
        below.sort()


def _damage(file: Path, entry: Mapping[str, Any]) -> str | None:
    """How a file differs from its entry in the record, None if it does not."""
    try:
        if not file.is_file():
            return "is missing"
        with open(file, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != entry["size"]:
                return f"has {size} bytes instead of {entry['size']}"
            if file_sha256(opened.fileno()) == entry["sha256"]:
                return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    unreadable = _unreadable(file)
    return "has another sha256 than the record says" + (f": {unreadable}" if unreadable else "")


def _unreadable(file: Path) -> str | None:
    """Why a damaged file cannot be parsed, None if it can."""
    try:
        if file.suffix == ".safetensors":
            read_header(file, "it")
        elif file.suffix == ".json":
            parse_json(read_whole(file, "it", layout.MAX_RECORD_BYTES))
    except ConvertError as error:
        return str(error)
    except ValueError as error:
        return f"it {error}"
    return None


def _check_structure(root: Path, record: Mapping[str, Any], found: list[Finding]) -> Sequence[Shard]:
    """Add to `found` what does not fit together in headers, scales, indices and configs; returns the shards looked at.

    Where a damaged file keeps the snapshot from being described, each shard that parses is checked for itself.
    """
    files = LocalFiles(root)
    damaged = {f.path for f in found}
    components: tuple[Component, ...] = ()
    try:
        components = describe(files, allow_converted=True).components
        shards = [shard for c in components for shard in c.shards]
        if {c.name: c.class_name for c in components} != recorded_classes(record):
            found.append(Finding(layout.RECORD_FILE, "has other components than the snapshot"))
    except ConvertError as error:
        if not any(path.endswith((".safetensors", ".json")) for path in damaged):  # else that is why
            found.append(Finding(".", str(error)))
        shards = [*_readable_shards(files, record)]
    # A component that was only copied may be quantised in some other way; its digests say all.
    converted = {name for name, entry in record["components"].items() if any(entry["fp8_modules"].values())}
    for shard in shards:
        if shard.path.rpartition("/")[0] in converted or layout.METADATA_KEY in shard.header.metadata:
            found += _check_shard(root, shard)
    for component in components:
        missing = not component.config and component.path(CONFIG) in damaged
        if component.name in record["components"] and not missing:
            found += _check_component(component, record["components"][component.name]["fp8_modules"])
            found += _check_shared_scales(root, component, record["components"][component.name]["shared_scales"])
    return shards


def _readable_shards(files: LocalFiles, record: Mapping[str, Any]) -> Iterator[Shard]:
    for path, entry in record["shards"].items():
        try:
            yield Shard(path, entry["size"], files.header(path))
        except ConvertError:  # found by its digest, or by what describing the snapshot met
            continue


def _check_shard(root: Path, shard: Shard) -> Iterator[Finding]:
    """What readers rely on: every FP8 weight with its scale beside it, every scale usable."""
    try:
        modules = layout.decode_modules(shard.header.metadata)
    except ValueError as error:
        yield Finding(shard.path, f"has unreadable fp8_convert metadata ({error!s:.200})")
        return
    tensors = {t.name: t for t in shard.header.tensors}
    for module, how in modules.items():
        if (weight := tensors.get(module + layout.WEIGHT)) is None:
            yield Finding(shard.path, f"its metadata name {module}, whose weight it does not hold")
        elif problem := _weight_problem(module, how, weight, tensors):
            yield Finding(shard.path, problem)
    for name, tensor in tensors.items():
        if tensor.dtype == "F8_E4M3" and name.removesuffix(layout.WEIGHT) not in modules:
            yield Finding(shard.path, f"{name} is FP8 and the metadata do not name it")
        if name.endswith((layout.WEIGHT_SCALE, layout.WEIGHT_SCALE_INV, layout.INPUT_SCALE)):
            if name.rpartition(".")[0] not in modules:
                yield Finding(shard.path, f"{name} is a scale without an FP8 weight")
            elif name.endswith(layout.INPUT_SCALE) and (tensor.dtype, tensor.shape) != ("F32", ()):
                yield Finding(shard.path, f"{name} is {tensor.dtype} {list(tensor.shape)} instead of F32 []")
            elif not _usable(root / shard.path, shard.header, tensor):
                yield Finding(shard.path, f"{name} holds a scale that is not finite and positive")


def _weight_problem(
    module: str, how: layout.WeightFormat, weight: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> str | None:
    """What is wrong with a weight that the metadata name, or with its scale."""
    key = how.scale_key(module)
    if weight.dtype != "F8_E4M3":
        return f"{weight.name} is {weight.dtype}, and the metadata say {how.mode} {how.scheme}"
    if how.block is not None and len(weight.shape) != 2:
        return f"{weight.name} is {list(weight.shape)}, and block scales are for two dimensions"
    if (scale := tensors.get(key)) is None:
        return f"{weight.name} has no scale {key}"
    expected = how.scale_shape(weight.shape)
    if scale.dtype != "F32" or scale.shape != expected:
        return f"{key} is {scale.dtype} {list(scale.shape)} instead of F32 {list(expected)}"
    return None


def _check_component(component: Component, recorded: Mapping[str, int]) -> Iterator[Finding]:
    """Whether record and config tell exactly what the shards hold. recorded: numbers of FP8 modules by mode."""
    modules: dict[str, layout.WeightFormat] = {}
    try:
        for shard in component.shards:
            modules |= layout.decode_modules(shard.header.metadata)
    except ValueError:  # found in the shard
        return
    if Counter(how.mode for how in modules.values()) != Counter(recorded):
        yield Finding(layout.RECORD_FILE, f"counts other FP8 modules in {component.label} than its shards hold")
    if modules:
        yield from _check_config(component, modules)


def _check_shared_scales(root: Path, component: Component, groups: Sequence[Sequence[str]]) -> Iterator[Finding]:
    """Whether the members of each fusion group have one scale, bit for bit: runtimes that fuse them need that."""
    scales: dict[str, bytes] = {}
    for shard in component.shards:
        with contextlib.suppress(OSError), open(root / shard.path, "rb") as file:  # found with its digest
            for tensor in shard.header.tensors:
                if tensor.name.endswith(layout.WEIGHT_SCALE) and (tensor.dtype, tensor.shape) == ("F32", ()):
                    file.seek(shard.header.data_start + tensor.start)
                    scales[tensor.name.removesuffix(layout.WEIGHT_SCALE)] = file.read(4)
    for modules in groups:
        found = {module: scales[module] for module in modules if module in scales}
        if len(found) < len(modules):
            absent = next(module for module in modules if module not in found)
            yield Finding(layout.RECORD_FILE, f"names the shared scale of {absent}, which has none")
        elif len({*found.values()}) > 1 and all(map(_is_usable, found.values())):  # else found
            yield Finding(component.name or ".", f"{', '.join(modules)} must share one scale and do not")


def _is_usable(scale: bytes) -> bool:
    value = float(np.frombuffer(scale, np.float32)[0]) if len(scale) == 4 else 0.0
    return np.isfinite(value) and value > 0


def _check_config(component: Component, modules: Mapping[str, layout.WeightFormat]) -> Iterator[Finding]:
    """What readers take from the config: which layers are FP8, and how."""
    path = component.path(CONFIG)
    config = component.config.get(layout.CONFIG_KEY)
    if not isinstance(config, dict):
        yield Finding(path, f"has no {layout.CONFIG_KEY}, so readers would take codes for weights")
        return
    keys = layout.quantization_config(native=False, activation_scheme="dynamic", ignored_layers=[], block=None)
    if set(config) != set(keys):
        stated = ", ".join(sorted(config))
        yield Finding(path, f"{layout.CONFIG_KEY} has the keys {stated:.200} instead of {', '.join(sorted(keys))}")
        return
    built = module_map(component)
    if built.problem:
        yield Finding(path, f"its layers cannot be checked: {built.problem}")
        return
    formats = set(modules.values())
    blocks = {how.block for how in formats if how.block}
    methods = []
    if plain := len(formats) <= 1 and all(built.kinds.get(m) == "Linear" for m in modules):
        methods.append(layout.QUANT_METHOD)
    if not plain or all(how.mode == layout.STORAGE for how in formats):  # for a DiT "fp8" would mean W8A8
        methods.append(layout.QUANT_METHOD_NATIVE)
    native = config["quant_method"] == layout.QUANT_METHOD_NATIVE
    expected: dict[str, list[Any]] = {
        "quant_method": methods,
        "activation_scheme": [*ACTIVATION_SCHEMES],
        "is_checkpoint_fp8_serialized": [True],
        "weight_block_size": [*map(list, blocks), *([None] if native or not blocks else [])],
    }
    for key, values in expected.items():
        if config[key] not in values:
            yield Finding(path, f"{key} is {config[key]!r:.80} instead of {' or '.join(map(repr, values))}")
    linears = {name for name, kind in built.kinds.items() if kind == "Linear"}
    if config["ignored_layers"] != sorted(linears - set(modules)):
        yield Finding(path, "ignored_layers are not exactly the linear layers that are not FP8")
    if config["activation_scheme"] == "static":
        names = {t.name for t in component.tensors}
        for module, how in modules.items():
            if how.mode == layout.W8A8 and module + layout.INPUT_SCALE not in names:
                yield Finding(path, f"activations are static and {module} has no input_scale")


def _usable(path: Path, header: Header, scale: TensorInfo) -> bool:
    if scale.dtype != "F32":
        return True  # found with its shape
    try:
        with open(path, "rb") as file:
            file.seek(header.data_start + scale.start)
            for start in range(0, scale.nbytes, _SCALE_BYTES_AT_ONCE):
                values = np.frombuffer(file.read(min(_SCALE_BYTES_AT_ONCE, scale.nbytes - start)), np.float32)
                if not (np.isfinite(values).all() and (values > 0).all()):
                    return False
    except OSError:  # found with its digest
        pass
    return True
