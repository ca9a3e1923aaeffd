"""The journal: what is written is read back, and what cannot be understood counts for nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from fp8_convert.converter.output.journal import (
    Done,
    add_changed,
    add_done,
    begin_journal,
    journal_file,
    journalled_key,
    read_journal,
)

FIRST = Done("a.safetensors", 8, "aa", 16, "bb", (1, 2, 3))
SECOND = Done("config.json", 2, "cc")


def begun(folder: Path) -> Path:
    begin_journal(
        folder, "key", shards=["a.safetensors"], source_stats={"s": (1, 2)}, replaces={"y", "x"}, done=[FIRST]
    )
    return journal_file(folder)


def test_what_is_journalled_is_read_back(tmp_path: Path) -> None:
    begun(tmp_path)
    add_done(tmp_path, SECOND)
    add_changed(tmp_path, "s")
    journal = read_journal(tmp_path)
    assert journal is not None
    assert (journal.key, journal.shards, journal.source_stats) == ("key", ("a.safetensors",), {"s": (1, 2)})
    assert journal.done == {FIRST.path: FIRST, SECOND.path: SECOND}
    assert journal.paths == {FIRST.path, SECOND.path}
    assert (journal.replaces, journal.changed) == ({"x", "y"}, {"s"})
    assert journalled_key(tmp_path) == "key"


def test_no_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path) is None
    assert journalled_key(tmp_path) is None


def test_a_line_that_a_kill_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    file = begun(tmp_path)
    add_done(tmp_path, SECOND)
    file.write_bytes(file.read_bytes()[:-5])
    journal = read_journal(tmp_path)
    assert journal is not None
    assert journal.done == {FIRST.path: FIRST}


def test_a_later_line_replaces_an_earlier_one(tmp_path: Path) -> None:
    begun(tmp_path)
    again = Done(FIRST.path, 9, "dd")
    add_done(tmp_path, again)
    journal = read_journal(tmp_path)
    assert journal is not None
    assert journal.done == {FIRST.path: again}


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"key": 3, "shards": "a", "source_stats": [1], "replaces": {"x": 1}},
        {"shards": [1], "source_stats": {"s": 1}},
    ],
    ids=str,
)
@pytest.mark.parametrize("line", [{"path": ["a"]}, {"path": 1}, {"changed": 1}, {"path": "a", "more": 1}], ids=str)
def test_what_another_version_wrote(tmp_path: Path, header: dict[str, Any], line: dict[str, Any]) -> None:
    file = begun(tmp_path)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in (header, line, [], 3)))
    journal = read_journal(tmp_path)
    assert journal is not None
    assert (journal.key, journal.done, journal.changed, journal.source_stats) == (None, {}, frozenset(), {})
    assert journal.paths == ({"a"} if line.get("path") == "a" else set())  # named, so it is this project's
