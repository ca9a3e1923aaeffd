"""`verify`: is a converted snapshot still what was written, is it consistent, and is it what its source gives?

Three questions, each answered by findings: do all bytes have the record's digests; do headers, scales, indices and
configs fit together as readers need them; and, with the source, are codes and scales those of the formula. Damage is
no reason to stop: what can still be read is still checked. Nothing in the folder is trusted, the record neither.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checks.comparison import compare, described, open_original
from .checks.digests import check_files, has_own_card
from .checks.finding import Finding
from .checks.structure import check_structure
from .format import layout
from .format.layout import STAGING
from .output.record import check_record, load_record
from .plan.settings import Settings
from .snapshot.access import HubAccess
from .snapshot.files import require_folder
from .telling.errors import ConvertError
from .telling.notebook import html_table, one_line
from .telling.progress import Progress, Silent
from .telling.quantities import plural


@dataclass(frozen=True, repr=False)
class Verification:
    """What was checked, and what is wrong with it. `notes` tell what could not be checked."""

    path: str
    files: int
    tensors: int
    compared_with: str | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return one_line(self, self.verdict)

    def _repr_html_(self) -> str:
        return html_table(self.verdict, ("file", "finding"), [(f.path, f.problem) for f in self.findings])

    @property
    def verdict(self) -> str:
        """Whether all is well, and what was looked at, in one line."""
        against = f", compared with {self.compared_with}" if self.compared_with else ""
        verdict = "ok" if self.ok else plural(len(self.findings), "finding")
        return f"{self.path}: {verdict} ({self.files} files, {self.tensors} tensors{against})"

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {"ok": self.ok, **asdict(self)}


def require_finished(root: Path) -> None:
    """Raise ConvertError unless `root` is the folder of a conversion that has finished."""
    require_folder(root)
    if not (root / layout.RECORD_FILE).is_file():
        advice = "run its conversion again" if (root / STAGING).exists() else "give the folder that fp8-convert wrote"
        raise ConvertError(
            f"{root} has no {layout.RECORD_FILE}, so it is not a snapshot that fp8-convert finished; {advice}."
        )


def verify(
    path: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    manifest: str | None = None,
    merge_lora: Sequence[Any] = (),
    options: HubAccess | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a converted snapshot; with `source` (a folder or a Hub id), also against what it was made from.

    manifest: the manifest it was converted with, where that was one of your own. merge_lora: the LoRAs that were
    merged, as for `convert`. Raises ConvertError where there is nothing to verify: no converted snapshot, or a source,
    manifest or LoRA that cannot be read or is another one's.
    """
    root = Path(path)
    progress = progress or Silent()
    options = options or HubAccess()
    require_finished(root)
    if problem := check_record(root):  # nothing else can be believed
        return Verification(str(root), 1, 0, None, (Finding(layout.RECORD_FILE, problem),))
    record = load_record(root)
    assert record is not None
    original = None
    if source is not None:  # before the long work: what is wrong with the options is said at once
        loras = Settings.read({"merge_lora": merge_lora}).merge_lora
        original = open_original(root, record, source, manifest, loras, options)
    progress.start(sum(file.size for file in record.files.values()))
    found = [*check_files(root, record, progress)]
    progress.close()
    shards = check_structure(root, record, found)
    if original is not None:
        found += compare(root, record, original, {f.path for f in found}, progress)
    tensors = sum(len(s.header.tensors) for s in shards)
    compared, notes = (None, ()) if original is None else described(original.snapshot, record)
    if has_own_card(root, record):
        notes = (*notes, f"{layout.CARD} is not checked: it was written after the conversion, to present the snapshot")
    return Verification(str(root), len(record.files) + 1, tensors, compared, tuple(found), notes)
