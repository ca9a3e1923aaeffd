"""What another tool's FP8 files hold: which tensors are codes, what scales them, and what is there for that tool alone.

Read are ComfyUI's current layout (`_quantization_metadata`, `.comfy_quant`) and its older one (`scaled_fp8`,
`.scale_weight`), bare casts, ModelOpt's FP8, compressed-tensors' `float-quantized`, scales for each row as LightX2V
writes them, blocks as DeepSeek does, and this project's own. They can be told apart by names and dtypes, so what a
config says only has to agree. What is none of these is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..format import layout
from ..format.descriptor import read_at
from ..format.header import TensorInfo
from ..format.layout import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, WEIGHT_SCALE_INV, Block
from ..format.untrusted import open_regular, parse_json
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from .files import LocalFiles
from .fp8 import CODES
from .given_scale import BARE, GivenScale, as_float32, fitted
from .snapshot import Component, Shard

COMFY_METADATA = "_quantization_metadata"
_COMFY_QUANT, _SCALED_FP8 = ".comfy_quant", "scaled_fp8"
_WEIGHT_SCALES = (WEIGHT_SCALE, WEIGHT_SCALE_INV, ".scale_weight")
_INPUT_SCALES = (INPUT_SCALE, ".scale_input", ".activation_scale")
_DROPPED = (*_WEIGHT_SCALES, *_INPUT_SCALES, _COMFY_QUANT)
_OTHER_CODES = {"F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"}
# Tensors of quantisations that FP8 codes under one scale cannot stand for.
_REFUSED_SUFFIXES = (
    ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_scale_2", ".weight_g_idx", ".pre_quant_scale",
    ".input_zero_point", ".qweight", ".qzeros", ".SCB", ".absmax", ".quant_map", ".weight_format", ".smooth_scale",
    ".k_scale", ".v_scale", ".q_scale", ".output_scale", "_qdata",
)  # fmt: skip
_METHODS = {
    "fp8": "fp8", "fp8_convert": "fp8-convert", "modelopt": "ModelOpt", "compressed-tensors": "compressed-tensors",
}  # fmt: skip
_LARGEST_SCALE = 64 * 1024 * 1024  # bytes of one scale tensor: several times what a real one has


@dataclass(frozen=True, repr=False)
class Foreign(Brief):
    """A component's FP8 tensors as another tool wrote them, by name; all of them E4M3 codes.

    label: what the layout is called. scales: by the codes' names. dropped: tensors that only that tool needs.
    """

    label: str
    scales: Mapping[str, GivenScale]
    dropped: frozenset[str]


def read_foreign(component: Component, files: LocalFiles) -> Foreign | None:
    """Read a component's FP8 tensors and their scales; None for a component that is not quantised.

    Raises ConvertError for a quantisation that cannot be imported, for a scale that does not fit, and for one without
    its codes.
    """
    tensors = {t.name: (t, shard) for shard in component.shards for t in shard.header.tensors}
    config = component.config.get(layout.CONFIG_KEY)
    _refuse_others(component, files.label, config, [t for t, _ in tensors.values()])
    codes = [name for name, (tensor, _) in tensors.items() if tensor.dtype == CODES]
    dropped = {name for name in tensors if name.endswith(_DROPPED) or _is_marker(name)}
    if not codes and not dropped and config is None:
        return None
    layers = _comfy_layers(component, files, tensors)
    reader = _Scales(files, tensors, _block_of(config, component))
    scales = {name: replace(reader.scale_of(name), mode=layers.get(_module(name))) for name in codes}
    stated = _stated(component)
    scales = {name: replace(s, mode=stated.get(_module(name), s.mode)) for name, s in scales.items()}
    _refuse_orphans(component, dropped, codes, layers)
    return Foreign(_label(component, config, dropped, layers, scales), scales, frozenset(dropped))


class _Scales:
    """The scales of one component, read where they lie. block: what its config says of blocks."""

    def __init__(self, files: LocalFiles, tensors: Mapping[str, tuple[TensorInfo, Shard]], block: Block | None) -> None:
        self._files, self._tensors, self._block = files, tensors, block
        self._scale_like: dict[str, str] = {}  # by every module above it
        for name in tensors:
            path, _, last = name.rpartition(".")
            if re.search("scale|amax", last) and not name.endswith(_DROPPED) and not _is_marker(name):
                self._scale_like |= {path: name, path.rpartition(".")[0]: name}

    def scale_of(self, name: str) -> GivenScale:
        """What scales the codes `name`; a bare 1 where the file has nothing that does."""
        module = _module(name)
        found = [module + suffix for suffix in _WEIGHT_SCALES if module + suffix in self._tensors]
        if len(found) > 1:
            raise ConvertError(f"{name} has two scales, {found[0]} and {found[1]}; download the file again.")
        weight, _ = self._tensors[name]
        if not found or not name.endswith(WEIGHT):
            self._refuse_unknown_scale(name, module)
            return BARE
        info, shard = self._tensors[found[0]]
        where = f"{shard.path} of {self._files.label}"
        scale = fitted(self._values(found[0]), info, weight, self._block, where)
        return replace(scale, input_scale=self._input_scale(module))

    def _refuse_unknown_scale(self, name: str, module: str) -> None:
        """Raise ConvertError where something beside codes without a scale looks like one that is not understood."""
        if other := self._scale_like.get(module):
            raise ConvertError(
                f"{name} holds FP8 codes, and {other} may be their scale in a layout that is not known; it cannot be "
                "imported."
            )

    def _input_scale(self, module: str) -> float | None:
        name = next((module + suffix for suffix in _INPUT_SCALES if module + suffix in self._tensors), None)
        if name is None:
            return None
        info, shard = self._tensors[name]
        if info.numel != 1:
            raise ConvertError(f"{name} in {shard.path} has the shape {list(info.shape)}; one scale can be imported.")
        value = float(self._values(name)[0])
        return None if value == 1 and not name.endswith(INPUT_SCALE) else value  # ComfyUI's older layout: none

    def _values(self, name: str) -> Any:
        info, shard = self._tensors[name]
        return as_float32(info.dtype, read_tensor(self._files, shard, info), name, shard.path)


def read_tensor(files: LocalFiles, shard: Shard, info: TensorInfo) -> bytes:
    """The bytes of a small tensor: a scale or a marker. Raises ConvertError."""
    if info.nbytes > _LARGEST_SCALE:
        raise ConvertError(f"{info.name} in {shard.path} has {info.nbytes} bytes, which no scale has; check the file.")
    fd = open_regular(files.local(shard.path), shard.path)
    data = bytearray(info.nbytes)
    try:
        done = 0
        while done < len(data):
            count = read_at(fd, memoryview(data)[done:], shard.header.data_start + info.start + done)
            if count == 0:
                raise ConvertError(f"{shard.path} became shorter while it was read; check the file and run again.")
            done += count
    except OSError as error:
        raise ConvertError(f"{shard.path} cannot be read ({error.strerror}); check the disk and run again.") from error
    finally:
        os.close(fd)
    return bytes(data)


def _is_marker(name: str) -> bool:
    """Whether it is the tensor that marks files of ComfyUI's older layout, or one model's part of a file."""
    return name.rpartition(".")[2] == _SCALED_FP8


def _module(name: str) -> str:
    return name.removesuffix(WEIGHT)


def _stated(component: Component) -> dict[str, str]:
    """Modes of the modules that this project's own metadata name."""
    modes: dict[str, str] = {}
    for shard in component.shards:
        try:
            modes |= {m: how.mode for m, how in layout.decode_modules(shard.header.metadata).items()}
        except ValueError as error:
            raise ConvertError(f"{shard.path} has unreadable fp8_convert metadata ({error!s:.200}).") from error
    return modes


