"""docs/compatibility.md names every reader and target there is, with the versions that were run."""

from __future__ import annotations

import re
from pathlib import Path

from fp8_convert.converter.targets.choosing import TARGETS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "compatibility.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]


def test_every_reader_whose_code_is_run_has_a_row_with_its_version() -> None:
    readers = {folder.parent.name: folder.read_text() for folder in ROOT.glob("tests/readers/*/requirements.txt")}
    stated = {m[1]: row for row in ROWS for cell in row if (m := re.search(r"READERS=(\w+)", cell))}
    assert stated.keys() == readers.keys()
    for reader, row in stated.items():
        for version in re.findall(r"\d+\.[\d.]*\d", row[1]):
            assert re.search(rf"=={re.escape(version)}(\.\d+)?$", readers[reader], re.MULTILINE), (reader, version)


def test_every_target_has_a_row_and_a_page() -> None:
    targets = {match for row in ROWS if len(row) == 7 for match in re.findall(r"--target ([\w-]+)", row[2])}
    assert targets == TARGETS.keys() - {"native"}
    pages = {page.stem for page in (ROOT / "docs" / "serving").glob("*.md")}
    assert targets <= pages


def test_every_row_names_a_command_or_a_file_that_is_there() -> None:
    cells = [row for row in ROWS if len(row) == 7 and row[0] != "reader"]
    assert len(cells) > 8
    for row in cells:
        paths = re.findall(r"`(tests/[\w/.]+)`", row[6])
        assert all((ROOT / path).exists() for path in paths), row
        assert paths or "`make test" in row[6], row
