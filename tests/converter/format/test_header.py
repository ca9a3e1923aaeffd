"""Safetensors headers: what is written is read back, and whatever is corrupt is a ConvertError and nothing else."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from fp8_convert.converter.format.header import (
    DTYPE_BITS,
    TensorInfo,
    encode_header,
    header_length,
    parse_header,
    read_header,
)
from fp8_convert.converter.telling.errors import ConvertError

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
    "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [20, 20]},
}
GOOD_BYTES = 20


def packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def parsed(raw: bytes, data_bytes: int = GOOD_BYTES) -> Any:
    return parse_header(raw, 8 + len(raw) + data_bytes, "x.safetensors")


# What is written is read back

# Whatever is valid Unicode: no half surrogate pairs, which UTF-8 cannot hold.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[TensorInfo]:
    names = draw(st.lists(TEXTS.filter(lambda n: n != "__metadata__"), unique=True, max_size=8))
    tensors, position = [], 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(d for d, bits in DTYPE_BITS.items() if bits >= 8)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        nbytes = DTYPE_BITS[dtype] // 8
        for size in shape:
            nbytes *= size
        tensors.append(TensorInfo(name, dtype, shape, position, position + nbytes))
        position += nbytes
    return tensors


@given(tensor_lists(), st.dictionaries(TEXTS, TEXTS, max_size=3))
def test_encoded_headers_parse_to_the_same(tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
    encoded = encode_header(tensors, metadata)
    assert len(encoded) % 8 == 0  # so that 8-byte elements at the start of the data are aligned
    size = len(encoded) + (tensors[-1].end if tensors else 0)
    length = header_length(encoded[:8], size, "x")
    header = parse_header(encoded[8 : 8 + length], size, "x")
    assert list(header.tensors) == tensors
    assert header.metadata == metadata
    assert header.data_start == len(encoded)
    assert header.file_size == size


def test_safetensors_reads_an_encoded_header(tmp_path: Path) -> None:
    tensors = [TensorInfo("ü", "F32", (1,), 0, 4), TensorInfo("b.weight", "F8_E4M3", (2, 2), 4, 8)]
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_header(tensors, {"format": "pt", "z": "1"}) + bytes(range(8)))
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["b.weight", "ü"]
        assert file.metadata() == {"format": "pt", "z": "1"}
    assert read_header(path, "x").tensors == tuple(tensors)


def test_encoding_is_reviewable() -> None:
    encoded = encode_header([TensorInfo("a", "U8", (3,), 0, 3)], {"b": "2", "a": "1"})
    text = b'{"__metadata__":{"a":"1","b":"2"},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    assert encoded == struct.pack("<Q", 88) + text + b"  "


def test_tensors_come_in_data_order() -> None:
    header = parsed(json.dumps(dict(reversed(GOOD.items()))).encode())
    assert [t.name for t in header.tensors] == ["a.weight", "b", "empty"]
    assert [(t.nbytes, t.numel, t.itemsize) for t in header.tensors] == [(12, 6, 2), (8, 1, 8), (0, 0, 4)]


def test_the_good_header_is_good() -> None:
    assert len(parsed(json.dumps(GOOD).encode()).tensors) == 3


# What is corrupt

INF = float("inf")
WRONG_ENTRIES: dict[str, Any] = {
    "negative size": {"shape": [-2, -3]},
    "negative offset": {"data_offsets": [-12, 0]},
    "float size": {"shape": [2.0, 3]},
    "bool size": {"shape": [True, 6]},
    "bool offset": {"data_offsets": [False, 12]},
    "NaN offset": {"data_offsets": [0, float("nan")]},
    "infinite offset": {"data_offsets": [0, INF]},
    "text size": {"shape": ["2", 3]},
    "size beyond 64 bits": {"shape": [2**64, 0], "data_offsets": [0, 0]},
    "sizes whose product wraps in 64 bits": {"shape": [2**32, 2**32, 6], "data_offsets": [0, 12]},
    "absurdly many dimensions": {"shape": [1] * 5000 + [6]},
    "shape no list": {"shape": 6},
    "shape null": {"shape": None},
    "offsets no pair": {"data_offsets": [0, 6, 12]},
    "offsets swapped": {"data_offsets": [12, 0]},
    "offsets no list": {"data_offsets": {"0": 12}},
    "too few bytes": {"shape": [2, 4]},
    "unknown dtype": {"dtype": "BF17"},
    "dtype in lower case": {"dtype": "bf16"},
    "dtype null": {"dtype": None},
    "dtype no text": {"dtype": ["BF16"]},
    "half a byte": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]},
    "a key too much": {"strides": [3, 1]},
}


@pytest.mark.parametrize("change", WRONG_ENTRIES.values(), ids=WRONG_ENTRIES)
def test_wrong_entries(change: dict[str, Any]) -> None:
    header = {**GOOD, "a.weight": {**GOOD["a.weight"], **change}}
    with pytest.raises(ConvertError, match=r"x\.safetensors has a corrupt safetensors header: tensor 'a\.weight'"):
        parsed(json.dumps(header).encode())


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_missing_entries(key: str) -> None:
    entry = {k: v for k, v in GOOD["a.weight"].items() if k != key}
    with pytest.raises(ConvertError, match=r"tensor 'a\.weight' lacks"):
        parsed(json.dumps({**GOOD, "a.weight": entry}).encode())


WRONG_TEXTS = {
    "empty": b"",
    "no JSON": b"hello",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "cut off": json.dumps(GOOD).encode()[:-5],
    "not UTF-8": json.dumps(GOOD).replace("a.weight", "\xff").encode("latin-1"),
    "half a surrogate pair in a name": json.dumps(GOOD).replace("a.weight", "\\ud800").encode(),
    "half a surrogate pair in the metadata": json.dumps(GOOD).replace('"pt"', '"\\udfff"').encode(),
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "an endless number": b'{"a":' + b"9" * 10_000 + b"}",
    "an entry no object": b'{"a": [1, 2]}',
    "metadata no object": b'{"__metadata__": [1]}',
    "metadata NaN": b'{"__metadata__": NaN}',
    "metadata with a number": b'{"__metadata__": {"a": 1}}',
    "a name twice": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "metadata twice": b'{"__metadata__":{},"__metadata__":{}}',
    "a key of an entry twice": b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}',
    "a byte order mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("raw", WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_wrong_texts(raw: bytes) -> None:
    with pytest.raises(ConvertError, match=r"x\.safetensors has a corrupt safetensors header"):
        parsed(raw, 0)


def entry(start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([(0, 4), (3, 8)], "'t1' overlaps"),
        ([(0, 8), (0, 8)], "'t1' overlaps"),
        ([(0, 8), (2, 4)], "'t1' overlaps"),
        ([(0, 4), (5, 8)], "'t1' leaves a hole"),
        ([(1, 8)], "'t0' leaves a hole"),
        ([(0, 4), (4, 9)], "is truncated"),
        ([(0, 4), (4, 7)], "is followed by stray bytes"),
        ([], "is followed by stray bytes"),
    ],
)
def test_offsets_that_do_not_fit(offsets: list[tuple[int, int]], message: str) -> None:
    header = {f"t{i}": entry(*pair) for i, pair in enumerate(offsets)}
    with pytest.raises(ConvertError, match=message):
        parsed(json.dumps(header).encode(), 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        (struct.pack("<Q", 1) + b"", "its length is given as 1 bytes in a file of 8"),
        (struct.pack("<Q", 2**63), "its length is given as"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "its length is given as"),
        (struct.pack("<Q", 0) + b"{}", "not valid JSON"),
        (packed(json.dumps(GOOD).encode(), b"0" * (GOOD_BYTES - 1)), "is truncated"),
        (packed(json.dumps(GOOD).encode(), b"0" * (GOOD_BYTES + 1)), "stray bytes"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=message):
        read_header(path, "x.safetensors")


def test_a_length_beyond_the_format_s_limit_is_refused_without_reading() -> None:
    with pytest.raises(ConvertError, match="100000001"):
        header_length(struct.pack("<Q", 100_000_001), 2**40, "x")
    assert header_length(struct.pack("<Q", 100_000_000), 2**40, "x") == 100_000_000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="x is a folder instead of a file"):
        read_header(tmp_path, "x")
    with pytest.raises(ConvertError, match="x cannot be opened"):
        read_header(tmp_path / "missing.safetensors", "x")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConvertError, match="x is a FIFO instead of a file"):
        read_header(tmp_path / "fifo", "x")


def test_a_header_of_too_many_values_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lists would take a hundred times the room of what they say."""
    raw = b'{"a":[' + b"[]," * 1_100_000 + b"[]]}"
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ConvertError, match=r"corrupt safetensors header: it has more than 2000000 JSON values"):
        parsed(raw, 0)


