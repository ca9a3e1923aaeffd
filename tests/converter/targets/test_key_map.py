"""The mechanics of key maps, on a table of three rules."""

from __future__ import annotations

import pytest

from fp8_convert.converter.targets.key_map import KeyMap, Original, Rule
from fp8_convert.converter.telling.errors import ConvertError

MAP = KeyMap(
    "Toy",
    (
        Rule(("blocks.{}.to_q", "blocks.{}.to_k"), "layers.{}.qk"),
        Rule("blocks.{}.conv", "layers.{}.conv", pointwise=True),
        Rule("newer", "head"),
        Rule("proj", "head"),
    ),
    prefixes=("model.",),
)


def test_members_are_one_below_the_other() -> None:
    native = {"blocks.7.to_k.weight": (2, 3), "proj.weight": (4,), "blocks.7.to_q.weight": (2, 3)}

    assert MAP.to_original(native) == (
        Original("layers.7.qk.weight", (4, 3), ("blocks.7.to_q.weight", "blocks.7.to_k.weight")),
        Original("head.weight", (4,), ("proj.weight",)),
    )


def test_pointwise_weights_are_reshaped_and_their_biases_not() -> None:
    originals = MAP.to_original({"blocks.0.conv.weight": (2, 3), "blocks.0.conv.bias": (2,)})

    assert [o.shape for o in originals] == [(2, 3, 1, 1), (2,)]


def test_a_prefix_is_what_all_names_have() -> None:
    assert MAP.prefix_of(["model.head.weight", "model.layers.0.conv.bias"]) == "model."
    assert MAP.prefix_of(["model.head.weight", "head.bias"]) == ""


def test_other_spellings_are_read() -> None:
    assert MAP.original_module("newer") == MAP.original_module("proj") == "head"


@pytest.mark.parametrize(
    ("native", "message"),
    [
        ({"blocks.0.to_q.weight": (2, 3)}, r"layers\.0\.qk\.weight is made of 2 tensors, and its to_k is missing"),
        (
            {"blocks.0.to_q.weight": (2, 3), "blocks.0.to_k.weight": (1, 3)},
            r"blocks\.0\.to_k\.weight has the shape \[1, 3\] and blocks\.0\.to_q\.weight \[2, 3\]",
        ),
        ({"other.weight": (1,)}, r"other\.weight is not a tensor that the original layout of Toy has"),
        ({"blocks.x.conv.weight": (1,)}, r"blocks\.x\.conv\.weight is not a tensor"),
        ({"newer.weight": (1,), "proj.weight": (1,)}, r"proj\.weight and newer\.weight are both head\.weight"),
    ],
)
def test_what_cannot_be_mapped_is_named(native: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        MAP.to_original(native)