# What is refused


def _refuse_others(component: Component, source: str, config: Any, tensors: Sequence[TensorInfo]) -> None:
    label = f"{component.label} of {source}"
    if problem := _config_problem(config):
        raise ConvertError(f"{label} {problem}, which cannot be imported; give an FP8 checkpoint of E4M3 codes.")
    for shard in component.shards:
        if "tensor_names" in shard.header.metadata:
            raise ConvertError(f"{shard.path} holds flattened torchao tensors, which cannot be imported.")
    for tensor in tensors:
        if tensor.dtype in _OTHER_CODES:
            raise ConvertError(
                f"{tensor.name} in {label} is {tensor.dtype}, and only F8_E4M3 codes (float8_e4m3fn) can be imported."
            )
        if tensor.name.endswith(_REFUSED_SUFFIXES):
            raise ConvertError(f"{label} has {tensor.name}, so it is quantised in a way that cannot be imported.")
        if tensor.dtype in ("I8", "U8") and tensor.name.endswith(WEIGHT):
            raise ConvertError(f"{tensor.name} in {label} holds {tensor.dtype} codes, which cannot be imported.")


def _config_problem(config: Any) -> str | None:
    """Why a quantization_config is of no layout that is read, as a clause."""
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in _METHODS:
        return f"has the quant_method {method!r:.80}"
    algorithm = config.get("quant_algo", config.get("quant_type", "FP8"))
    if method == "modelopt" and algorithm != "FP8":
        return f"was quantised by ModelOpt to {algorithm!r:.80}"
    if method == "compressed-tensors" and config.get("format") not in ("float-quantized", "naive-quantized"):
        return f"has the compressed-tensors format {config.get('format')!r:.80}"
    return None


