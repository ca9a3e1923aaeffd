"""A checkpoint of one component in place of that of a snapshot: its tensors under the snapshot's names and shapes.

The bytes stay where they are. A tensor that is renamed, or is one of the parts of a fused one, is one range of its
file; so a shard keeps its bytes and gets other tensors in its header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..format.header import TensorInfo
from ..format.layout import METADATA_KEY
from ..snapshot.foreign import Foreign
from ..snapshot.foreign_config import COMFY_METADATA
from ..snapshot.given_scale import GivenScale
from ..snapshot.snapshot import Component
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from .key_map import KeyMap
from .key_maps import key_map

_FORMAT_KEYS = (COMFY_METADATA, METADATA_KEY)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, repr=False)
class Adopted(Brief):
    """A component whose FP8 tensors another tool made, under the names of its class.

    component: with shards whose headers have these names. scales: by the codes' names. dropped: why a tensor, which
    keeps its name, is left out. notes: what else the user should know, as clauses.
    """

    component: Component
    label: str
    scales: Mapping[str, GivenScale]
    dropped: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Names:
    """The native tensors in each tensor of a checkpoint, and why some have none."""

    members: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str]


def adopt(foreign: Foreign, source: Component, base: Component, shapes: Shapes) -> Adopted:
    """Name what `foreign` found in `source` as the component `base` does. shapes: of base's tensors, scales excluded.

    Raises ConvertError for tensors that base has and source lacks, for others than it has, and for other shapes.
    """
    given = {t.name: t.shape for t in source.tensors if t.name not in foreign.dropped}
    names = name_as(base, given, shapes)
    shards, scales = [], {}
    dropped = {**names.dropped, **dict.fromkeys(foreign.dropped, f"a scale or marker of the layout {foreign.label}")}
    for shard in source.shards:
        tensors: list[TensorInfo] = []
        for tensor in shard.header.tensors:
            parts = _parts(tensor, names, shapes)
            tensors += parts
            if (scale := foreign.scales.get(tensor.name)) is not None and tensor.name not in dropped:
                for number, part in enumerate(parts):
                    scales[part.name] = _part_of(scale, number, len(parts), tensor)
        metadata = {k: v for k, v in shard.header.metadata.items() if k not in _FORMAT_KEYS}
        header = replace(shard.header, tensors=tuple(tensors), metadata=metadata)
        shards.append(replace(shard, header=header, renamed=True))
    component = replace(base, shards=tuple(shards), index=None)
    return Adopted(component, foreign.label, scales, dropped, foreign.notes)


def name_as(base: Component, given: Shapes, shapes: Shapes) -> _Names:
    """Which of base's tensors the given ones are: by their own names, else by the original names of base's class."""
    if given.keys() <= shapes.keys():
        names = _Names({name: (name,) for name in given}, {})
    else:
        names = _by_original_names(base, given, shapes)
    found = {member for members in names.members.values() for member in members}
    if missing := [name for name in shapes if name not in found]:
        raise ConvertError(
            f"The checkpoint lacks {missing[0]} of {base.label}{_more(missing)}; give the file of the whole component."
        )
    return names


def matches(base: Component, given: Shapes, shapes: Shapes) -> bool:
    """Whether the given tensors are those of the component."""
    try:
        name_as(base, given, shapes)
    except ConvertError:
        return False
    return True


def _by_original_names(base: Component, given: Shapes, shapes: Shapes) -> _Names:
    names = key_map(base.class_name, base.config)
    unknown = next(name for name in given if name not in shapes)
    if names is None:
        raise ConvertError(
            f"{unknown} is no tensor of {base.label} ({base.class_name}), and fp8-convert knows no other names of this "
            "class; give a checkpoint with diffusers' names."
        )
    originals = {original.name: original for original in names.to_original(shapes)}
    prefix, others = _prefix_of(names, given)
    members, dropped = {}, dict.fromkeys(others, f"of another component than {base.label}")
    for name in given:
        if name in dropped:
            continue
        original = originals.get(name.removeprefix(prefix))
        if original is not None:
            members[name] = original.members
        elif name.removeprefix(prefix) in names.dropped:
            dropped[name] = f"{base.class_name} does without it"
        else:
            raise ConvertError(
                f"{name} is no tensor of {base.label} ({base.class_name}), neither by diffusers' names nor by those of "
                "the model's first release; check that the file is of this model, or name another --component."
            )
    return _Names(members, dropped)


def _prefix_of(names: KeyMap, given: Iterable[str]) -> tuple[str, list[str]]:
    """What stands before the component's names, and the names without it: a file may hold a whole pipeline."""
    given = list(given)
    if prefix := names.prefix_of(given):
        return prefix, []
    for prefix in names.prefixes:
        others = [name for name in given if not name.startswith(prefix)]
        if len(others) < len(given):
            return prefix, others
    return "", []


def _parts(tensor: TensorInfo, names: _Names, shapes: Shapes) -> Sequence[TensorInfo]:
    """The native tensors that are in one, each a range of its bytes; the tensor itself where it has none."""
    members = names.members.get(tensor.name)
    if members is None:
        return [tensor]
    rows = tensor.shape[0] if tensor.shape else 1
    wanted = [shapes[member] for member in members]
    if len(members) == 1 and _alike(tensor.shape, wanted[0]):
        return [replace(tensor, name=members[0], shape=wanted[0])]
    if len(members) > 1 and all(_alike(tensor.shape, (w[0] * len(members), *w[1:])) for w in wanted if w):
        size = tensor.nbytes // len(members)
        starts = [tensor.start + number * size for number in range(len(members))]
        return [
            TensorInfo(member, tensor.dtype, shape, start, start + size)
            for member, shape, start in zip(members, wanted, starts, strict=True)
        ]
    raise ConvertError(
        f"{tensor.name} has the shape {list(tensor.shape)} with {rows} rows, and {members[0]} of the base "
        f"{list(wanted[0])}; check that the file is of this model."
    )


def _alike(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether shapes are the same but for dimensions of one behind them, as those of 1x1 convolutions."""
    shorter, longer = sorted((shape, wanted), key=len)
    return longer[: len(shorter)] == shorter and set(longer[len(shorter) :]) <= {1}


def _part_of(scale: GivenScale, number: int, parts: int, tensor: TensorInfo) -> GivenScale:
    try:
        return scale.part(number, parts, tensor.shape[0] if tensor.shape else 1)
    except ValueError as error:
        raise ConvertError(f"{tensor.name} cannot be divided: {error}.") from error


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def real_shapes(component: Component, foreign: Foreign | None) -> Shapes:
    """A component's tensors with their shapes, without what belongs to its quantisation."""
    dropped = foreign.dropped if foreign is not None else frozenset()
    return {t.name: t.shape for t in component.tensors if t.name not in dropped}
