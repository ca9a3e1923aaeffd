"""The prompts of a file: a line each, or JSON where one needs a negative prompt or an image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...converter.format.untrusted import check_text, parse_json, read_whole
from ...converter.telling.errors import ConvertError

MAX_BYTES = 16 * 1024 * 1024
_KEYS = ("prompt", "negative_prompt", "image")


@dataclass(frozen=True)
class Prompt:
    """What a pipeline is asked for. image: a file, for pipelines that edit one."""

    text: str
    negative: str | None = None
    image: Path | None = None


def read_prompts(path: str | os.PathLike[str]) -> tuple[Prompt, ...]:
    """The prompts of a file in UTF-8, in its order.

    *.json: a list of objects {"prompt": …, "negative_prompt": …, "image": …}, of which the last two may be left out;
    *.jsonl: such an object a line; anything else: a prompt a line, without blank lines and lines that begin with #.
    An image is named relative to the file's folder. Raises ConvertError for a file that is missing, empty, not UTF-8,
    or that holds anything else, and for an image that is not there.
    """
    check_text(path, "The prompts file")
    path = Path(path)
    raw = read_whole(path, str(path), MAX_BYTES).removeprefix(b"\xef\xbb\xbf")  # the mark that some editors write
    if path.suffix == ".json":
        entries = _parsed(raw, str(path)) if raw.strip() else []
        if not isinstance(entries, list):
            raise ConvertError(f'{path} must be a list of objects such as {{"prompt": "a red apple"}}; correct it.')
        prompts = [_prompt(entry, f"{path}, entry {i}", path.parent) for i, entry in enumerate(entries, 1)]
    else:
        try:
            lines = [(i, line.strip()) for i, line in enumerate(raw.decode("utf-8").split("\n"), 1)]
        except UnicodeDecodeError as error:
            raise ConvertError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8.") from None
        if path.suffix == ".jsonl":
            told = [(f"{path}, line {i}", line) for i, line in lines if line]
            prompts = [_prompt(_parsed(line.encode(), where), where, path.parent) for where, line in told]
        else:
            prompts = [Prompt(line) for _, line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConvertError(f"{path} holds no prompt; write one a line.")
    return tuple(prompts)


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return parse_json(raw)
    except ValueError as error:
        raise ConvertError(f"{where} {error}; correct it.") from None


def _prompt(entry: Any, where: str, folder: Path) -> Prompt:
    if not isinstance(entry, dict) or "prompt" not in entry:
        raise ConvertError(f'{where} must be an object with a "prompt"; correct it.')
    for key, value in entry.items():
        if key not in _KEYS:
            raise ConvertError(f"{where} has the unknown key {key!r:.80}; the keys are {', '.join(_KEYS)}.")
        if not isinstance(value, str) and (value is not None or key == "prompt"):
            raise ConvertError(f"{where}: {key} must be a string; correct it.")
    image = folder / entry["image"] if entry.get("image") else None
    if image is not None and not image.is_file():
        raise ConvertError(f"{where} names the image {image}, which is no file; correct its path.")
    return Prompt(entry["prompt"], entry.get("negative_prompt"), image)
