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

import torch

from ..converter.format import layout
from ..converter.format.header import TensorInfo
from ..converter.format.layout import STAGING, WeightFormat
from ..converter.output.record import read_record
from ..converter.snapshot.access import SourceOptions
from ..converter.snapshot.hub import HubFiles, download
from ..converter.snapshot.locate import fetch, find_snapshot
from ..converter.snapshot.source import CONFIG, Component, LocalFiles, Snapshot
from ..converter.telling.errors import LoadError
from .config import METHODS, config_problem

_SCALAR_SHAPES: list[tuple[int, ...]] = [(), (1,)]  # [1] is how some other tools write a scalar


def one_line(error: BaseException) -> str:
    """What a library said, short enough to stand inside one sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


@dataclass(frozen=True)
class Fp8Modules:
    """The FP8 modules that a component's checkpoint holds.

    `modules` are by checkpoint name; `config` is what config.json has under
    `quantization_config`.
    """

    modules: Mapping[str, WeightFormat]
    config: Mapping[str, Any]

    @property
    def activation_scheme(self) -> str:
        return str(self.config.get("activation_scheme") or "dynamic")


def open_snapshot(source: str | os.PathLike[str], options: SourceOptions) -> Snapshot:
    """Describe a folder or Hub id, converted or not. A Hub repository is asked, not downloaded.

    Raises ConvertError, and LoadError for the output of a conversion that has not finished.
    """
    folder = Path(source)
    if (folder / STAGING).is_dir() and not (folder / layout.RECORD_FILE).exists():
        raise LoadError(f"The conversion into {folder} is unfinished; run the same fp8-convert command again.")
    return find_snapshot(source, options, allow_converted=True)


def fetched(snapshot: Snapshot, *, recorded: bool = False) -> tuple[Snapshot, Path]:
    """The snapshot with its files on this machine, and the folder they are in.

    recorded: also the files that only the record lists, as checking its digests needs them.
    """
    also = {layout.RECORD_FILE}
    if recorded and snapshot.files.remote and (record := record_of(snapshot)) is not None:
        also |= set(record["files"])
    snapshot = fetch(snapshot, also & set(snapshot.files.sizes()))
    assert isinstance(snapshot.files, LocalFiles)
    return snapshot, snapshot.files.root


def record_of(snapshot: Snapshot) -> dict[str, Any] | None:
    """The snapshot's record, None where there is none; of a Hub repository nothing else is downloaded."""
    files = snapshot.files
    if isinstance(files, HubFiles):
        if layout.RECORD_FILE not in files.sizes():
            return None
        files = download(files, [layout.RECORD_FILE])
    assert isinstance(files, LocalFiles)
    return read_record(files.root)


def check_digests(root: Path) -> None:
    """Compare every byte of the snapshot in `root` with its record. Raises LoadError."""
    from ..converter.verification import verify  # only here: loading needs none of what checking needs

    if not (root / layout.RECORD_FILE).is_file():
        raise LoadError(
            f"verify=True needs the record {layout.RECORD_FILE}, and {root} has none; give the folder that fp8-convert "
            "wrote (to load_component with the component's name), or leave verify out."
        )
    findings = verify(root).findings
    if findings:
        first, more = findings[0], len(findings) - 1
        raise LoadError(
            f"{root} is not what was converted: {first.path} {first.problem}{f' (and {more} more)' if more else ''}; "
            f"`fp8-convert verify {root}` lists all {len(findings)} findings: convert or download it again."
        )


def is_converted(component: Component) -> bool:
    """Whether the component's checkpoint holds FP8 weights of this project's layout."""
    config = component.config.get(layout.CONFIG_KEY)
    method = config.get("quant_method") if isinstance(config, dict) else None
    return method in METHODS or any(layout.METADATA_KEY in s.header.metadata for s in component.shards)


