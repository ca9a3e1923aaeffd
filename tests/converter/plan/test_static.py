"""Which layer an input scale is for: its key may name its component, and must where two have a layer of that name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import saved
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, convert, plan_conversion, verify

Q, K, OUT = (f"blocks.0.attn1.to_{x}" for x in ("q", "k", "out.0"))


def w8a8(source: Path) -> list[tuple[str, str]]:
    plan = plan_conversion(source)
    return [(c.source.name, t.module) for c in plan.components for t in c.tensors if t.decision.mode == "w8a8"]


def static(path: Path, scales: dict[str, float]) -> dict[str, Any]:
    """The options of a static conversion with these scales."""
    save_file({f"{name}.input_scale": torch.tensor(value) for name, value in scales.items()}, path)
    return {"activation_scheme": "static", "input_scales": path}


@pytest.fixture
def scales() -> dict[str, float]:
    """One for every layer of Wan's two DiTs, each another."""
    return {f"{component}.{module}": 0.01 + i / 1000 for i, (component, module) in enumerate(w8a8(saved("wan22")))}


def written(output: Path, component: str) -> dict[str, float]:
    (shard,) = (output / component).glob("*.safetensors")
    found = load_file(shard)
    return {n.removesuffix(".input_scale"): float(v) for n, v in found.items() if n.endswith(".input_scale")}


def test_two_dits_have_their_own(tmp_path: Path, scales: dict[str, float]) -> None:
    convert(saved("wan22"), tmp_path / "out", **static(tmp_path / "s.safetensors", scales))
    for component in ("transformer", "transformer_2"):
        found = written(tmp_path / "out", component)
        assert found[OUT] == pytest.approx(scales[f"{component}.{OUT}"])
        group = [scales[f"{component}.blocks.0.attn1.to_{x}"] for x in "qkv"]
        assert found[Q] == found[K] == pytest.approx(max(group)), "of this component's members alone"
    assert verify(tmp_path / "out", source=saved("wan22")).ok


def test_a_key_that_two_dits_have(tmp_path: Path, scales: dict[str, float]) -> None:
    scales[OUT] = scales.pop(f"transformer_2.{OUT}")
    message = (
        f"{OUT} is of a layer of transformer and of transformer_2; name its component too, as in transformer_2.{OUT}"
    )
    with pytest.raises(ConvertError, match=re.escape(message)):
        plan_conversion(saved("wan22"), **static(tmp_path / "s.safetensors", scales))


def test_a_key_without_its_component_is_clear_where_one_is_converted(tmp_path: Path, scales: dict[str, float]) -> None:
    bare = {n.removeprefix("transformer_2."): v for n, v in scales.items() if n.startswith("transformer_2.")}
    options = {"components": ["transformer_2"], **static(tmp_path / "s.safetensors", bare)}
    plan = plan_conversion(saved("wan22"), **options)
    found = {t.module: t.decision.input_scale for c in plan.components for t in c.tensors if t.decision.input_scale}
    assert found[OUT] == pytest.approx(bare[OUT])


@pytest.mark.parametrize("options", [{"components": ["transformer"]}, {"ignored_layers": ["ffn"]}])
def test_scales_of_what_is_kept_are_not_used_and_said(
    tmp_path: Path, scales: dict[str, float], options: dict[str, Any]
) -> None:
    plan = plan_conversion(saved("wan22"), **options, **static(tmp_path / "s.safetensors", scales))
    left = sum(1 for c in plan.components for t in c.tensors if t.decision.mode == "w8a8")
    (note,) = [note for note in plan.notes if "input scales" in note]
    assert note.startswith(f"the input scales of {len(scales) - left} layers that are not W8A8 here, such as ")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("transformer.blocks.9.attn1.to_q", "transformer.blocks.9.attn1.to_q, which is no layer of this source"),
        (f"transformer_3.{Q}", f"transformer_3.{Q}, which is no layer of this source"),
    ],
)
def test_a_key_of_no_layer(tmp_path: Path, scales: dict[str, float], key: str, message: str) -> None:
    with pytest.raises(ConvertError, match=re.escape(message)):
        plan_conversion(saved("wan22"), **static(tmp_path / "s.safetensors", scales | {key: 1.0}))


def test_a_layer_that_is_named_in_both_ways(tmp_path: Path) -> None:
    names = [module for _, module in w8a8(saved("z_image"))]
    given = dict.fromkeys(names, 0.1) | {f"transformer.{names[0]}": 0.2}
    with pytest.raises(ConvertError, match=re.escape(f"name transformer.{names[0]} twice")):
        plan_conversion(saved("z_image"), **static(tmp_path / "s.safetensors", given))


def test_a_missing_one_names_its_component(tmp_path: Path, scales: dict[str, float]) -> None:
    del scales[f"transformer_2.{OUT}"]
    with pytest.raises(ConvertError, match=re.escape(f"lack {OUT}.input_scale of transformer_2; calibrate it")):
        plan_conversion(saved("wan22"), **static(tmp_path / "s.safetensors", scales))
