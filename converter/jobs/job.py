"""A job of a batch: one conversion, by the names of `convert`'s arguments."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conversion import convert
from ..output.work import Work
from ..plan.settings import Settings, unknown_setting
from ..telling.errors import ConvertError, SettingsError, one_clause

# What a job may say: all that a conversion may be asked, but how it tells of itself, and secrets.
KEYS = tuple(name for name in inspect.signature(convert).parameters if name not in ("progress", "quiet", "token"))

_TEXTS = ("source", "output", "revision", "cache_dir", "variant")
_FLAGS = ("read_back", "stream", "force", "check", "local_files_only")


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


def read_jobs(given: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[Job]:
    """The jobs of a JSONL file or of mappings. What is wrong with one is its `problem` and no other's.

    Raises ConvertError for a file that cannot be read or has no jobs.
    """
    jobs = [*(_of_file(Path(given)) if isinstance(given, str | os.PathLike) else _of_mappings(given))]
    if not jobs:
        raise ConvertError(f"{given if isinstance(given, str | os.PathLike) else 'The list'} has no jobs.")
    return [*_apart(jobs)]


def _of_mappings(given: Iterable[Mapping[str, Any]]) -> Iterator[Job]:
    for line, stated in enumerate(given, 1):
        yield _job(line, stated)


def _of_file(path: Path) -> Iterator[Job]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConvertError(f"{path} cannot be read ({error.strerror}); name a file with a job in each line.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            stated = json.loads(line)
        except ValueError as error:
            yield Job(number, "", "", problem=f"it is no JSON ({one_clause(error)}).")
            continue
        yield _job(number, stated)


def _job(line: int, stated: Any) -> Job:
    if not isinstance(stated, Mapping):
        return Job(line, "", "", problem=f"it is no JSON object, such as {_EXAMPLE}.")
    source, output = (value if isinstance(value := stated.get(key), str) else "" for key in ("source", "output"))
    settings = {key: value for key, value in stated.items() if key not in ("source", "output")}
    try:
        _check(stated)
    except SettingsError as error:
        return Job(line, source, output, settings, str(error))
    return Job(line, source, output, settings)


_EXAMPLE = '{"source": "Qwen/Qwen-Image", "output": "qwen-image-fp8"}'


def _check(stated: Mapping[str, Any]) -> None:
    """Raise SettingsError for what can be seen to be wrong without a look at the source."""
    for key, value in stated.items():
        if key == "token":
            raise SettingsError("a token does not belong into a file; set HF_TOKEN, or pass --token.")
        if key not in KEYS:
            raise SettingsError(f"{unknown_setting(key, KEYS)}.")
        if key in _TEXTS and not (isinstance(value, str) and value):
            raise SettingsError(f"{key} is {value!r:.80}; use a string.")
        if key in _FLAGS and not isinstance(value, bool):
            raise SettingsError(f"{key} is {value!r:.80}; use true or false.")
    for key in ("source", "output"):
        if key not in stated:
            raise SettingsError(f"there is no {key}; a job is such as {_EXAMPLE}.")
    Settings.among(stated)
    Work(**{key: stated[key] for key in Work.__dataclass_fields__ if key in stated})


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