def fp8_modules(component: Component) -> Fp8Modules:
    """The FP8 modules of a converted component, as its own files say.

    Raises LoadError for FP8 codes without a scale or without a mode, for named modules without codes, and for a
    quantization_config that means nothing.
    """
    config = _config_of(component)
    tensors = {t.name: t for t in component.tensors}
    stated: dict[str, WeightFormat] = {}
    for shard in component.shards:
        try:
            stated |= layout.decode_modules(shard.header.metadata)
        except ValueError as error:
            raise LoadError(f"{shard.path} has damaged FP8 metadata ({error}); convert the snapshot again.") from error
    found: dict[str, WeightFormat] = {}
    for tensor in tensors.values():
        if tensor.dtype != "F8_E4M3":
            continue
        module = tensor.name.removesuffix(layout.WEIGHT)
        if not tensor.name.endswith(layout.WEIGHT):
            raise LoadError(f"{tensor.name} of {component.label} holds FP8 codes but is no weight; convert it again.")
        found[module] = stated.get(module) or _guess(component, module, tensors, config)
        key = found[module].scale_key(module)
        scale = tensors.get(key)
        if scale is None:
            raise LoadError(
                f"{tensor.name} of {component.label} holds FP8 codes, but {key} is "
                "missing; without its scale the weight is wrong: convert the snapshot again."
            )
        if scale.dtype != "F32" or scale.shape not in _scale_shapes(tensor.shape, found[module]):
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
            here = sum(1 for how in found.modules.values() if how.mode == mode)
            if here != count:
                return f"the record counts {count} {mode} modules, the shards hold {here}"
    ignored = found.config.get("ignored_layers") or []
    if both := sorted(set(ignored) & set(found.modules)):
        return f"config.json ignores {both[0]}, which is FP8 in the shards"
    return None


def check_scale(name: str, scale: torch.Tensor, where: str) -> None:
    """Raise LoadError unless all values of the scale `name` are finite and positive; waits for its device."""
    values = scale.detach().flatten()
    bad = values[~(values.isfinite() & (values > 0))]
    if bad.numel():
        raise LoadError(
            f"{name} of {where} holds {float(bad[0])}, and a scale is finite and positive: the file is damaged; "
            "convert or download the snapshot again."
        )


def _config_of(component: Component) -> dict[str, Any]:
    """What config.json has under `quantization_config`; empty if it has nothing there."""
    config = component.config.get(layout.CONFIG_KEY)
    if config is None:
        return {}
    problem = config_problem(config) if isinstance(config, dict) else f"it is {config!r:.80}; it must be an object"
    if problem:
        where = f" of {component.label}" if not component.name else ""
        raise LoadError(
            f"{component.path(CONFIG)}{where} has a {layout.CONFIG_KEY} that cannot be used: {problem}: convert the "
            "snapshot again."
        )
    return dict(config)


def _scale_shapes(shape: tuple[int, ...], how: WeightFormat) -> list[tuple[int, ...]]:
    if how.block is None:
        return _SCALAR_SHAPES
    return [how.scale_shape(shape)] if len(shape) == 2 else []


def _guess(component: Component, module: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> WeightFormat:
    """Mode and scheme of an FP8 weight that no shard's metadata names: another tool's, or rewritten since."""
    mode = layout.W8A8 if "transformer" in f"{component.name} {component.class_name}".lower() else layout.STORAGE
    if len(tensors[module + layout.WEIGHT].shape) != 2:
        mode = layout.STORAGE
    if module + layout.WEIGHT_SCALE_INV in tensors:
        size = config.get("weight_block_size") or (128, 128)
        return WeightFormat(mode, (int(size[0]), int(size[1])))
    return WeightFormat(mode)


def _check_input_scales(
    component: Component, found: Mapping[str, WeightFormat], tensors: Mapping[str, TensorInfo]
) -> None:
    for module, how in found.items():
        if how.mode != layout.W8A8:
            continue
        scale = tensors.get(module + layout.INPUT_SCALE)
        if scale is None:
            raise LoadError(
                f"{component.label} has the static activation scheme, but {module}{layout.INPUT_SCALE} is missing; "
                "convert it with --activation-scheme dynamic, or with calibrated --input-scales."
            )
        if scale.dtype != "F32" or scale.shape not in _SCALAR_SHAPES:
            raise LoadError(
                f"{scale.name} of {component.label} is {scale.dtype} {list(scale.shape)}, which is no activation "
                "scale; convert the snapshot again."
            )
