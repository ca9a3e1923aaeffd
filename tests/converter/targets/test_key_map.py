"""The mechanics of key maps, on a table of three rules."""

from __future__ import annotations

import pytest

from fp8_convert.converter.targets.key_map import KeyMap, Native, Original, Rule
from fp8_convert.converter.telling.errors import ConvertError

MAP = KeyMap(
    "Toy",
    (
        Rule(("blocks.{}.to_q", "blocks.{}.to_k"), "layers.{}.qk"),
        Rule("blocks.{}.conv", "layers.{}.conv", pointwise=True),
        Rule("newer", "head", read_only=True),
        Rule("proj", "head"),
    ),
    prefixes=("model.",),
    dropped=("unused.weight",),
)


def test_members_are_one_below_the_other() -> None:
    native = {"blocks.7.to_k.weight": (2, 3), "proj.weight": (4,), "blocks.7.to_q.weight": (2, 3)}

    assert MAP.to_original(native) == (
        Original("layers.7.qk.weight", (4, 3), ("blocks.7.to_q.weight", "blocks.7.to_k.weight")),
        Original("head.weight", (4,), ("proj.weight",)),
    )


def test_a_fused_tensor_is_ranges_of_its_rows() -> None:
    assert MAP.to_native({"layers.7.qk.weight": (4, 3)}) == (
        Native("blocks.7.to_q.weight", (2, 3), "layers.7.qk.weight", 0, 2),
        Native("blocks.7.to_k.weight", (2, 3), "layers.7.qk.weight", 1, 2),
    )
    assert Native("", (), "", 1, 2).bytes_within(24) == (12, 24)


def test_pointwise_weights_are_reshaped_and_their_biases_not() -> None:
    originals = MAP.to_original({"blocks.0.conv.weight": (2, 3), "blocks.0.conv.bias": (2,)})

    assert [o.shape for o in originals] == [(2, 3, 1, 1), (2,)]
    assert [n.shape for n in MAP.to_native({o.name: o.shape for o in originals})] == [(2, 3), (2,)]


def test_a_prefix_is_kept_in_the_original_name_alone() -> None:
    (native,) = MAP.to_native({"model.head.weight": (4,)})

    assert (native.name, native.original) == ("proj.weight", "model.head.weight")


def test_a_prefix_that_not_all_have_is_none() -> None:
    with pytest.raises(ConvertError, match=r"^model\.head\.weight is not a tensor"):
        MAP.to_native({"model.head.weight": (4,), "head.bias": (4,)})


def test_what_the_class_does_without_is_dropped() -> None:
    assert MAP.to_native({"unused.weight": (1,)}) == ()


def test_other_spellings_are_read_and_not_given() -> None:
    assert MAP.original_module("newer") == "head"
    assert MAP.to_native({"head.weight": (1,)})[0].name == "proj.weight"


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


def test_rows_that_cannot_be_divided_are_named() -> None:
    with pytest.raises(ConvertError, match=r"layers\.0\.qk\.weight has the shape \[3, 3\], whose rows"):
        MAP.to_native({"layers.0.qk.weight": (3, 3)})
