"""Names and shapes of a checkpoint against those of a snapshot: each tensor is one range of its file, or is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fp8_convert.converter import ConvertError
from fp8_convert.converter.format.header import Header, TensorInfo
from fp8_convert.converter.snapshot.foreign import Foreign
from fp8_convert.converter.snapshot.given_scale import GivenScale
from fp8_convert.converter.snapshot.snapshot import Component, Shard
from fp8_convert.converter.targets.adopting import Adopted, adopt, matches

BASE = Component("transformer", "diffusers", "ZImageTransformer2DModel", {}, "diffusion_pytorch_model", (), None)
A = "layers.0.attention"
SHAPES = {f"{A}.to_{x}.weight": (256, 128) for x in "qkv"} | {"cap_pad_token": (1, 128)}
GIVEN = {f"{A}.qkv.weight": (768, 128), "cap_pad_token": (1, 128)}


def component(shapes: dict[str, tuple[int, ...]]) -> Component:
    """A checkpoint of these tensors, all of them FP8."""
    tensors, position = [], 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors.append(TensorInfo(name, "F8_E4M3", shape, position, position + size))
        position += size
    header = Header(tuple(tensors), {"format": "pt", "_quantization_metadata": "{}", "title": "kept"}, b"{}")
    return replace(BASE, name="", class_name=None, shards=(Shard("file.safetensors", position, header),))


def adopted(shapes: dict[str, tuple[int, ...]], scale: GivenScale | None = None) -> Adopted:
    scale = scale or GivenScale(np.array(2, np.float32))
    scales = {name: scale for name in shapes if name.endswith(".weight")}
    return adopt(Foreign("ComfyUI", scales, frozenset()), component(shapes), BASE, SHAPES)


def test_fused_rows_are_ranges_of_bytes() -> None:
    found = adopted(GIVEN)
    (shard,) = found.component.shards
    assert shard.renamed
    assert [(t.name, t.shape, t.start, t.end) for t in shard.header.tensors] == [
        (f"{A}.to_q.weight", (256, 128), 0, 32768),
        (f"{A}.to_k.weight", (256, 128), 32768, 65536),
        (f"{A}.to_v.weight", (256, 128), 65536, 98304),
        ("cap_pad_token", (1, 128), 98304, 98432),
    ]
    assert shard.header.metadata == {"format": "pt", "title": "kept"}
    assert {float(scale.values) for scale in found.scales.values()} == {2}
    assert len(found.scales) == 3


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixes(prefix: str) -> None:
    found = adopted({prefix + name: shape for name, shape in GIVEN.items()})
    assert {t.name for t in found.component.tensors} == SHAPES.keys()
    assert found.dropped == {}


def test_a_file_of_a_whole_pipeline() -> None:
    """What has no prefix of the component's is another component's."""
    others: dict[str, tuple[int, ...]] = {"vae.decoder.conv_in.weight": (4, 4), "text_encoders.x.weight": (2, 2)}
    found = adopted({"model.diffusion_model." + name: shape for name, shape in GIVEN.items()} | others)
    assert found.dropped == dict.fromkeys(others, "of another component than transformer")
    assert found.scales.keys() == {name for name in SHAPES if name.endswith(".weight")}


def test_blocks_and_rows_are_divided() -> None:
    grid = GivenScale(np.arange(1, 7, dtype=np.float32).reshape(6, 1), (128, 128))
    found = adopted(GIVEN, grid)
    assert found.scales[f"{A}.to_k.weight"].values.tolist() == [[3], [4]]
    cut = GivenScale(np.ones((3, 1), np.float32), (256 + 128, 128))
    with pytest.raises(ConvertError, match=r"qkv\.weight cannot be divided: 3 parts of 768 rows would cut its blocks"):
        adopted(GIVEN, cut)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cap_pad_token": (1, 128)}, r"lacks layers\.0\.attention\.to_q\.weight of transformer and 2 others"),
        (GIVEN | {"cap_pad_token": (1, 64)}, r"cap_pad_token has the shape \[1, 64\]"),
        (GIVEN | {f"{A}.qkv.weight": (384, 256)}, r"qkv\.weight has the shape \[384, 256\]"),
        (GIVEN | {"layers.0.more.weight": (2, 2)}, r"layers\.0\.more\.weight is no tensor of transformer"),
        (SHAPES | {"cap_pad_token.extra": (1,)}, "is no tensor of transformer"),
    ],
)
def test_what_does_not_fit(given: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        adopted(given)


def test_a_class_without_other_names() -> None:
    base = replace(BASE, class_name="FluxTransformer2DModel")
    assert not matches(base, {"double_blocks.0.weight": (2, 2)}, SHAPES)
    assert matches(base, SHAPES, SHAPES)
    with pytest.raises(ConvertError, match="knows no other names of this class"):
        adopt(Foreign("ComfyUI", {}, frozenset()), component({"double_blocks.0.weight": (2, 2)}), base, SHAPES)
