"""Snapshots as data: what is known of a file before it is read, and what is imported to know it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import copied, saved

from fp8_convert.converter import ConvertError, ResumableError
from fp8_convert.converter.format.header import read_header
from fp8_convert.converter.snapshot.describing import describe
from fp8_convert.converter.snapshot.files import LocalFiles, file_stat


def test_a_shard_knows_its_file_from_before_its_header_was_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lone = copied(saved("z_image") / "vae", tmp_path / "vae")
    file = lone / "diffusion_pytorch_model.safetensors"
    before = file_stat(file)

    def touched_while_it_is_read(path: Path, where: str) -> object:
        os.utime(file, ns=(1, 1))
        return read_header(path, where)

    monkeypatch.setattr("fp8_convert.converter.snapshot.files.read_header", touched_while_it_is_read)
    files = LocalFiles(lone)
    (shard,) = describe(files).components[0].shards
    opened = files.open(shard.path)
    assert opened.stat == before != file_stat(file)
    with pytest.raises(ResumableError, match=r"diffusion_pytorch_model.safetensors changed while it was read"):
        opened.check_unchanged()
    stat = file.stat()
    assert file_stat(file) == (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    with pytest.raises(ResumableError, match="cannot be opened"):
        file_stat(tmp_path / "missing")


def test_pieces_are_the_file_that_was_listed(tmp_path: Path) -> None:
    content = os.urandom(10_000_000)
    (tmp_path / "vocab.txt").write_bytes(content)
    files = LocalFiles(tmp_path)
    pieces = list(files.pieces("vocab.txt"))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= 4 * 2**20
    for changed in (content + b"x", content[:-1], b""):
        (tmp_path / "vocab.txt").write_bytes(changed)
        with pytest.raises(ResumableError, match="changed while it was read"):
            list(files.pieces("vocab.txt"))
    (tmp_path / "vocab.txt").unlink()
    os.mkfifo(tmp_path / "vocab.txt")
    with pytest.raises(ConvertError, match="is a FIFO"):
        list(files.pieces("vocab.txt"))


_IMPORTS = """
import sys, types
package = types.ModuleType("fp8_convert.converter")
package.__path__ = [sys.argv[1]]
sys.modules["fp8_convert.converter"] = package  # without what its __init__ imports
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.snapshot.locate import describe_source, open_files
snapshot = describe_source(open_files(sys.argv[2], HubAccess()), HubAccess())
assert len(snapshot.components) == 3
heavy = ("torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "numpy")
print([name for name in heavy if name in sys.modules])
"""


def test_describing_a_folder_imports_nothing_heavy() -> None:
    import fp8_convert.converter

    command = [sys.executable, "-c", _IMPORTS, *fp8_convert.converter.__path__, str(saved("z_image"))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names_of_a_listing_that_cannot_be_written(tmp_path: Path) -> None:
    """What a server lists is no file system's word."""
    files = LocalFiles(copied(saved("z_image"), tmp_path / "source"))
    sizes = dict(files.sizes())
    for name in ("tokenizer//x.json", f"tokenizer/{'x' * 256}", "tokenizer/" + "é" * 128):
        files._listed = {**sizes, name: 2}
        with pytest.raises(ConvertError, match="a name that cannot be written"):
            describe(files)
    outside = ("tokenizer/../../x.json", "tokenizer/./x.json", "../x.json", "/etc/x.json")
    files._listed = {**sizes, **dict.fromkeys(outside, 2)}
    assert not set(outside) & set(describe(files).sidecars)
