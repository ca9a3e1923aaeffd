"""`inspect` of what users have: snapshots here and on the Hub, single files of any tool, and unfinished outputs."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hub_server import HubServer, running_hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, ResumableError, convert, inspect
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.cli.render import render_inspection
from fp8_convert.converter.inspection import Inspection
from fp8_convert.converter.snapshot.access import HubAccess

DIT = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"
FP8 = torch.float8_e4m3fn
ONE = torch.ones(())
CODES = torch.ones(4, 6).to(FP8)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path / "home") as server:
        yield server


def problems(path: Path) -> list[str]:
    return [problem for c in inspect(path).components for problem in c.problems]


def fp8_groups(inspection: Inspection) -> list[tuple[str | None, str, int]]:
    """(scheme, dtype, tensors) of what is FP8."""
    return [(g.scheme, g.dtype, g.tensors) for c in inspection.components for g in c.groups if g.what == "fp8"]


# On the Hub


def test_a_repository_is_not_downloaded(hub: HubServer, converted: Path) -> None:
    hub.add_repo("org/converted", converted)
    hub.add_repo("Tongyi-MAI/Z-Image-Turbo", saved("z_image"))
    for repo, folder in (("org/converted", converted), ("Tongyi-MAI/Z-Image-Turbo", saved("z_image"))):
        hub.clear_log()
        found, here = inspect(repo), inspect(folder)
        assert (found.components, found.converted_by) == (here.components, here.converted_by)
        assert (found.path, found.commit, found.ok) == (repo, hub.commit(repo), True)
        headers = 0
        for file in folder.rglob("*.safetensors"):
            headers += min(file.stat().st_size, 64 * 1024)  # what the first request asks for
        assert hub.bytes_sent(".safetensors") <= headers
        assert {r.file for r in hub.log if r.route != "api"} <= {
            *(p.relative_to(folder).as_posix() for p in folder.glob("*/*.safetensors")),
            *("model_index.json", "fp8_convert.json"),
            *(p.relative_to(folder).as_posix() for p in folder.glob("*/config.json")),
        }


def test_options_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/x", saved("z_image"))
    with pytest.raises(ConvertError, match="has no revision 'v9'; check --revision"):
        inspect("org/x", options=HubAccess(revision="v9"))
    with pytest.raises(ConvertError, match="No component of org/x has weights of the variant 'fp17'"):
        inspect("org/x", options=HubAccess(variant="fp17"))
    with pytest.raises(ConvertError, match="is not in the cache"):
        inspect("org/x", options=HubAccess(local_files_only=True, cache_dir=tmp_path / "cache"))
    convert("org/x", tmp_path / "out", cache_dir=tmp_path / "cache")
    hub.clear_log()
    found = inspect("org/x", options=HubAccess(local_files_only=True, cache_dir=tmp_path / "cache"))
    assert found.components == inspect(saved("z_image")).components
    assert not hub.log


def test_the_command_takes_them_too(hub: HubServer) -> None:
    hub.add_repo("org/x", saved("z_image"))
    result = CliRunner().invoke(main, ["inspect", "org/x", "--revision", "main"])
    assert result.exit_code == 0
    assert result.output.startswith(f"org/x @ {hub.commit('org/x')[:12]}: not converted by fp8-convert\n")
    wrong = CliRunner().invoke(main, ["inspect", "org/x", "--revision", "v9"])
    assert (wrong.exit_code, wrong.stderr) == (1, "error: org/x has no revision 'v9'; check --revision.\n")
    missing = CliRunner().invoke(main, ["inspect", "org/none"])
    assert missing.exit_code == 1
    assert "org/none is not a folder here and does not exist on the Hub" in missing.stderr


def test_a_damaged_record_on_the_hub(hub: HubServer, spoilt: Path) -> None:
    (spoilt / "fp8_convert.json").write_text('{"format": []}')
    hub.add_repo("org/spoilt", spoilt)
    assert inspect("org/spoilt").converted_by == "fp8-convert, with a damaged record: run verify"


# Single files


def test_a_file_of_ours(converted: Path) -> None:
    found = inspect(converted / DIT)
    assert found.converted_by == "fp8-convert; fp8_convert.json is not here"
    (whole,) = (c for c in inspect(converted).components if c.name == "transformer")
    assert [(g.mode, g.scheme, g.tensors) for g in found.components[0].groups if g.what == "fp8"] == [
        (g.mode, g.scheme, g.tensors) for g in whole.groups if g.what == "fp8"
    ]
    assert found.components[0].bytes == whole.bytes
    assert found.ok
    assert f"{converted / DIT}: fp8-convert" in render_inspection(found)


@pytest.mark.parametrize(
    ("tensors", "tool", "fp8"),
    [
        pytest.param({"a.weight": torch.ones(2, 2)}, None, [], id="plain"),
        pytest.param(
            {
                "a.weight": CODES,
                "a.scale_weight": ONE,
                "a.scale_input": torch.zeros(()),
                "scaled_fp8": torch.zeros(2).to(FP8),
            },
            "another tool, in ComfyUI's format",
            [("tensor", "F8_E4M3", 1)],
            id="ComfyUI scaled",
        ),
        pytest.param(
            {"a.weight": CODES, "a.weight_scale": ONE, "a.comfy_quant": torch.zeros(9, dtype=torch.uint8)},
            "another tool, in ComfyUI's format",
            [("tensor", "F8_E4M3", 1)],
            id="ComfyUI quant",
        ),
        pytest.param(
            {"a.weight": CODES, "a.weight_scale": torch.ones(4, 1, dtype=torch.bfloat16)},
            "another tool",
            [("channel", "F8_E4M3", 1)],
            id="compressed-tensors, per channel",
        ),
        pytest.param(
            {"a.weight": CODES, "a.weight_scale_inv": torch.ones(2, 3)},
            "another tool",
            [("block", "F8_E4M3", 1)],
            id="DeepSeek blocks",
        ),
        pytest.param(
            {"e.gate_up_proj": torch.ones(3, 4, 6).to(FP8), "e.gate_up_proj_scale": torch.ones(3, 4, 1)},
            "another tool",
            [("block", "F8_E4M3", 1)],
            id="experts",
        ),
        pytest.param(
            {"a.weight": torch.ones(2, 2).to(torch.float8_e5m2), "a.weight_scale": torch.ones(1)},
            "another tool",
            [("tensor", "F8_E5M2", 1)],
            id="E5M2",
        ),
        pytest.param(
            {"a.weight_packed": torch.zeros(2, 4, dtype=torch.uint8), "a.weight_scale": torch.ones(2, 1).to(FP8)},
            "another tool",
            [],
            id="NVFP4, whose scales are FP8",
        ),
    ],
)
def test_files_of_other_tools(
    tmp_path: Path, tensors: dict[str, torch.Tensor], tool: str | None, fp8: list[tuple[str, str, int]]
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert (found.converted_by, fp8_groups(found)) == (tool, fp8)
    assert found.ok, found.components[0].problems
    assert sum(g.tensors for g in found.components[0].groups) == len(tensors)
    json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        pytest.param(
            {f"a{i}.weight": CODES.clone() for i in range(38)},
            "38 FP8 weights have no scale, such as a0.weight",
            id="a plain cast",
        ),
        pytest.param({"a.bias": torch.zeros(2).to(FP8)}, "1 FP8 weight has no scale: a.bias", id="a bias"),
        pytest.param(
            {"a.weight": CODES, "a.weight_scale": torch.ones(3)},
            "1 scale does not fit its weight: a.weight_scale (F32 [3])",
            id="a scale of another shape",
        ),
        pytest.param(
            {"a.weight": CODES, "a.weight_scale": torch.ones((), dtype=torch.int32)},
            "1 scale does not fit its weight: a.weight_scale (I32 [])",
            id="a scale of another dtype",
        ),
        pytest.param(
            {"a.weight": CODES.clone()[0, 0], "a.weight_scale": torch.ones(2)},
            "1 scale does not fit its weight: a.weight_scale (F32 [2])",
            id="a weight without dimensions",
        ),
        pytest.param(
            {f"{m}.{k}": torch.ones(2, 2) for m in "ab" for k in ("weight", "weight_scale")},
            "2 scales have no quantised weight, such as a.weight_scale",
            id="scales of what was made BF16 again",
        ),
        pytest.param(
            {"a.scale_weight": ONE, "b.bias": ONE.clone()},
            "1 scale has no quantised weight: a.scale_weight",
            id="a scale alone",
        ),
    ],
)
def test_problems_of_a_file(tmp_path: Path, tensors: dict[str, torch.Tensor], says: str) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    assert problems(file) == [says]
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert result.exit_code == 1
    assert result.stdout.count("PROBLEM: ") == 1


def test_what_is_no_safetensors_file(tmp_path: Path, converted: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"pickle")
    with pytest.raises(ConvertError, match=r"x\.ckpt is not a \.safetensors file; give one, or the folder of"):
        inspect(tmp_path / "x.ckpt")
    (tmp_path / "x.safetensors").write_bytes((converted / DIT).read_bytes()[:-1])
    with pytest.raises(ConvertError, match=r"x\.safetensors is truncated"):
        inspect(tmp_path / "x.safetensors")
    with pytest.raises(ConvertError):
        inspect("x" * 5000)
    with pytest.raises(ConvertError, match=r"x\.safetensors cannot be opened .*; check the path"):
        inspect(tmp_path / "none" / "x.safetensors")


# What is wrong with a snapshot of ours, once for all that share it


def rewritten(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a shard's tensors and keep its metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


def dropped(ending: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(ending)]:
            del tensors[name]

    return change


def made_bf16(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n, t in tensors.items() if t.dtype == FP8]:
        tensors[name] = tensors[name].to(torch.bfloat16)


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.endswith("_scale")]:
        tensors[name] = tensors[name].reshape(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dropped(".weight_scale"), [r"28 FP8 weights have no scale, such as \S+\.weight"]),
        (dropped("layers.0.attention.to_q.weight_scale"), [r"1 FP8 weight has no scale: layers\.0\.\S+to_q\.weight"]),
        (reshaped, [r"28 scales do not fit their weights, such as \S+ \(F32 \[1\]\)"]),
        (
            made_bf16,
            [
                r"28 FP8 layers by the metadata, whose weights are not, such as \S+",
                r"28 scales have no quantised weight, such as \S+\.weight_scale",
                r"transformer/config\.json has the quant_method fp8, and no weight is FP8",
            ],
        ),
    ],
)
def test_problems_are_counted(spoilt: Path, change: Callable[[dict[str, torch.Tensor]], None], says: list[str]) -> None:
    rewritten(spoilt / DIT, change)
    found = problems(spoilt)
    assert len(found) == len(says), found
    for problem, expected in zip(found, says, strict=True):
        assert re.fullmatch(expected, problem), problem
    assert CliRunner().invoke(main, ["inspect", str(spoilt)]).exit_code == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": None}, "has no quantization_config, so readers would take FP8 codes for weights"),
        ({"quantization_config": [1]}, "quantization_config in transformer/config.json is [1] instead of an object"),
        ({"quant_method": 5}, "quantization_config in transformer/config.json has the quant_method 5"),
        ({"quant_method": ...}, "quantization_config in transformer/config.json has no quant_method"),
        ({"activation_scheme": ["\x1b[2J"]}, r"config.json has the activation_scheme ['\x1b[2J']"),
        ({"ignored_layers": "all"}, "config.json has the ignored_layers 'all'"),
        ({"ignored_layers": [{}, 1]}, "config.json has the ignored_layers [{}, 1]"),
        ({"weight_block_size": [128]}, "config.json has the weight_block_size [128]"),
        ({"weight_block_size": {"a": [None] * 50}}, "config.json has the weight_block_size {'a': [None, None, "),
    ],
)
def test_damaged_quantization_config(spoilt: Path, change: dict[str, Any], says: str) -> None:
    config = json.loads((spoilt / CONFIG).read_text())
    for key, value in change.items():
        place = config if key in config else config["quantization_config"]
        place[key] = value
        if value is ...:
            del place[key]
    (spoilt / CONFIG).write_text(json.dumps(config))
    (problem,) = problems(spoilt)
    assert says in problem
    assert len(problem) < 200


# Unfinished outputs


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a conversion leaves on a disk that was full after its second shard."""
    write, left = os.pwrite, [2_500_000]

    def filling(fd: int, data: memoryview, offset: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", filling)
        with pytest.raises(ResumableError):
            convert(saved("z_image", max_shard_size="2MB"), tmp_path / "out", workers=1)
    return tmp_path / "out"


def journal(folder: Path) -> Path:
    return folder / ".fp8-convert" / "journal.jsonl"


def test_an_interrupted_conversion(interrupted: Path, tmp_path: Path) -> None:
    first, *done = [json.loads(line) for line in journal(interrupted).read_text().splitlines()]
    assert done
    source = saved("z_image", max_shard_size="2MB")
    shards = sorted(p.relative_to(source).as_posix() for p in source.rglob("*.safetensors"))
    for stated, count in ((None, f"{len(done)} shards so far"), (shards, f"{len(done)} of {len(shards)} shards")):
        line = {k: v for k, v in {**first, "shards": stated}.items() if v is not None}
        journal(interrupted).write_text("\n".join(map(json.dumps, (line, *done))) + "\n")
        result = CliRunner().invoke(main, ["inspect", str(interrupted)])
        assert result.exit_code == 1
        assert result.output == f"{interrupted}: unfinished, {count}; run the same command again to finish it\n"
    found = json.loads(CliRunner().invoke(main, ["inspect", str(interrupted), "--json"]).stdout)
    assert (found["ok"], found["unfinished"]) == (False, {"done": len(done), "shards": len(shards)})
    assert f"unfinished, {len(done)} of {len(shards)} shards" in repr(inspect(interrupted))
    convert(source, interrupted)
    assert inspect(interrupted).ok


def test_a_finished_snapshot_beside_an_unfinished_one(spoilt: Path) -> None:
    """A forced conversion that was interrupted before it replaced anything."""
    journal(spoilt).parent.mkdir()
    journal(spoilt).write_text('{"key": "x", "shards": ["a.safetensors"]}\n')
    found = inspect(spoilt)
    assert found.ok
    assert "a conversion that would replace it is unfinished, 0 of 1 shards" in render_inspection(found)
    (spoilt / "model_index.json").unlink()  # what is replaced first
    assert not inspect(spoilt).ok
    assert render_inspection(inspect(spoilt)).startswith(f"{spoilt}: unfinished, 0 of 1 shards; ")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.text(),
        st.lists(
            st.fixed_dictionaries(
                {}, optional={k: st.one_of(st.none(), st.integers(), st.lists(st.text())) for k in ("shards", "path")}
            )
        ).map(lambda lines: "\n".join(map(json.dumps, lines))),
        st.just('{"a":' * 100_000),
    )
)
def test_any_journal(tmp_path: Path, text: str) -> None:
    journal(tmp_path).parent.mkdir(exist_ok=True)
    journal(tmp_path).write_bytes(text.encode(errors="surrogatepass"))
    found = inspect(tmp_path)
    assert not found.ok
    assert "unfinished, " in render_inspection(found)
