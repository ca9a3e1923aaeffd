"""The record `fp8_convert.json` at a converted snapshot's root: what it was made from, how, and every digest.

It holds nothing that changes between two conversions of the same source with the same recipe and tool: no times,
no paths, no device, no thread counts. `docs/format.md` says what each field means. What changes its fields raises
`layout.RECORD_FORMAT`; what older formats lack has a default here, and `_ADDED` says since when it is there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from . import layout
from .layout import Block
from .reader import as_json, read_value
from .untrusted import parse_json

SEAL = "record_sha256"
_MOST_COLUMNS = 2**17
_ERRORS_SINCE = 4
# Fields by the format that brought them: a record of that format or a newer one has them, an older one does not.
_ADDED = {
    2: (("recipe", "max_shard_size"), ("components", "shared_scales")),
    3: (
        ("recipe", "target"), ("recipe", "merged_loras"), ("shards", "component"), ("shards", "parts"),
        ("source", "base_repo"), ("source", "base_commit"),
        ("components", "imported"), ("components", "unequal_scales"),
    ),
    _ERRORS_SINCE: (("components", "errors"),),
}  # fmt: skip


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedSource(Brief):
    """What was converted: Hub id and commit (None for a folder), the pipeline's class (None for a lone component).

    base_repo, base_commit: the Hub id and commit that lent an imported checkpoint all but its weights.
    """

    repo: str | None
    commit: str | None
    pipeline: str | None
    base_repo: str | None = None
    base_commit: str | None = None


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedLora(Brief):
    """A LoRA that was merged: digests of its file and of the adapter_config.json beside it, and how it was scaled.

    component: the DiT that was named for it, None where that was left to its names.
    """

    sha256: str
    config_sha256: str | None
    scale: float
    component: str | None

    def __str__(self) -> str:
        return f"the LoRA {self.sha256:.12} at scale {self.scale:g}{f' in {self.component}' if self.component else ''}"


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedRecipe(Brief):
    """The settings, as `Recipe.to_json` states them."""

    quantization: str
    manifest: str
    manifest_sha256: str
    ignored_layers: tuple[str, ...]
    components: tuple[str, ...]
    compact: bool
    weight_block_size: Block | None
    activation_scheme: str
    max_shard_size: int | None = None
    target: str = "native"
    input_scales_sha256: str | None
    merged_loras: tuple[RecordedLora, ...] = ()


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedDecision(Brief):
    """Tensors of one component that share a decision; `dtypes` counts them by source dtype."""

    mode: str | None
    scheme: str | None
    kind: str | None
    rule: str
    why: str
    tensors: int
    dtypes: Mapping[str, int]
    params: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedError(Brief):
    """What the codes of an FP8 module miss of the weight that they were made of, LoRAs merged; `docs/weight-error.md`.

    sqnr_db: signal to quantisation noise, None where nothing is missed. row_sqnr_db: the same where every row, an
    output channel, counts alike. row_error: the largest relative error of a row, sqrt(sum e^2 / sum w^2). weights:
    elements; of them saturated: codes of +-448, subnormal: codes below 2^-6 but not zero, vanished: codes of zero whose
    weights are not zero.
    """

    sqnr_db: float | None
    row_sqnr_db: float | None
    row_error: float
    weights: int
    saturated: int
    subnormal: int
    vanished: int


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedComponent(Brief):
    """One component; `fp8_modules` are counts by mode, `shared_scales` the modules of each group with one scale.

    imported: the layout that its FP8 weights were imported from, None where this tool made them. unequal_scales: the
    modules of each group that runtimes fuse and whose imported scales differ. errors: by module, of those FP8 weights
    that this tool made.
    """

    class_: str | None
    fp8_modules: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    shared_scales: tuple[tuple[str, ...], ...] = ()
    imported: str | None = None
    unequal_scales: tuple[tuple[str, ...], ...] = ()
    errors: Mapping[str, RecordedError] = field(default_factory=dict)
    decisions: tuple[RecordedDecision, ...]

    @property
    def converted(self) -> bool:
        return any(self.fp8_modules.values())


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedPart(Brief):
    """A source file beside the first one."""

    source: str
    source_size: int
    source_sha256: str


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedShard(Brief):
    """A safetensors file, and the one that it was made from.

    component: whose it is, where that is not the folder that it lies in. parts: the other files that it was made from.
    """

    size: int
    sha256: str
    source: str
    source_size: int
    source_sha256: str
    component: str | None = None
    parts: tuple[RecordedPart, ...] = ()

    @property
    def sources(self) -> dict[str, RecordedPart]:
        """Every file that it was made from, by path."""
        first = RecordedPart(source=self.source, source_size=self.source_size, source_sha256=self.source_sha256)
        return {part.source: part for part in (first, *self.parts)}

    def component_of(self, path: str) -> str:
        """The component that the file at `path` belongs to."""
        return path.rpartition("/")[0] if self.component is None else self.component


@dataclass(frozen=True, repr=False, kw_only=True)
class RecordedFile(Brief):
    """Size and digest of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, repr=False, kw_only=True)
