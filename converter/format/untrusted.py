"""What an uploader or a shell hands over, taken with care: regular files alone, JSON within limits, text that is text.

An open never waits (a FIFO would, for ever) and never reads a device; a file larger than its limit is refused before
it is read. JSON can take fifty times its bytes once it is parsed (`[[],[],…`), so its values are counted first.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from typing import Any

from ..telling.errors import ConvertError, ResumableError
from .descriptor import open_descriptor

MAX_JSON_VALUES = 2_000_000  # some 500 MB once parsed, at worst; the largest real index has a tenth of it
_MAX_DEPTH = 100
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: os.PathLike[str], where: str) -> int:
    """A descriptor for reading a regular file, never waited for. Raises ConvertError for anything else than a file."""
    try:
        fd = open_descriptor(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        check_regular(path, where)  # a socket cannot be opened at all
        raise ResumableError(f"{where} cannot be opened ({error.strerror}); check the path and permissions.") from error
    try:
        _check_mode(os.fstat(fd).st_mode, where)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_regular(path: os.PathLike[str], where: str) -> None:
    """Raise ConvertError if something else than a regular file stands at `path`."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # what is missing is said by whoever needs it
        return
    _check_mode(mode, where)


def read_whole(path: os.PathLike[str], where: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises ConvertError."""
    fd = open_regular(path, where)
    try:
        with open(fd, "rb") as file:
            check_size(os.fstat(fd).st_size, limit, where)
            data = file.read(limit + 1)
    except OSError as error:
        raise ResumableError(f"{where} cannot be read ({error.strerror}); check the disk and run again.") from error
    check_size(len(data), limit, where)  # it may have grown
    return data


def check_size(size: int, limit: int, where: str) -> None:
    """Raise ConvertError for a file that is too large for what it should be."""
    if size > limit:
        raise ConvertError(
            f"{where} has {size} bytes, and at most {limit} are read of such a file; check that it is the right one."
        )


def parse_json(raw: bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON in UTF-8. Raises ValueError for what is bad or excessive, in words that can follow a file's name.

    Half a surrogate pair is no text: it could be read, but never written again.
    """
    containers = raw.count(b"[") + raw.count(b"{")
    if containers + raw.count(b",") > MAX_JSON_VALUES:
        raise ValueError(f"has more than {MAX_JSON_VALUES} JSON values")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not valid JSON in UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError:
        raise ValueError("is not valid JSON") from None
    if containers > _MAX_DEPTH and _deeper_than(value, _MAX_DEPTH):
        raise ValueError("is nested too deeply")
    if _SURROGATE_ESCAPE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("contains half a surrogate pair, which is not valid text") from None
    return value


def check_text(value: str | os.PathLike[str], what: str) -> None:
    """Raise ConvertError for text that is not valid Unicode, as a shell can pass it: it could not be printed."""
    text = os.fspath(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConvertError(f"{what} {text!a:.200} is not valid Unicode; correct or rename it.") from None


def _check_mode(mode: int, where: str) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ConvertError(f"{where} is {kind} instead of a file; replace it by the file or remove it.")


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
