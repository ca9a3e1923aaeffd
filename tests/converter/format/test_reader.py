"""Typed values of JSON: what fits is read and written alike, what does not is named with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from fp8_convert.converter.format.reader import as_json, read_value


@dataclass(frozen=True)
class Part:
    class_: str | None
    pair: tuple[int, int] | None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    flag: bool
    parts: Mapping[str, Part]


GOOD: dict[str, Any] = {
    "flag": True,
    "parts": {"a": {"class": "X", "pair": [1, 2], "names": ["n"]}, "b": {"class": None, "pair": None, "names": []}},
}


def test_what_is_read_is_written_alike() -> None:
    whole = read_value(Whole, GOOD, "it")
    assert whole.parts["a"] == Part("X", (1, 2), ("n",))
    assert json.dumps(as_json(whole)) == json.dumps(GOOD)


def test_a_field_with_a_default_may_be_missing() -> None:
    assert read_value(Part, {"class": None, "pair": None}, "it") == Part(None, None)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (Whole, [], "it is []"),
        (Whole, {"flag": True}, "it lacks parts"),
        (Whole, {**GOOD, "more": 1}, "it has the unknown key 'more'"),
        (Whole, {**GOOD, "flag": 1}, "'flag' of it is 1"),
        (Whole, {**GOOD, "parts": None}, "'parts' of it is None"),
        (Whole, {"flag": True, "parts": {"a": {"class": 1, "pair": None}}}, "'class' of 'a' of 'parts' of it is 1"),
        (Part, {"class": None, "pair": [1]}, "'pair' of it is [1]"),
        (Part, {"class": None, "pair": [1, -1]}, "an item of 'pair' of it is -1"),
        (Part, {"class": None, "pair": [1, True]}, "an item of 'pair' of it is True"),
        (Part, {"class": None, "pair": [1, 2**63]}, "an item of 'pair' of it is 9223372036854775808"),
        (Part, {"class": None, "pair": None, "names": "ab"}, "'names' of it is 'ab'"),
        (Part, {"class_": None, "pair": None}, "it has the unknown key 'class_'"),
    ],
)
def test_what_does_not_fit(kind: Any, value: Any, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_value(kind, value, "it")
    assert str(caught.value) == says
