from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8_convert.converter.telling.errors import ConvertError
from fp8_convert.loader.quality.prompts import Prompt, read_prompts


def test_lines_without_blanks_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# fruit\r\nred apple\r\n\r\n  grüne Birne \r\na # b".encode())
    assert read_prompts(file) == (Prompt("red apple"), Prompt("grüne Birne"), Prompt("a # b"))


@pytest.mark.parametrize("lines", [False, True])
def test_objects_with_negative_prompts_and_images(tmp_path: Path, lines: bool) -> None:
    (tmp_path / "cat.png").write_bytes(b"not opened while reading")
    entries = [
        {"prompt": "a", "negative_prompt": "blurred", "image": "cat.png"},
        {"prompt": "line\nand\u2028separator", "negative_prompt": None},
    ]
    file = tmp_path / ("prompts.jsonl" if lines else "prompts.json")
    text = "\n\n".join(json.dumps(e, ensure_ascii=False) for e in entries) if lines else json.dumps(entries)
    file.write_text(text)
    assert read_prompts(file) == (Prompt("a", "blurred", tmp_path / "cat.png"), Prompt("line\nand\u2028separator"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n# only a comment\n", "holds no prompt"),
        ("p.json", b"", "holds no prompt"),
        ("p.json", b"[]", "holds no prompt"),
        ("p.jsonl", b"\n", "holds no prompt"),
        ("p.txt", b"ok\n\xff\xfe", "not UTF-8 at byte 3"),
        ("p.json", b'{"prompt": "a"}', "must be a list"),
        ("p.json", b'["a"]', "entry 1 must be an object"),
        ("p.json", b'[{"prompt": "a"}, {"promt": "b"}]', "entry 2 must be an object"),
        ("p.json", b'[{"prompt": "a", "seed": 1}]', "unknown key 'seed'"),
        ("p.json", b'[{"prompt": 3}]', "prompt must be a string"),
        ("p.json", b'[{"prompt": null}]', "prompt must be a string"),
        ("p.json", b'[{"prompt": "a", "image": ["b"]}]', "image must be a string"),
        ("p.json", b'[{"prompt": "a", "image": "none.png"}]', "none.png, which is no file"),
        ("p.json", b"[{", "is not valid JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 is not valid JSON"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConvertError, match=said) as error:
        read_prompts(file)
    assert str(file) in str(error.value)


def test_a_file_that_is_missing_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"none\.txt cannot be opened"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ConvertError, match="is a folder instead of a file"):
        read_prompts(tmp_path)
