"""The three kinds of pattern, and what is offered when one matches nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8_convert.converter.plan.pattern import closest, matches
from fp8_convert.converter.telling.errors import ConvertError

SEGMENTS = st.text(st.characters(exclude_characters="."), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("pattern", "name", "matched"),
    [
        ("img_mlp", "transformer_blocks.3.img_mlp.net.2", True),
        ("img_mlp", "img_mlp", True),
        ("img_mlp", "img_mlp.net", True),
        ("img_mlp", "blocks.img_mlp", True),
        ("img_mlp", "blocks.my_img_mlp2.net", False),
        ("img_mlp", "blocks.img_mlp2", False),
        ("img_mlp", "blocks.my_img_mlp", False),
        ("img_mlp.net", "blocks.3.img_mlp.net.2", True),
        ("img_mlp.2", "blocks.3.img_mlp.net.2", False),
        ("blocks.1", "blocks.1.to_q", True),
        ("blocks.1", "blocks.10.to_q", False),
        ("blocks.1", "blocks.1", True),
        ("a+b", "x.a+b.y", True),
        ("a.b", "aXb", False),
        ("Blocks", "blocks.1", False),
        ("blocks.*", "blocks.1.to_q", True),
        ("*.to_q", "blocks.1.attn.to_q", True),
        ("*.to_q", "to_q", False),
        ("to_q*", "blocks.to_q", False),
        ("blocks.?.to_q", "blocks.1.to_q", True),
        ("blocks.?.to_q", "blocks.11.to_q", False),
        ("blocks.[01].*", "blocks.0.to_q", True),
        ("blocks.[01].*", "blocks.2.to_q", False),
        ("*", "", True),
        ("re:blocks\\.\\d+\\.to_[qk]", "blocks.12.to_k", True),
        ("re:blocks\\.\\d+\\.to_[qk]", "blocks.12.to_kv", False),
        ("re:blocks", "blocks.1", False),
        ("re:", "", True),
    ],
)
def test_matches(pattern: str, name: str, matched: bool) -> None:
    assert matches(pattern, name) is matched


@given(st.lists(SEGMENTS, min_size=1, max_size=6), st.data())
def test_a_plain_pattern_is_a_run_of_segments(segments: list[str], data: st.DataObject) -> None:
    pattern = data.draw(st.lists(SEGMENTS.filter(lambda s: not set(s) & set("*?[")), min_size=1, max_size=3))
    if data.draw(st.booleans()):
        segments = segments + pattern + data.draw(st.lists(SEGMENTS, max_size=2))
    if "\n" in "".join(segments) or pattern[0].startswith("re:"):
        return  # no module has a line break in its name
    runs = [segments[i : i + len(pattern)] for i in range(len(segments))]
    assert matches(".".join(pattern), ".".join(segments)) is (pattern in runs)


@pytest.mark.parametrize(
    "pattern", ["re:(", "re:[a", "re:*", "re:a{99999999999999999999}", "re:" + "(" * 5000 + ")" * 5000]
)
def test_bad_regular_expressions(pattern: str) -> None:
    with pytest.raises(ConvertError, match=r"not a valid regular expression \(.*\); correct it\."):
        matches(pattern, "x")


@pytest.mark.parametrize("pattern", ["", ".", ".."])
def test_empty_patterns(pattern: str) -> None:
    with pytest.raises(ConvertError, match="empty pattern"):
        matches(pattern, "x")


def test_closest_offers_segments_and_pairs() -> None:
    names = ["transformer_blocks.0.img_mlp.net.2", "transformer_blocks.0.attn.to_q", "proj_out"]
    assert closest("img_mpl", names)[0] == "img_mlp"
    assert closest("*.to_qq", names)[0] == "to_q"
    assert closest("attn.to_k", names)[0] == "attn.to_q"
    assert closest("zzzzzzzz", names) == []
    assert len(closest("t", [f"t{i}" for i in range(9)])) == 3


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("layers.*.adaLN_modulaton.*", "adaLN_modulation"),
        (r"re:(?:model\.)?layers\.\d+\.self_atn\.[qkvo]_proj", "self_attn"),
        (r"re:(?:\w+\.)+\d+\.fed_forward\.w[1-3]", "feed_forward"),
    ],
)
def test_closest_finds_the_word_that_is_mistyped(pattern: str, name: str) -> None:
    names = ["model.layers.0.self_attn.q_proj", "layers.3.adaLN_modulation.0", "layers.11.feed_forward.w1"]
    assert name in closest(pattern, names)
