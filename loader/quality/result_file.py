"""Where a result goes: a new file, known to be writable in place before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

from ...converter.format.untrusted import check_text
from ...converter.telling.errors import ConvertError, SettingsError


def new_file(path: str | os.PathLike[str], suffix: str, *, force: bool) -> Path:
    """The path, whose folder exists. force: whether a file that is there is replaced.

    Raises SettingsError for another suffix, ConvertError for a file that is there and for a folder that is not.
    """
    check_text(path, "The output file")
    path = Path(path)
    if path.suffix != suffix:
        raise SettingsError(f"The output {path} must end in {suffix}; rename it.")
    if not path.parent.is_dir():
        raise ConvertError(f"The folder {path.parent}, where {path.name} goes, does not exist; create it.")
    if path.is_dir() or path.is_symlink() or (path.exists() and not force):
        raise ConvertError(f"{path} exists; name another file, or replace it with --force.")
    return path
