"""What a scale covers: its name, its shape and the text that says so, for every scheme."""

from __future__ import annotations

from typing import Any

import pytest

from fp8_convert.converter.format.layout import METADATA_KEY, WeightFormat, decode_modules, encode_modules

FORMATS = {
    "tensor": (WeightFormat("w8a8"), ".weight_scale", ()),
    "channel": (WeightFormat("w8a8", channel=True), ".weight_scale", (200, 1)),
    "block128x64": (WeightFormat("storage", (128, 64)), ".weight_scale_inv", (2, 2)),
}


@pytest.mark.parametrize("scheme", FORMATS)
def test_names_and_shapes(scheme: str) -> None:
    how, suffix, shape = FORMATS[scheme]
    assert (how.scheme, how.per_tensor) == (scheme, scheme == "tensor")
    assert (how.scale_key("a.b"), how.scale_shape((200, 100))) == ("a.b" + suffix, shape)


@pytest.mark.parametrize("mode", ["w8a8", "storage"])
@pytest.mark.parametrize("scheme", FORMATS)
def test_metadata_say_it(mode: str, scheme: str) -> None:
    how = WeightFormat.read([mode, scheme])
    assert (how.mode, how.scheme) == (mode, scheme)
    assert decode_modules({METADATA_KEY: encode_modules({"a": how})}) == {"a": how}


@pytest.mark.parametrize("scheme", ["channels", "channel1", "row", "block0x1", "block1", None, ["channel"]])
def test_other_schemes_are_not_read(scheme: Any) -> None:
    with pytest.raises(ValueError, match="the unknown scheme"):
        WeightFormat.read(["w8a8", scheme])


def test_scales_of_rows_and_of_blocks_are_for_matrices() -> None:
    for how in (WeightFormat("storage", channel=True), WeightFormat("storage", (4, 4))):
        with pytest.raises(ValueError, match="unpack"):
            how.scale_shape((2, 2, 3))


def test_rows_and_blocks_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        WeightFormat("w8a8", (128, 128), channel=True)
