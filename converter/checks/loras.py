"""The LoRAs that a record names, read again from the files that a user gives for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..format.reader import read_value
from ..format.record import Record, RecordedLora
from ..plan.lora import Lora, read_loras
from ..plan.lora_request import LoraRequest
from ..snapshot.snapshot import Snapshot
from ..telling.errors import ConvertError


def recorded_loras(root: Path, record: Record, given: Sequence[LoraRequest], snapshot: Snapshot) -> tuple[Lora, ...]:
    """The LoRAs that were merged. Raises ConvertError unless they are those that are given, in order."""
    recorded = record.recipe.merged_loras
    was = f"{root} was made {'with ' + _listed(recorded) if recorded else 'without a LoRA'}"
    if recorded and not given:
        raise ConvertError(f"{was}; pass each with --merge-lora, as it was converted.")
    read = read_loras(given, snapshot, record.recipe.components)
    stated = tuple(read_value(RecordedLora, lora.to_json(), "the LoRA") for lora in read)
    if stated != recorded:
        raise ConvertError(f"{was}, and --merge-lora gives {_listed(stated)}; pass what it was made with.")
    return read


def _listed(loras: Sequence[RecordedLora]) -> str:
    return ", ".join(map(str, loras))
