"""Do headers, scales, indices and configs of a converted snapshot fit together as readers need them?"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..format import layout
from ..format.header import Header, TensorInfo
from ..format.record import Record, RecordedComponent
from ..plan.recipe import ACTIVATION_SCHEMES
from ..snapshot.describing import describe
from ..snapshot.files import LocalFiles
from ..snapshot.fp8 import Fault, Fp8Component, read_fp8
from ..snapshot.modules import module_map
from ..snapshot.snapshot import CONFIG, Component, Shard
from ..targets.choosing import TARGETS
from ..targets.target import NATIVE, Target
from ..telling.errors import ConvertError
from .finding import Finding
from .single_files import check_statement, original_groups
from .weight_errors import check_errors

_SCALE_BYTES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class _Ignored:
    """What a config's `ignored_layers` must be, for the target that the record names."""

    target: Target
    components: Sequence[Component]

    def names(self, component: Component, kept: Collection[str]) -> list[str]:
        """kept: the component's linears that are not FP8."""
        return sorted(self.target.ignored_layers(component, kept, self.components))

    @property
    def meaning(self) -> str:
        if self.target is NATIVE:
            return "the linear layers that are not FP8"
        return f"those that the target {self.target.name} needs"


def check_structure(root: Path, record: Record, found: list[Finding]) -> Sequence[Shard]:
    """Add to `found` what does not fit together in headers, scales, indices and configs; returns the shards looked at.

    Where a damaged file keeps the snapshot from being described, the shards that parse are checked without a config.
    """
    files = LocalFiles(root)
    damaged = {f.path for f in found}
    try:
        snapshot = describe(files, allow_converted=True)
        components = snapshot.components
    except ConvertError as error:
        if not any(path.endswith((".safetensors", ".json")) for path in damaged):  # else that is why
            found.append(Finding(".", str(error)))
        components = tuple(_without_configs(files, record))
        whole = False
    else:
        whole = True
        if {c.name: c.class_name for c in components} != record.classes:
            found.append(Finding(layout.RECORD_FILE, "has other components than the snapshot"))
    for component in components:
        recorded = record.components.get(component.name)
        # A component that was only copied may be quantised in some other way; its digests say all.
        named = any(layout.METADATA_KEY in shard.header.metadata for shard in component.shards)
        fp8 = read_fp8(component)
        if named or (recorded is not None and recorded.converted):
            found += _check_weights(root, component, fp8)
        missing = not component.config and component.path(CONFIG) in damaged
        if whole and recorded is not None and not missing:
            if record.states_errors:
                found += check_errors(component, recorded, fp8, single=snapshot.single_files)
            if snapshot.single_files:
                found += check_statement(component, fp8)
                found += _check_shared_scales(root, component, original_groups(component, recorded.shared_scales))
                continue
            found += _check_component(
                root, component, recorded, fp8, _Ignored(TARGETS.get(record.recipe.target, NATIVE), components)
            )
    return [shard for component in components for shard in component.shards]


def _without_configs(files: LocalFiles, record: Record) -> Iterator[Component]:
    """The components that the record names, with the shards that can be read."""
    for name, entry in record.components.items():
        shards = []
        for path, stated in record.shards.items():
            if stated.component_of(path) == name:
                with contextlib.suppress(ConvertError):  # found by its digest, or by what describing it met
                    shards.append(Shard(path, stated.size, files.header(path)))
        yield Component(name, "", entry.class_, {}, "", tuple(shards), None)


def _check_weights(root: Path, component: Component, fp8: Fp8Component) -> Iterator[Finding]:
    """What readers rely on: every FP8 weight with its scale beside it, every scale usable."""
    for problem in fp8.problems:
        yield Finding(problem.file, str(problem))
    formats = fp8.formats
    for shard in component.shards:
        for tensor in shard.header.tensors:
            module = tensor.name.rpartition(".")[0]
            is_scale = tensor.name.endswith(layout.SCALE_SUFFIXES) and module in formats
            if is_scale and not _usable(root / shard.path, shard.header, tensor):
                yield Finding(shard.path, f"{tensor.name} holds a scale that is not finite and positive")


def _check_component(
    root: Path, component: Component, recorded: RecordedComponent, fp8: Fp8Component, ignored: _Ignored
) -> Iterator[Finding]:
    """Whether record and config tell exactly what the shards hold."""
    if not any(problem.fault is Fault.METADATA for problem in fp8.problems):  # else found in the shard
        if Counter(how.mode for how in fp8.stated.values()) != Counter(recorded.fp8_modules):
            yield Finding(layout.RECORD_FILE, f"counts other FP8 modules in {component.label} than its shards hold")
        if fp8.stated:
            yield from _check_config(component, fp8.stated, ignored)
    yield from _check_shared_scales(root, component, recorded.shared_scales)


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


def _check_config(
    component: Component, modules: Mapping[str, layout.WeightFormat], ignored: _Ignored
) -> Iterator[Finding]:
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
    known = len(formats) <= 1 and not any(how.channel for how in formats)  # to readers of "fp8"
    if plain := known and all(built.kinds.get(m) == "Linear" for m in modules):
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
    kept = linears - set(modules)  # earlier versions left out those that share their weight with an embedding
    lists = (ignored.names(component, kept), ignored.names(component, kept | built.tied))
    if config["ignored_layers"] not in lists:
        yield Finding(path, f"ignored_layers are not exactly {ignored.meaning}")


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
