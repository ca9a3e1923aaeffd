"""Errors of weights against float64 in numpy, and faults that are planted into a snapshot's files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pipelines
import pytest
import reference
import torch
from damage import LAYER, SHARD, rewrite
from runs import converted

from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.telling.progress import Silent
from fp8_convert.loader.checkpoint import open_snapshot
from fp8_convert.loader.quality.weight_errors import LayerError, weight_errors

DECODED = np.array([reference.decode(code) for code in range(256)])
Change = Callable[[torch.Tensor], torch.Tensor]


def errors(folder: Path, source: Path) -> dict[str, LayerError]:
    sides = [open_snapshot(path, HubAccess()) for path in (folder, source)]
    return {error.label: error for error in weight_errors(*sides, torch.device("cpu"), Silent())}  # type: ignore[arg-type]


def sqnr_in_numpy(folder: Path, source: Path, error: LayerError) -> float:
    """From the files' bytes."""
    shard = next((folder / error.component).glob("*.safetensors"))
    mine, theirs = reference.read_safetensors(shard), reference.read_safetensors(source / error.component / shard.name)
    name = f"{error.name}.weight"
    dtype, shape, data = theirs[name]
    weight = reference.floats(dtype, data).astype(np.float64).reshape(shape)
    codes = DECODED[np.frombuffer(mine[name][2], np.uint8)].reshape(shape)
    _, across, scale = mine.get(f"{error.name}.weight_scale_inv") or mine[f"{error.name}.weight_scale"]
    scales = np.frombuffer(scale, np.float32).astype(np.float64)
    if across:
        rows, columns = shape
        scales = scales.reshape(across).repeat(128, 0)[:rows].repeat(128, 1)[:, :columns]
    return float(10 * np.log10((weight**2).sum() / ((weight - codes * scales) ** 2).sum()))


@pytest.mark.parametrize(
    ("name", "options"), [("qwen_image", {"compact": True}), ("wan22", {"weight_block_size": (128, 128)})]
)
def test_what_was_converted_is_what_rounding_gives(name: str, options: dict[str, object]) -> None:
    folder, source = converted(name, **options), pipelines.saved(name)
    found = errors(folder, source)
    assert {e.scheme for e in found.values()} >= {"block128x128"}
    assert [e.label for e in found.values() if e.problem or e.coarse] == []
    for error in [*found.values()][::5]:
        assert error.sqnr == pytest.approx(sqnr_in_numpy(folder, source, error), abs=1e-4), error.label
        assert error.rounding == pytest.approx(error.sqnr, abs=1e-9)
        assert 30 < error.sqnr < 33


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[[str, Change], dict[str, LayerError]]:
    """What is found once a tensor of the converted z_image is changed."""

    def changed(tensor: str, change: Change) -> dict[str, LayerError]:
        folder = pipelines.copied(converted("z_image"), tmp_path / "faulty")
        rewrite(folder / SHARD, tensor, change)
        return errors(folder, pipelines.saved("z_image"))

    return changed


def wrong(found: dict[str, LayerError]) -> dict[str, str]:
    return {label: error.problem for label, error in found.items() if error.problem}


def test_a_doubled_scale_is_named(faulty: Callable[[str, Change], dict[str, LayerError]]) -> None:
    found = faulty(f"{LAYER}.weight_scale", lambda scale: scale * 2)
    assert list(wrong(found)) == [f"transformer.{LAYER}"]
    assert found[f"transformer.{LAYER}"].sqnr == pytest.approx(0, abs=0.1)
    assert "its scale is 2 times the one that fits" in wrong(found)[f"transformer.{LAYER}"]


def test_noised_codes_are_named(faulty: Callable[[str, Change], dict[str, LayerError]]) -> None:
    def noised(codes: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
        values = codes.float()
        return (values + 0.1 * values.std() * noise).clamp(-448, 448).to(torch.float8_e4m3fn)

    found = faulty(f"{LAYER}.weight", noised)
    assert list(wrong(found)) == [f"transformer.{LAYER}"]
    assert "is not the original's weight rounded" in wrong(found)[f"transformer.{LAYER}"]
    assert "times the one that fits" not in wrong(found)[f"transformer.{LAYER}"]
    assert found[f"transformer.{LAYER}"].sqnr == pytest.approx(20, abs=0.5)


def test_a_weight_that_is_kept_and_noised_is_named(faulty: Callable[[str, Change], dict[str, LayerError]]) -> None:
    found = faulty("all_final_layer.2-1.linear.weight", lambda w: w + 0.01 * w.std() * torch.ones_like(w))
    assert list(wrong(found)) == ["transformer.all_final_layer.2-1.linear"]
    assert "is kept, and is not the original's: 4" in wrong(found)["transformer.all_final_layer.2-1.linear"]


@pytest.mark.parametrize("tensor", [f"{LAYER}.weight_scale", f"{LAYER}.weight"])
def test_nan_is_named(faulty: Callable[[str, Change], dict[str, LayerError]], tensor: str) -> None:
    def holding_nan(values: torch.Tensor) -> torch.Tensor:
        floats = values.float()
        floats.view(-1)[0] = math.nan
        return floats.to(values.dtype)

    found = faulty(tensor, holding_nan)
    assert "holds NaN or Inf" in wrong(found)[f"transformer.{LAYER}"]
    assert found[f"transformer.{LAYER}"].to_json()["sqnr"] is None


def test_a_scale_that_is_too_coarse_is_no_fault_but_told(tmp_path: Path) -> None:
    folder = pipelines.copied(converted("z_image"), tmp_path / "coarse")
    weight = reference.floats(*reference.read_safetensors(pipelines.saved("z_image") / SHARD)[f"{LAYER}.weight"][::2])
    scale = np.float32(np.abs(weight).max())  # its largest magnitude is the code of 1: most are subnormal
    codes = torch.from_numpy(reference.quantize(weight, scale).copy()).view(torch.float8_e4m3fn)
    rewrite(folder / SHARD, f"{LAYER}.weight", lambda w: codes.view(w.shape))
    rewrite(folder / SHARD, f"{LAYER}.weight_scale", lambda s: torch.tensor(scale))
    fine = errors(folder, pipelines.saved("z_image"))[f"transformer.{LAYER}"]
    assert (fine.problem, fine.coarse) == (None, False)  # E4M3 reaches down to 2^-9
    scale = np.float32(256 * scale)
    codes = torch.from_numpy(reference.quantize(weight, scale).copy()).view(torch.float8_e4m3fn)
    rewrite(folder / SHARD, f"{LAYER}.weight", lambda w: codes.view(w.shape))
    rewrite(folder / SHARD, f"{LAYER}.weight_scale", lambda s: torch.tensor(scale))
    coarse = errors(folder, pipelines.saved("z_image"))[f"transformer.{LAYER}"]
    assert (coarse.problem, coarse.coarse) == (None, True)
    assert coarse.sqnr == pytest.approx(coarse.rounding, abs=0.01)
