"""What is FP8 in a component's files: shard metadata, weights, scales and config, read from headers in one place.

`verify`, `inspect` and the loader look at finished components through this. A weight that is FP8 and that no metadata
name is another tool's or was rewritten since: its format is guessed. `docs/format.md` is the contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from ..format import layout
from ..format.header import TensorInfo
from ..format.layout import WeightFormat
from .snapshot import CONFIG, Component, Shard

CODES = "F8_E4M3"


class Fault(Enum):
    """What can be wrong. SCALAR is a scale of shape [1] instead of [], as some other tools write it."""

    METADATA = auto()
    ABSENT = auto()
    NOT_CODES = auto()
    NOT_ROWS = auto()
    NO_SCALE = auto()
    SCALE = auto()
    SCALAR = auto()
    ELSEWHERE = auto()
    UNNAMED = auto()
    NOT_WEIGHT = auto()
    ORPHAN = auto()
    INPUT_SCALE = auto()
    NO_INPUT_SCALE = auto()


_TEXTS = {
    Fault.METADATA: "has unreadable fp8_convert metadata ({found})",
    Fault.ABSENT: "its metadata name {module}, whose weight it does not hold",
    Fault.NOT_CODES: "{name} is {found}, and the metadata say {due}",
    Fault.NOT_ROWS: "{name} is {found}, and scales of rows or blocks are for two dimensions",
    Fault.NO_SCALE: "{name} has no scale {due}",
    Fault.SCALE: "{name} is {found} instead of {due}",
    Fault.SCALAR: "{name} is {found} instead of {due}",
    Fault.ELSEWHERE: "{name} is in another file than the metadata that name it",
    Fault.UNNAMED: "{name} is FP8 and the metadata do not name it",
    Fault.NOT_WEIGHT: "{name} is FP8 and the metadata do not name it",
    Fault.ORPHAN: "{name} is a scale without an FP8 weight",
    Fault.INPUT_SCALE: "{name} is {found} instead of {due}",
    Fault.NO_INPUT_SCALE: "activations are static and {module} has no input_scale",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with the tensor `name` of `module`: what is `found` there, and what is `due`."""

    fault: Fault
    file: str
    module: str = ""
    name: str = ""
    found: str = ""
    due: str = ""

    def __str__(self) -> str:
        """A clause that can follow the file's name."""
        values = {"module": self.module, "name": self.name, "found": self.found, "due": self.due}
        return _TEXTS[self.fault].format_map(values)


@dataclass(frozen=True)
class Fp8Component:
    """The FP8 weights of a component by module (a tensor's name without `.weight`), and what is wrong with them.

    stated: those that metadata name. guessed: the others. config: what config.json has under `quantization_config`.
    """

    stated: Mapping[str, WeightFormat]
    guessed: Mapping[str, WeightFormat]
    config: Mapping[str, Any]
    problems: tuple[Problem, ...]

    @property
    def formats(self) -> dict[str, WeightFormat]:
        return {**self.stated, **self.guessed}


def read_fp8(component: Component) -> Fp8Component:
    """Read a component's headers and config; no weights are touched. What is wrong is among the problems."""
    config = component.config.get(layout.CONFIG_KEY)
    config = config if isinstance(config, dict) else {}
    problems, named = [], {}
    for shard in component.shards:
        try:
            named[shard.path] = layout.decode_modules(shard.header.metadata)
        except ValueError as error:
            problems.append(Problem(Fault.METADATA, shard.path, found=f"{error!s:.200}"))
    shards = [shard for shard in component.shards if shard.path in named]
    tensors = {t.name: t for shard in shards for t in shard.header.tensors}
    stated = {module: how for modules in named.values() for module, how in modules.items()}
    guessed = {
        module: _guess(component, module, tensors, config)
        for name, tensor in tensors.items()
        if tensor.dtype == CODES and name.endswith(layout.WEIGHT)
        if (module := name.removesuffix(layout.WEIGHT)) not in stated
    }
    for shard in shards:
        problems += _problems_of_named(shard, named[shard.path], tensors)
        problems += _problems_of_held(shard, stated, guessed, tensors)
    formats = {**stated, **guessed}
    if config.get("activation_scheme") == "static":
        for module, how in formats.items():
            if how.mode == layout.W8A8 and module + layout.INPUT_SCALE not in tensors:
                problems.append(Problem(Fault.NO_INPUT_SCALE, component.path(CONFIG), module))
    return Fp8Component(stated, guessed, config, tuple(problems))


