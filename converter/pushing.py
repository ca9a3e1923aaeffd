"""`push`: a converted snapshot into a Hub repository, with a model card of its own. The door of an upload.

The folder is only read: the card is made in memory, and the source's card, which the folder has as README.md, is
uploaded as README.source.md beside it. Nothing is created on the Hub before every byte was compared with the record.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks.digests import place
from .format import layout
from .format.record import Record
from .output.card import MAX_CARD_BYTES, carried, front_matter, licence_files, model_card
from .output.record import check_record, load_record
from .output.writing import sha256_at
from .snapshot.access import HubAccess
from .snapshot.files import LocalFiles
from .telling.errors import ConvertError, one_clause
from .telling.notebook import html_table, one_line
from .telling.progress import Progress, Silent, bars_of_libraries
from .telling.quantities import byte_count, plural
from .verification import require_finished, verify

if TYPE_CHECKING:
    from .output.uploading import Upload

_BY_HAND = "was written or edited by hand and stays as it is: delete it on the Hub and push again for a new one"


@dataclass(frozen=True, repr=False)
class Push:
    """What a push put on the Hub, or would put there.

    files: bytes by path in the repository. commit: None for a dry run. changed: whether the push made that commit; it
    does not where the Hub has all of it already. deleted: what an earlier push had left and this one has not.
    """

    path: str
    repo: str
    url: str | None
    branch: str
    commit: str | None
    changed: bool
    files: Mapping[str, int]
    deleted: tuple[str, ...]
    notes: tuple[str, ...]
    card: str

    def __repr__(self) -> str:
        return one_line(self, self.summary)

    def _repr_html_(self) -> str:
        rows = [(path, byte_count(size)) for path, size in self.files.items()]
        return html_table(self.summary, ("file", "bytes"), rows, self.notes)

    @property
    def summary(self) -> str:
        """What was done, in one line."""
        size = f"{plural(len(self.files), 'file')}, {byte_count(sum(self.files.values()))}"
        if self.commit is None:
            return f"would push {self.path} to {self.repo}: {size}"
        done = f"pushed {self.path}" if self.changed else f"already there: {self.path}"
        return f"{done}: {size}, {self.url} @ {self.commit[:12]}"

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {
            "path": self.path,
            "repo": self.repo,
            "url": self.url,
            "branch": self.branch,
            "commit": self.commit,
            "changed": self.changed,
            "bytes": sum(self.files.values()),
            "files": dict(self.files),
            "deleted": list(self.deleted),
            "notes": list(self.notes),
            "card": self.card,
        }


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Push:
    """Upload the converted snapshot in the folder `path` to the Hub repository `repo`, in one commit.

    repo: created if need be; a name without a namespace is in your own. revision: the branch, created if need be.
    message: the commit's. dry_run: makes the card and the list of files, and no connection. quiet: no progress bars.
    Raises ConvertError for a snapshot that is not as it was written, and for a repository that holds something else.
    """
    from .output.uploading import Repository, check_repo_name, former_files, keeps_card  # late: the Hub's client

    root, progress = Path(path), progress or Silent()
    options = HubAccess(revision=revision, token=token, quiet=quiet)
    check_repo_name(repo)
    record = _recorded(root)
    data, notes = _source_data(root, record)
    if dry_run:
        card = model_card(record, data, repo)
        sizes = {name: upload.size for name, upload in _uploads(root, record, card).items()}
        return Push(str(root), repo, None, revision or "main", None, False, sizes, (), notes, card.decode())
    repository = Repository(repo, options, private=private)
    if (there := repository.look()) is not None:  # before the long work: what is there may not be replaced
        former_files(there, record)
    card = model_card(record, data, repository.repo)
    uploads = _uploads(root, record, card)
    _check_all(root, progress)
    progress.say(f"uploading {byte_count(sum(upload.size for upload in uploads.values()))} to {repository.url} ...")
    label = record.source.repo or record.source.pipeline or "a component"
    message = message or f"FP8 snapshot of {label} by fp8-convert {record.tool_version}"
    with bars_of_libraries(quiet=quiet):
        there = repository.prepare()
        if keeps_card(there, _source_card(root, record)):
            del uploads[layout.CARD]
            notes = (*notes, f"{layout.CARD} of {repository.repo} {_BY_HAND}")
        obsolete = sorted(former_files(there, record) - uploads.keys() - {layout.CARD})
        commit = repository.commit(there, uploads, obsolete, message)
    return Push(
        path=str(root),
        repo=repository.repo,
        url=repository.url,
        branch=repository.branch,
        commit=commit,
        changed=commit != there.commit,
        files={name: upload.size for name, upload in uploads.items()},
        deleted=tuple(obsolete),
        notes=notes,
        card=card.decode(),
    )


def _recorded(root: Path) -> Record:
    """The record of the snapshot in a folder, all of whose files are there with their sizes. Raises ConvertError."""
    require_finished(root)
    record = load_record(root)
    assert record is not None
    if problem := check_record(root):
        raise _damaged(root, layout.RECORD_FILE, problem)
    for name, entry in record.files.items():
        file = root / place(root, record, name)
        if not file.is_file():
            raise _damaged(root, name, "is missing")
        if (size := file.stat().st_size) != entry.size:
            raise _damaged(root, name, f"has {size} bytes instead of {entry.size}")
    return record


def _check_all(root: Path, progress: Progress) -> None:
    """Raise ConvertError unless every byte is as it was written, and nothing else is there."""
    findings = verify(root, progress=progress).findings
    if findings:
        raise _damaged(root, findings[0].path, findings[0].problem, len(findings) - 1)


def _damaged(root: Path, path: str, problem: str, more: int = 0) -> ConvertError:
    return ConvertError(
        f"{root} is not as it was written: {path} {problem}{f' (and {more} more)' if more else ''}; nothing was "
        f"pushed, and `fp8-convert verify {root}` shows all that is wrong."
    )


def _uploads(root: Path, record: Record, card: bytes) -> dict[str, Upload]:
    """What goes into the repository, by path there: the snapshot, its record, its card, the source's card elsewhere."""
    from .output.uploading import Upload

    files = LocalFiles(root)
    uploads = {
        layout.SOURCE_CARD if name == layout.CARD else name: Upload(
            files.open(place(root, record, name)), entry.size, entry.sha256
        )
        for name, entry in record.files.items()
    }
    if len(uploads) < len(record.files):
        raise ConvertError(
            f"{root} has a {layout.SOURCE_CARD} of its source, where a push puts the source's {layout.CARD}; remove it "
            "from the source and convert again."
        )
    own = files.open(layout.RECORD_FILE)
    digest = sha256_at(own.path, layout.RECORD_FILE)
    uploads[layout.RECORD_FILE] = Upload(own, files.sizes()[layout.RECORD_FILE], digest)
    uploads[layout.CARD] = Upload(card, len(card), hashlib.sha256(card).hexdigest())
    return dict(sorted(uploads.items()))


