"""One file for a whole component, under the model's original names: what ComfyUI reads.

The shards are streamed as they are for a snapshot; every chunk has its place in the one file. Members of a fused
projection lie one below the other and share the scale that stands beside them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..format import layout
from ..format.header import DTYPE_BITS, TensorInfo, encode_header
from ..targets.comfyui import Extra
from ..targets.key_map import KeyMap, Original
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from .decide import PlannedTensor
from .sharding import OutputFile


@dataclass(frozen=True, repr=False)
class SingleFile(Brief):
    """The file of one component.

    file: its path, header and tensors. places: where the bytes of every output tensor of the component's shards begin
    in the data section; the scales of a fused projection's members have one place.
    """

    file: OutputFile
    places: Mapping[str, int]
    extras: tuple[Extra, ...] = ()

    def start_of(self, extra: Extra) -> int:
        """Where an extra tensor begins in the data section."""
        return next(t.start for t in self.file.outputs if t.name == extra.name)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file. `members` are the output tensors that it is made of, and `shared` says that each of them
    is all of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    members: tuple[str, ...]
    shared: bool = False


def lay_out_single_file(
    tensors: Iterable[PlannedTensor],
    names: KeyMap,
    path: str,
    metadata: Mapping[str, str],
    extras: Sequence[Extra] = (),
) -> SingleFile:
    """Lay out a component's tensors in one file. metadata: what its header says beside the FP8 modules.

    Raises ConvertError where the original layout does not have a tensor, and where members of a fused tensor would be
    stored differently.
    """
    planned = {t.info.name: t for t in tensors}
    entries = [_of_extra(extra) for extra in extras]
    for original in names.to_original({name: t.info.shape for name, t in planned.items()}):
        entries += _entries(original, [planned[member] for member in original.members])
    entries.sort(key=lambda e: (-DTYPE_BITS[e.dtype], e.name))  # so that every offset is a multiple of its dtype's size
    outputs, places, position = [], {}, 0
    for entry in entries:
        outputs.append(TensorInfo(entry.name, entry.dtype, entry.shape, position, position + entry.nbytes))
        for number, member in enumerate(entry.members):
            places[member] = position if entry.shared else position + entry.nbytes * number // len(entry.members)
        position += entry.nbytes
    header = encode_header(outputs, {"format": "pt", **metadata})
    return SingleFile(OutputFile(path, header, tuple(outputs)), places, tuple(extras))


def original_modules(tensors: Iterable[PlannedTensor], names: KeyMap) -> dict[str, layout.WeightFormat]:
    """The FP8 modules under their original names."""
    return {names.original_module(t.module): t.decision.format for t in tensors if t.decision.format is not None}


def _of_extra(extra: Extra) -> _Entry:
    return _Entry(extra.name, extra.dtype, extra.shape, extra.nbytes, ())


def _entries(original: Original, members: Sequence[PlannedTensor]) -> list[_Entry]:
    """The tensor and, of an FP8 weight, its scales."""
    _check_alike(original, members)
    first, how = members[0], members[0].decision.format
    names = tuple(m.info.name for m in members)
    dtype = "F8_E4M3" if how else first.info.dtype
    entries = [_Entry(original.name, dtype, original.shape, sum(m.out_bytes for m in members), names)]
    if how is not None:
        module = original.name.removesuffix(layout.WEIGHT)
        scales = tuple(how.scale_key(m.module) for m in members)
        entries.append(_Entry(how.scale_key(module), "F32", (), 4, scales, shared=True))
        if first.decision.input_scale is not None:
            inputs = tuple(m.module + layout.INPUT_SCALE for m in members)
            entries.append(_Entry(module + layout.INPUT_SCALE, "F32", (), 4, inputs, shared=True))
    return entries


def _check_alike(original: Original, members: Sequence[PlannedTensor]) -> None:
    first = members[0]
    assert not first.decision.fp8 or first.decision.per_tensor, f"{first.module} has scales that one file cannot hold"
    for other in members[1:]:
        if first.decision.format != other.decision.format or (
            not first.decision.fp8 and first.info.dtype != other.info.dtype
        ):
            raise ConvertError(
                f"{first.info.name} and {other.info.name} are one tensor in the original layout ({original.name}), and "
                "they would be stored differently; ignore both or none."
            )
        if first.decision.fp8 and (first.decision.group is None or first.decision.group != other.decision.group):
            raise ConvertError(
                f"{first.info.name} and {other.info.name} are one tensor in the original layout ({original.name}), and "
                "no fusion group of the manifest gives them one scale; add one."
            )