def _problems_of_named(
    shard: Shard, modules: Mapping[str, WeightFormat], tensors: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    """What is wrong with the modules that a shard's metadata name; `tensors` are the component's."""
    held = {tensor.name for tensor in shard.header.tensors}
    for module, how in modules.items():
        if (problem := _weight_problem(shard.path, module, how, tensors)) is not None:
            yield problem
            continue
        for name in (module + layout.WEIGHT, how.scale_key(module)):
            if name not in held:
                yield Problem(Fault.ELSEWHERE, shard.path, module, name)


def _problems_of_held(
    shard: Shard,
    stated: Mapping[str, WeightFormat],
    guessed: Mapping[str, WeightFormat],
    tensors: Mapping[str, TensorInfo],
) -> Iterator[Problem]:
    """What is wrong with the tensors that a shard holds, and that its metadata do not tell."""
    for tensor in shard.header.tensors:
        module = tensor.name.removesuffix(layout.WEIGHT)
        if tensor.name.endswith(layout.WEIGHT) and module in guessed:
            yield Problem(Fault.UNNAMED, shard.path, module, tensor.name)
            if (problem := _weight_problem(shard.path, module, guessed[module], tensors)) is not None:
                yield problem
        elif tensor.dtype == CODES and module not in stated:
            yield Problem(Fault.NOT_WEIGHT, shard.path, module, tensor.name)
        if not tensor.name.endswith(layout.SCALE_SUFFIXES):
            continue
        module = tensor.name.rpartition(".")[0]
        if module not in stated and module not in guessed:
            yield Problem(Fault.ORPHAN, shard.path, module, tensor.name)
        elif tensor.name.endswith(layout.INPUT_SCALE) and (tensor.dtype, tensor.shape) != ("F32", ()):
            fault = Fault.SCALAR if _is_f32_of_one(tensor) else Fault.INPUT_SCALE
            yield Problem(fault, shard.path, module, tensor.name, _about(tensor), "F32 []")


def _weight_problem(file: str, module: str, how: WeightFormat, tensors: Mapping[str, TensorInfo]) -> Problem | None:
    """What is wrong with an FP8 weight, or with its scale."""
    weight = tensors.get(module + layout.WEIGHT)
    if weight is None:
        return Problem(Fault.ABSENT, file, module)
    if weight.dtype != CODES:
        return Problem(Fault.NOT_CODES, file, module, weight.name, weight.dtype, f"{how.mode} {how.scheme}")
    if not how.per_tensor and len(weight.shape) != 2:
        return Problem(Fault.NOT_ROWS, file, module, weight.name, str(list(weight.shape)))
    key = how.scale_key(module)
    if (scale := tensors.get(key)) is None:
        return Problem(Fault.NO_SCALE, file, module, weight.name, due=key)
    due = how.scale_shape(weight.shape)
    if scale.dtype == "F32" and scale.shape == due:
        return None
    fault = Fault.SCALAR if due == () and _is_f32_of_one(scale) else Fault.SCALE
    return Problem(fault, file, module, key, _about(scale), f"F32 {list(due)}")


def _guess(
    component: Component, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> WeightFormat:
    """Mode and scheme of an FP8 weight that no shard's metadata name."""
    weight = tensors[module + layout.WEIGHT]
    mode = layout.W8A8 if "transformer" in f"{component.name} {component.class_name}".lower() else layout.STORAGE
    if len(weight.shape) != 2:
        mode = layout.STORAGE
    if module + layout.WEIGHT_SCALE_INV not in tensors:
        scale = tensors.get(module + layout.WEIGHT_SCALE)
        channel = scale is not None and len(weight.shape) == 2 and scale.shape == (weight.shape[0], 1)
        return WeightFormat(mode, channel=channel)
    match config.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return WeightFormat(mode, (rows, columns))
    return WeightFormat(mode, (128, 128))


def _is_f32_of_one(tensor: TensorInfo) -> bool:
    return (tensor.dtype, tensor.shape) == ("F32", (1,))


def _about(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