# Fuzzing: a ConvertError, or a header that can be written again and that safetensors accepts


def check_untrusted(raw: bytes, data_bytes: int) -> None:
    try:
        header = parsed(raw, data_bytes)
    except ConvertError:
        return
    again = encode_header(header.tensors, header.metadata)
    assert parse_header(again[8:], len(again) + data_bytes, "again").tensors == header.tensors


@given(st.binary(max_size=200), st.integers(0, 50))
def test_random_bytes(raw: bytes, data_bytes: int) -> None:
    check_untrusted(raw, data_bytes)


@given(st.data())
def test_mutated_bytes(data: st.DataObject) -> None:
    raw = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check_untrusted(bytes(raw), GOOD_BYTES)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(DTYPE_BITS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["__metadata__", "a.weight", "b", "empty", "new"]), JSON)
def test_mutated_entries(name: str, value: Any) -> None:
    check_untrusted(json.dumps({**GOOD, name: value}).encode(), GOOD_BYTES)


@given(st.sampled_from(["a.weight", "b", "empty"]), st.sampled_from(["dtype", "shape", "data_offsets", "x"]), JSON)
def test_mutated_fields(name: str, key: str, value: Any) -> None:
    check_untrusted(json.dumps({**GOOD, name: {**GOOD[name], key: value}}).encode(), GOOD_BYTES)


@pytest.mark.parametrize("change", ["overlap", "hole", "truncated", "dtype"])
def test_safetensors_refuses_them_too(tmp_path: Path, change: str) -> None:
    """The corruptions above are real ones: the format's own reader does not take them either."""
    second = {"overlap": entry(3, 8), "hole": entry(5, 8), "truncated": entry(4, 9), "dtype": entry(4, 8)}[change]
    if change == "dtype":
        second["dtype"] = "BF17"
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(json.dumps({"t0": entry(0, 4), "t1": second}).encode(), bytes(8)))
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(ConvertError):
        read_header(path, "x")