def _refuse_orphans(
    component: Component, dropped: set[str], codes: Sequence[str], layers: Mapping[str, str | None]
) -> None:
    """Scales and layers without codes: a file that was read wrong, or is not whole."""
    modules = {_module(name) for name in codes}
    for name in sorted(name for name in dropped if not _is_marker(name)):
        module = next(name.removesuffix(s) for s in _DROPPED if name.endswith(s))
        if module not in modules and not name.endswith(_INPUT_SCALES):  # of layers that were left in BF16, too
            raise ConvertError(f"{name} of {component.label} scales no FP8 weight; download the file again.")
    if absent := sorted(layers.keys() - modules):
        raise ConvertError(f"{absent[0]} of {component.label} should be FP8 by the file's header, and is not.")


# What tools state beside the codes


def _comfy_layers(
    component: Component, files: LocalFiles, tensors: Mapping[str, tuple[TensorInfo, Shard]]
) -> dict[str, str | None]:
    """The layers that ComfyUI's header or its `.comfy_quant` tensors name, with the mode that they ask for."""
    layers: dict[str, str | None] = {}
    for shard in component.shards:
        if (text := shard.header.metadata.get(COMFY_METADATA)) is not None:
            stated = _json(text.encode(), COMFY_METADATA, shard.path).get("layers")
            if not isinstance(stated, dict):
                raise ConvertError(f"{COMFY_METADATA} of {shard.path} names no layers; download the file again.")
            layers |= {name: _comfy_mode(entry, name, shard.path) for name, entry in stated.items()}
    for name, (info, shard) in tensors.items():
        if name.endswith(_COMFY_QUANT):
            entry = _json(read_tensor(files, shard, info), name, shard.path)
            module = name.removesuffix(_COMFY_QUANT)
            layers[module] = _comfy_mode(entry, module, shard.path)
    return layers


def _comfy_mode(entry: Any, layer: str, where: str) -> str | None:
    found = entry.get("format") if isinstance(entry, dict) else None
    if found != "float8_e4m3fn":
        raise ConvertError(f"{layer} in {where} has ComfyUI's format {found!r:.80}, and float8_e4m3fn can be imported.")
    return layout.STORAGE if entry.get("full_precision_matrix_mult") is True else None


def _json(raw: bytes, what: str, where: str) -> dict[str, Any]:
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise ConvertError(f"{what} of {where} {error}; download the file again.") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{what} of {where} is no JSON object; download the file again.")
    return value


def _block_of(config: Any, component: Component) -> Block | None:
    """Rows and columns of a scale's block, as the config states them in one place or the other."""
    stated = [] if config is None else [config.get("weight_block_size"), *_block_structures(config)]
    for value in stated:
        if value is None:
            continue
        if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
            return value[0], value[1]
        raise ConvertError(f"config.json of {component.label} states the block {value!r:.80}, which is none.")
    return None


def _block_structures(config: Mapping[str, Any]) -> Iterator[Any]:
    """What compressed-tensors' groups say of blocks."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights.get("block_structure")


def _label(
    component: Component,
    config: Any,
    dropped: set[str],
    layers: Mapping[str, str | None],
    scales: Mapping[str, GivenScale],
) -> str:
    """What the layout is called, by what tells it apart."""
    if any(layout.METADATA_KEY in shard.header.metadata for shard in component.shards):
        return "fp8-convert"
    if config is not None:
        return _METHODS[config["quant_method"]]
    if layers:
        return "ComfyUI"
    if any(_is_marker(name) or name.endswith(".scale_weight") for name in dropped):
        return "ComfyUI scaled"
    if any(scale.channel for scale in scales.values()):
        return "scales of rows"
    if any(scale.block for scale in scales.values()):
        return "scales of blocks"
    return "bare cast" if all(scale.bare for scale in scales.values()) else "scales of tensors"
