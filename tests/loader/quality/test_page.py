"""The page: parsed as a browser would, its pictures decoded, and written whole or not at all."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparing import PROMPTS, compared, held, painter
from PIL import Image

from fp8_convert.converter.telling.errors import ConvertError
from fp8_convert.loader.quality.page import AMPLIFIED, open_page

VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """Tags with their attributes, text without that of scripts and styles, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open and self.open[-1] in ("script", "style") else data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page() -> Parsed:
    path = compared().page
    assert path is not None
    return Parsed(path.read_text())


def test_it_is_well_formed_and_needs_nothing_but_itself() -> None:
    found = page()
    assert found.open == []
    places = [a[name] for _, a in found.tags for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert places
    assert all(str(place).startswith("data:image/png;base64,") for place in places)
    policy = next(a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; img-src data:;")
    assert "link" not in {tag for tag, _ in found.tags}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", compared().page.read_text())  # type: ignore[union-attr]


def test_what_prompts_hold_is_text_and_no_markup() -> None:
    found = page()
    assert len(found.of("script")) == 1
    assert repr(PROMPTS[1]) in found.text
    assert any(repr(PROMPTS[1]) in str(a.get("alt")) for a in found.of("img"))


def test_no_path_of_the_machine_is_in_it() -> None:
    text = compared().page.read_text()  # type: ignore[union-attr]
    assert not [part for part in (str(Path.home()), os.getcwd(), tempfile.gettempdir() + "/") if part in text]


def test_it_has_the_pictures_their_difference_and_buttons_for_each() -> None:
    found = page()
    images = [a for a in found.of("img") if a.get("src")]
    names = ["original", "FP8", "control", f"difference of FP8, {AMPLIFIED} times"]
    assert [str(a["alt"]).split(": ")[0] for a in images] == names * 2
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(str(a["src"]).split(",")[1])))) for a in images]
    assert {p.shape for p in pixels} == {(32, 32, 3)}
    for original, fp8, _, difference in (pixels[:4], pixels[4:]):
        apart = np.abs(fp8.astype(float) - original)
        assert 0 < apart.mean() < 5
        assert np.abs(difference - np.minimum(apart * AMPLIFIED, 255)).max() <= AMPLIFIED  # of unrounded pictures
    assert [a["class"] for a in found.of("button")] == (["show"] * 4 + ["flicker"]) * 2
    assert [a["tabindex"] for a in found.of("div") if a.get("class") == "stage"] == ["0", "0"]


def test_it_says_what_was_found_and_how() -> None:
    found = page()
    assert compared().verdict in found.text
    assert '"manifest": "z-image"' in found.text
    assert "storage block128x128" in found.text
    assert f'"torch": "{compared().machine["torch"]}"' in found.text
    assert len(found.of("svg")) == 2


def test_the_farthest_cases_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    far = iter([0.5, 0.6, 0.7])

    def changing(prompt: str, generator: Any) -> Any:
        return painter(next(far))(prompt, generator)

    file = tmp_path / "page.html"
    held(changing, painter(0.5), prompts=["none", "some", "most"], output=file, shown=2)
    text = file.read_text()
    assert re.findall(r"<h3>&#x27;(\w+)", text) == ["most", "some"]
    assert "The other 1 are closer to the original" in text


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_of_every_kind(tmp_path: Path, channels: int, mode: str) -> None:
    held(painter(0.6, channels=channels), painter(0.5, channels=channels), output=tmp_path / "page.html")
    sources = [str(a["src"]) for a in Parsed((tmp_path / "page.html").read_text()).of("img") if a.get("src")]
    assert Image.open(io.BytesIO(base64.b64decode(sources[0].split(",")[1]))).mode == mode


# The file


def test_a_file_that_is_no_page_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<p>mine</p>")
    with pytest.raises(ConvertError, match=r"page\.html exists and is no page of compare"):
        held(painter(0.5), painter(0.5), output=file)
    assert file.read_text() == "<p>mine</p>"
    assert held(painter(0.5), painter(0.5), output=file, force=True).page == file
    assert held(painter(0.6), painter(0.5), output=file).page == file  # a page of compare is replaced
    assert "20.0 dB" in file.read_text()


def test_a_folder_and_a_fifo_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, what in ((tmp_path, "a folder"), (tmp_path / "fifo", "a FIFO")):
        with pytest.raises(ConvertError, match=f"is {what} instead of a file"):
            open_page(path, force=True)


def test_a_place_where_no_file_can_be_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match=r"No page can be written into .*file; choose another file"):
        open_page(tmp_path / "file" / "page.html", force=False)
    assert held(painter(0.5), painter(0.5), output=tmp_path / "new" / "page.html").page


@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_no_half_page_and_loses_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    file = tmp_path / "page.html"
    if before:
        held(painter(0.5), painter(0.5), output=file)
    old = file.read_bytes() if before else None

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    found = held(painter(0.6), painter(0.5), output=file)
    assert found.page is None
    assert found.problems == (
        f"The page {file} cannot be written (No space left on device); free some space or choose another file, and run "
        "again.",
    )
    assert found.summary is not None
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if before else [])
