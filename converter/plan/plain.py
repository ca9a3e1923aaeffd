"""What a converted snapshot becomes when its FP8 weights are made plain again: files, headers and configs, as data.

Every shard becomes one file of the same name, its tensors in the same order without their scales. Pure: headers and
configs in, no weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..format import layout
from ..format.header import PREFIX_BYTES, TensorInfo, encode_header
from ..format.layout import WeightFormat
from ..format.record import Record
from ..snapshot.fp8 import Fault, Fp8Component, read_fp8
from ..snapshot.snapshot import CONFIG, Component, Shard, Snapshot
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from ..telling.quantities import plural

PLAIN_DTYPES = {"bfloat16": "BF16", "float16": "F16"}  # by PyTorch's names, as safetensors spells them
# What other tools, and save_pretrained, write otherwise, and what does not change what a weight is.
_HARMLESS = (Fault.UNNAMED, Fault.SCALAR, Fault.INPUT_SCALE, Fault.NO_INPUT_SCALE)


@dataclass(frozen=True, repr=False)
class PlainShard(Brief):
    """One shard and the file that it becomes. `formats` are those of its FP8 modules; without any it is copied.

    sha256: of the source, where the record states it.
    """

    source: Shard
    formats: Mapping[str, WeightFormat]
    header: bytes
    outputs: tuple[TensorInfo, ...]
    sha256: str | None

    @property
    def size(self) -> int:
        """Bytes of the output file."""
        return len(self.header) + (self.outputs[-1].end if self.outputs else 0)

    def format_of(self, tensor: TensorInfo) -> WeightFormat | None:
        """How the tensor is FP8, None if it is not an FP8 weight."""
        if not tensor.name.endswith(layout.WEIGHT):
            return None
        return self.formats.get(tensor.name.removesuffix(layout.WEIGHT))


@dataclass(frozen=True, repr=False)
class PlainPlan(Brief):
    """A whole snapshot. dtype: of the weights that were FP8. files: JSON to write. sidecars: sizes of what to copy."""

    snapshot: Snapshot
    dtype: str
    shards: tuple[PlainShard, ...]
    files: Mapping[str, bytes]
    sidecars: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def weights(self) -> int:
        """How many weights are FP8."""
        return sum(len(shard.formats) for shard in self.shards)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every output file, by path."""
        shards = {shard.source.path: shard.size for shard in self.shards}
        return {**shards, **{path: len(data) for path, data in self.files.items()}, **self.sidecars}

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def bytes_before(self) -> int:
        return sum(shard.source.size for shard in self.shards)

    @property
    def bytes_after(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_to_write(self) -> int:
        return sum(self.sizes.values())


def plan_plain(snapshot: Snapshot, record: Record | None, dtype: str) -> PlainPlan:
    """Plan the way back to plain weights in `dtype`, one of PLAIN_DTYPES. Raises ConvertError for what has none."""
    if snapshot.single_files:
        raise ConvertError(
            f"{snapshot.label} holds single files for another reader; import them with `fp8-convert import` first, and "
            "dequantize what that gives."
        )
    shards: list[PlainShard] = []
    files: dict[str, bytes] = {}
    for component in snapshot.components:
        formats = _formats(component)
        mine = [_shard(shard, formats, record, PLAIN_DTYPES[dtype]) for shard in component.shards]
        if formats and layout.CONFIG_KEY in component.config:
            config = {key: value for key, value in component.config.items() if key != layout.CONFIG_KEY}
            files[component.path(CONFIG)] = layout.encode_json(config)
        if len(mine) > 1:
            files[component.path(layout.index_name(component.stem))] = _index(mine)
        shards += mine
    if not any(shard.formats for shard in shards):
        raise ConvertError(f"{snapshot.label} has no FP8 weights; give a snapshot that fp8-convert made.")
    left_out = {*files, layout.RECORD_FILE}
    sidecars = {path: size for path, size in snapshot.sidecars.items() if path not in left_out}
    notes = (*_notes(record, PLAIN_DTYPES[dtype]), *_unlisted(record, sidecars))
    return PlainPlan(snapshot, dtype, tuple(shards), files, sidecars, notes)


def _formats(component: Component) -> Mapping[str, WeightFormat]:
    """The component's FP8 modules. Raises ConvertError where one cannot be read for certain."""
    fp8: Fp8Component = read_fp8(component)
    method = fp8.config.get("quant_method")
    if fp8.guessed and not fp8.stated and method not in (layout.QUANT_METHOD, layout.QUANT_METHOD_NATIVE):
        stated = f"quant_method {method!r:.80}" if method else "FP8 weights that no config explains"
        raise ConvertError(f"{component.label} was quantised by another tool ({stated}); import it first.")
    if problem := next((p for p in fp8.problems if p.fault not in _HARMLESS), None):
        raise ConvertError(f"{problem.file} cannot be dequantised: {problem}; convert or download the snapshot again.")
    return fp8.formats


def _shard(source: Shard, formats: Mapping[str, WeightFormat], record: Record | None, dtype: str) -> PlainShard:
    header, held = source.header, {tensor.name for tensor in source.header.tensors}
    mine = {module: how for module, how in formats.items() if module + layout.WEIGHT in held}
    if apart := next((key for m, how in mine.items() if (key := how.scale_key(m)) not in held), None):
        raise ConvertError(f"{apart} is not in {source.path}, as its weight is; convert the snapshot again.")
    stated = record.shards.get(source.path) if record is not None else None
    sha256 = stated.sha256 if stated is not None else None
    if not mine:
        raw = len(header.raw).to_bytes(PREFIX_BYTES, "little") + header.raw
        return PlainShard(source, {}, raw, header.tensors, sha256)
    outputs = tuple(_outputs(header.tensors, mine, dtype))
    metadata = {key: value for key, value in header.metadata.items() if key != layout.METADATA_KEY}
    return PlainShard(source, mine, encode_header(outputs, metadata), outputs, sha256)


def _outputs(tensors: Iterable[TensorInfo], modules: Collection[str], dtype: str) -> Iterator[TensorInfo]:
    """The tensors of a file without the scales of its FP8 modules, whose weights have the dtype."""
    weights = {module + layout.WEIGHT for module in modules}
    scales = {module + suffix for module in modules for suffix in layout.SCALE_SUFFIXES}
    position = 0
    for tensor in tensors:
        if tensor.name in scales:
            continue
        fp8 = tensor.name in weights
        end = position + (2 * tensor.numel if fp8 else tensor.nbytes)
        yield TensorInfo(tensor.name, dtype if fp8 else tensor.dtype, tensor.shape, position, end)
        position = end


def _index(shards: list[PlainShard]) -> bytes:
    """The index file of a component."""
    names = {t.name: shard.source.path.rpartition("/")[2] for shard in shards for t in shard.outputs}
    total = sum(shard.outputs[-1].end for shard in shards if shard.outputs)
    return layout.encode_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


def _notes(record: Record | None, dtype: str) -> list[str]:
    """Where converting the result again would give other bytes, as far as the record tells."""
    if record is None:
        return []
    decisions = (d for component in record.components.values() for d in component.decisions if d.mode is not None)
    others: dict[str, int] = {}
    for decision in decisions:
        for source, count in decision.dtypes.items():
            if source != dtype and source in layout.SOURCE_DTYPES:
                others[source] = others.get(source, 0) + count
    return [
        f"{plural(count, 'weight')} had the dtype {source} before {'it was' if count == 1 else 'they were'} converted: "
        f"in {dtype} {'its' if count == 1 else 'their'} scale may come out otherwise if the result is converted again"
        for source, count in sorted(others.items())
    ]


def _unlisted(record: Record | None, sidecars: Iterable[str]) -> Iterator[str]:
    """Files that the record has no digest of."""
    listed = record.files if record is not None else sidecars
    yield from (f"{path} is not in the record, and is copied as it is" for path in sidecars if path not in listed)