class Record(Brief):
    """A snapshot's record; `record_sha256` seals all the rest."""

    format: int
    tool: str
    tool_version: str
    source: RecordedSource
    recipe: RecordedRecipe
    recipe_sha256: str
    components: Mapping[str, RecordedComponent]
    shards: Mapping[str, RecordedShard]
    files: Mapping[str, RecordedFile]
    record_sha256: str

    @property
    def classes(self) -> dict[str, str | None]:
        """The components' classes by name."""
        return {name: component.class_ for name, component in self.components.items()}

    @property
    def states_errors(self) -> bool:
        """Whether its format has the errors of weights."""
        return self.format >= _ERRORS_SINCE

    def to_json(self) -> dict[str, Any]:
        """As this version writes it."""
        data: dict[str, Any] = as_json(self)
        return data


def measured_columns(shape: Sequence[int]) -> int | None:
    """Elements of a row of a weight whose error is recorded, None for a weight whose error is not.

    That is one without elements, or with rows of which the squares of all codes' values might not fit into an int64.
    """
    columns = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    return columns if math.prod(shape) and columns <= _MOST_COLUMNS else None


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's JSON with a digest of itself, so that a damaged record is found too."""
    text = json.dumps({k: v for k, v in record.items() if k != SEAL}, sort_keys=True, separators=(",", ":"))
    return {**record, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_record(raw: bytes, where: str) -> Record:
    """The record whose bytes are `raw`; `where` names its file in errors.

    Its types and paths are checked, its digests are not. Raises ConvertError if the record cannot be used.
    """
    data = _parse(raw, where)
    try:
        return _read(data)
    except ValueError as error:
        advice = "upgrade fp8-convert" if _is_newer(data) else "convert the snapshot again"
        raise ConvertError(f"{where} {error}; {advice}.") from error


def record_problem(raw: bytes, where: str) -> str | None:
    """What is wrong with the record itself, None if it is, byte for byte, what was written.

    Raises ConvertError if it is no JSON object.
    """
    data = _parse(raw, where)
    try:
        _read(data)
    except ValueError as error:
        return str(error)
    try:
        as_written = seal(data) == data and layout.encode_json(data) == raw
    except (ValueError, RecursionError):  # what no encoder writes, such as half a surrogate pair
        as_written = False
    return None if as_written else "was changed since it was written"


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        data = parse_json(raw)
    except ValueError as error:
        raise ConvertError(f"{where} is damaged (it {error}); convert the snapshot again.") from error
    if not isinstance(data, dict):
        raise ConvertError(f"{where} is damaged (not a JSON object); convert the snapshot again.")
    return data


def _read(data: Mapping[str, Any]) -> Record:
    """The record in a JSON object. Raises ValueError with a clause on what keeps readers from using it."""
    if type(stated := data.get("format")) is not int or not 1 <= stated <= layout.RECORD_FORMAT:
        raise ValueError(f"has the format {stated!r:.40}, and this version reads 1 to {layout.RECORD_FORMAT}")
    try:
        record: Record = read_value(Record, data, "the record")
        if what := next(_contradictions(data, record), None):
            raise ValueError(what)
    except ValueError as error:
        raise ValueError(f"is damaged ({error})") from error
    return record


def _is_newer(data: Mapping[str, Any]) -> bool:
    stated = data.get("format")
    return isinstance(stated, int) and stated > layout.RECORD_FORMAT


def _contradictions(data: Mapping[str, Any], record: Record) -> Iterator[str]:
    """Fields that its format lacks or demands, names that are no paths below the snapshot, parts that do not fit."""
    for since, places in _ADDED.items():
        for part, key in places:
            for entry in data[part].values() if part in ("components", "shards") else (data[part],):
                if (key in entry) != (record.format >= since):
                    yield f"{key!r} of {part!r} comes with the format {since}, and its format is {record.format}"
    for path in (*filter(None, record.components), *record.files):
        if not path.isprintable() or any(part in ("", ".", "..") for part in path.split("/")):
            yield f"it names {path!r:.80}, which is not a path in a snapshot"
    for path, shard in record.shards.items():
        if record.files.get(path) != RecordedFile(size=shard.size, sha256=shard.sha256):
            yield f"its shards and files disagree about {path!r:.80}"
        elif shard.component_of(path) not in record.components:
            yield f"the shard {path!r:.80} is of no component"