def _source_card(root: Path, record: Record) -> bytes | None:
    """The card that came with the source, None if none did."""
    if layout.CARD not in record.files:
        return None
    return LocalFiles(root).read(place(root, record, layout.CARD), MAX_CARD_BYTES)


def _source_data(root: Path, record: Record) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The YAML at the head of the source's card, and notes on what the snapshot's own card will lack for want of it."""
    data: dict[str, Any] = {}
    notes = []
    card = _source_card(root, record)
    if card is not None:
        try:
            data = front_matter(card.decode())
        except ValueError as error:
            notes.append(
                f"the head of the source's card cannot be read ({one_clause(error)}), so nothing is taken from it"
            )
    taken = carried(data)
    for key in ("license", "license_name"):
        if data.get(key) is not None and key not in taken:
            notes.append(f"{key} of the source's card is {data[key]!r:.80}, which is no name and is not taken over")
    if not {"license", "license_name"} & taken.keys() and not licence_files(record):
        notes.append("no licence was found in the source, so the card states none; add it on the Hub if you know it")
    if record.source.repo is None:
        imported = any(component.imported for component in record.components.values())
        how = "its FP8 weights were imported" if imported else "the snapshot was made from a folder"
        notes.append(f"{how}, so the card names no base model; add `base_model` on the Hub")
    return data, tuple(notes)
