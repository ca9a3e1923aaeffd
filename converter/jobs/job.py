"""A job of a batch: one conversion, by the names of `convert`'s arguments."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conversion import check_outside, convert
from ..format.untrusted import check_text, parse_json, read_whole
from ..output.work import Work
from ..plan.settings import Settings, unknown_setting
from ..telling.errors import ConvertError, SettingsError
from ..telling.printable import printable

# What a job may say: all that a conversion may be asked, but how it tells of itself, and secrets.
KEYS = tuple(name for name in inspect.signature(convert).parameters if name not in ("progress", "quiet", "token"))

_TEXTS = ("source", "output", "revision", "cache_dir", "variant")
_PATHS = ("source", "output", "cache_dir", "manifest", "input_scales")
_FLAGS = ("read_back", "stream", "force", "check", "local_files_only")
_LARGEST_FILE = 256 * 1024 * 1024
_EXAMPLE = '{"source": "Qwen/Qwen-Image", "output": "qwen-image-fp8"}'
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Job:
    """line: its number in the file, from 1. settings: what else it says, by the names of `convert`'s arguments.

    problem: why there is nothing to do, a sentence; None for a job that makes sense.
    """

    line: int
    source: str
    output: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def __str__(self) -> str:
        return printable(f"line {self.line}" + (f", {self.source}" if self.source else ""))


def read_jobs(given: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[Job]:
    """The jobs of a JSONL file or of mappings. What is wrong with one is its `problem` and no other's.

    Raises ConvertError for a file that cannot be read or has no jobs.
    """
    if isinstance(given, str | os.PathLike):
        jobs = [*_of_file(Path(given))]
    else:
        jobs = [_job(line, stated) for line, stated in enumerate(given, 1)]
    if not jobs:
        raise ConvertError(f"{given if isinstance(given, str | os.PathLike) else 'The list'} has no jobs.")
    return [*_apart(jobs)]


def _of_file(path: Path) -> Iterator[Job]:
    content = read_whole(path, str(path), _LARGEST_FILE).removeprefix(_BOM)
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            stated = parse_json(line, pairs_hook=_without_repeats)
        except (ValueError, _RepeatedKeyError) as error:
            yield Job(number, "", "", problem=f"it {error}; a job is such as {_EXAMPLE}.")
            continue
        yield _job(number, stated)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, _ in pairs if [name for name, _ in pairs].count(key) > 1)
        raise _RepeatedKeyError(f"says {repeated!r:.80} twice")
    return found


class _RepeatedKeyError(Exception):
    """Not a ValueError, of which the parser would say that it is no JSON."""


def _job(line: int, stated: Any) -> Job:
    if not isinstance(stated, Mapping):
        return Job(line, "", "", problem=f"it is no JSON object, such as {_EXAMPLE}.")
    # As scripts write it: None is what is not said.
    said = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in stated.items() if v is not None}
    source, output = (value if isinstance(value := said.get(key), str) else "" for key in ("source", "output"))
    settings = {key: value for key, value in said.items() if key not in ("source", "output")}
    try:
        _check(said)
    except ConvertError as error:
        return Job(line, source, output, settings, str(error))
    return Job(line, source, output, settings)


def _check(said: Mapping[str, Any]) -> None:
    """Raise ConvertError for what can be seen to be wrong without a look at the source."""
    for key, value in said.items():
        if key == "token":
            raise SettingsError("a token belongs in no file; pass --token, or log in on each machine.")
        if key not in KEYS:
            raise SettingsError(unknown_setting(key, KEYS))
        if key in _TEXTS and not (isinstance(value, str) and value):
            raise SettingsError(f"{key} is {value!r:.80}; use a string.")
        if isinstance(value, str):
            check_text(value, f"The {key}")
        if key in _PATHS and isinstance(value, str) and (value.startswith("~") or "\0" in value):
            raise SettingsError(f"{key} is {value!r:.80}; no shell reads it: write the path as it is.")
        if key in _FLAGS and not isinstance(value, bool):
            raise SettingsError(f"{key} is {value!r:.80}; use true or false.")
    for key in ("source", "output"):
        if key not in said:
            raise SettingsError(f"there is no {key}; a job is such as {_EXAMPLE}.")
    Settings.among(said)
    Work(**{key: said[key] for key in Work.__dataclass_fields__ if key in said})
    check_outside(Path(said["output"]), said["source"])


def _apart(jobs: Iterable[Job]) -> Iterator[Job]:
    """The jobs; one whose output is or lies inside that of one before it, or the other way round, has a problem."""
    taken: dict[Path, int] = {}
    above: dict[Path, int] = {}  # folders that outputs are in
    for job in jobs:
        if job.problem is not None:
            yield job
            continue
        output = Path(os.path.realpath(job.output))
        lines = [taken[folder] for folder in (output, *output.parents) if folder in taken]
        lines += [above[output]] if output in above else []
        if lines:
            said = f"its output {job.output} is not apart from that of line {lines[0]}; use another."
            yield Job(job.line, job.source, job.output, job.settings, said)
            continue
        taken[output] = job.line
        above |= dict.fromkeys(output.parents, job.line)
        yield job
