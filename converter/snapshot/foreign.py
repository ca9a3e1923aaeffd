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
from .foreign_config import (
    COMFY_FORMAT,
    COMFY_FULL_PRECISION,
    COMFY_METADATA,
    METHODS,
    block_of,
    config_problem,
)
from .fp8 import CODES
from .given_scale import BARE, GivenScale, as_float32, fitted
from .snapshot import Component, Shard

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
_LARGEST_SCALE = 64 * 1024 * 1024  # bytes of one scale tensor: several times what a real one has


@dataclass(frozen=True, repr=False)
class Foreign(Brief):
    """A component's FP8 tensors as another tool wrote them, by name; all of them E4M3 codes.

    label: what the layout is called. scales: by the codes' names. dropped: tensors that only that tool needs. notes:
    what the user should know, as clauses.
    """

    label: str
    scales: Mapping[str, GivenScale]
    dropped: frozenset[str]
    notes: tuple[str, ...] = ()


def read_foreign(component: Component, files: LocalFiles) -> Foreign | None:
    """Read a component's FP8 tensors and their scales; None for a component that is not quantised.

    Raises ConvertError for a quantisation that cannot be imported, for a scale that does not fit, and for one without
    its codes.
    """
    tensors = {t.name: (t, shard) for shard in component.shards for t in shard.header.tensors}
    config = component.config.get(layout.CONFIG_KEY)
    _refuse_others(component, files.label, config, [t for t, _ in tensors.values()])
    dropped = {name for name in tensors if name.endswith(_DROPPED) or _is_marker(name)}
    codes = [name for name, (tensor, _) in tensors.items() if tensor.dtype == CODES and name not in dropped]
    if not codes and not dropped and config is None:
        return None
    layers = _comfy_layers(component, files, tensors)
    reader = _Scales(files, tensors, block_of(config, component.label))
    modes = {**_marked(tensors, codes), **layers, **_stated(component)}
    scales = {name: replace(reader.scale_of(name), mode=modes.get(_module(name))) for name in codes}
    _refuse_orphans(component, dropped, codes, layers)
    _refuse_bare(component, config, scales, dropped, layers)
    label = _label(component, config, dropped, layers, scales)
    notes = () if label == "fp8-convert" else tuple(_notes(config, scales, dropped))
    return Foreign(label, scales, frozenset(dropped), notes)


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
        found: dict[str, float] = {}
        for name in (module + suffix for suffix in _INPUT_SCALES if module + suffix in self._tensors):
            info, shard = self._tensors[name]
            if info.numel != 1:
                raise ConvertError(
                    f"{name} in {shard.path} has the shape {list(info.shape)}; one scale can be imported."
                )
            value = float(self._values(name)[0])
            if value != 1 or name.endswith(INPUT_SCALE):  # ComfyUI's older layout: none
                found[name] = value
        if len({*found.values()}) > 1:
            raise ConvertError(f"{' and '.join(found)} differ, and a layer has one input scale; check the file.")
        return next(iter(found.values()), None)

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


def _marked(tensors: Mapping[str, tuple[TensorInfo, Shard]], codes: Sequence[str]) -> dict[str, str]:
    """Modules that are stored by the marker of ComfyUI's older layout: one of two elements says so.

    Raises ConvertError for a marker that means something else.
    """
    modes: dict[str, str] = {}
    for name, (info, shard) in tensors.items():
        if not _is_marker(name):
            continue
        if info.dtype != CODES or info.numel > 2:
            raise ConvertError(
                f"{name} in {shard.path} is {info.dtype} of the shape {list(info.shape)}, which is no marker of a "
                "layout that is known; it cannot be imported."
            )
        if info.numel == 2:
            prefix = name.removesuffix(_SCALED_FP8)
            modes |= {_module(code): layout.STORAGE for code in codes if code.startswith(prefix)}
    return modes


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
    if problem := config_problem(config):
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


def _refuse_bare(
    component: Component,
    config: Any,
    scales: Mapping[str, GivenScale],
    dropped: set[str],
    layers: Mapping[str, str | None],
) -> None:
    """Codes without a scale are values only in a cast of everything: where anything is scaled, one was lost."""
    bare = next((name for name, scale in scales.items() if scale.bare), None)
    if bare is None:
        return
    ours = any(layout.METADATA_KEY in shard.header.metadata for shard in component.shards)
    if config is not None:
        why = "the config states a quantisation"
    elif ours or layers:
        why = "the file's header or its tensors name FP8 layers"
    elif dropped:
        why = f"{min(dropped)} is there"
    else:
        return
    raise ConvertError(
        f"{bare} of {component.label} holds FP8 codes without a scale, although {why}; a scale was lost: download or "
        "make the file again."
    )


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
    if found != COMFY_FORMAT:
        raise ConvertError(
            f"{layer} in {where} has ComfyUI's format {found!r:.80}, and {COMFY_FORMAT} can be imported."
        )
    full = entry.get(COMFY_FULL_PRECISION, False)
    if unknown := next((key for key in entry if key not in ("format", COMFY_FULL_PRECISION)), None):
        raise ConvertError(f"{layer} in {where} has {unknown!r:.80} in its ComfyUI entry, which cannot be imported.")
    if not isinstance(full, bool):
        raise ConvertError(
            f"{layer} in {where} has the {COMFY_FULL_PRECISION} {full!r:.80}, which is no true or false."
        )
    return layout.STORAGE if full else None


def _json(raw: bytes, what: str, where: str) -> dict[str, Any]:
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise ConvertError(f"{what} of {where} {error}; download the file again.") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{what} of {where} is no JSON object; download the file again.")
    return value


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
        return METHODS[config["quant_method"]]
    if layers:
        return "ComfyUI"
    if any(_is_marker(name) or name.endswith(".scale_weight") for name in dropped):
        return "ComfyUI scaled"
    if any(scale.channel for scale in scales.values()):
        return "scales of rows"
    if any(scale.block for scale in scales.values()):
        return "scales of blocks"
    return "bare cast" if all(scale.bare for scale in scales.values()) else "scales of tensors"


def _notes(config: Any, scales: Mapping[str, GivenScale], dropped: set[str]) -> Iterator[str]:
    """What is not as a reader would expect."""
    stated = config if isinstance(config, dict) else {}
    if block_of(config, "") is None and (found := [name for name, scale in scales.items() if scale.block]):
        yield f"no config states the size of blocks: 128x128 is assumed, for weights such as {found[0]}"
    given = [scale.input_scale for scale in scales.values() if scale.input_scale is not None]
    if stated.get("activation_scheme") == "static" and not given:
        yield "its config states static activations, and the file has no input scales: they are dynamic"
    modules = {_module(name) for name in scales}
    unused = sorted(n for n in dropped for s in _INPUT_SCALES if n.endswith(s) and n.removesuffix(s) not in modules)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        yield f"{unused[0]}{more} left out: of layers that are not FP8"
