"""Is there room? A conversion that cannot fit is refused from its plan, before it downloads or writes anything."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..plan.plan import Plan
from ..snapshot.files import Files
from ..snapshot.hub import HubFiles, bytes_to_download, cache_folder
from ..snapshot.snapshot import needed_files
from ..telling.errors import ConvertError
from .target import Target

SPARE_BYTES = 16 * 1024 * 1024


def check_space(plan: Plan, files: Files, target: Target, *, streamed: bool, spare_bytes: int = SPARE_BYTES) -> None:
    """Raise ConvertError where the output, or the download that it needs, does not fit.

    streamed: source shards lie beside the output, two at a time; else a Hub source is downloaded into the Hub cache.
    spare_bytes: room to leave.
    """
    wanted = plan.bytes_to_write + (_two_largest(plan) if streamed else 0)
    output = target.missing_bytes(wanted) + spare_bytes
    missing = output - shutil.disk_usage(target.folder).free
    if missing > 0:
        raise ConvertError(
            f"{target.folder} has not enough disk space: the conversion takes {wanted / 1e9:.2f} GB and "
            f"{missing / 1e9:.2f} GB are missing; free some space or choose another folder."
        )
    if isinstance(files, HubFiles) and not streamed:
        paths = needed_files(plan.snapshot)
        folder = cache_folder(files.options)
        cache = _existing(folder)
        same_disk = cache.stat().st_dev == target.folder.stat().st_dev
        room = shutil.disk_usage(cache).free - (output if same_disk else spare_bytes)
        if sum(files.sizes()[path] for path in paths) <= room:
            return  # whatever is in the cache already, which the Hub's client asks the Hub to know
        download = bytes_to_download(files, paths)
        missing = download - room
        if download and missing > 0:
            raise ConvertError(
                f"{folder} has not enough disk space: the download takes {download / 1e9:.2f} GB and "
                f"{missing / 1e9:.2f} GB are missing; free some space, choose another --cache-dir, or pass --stream, "
                "which keeps no download."
            )


def _two_largest(plan: Plan) -> int:
    """Bytes of the source shards that lie beside the output while they are streamed."""
    return sum(sorted(s.source.size for s in plan.shards)[-2:])


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(f for f in (folder, *folder.absolute().parents) if f.is_dir())
