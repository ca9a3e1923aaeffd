"""What a snapshot says of itself: where its files are, which modules are FP8 in which mode, and how it was
made.

Read from safetensors headers, each shard's `__metadata__["fp8_convert"]`, the component's config.json and the
record; no weights are touched. Names here are checkpoint names: a safetensors key without `.weight`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..converter import layout
from ..converter.hub import HubFiles, download
from ..converter.locate import SourceOptions, find_snapshot
from ..converter.record import read_record
from ..converter.source import Component, LocalFiles, Snapshot, describe, needed_files

_METHODS = (layout.QUANT_METHOD, layout.QUANT_METHOD_NATIVE)


class LoadError(RuntimeError):
    """A snapshot that cannot be loaded as it claims; one sentence: what, where, what to do."""


@dataclass(frozen=True)
class Fp8Modules:
    """The FP8 modules that a component's checkpoint holds.

    `modules` maps checkpoint names to (mode, scheme); `config` is what config.json has under
    `quantization_config`.
    """

    modules: Mapping[str, tuple[str, str]]
    config: Mapping[str, Any]

    @property
    def activation_scheme(self) -> str:
        return str(self.config.get("activation_scheme") or "dynamic")


def open_snapshot(source: str | os.PathLike[str], options: SourceOptions) -> Snapshot:
    """Describe a folder or Hub id, converted or not. A Hub repository is asked, not downloaded. Raises
    ConvertError.
    """
    return find_snapshot(source, options, allow_converted=True)


def fetched(snapshot: Snapshot, options: SourceOptions) -> tuple[Snapshot, Path]:
    """The snapshot with its files on this machine, and the folder they are in."""
    files = snapshot.files
    if isinstance(files, HubFiles):
        record = [layout.RECORD_FILE] if layout.RECORD_FILE in files.sizes() else []
        local = download(files, sorted({*needed_files(snapshot), *record}))
        snapshot = describe(local, variant=options.variant, allow_converted=True)
        files = local
    assert isinstance(files, LocalFiles)
    return snapshot, files.root


def is_converted(component: Component) -> bool:
    """Whether the component's checkpoint holds FP8 weights of this project's layout."""
    config = component.config.get(layout.CONFIG_KEY)
    method = config.get("quant_method") if isinstance(config, dict) else None
    return method in _METHODS or any(layout.METADATA_KEY in s.header.metadata for s in component.shards)


def fp8_modules(component: Component) -> Fp8Modules:
    """The FP8 modules of a converted component, as its own files say.

    Raises LoadError for FP8 codes without a scale or without a mode, and for named modules without codes.
    """
    config = component.config.get(layout.CONFIG_KEY)
    config = dict(config) if isinstance(config, dict) else {}
    tensors = {t.name: t for t in component.tensors}
    stated: dict[str, tuple[str, str]] = {}
    for shard in component.shards:
        try:
            stated |= layout.decode_modules(shard.header.metadata)
        except ValueError as error:
            raise LoadError(f"{shard.path} has damaged FP8 metadata ({error}); convert the snapshot again.") from error
    found: dict[str, tuple[str, str]] = {}
    for tensor in tensors.values():
        if tensor.dtype != "F8_E4M3":
            continue
        module = tensor.name.removesuffix(layout.WEIGHT)
        if not tensor.name.endswith(layout.WEIGHT):
            raise LoadError(f"{tensor.name} of {component.label} holds FP8 codes but is no weight; convert it again.")
        found[module] = stated.get(module) or _guess(component, module, tensors, config)
        block = layout.scheme_block(found[module][1])
        scale = tensors.get(layout.scale_key(module, block))
        if scale is None:
            raise LoadError(
                f"{tensor.name} of {component.label} holds FP8 codes, but {layout.scale_key(module, block)} is "
                "missing; without its scale the weight is wrong: convert the snapshot again."
            )
        if scale.dtype != "F32" or scale.shape not in _scale_shapes(tensor.shape, block):
            raise LoadError(
                f"{scale.name} of {component.label} is {scale.dtype} {list(scale.shape)}, which is no scale for "
                f"{tensor.name} {list(tensor.shape)}; convert the snapshot again."
            )
    if absent := sorted(set(stated) - set(found)):
        raise LoadError(
            f"{absent[0]} of {component.label} should be FP8 by the shards' metadata, but its weight is not; "
            "convert the snapshot again."
        )
    if config.get("activation_scheme") == "static":
        _check_input_scales(component, found, tensors)
    return Fp8Modules(found, config)


def check_record(root: Path, component: Component, found: Fp8Modules) -> str | None:
    """What the record or the config claims of the component and its shards do not hold; None if all is
    well.
    """
    record = read_record(root)
    entry = record["components"].get(component.name) if record is not None else None
    if entry is not None:
        for mode, count in entry["fp8_modules"].items():
            here = sum(1 for m, _ in found.modules.values() if m == mode)
            if here != count:
                return f"the record counts {count} {mode} modules, the shards hold {here}"
    ignored = found.config.get("ignored_layers") or []
    if both := sorted(set(ignored) & set(found.modules)):
        return f"config.json ignores {both[0]}, which is FP8 in the shards"
    return None


def _scale_shapes(shape: tuple[int, ...], block: layout.Block | None) -> list[tuple[int, ...]]:
    if block is None:
        return [(), (1,)]  # [1] is how some other tools write a scalar
    return [layout.scale_shape(shape, block)] if len(shape) == 2 else []


def _guess(component: Component, module: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, str]:
    """Mode and scheme of an FP8 weight that no shard's metadata names: another tool's, or rewritten since."""
    mode = layout.W8A8 if "transformer" in f"{component.name} {component.class_name}".lower() else layout.STORAGE
    if len(tensors[module + layout.WEIGHT].shape) != 2:
        mode = layout.STORAGE
    if module + layout.WEIGHT_SCALE_INV in tensors:
        size = config.get("weight_block_size") or (128, 128)
        return mode, layout.scheme_name((int(size[0]), int(size[1])))
    return mode, layout.SCHEME_TENSOR


def _check_input_scales(component: Component, found: Mapping[str, tuple[str, str]], tensors: Mapping[str, Any]) -> None:
    for module, (mode, _) in found.items():
        if mode == layout.W8A8 and module + layout.INPUT_SCALE not in tensors:
            raise LoadError(
                f"{component.label} has the static activation scheme, but {module}{layout.INPUT_SCALE} is missing; "
                "convert it with --activation-scheme dynamic, or with calibrated --input-scales."
            )
