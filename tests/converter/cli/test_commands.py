"""The command line: help, suggestions, tables and JSON, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

import own_manifests
import pytest
import torch
from click.testing import CliRunner, Result
from hub_server import running_hub
from pipelines import BUILDERS, copied, saved
from safetensors.torch import load_file, save_file

from fp8_convert.converter import convert, inspect, plan_conversion
from fp8_convert.converter.cli import demo
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.cli.demo import build_tiny_pipeline
from fp8_convert.converter.cli.render import render_inspection, render_manifests, render_plan
from fp8_convert.converter.plan.manifest import shipped
from fp8_convert.converter.plan.plan import Plan
from fp8_convert.converter.plan.showing import rows
from fp8_convert.converter.telling.progress import Silent

COMMAND = Path(sysconfig.get_path("scripts"), "fp8-convert")
DIT = "transformer/diffusion_pytorch_model.safetensors"
OPTIONS = [
    "--output", "--dry-run", "--json", "--quantization", "--manifest", "--ignored-layers", "--component", "--compact",
    "--weight-block-size", "--activation-scheme", "--input-scales", "--device", "--workers", "--shards",
    "--read-back", "--force", "--revision", "--token", "--cache-dir", "--local-files-only", "--variant", "-h, --help",
]  # fmt: skip


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fp8-convert")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "out"
    run(saved("z_image"), "-o", folder)
    return folder


# Help and mistakes


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["convert", "-h"], ["convert", "--help"]])
def test_help_shows_an_example_and_the_conversions_options(arguments: list[str]) -> None:
    text = run(*arguments).stdout
    assert "fp8-convert Qwen/Qwen-Image -o qwen-image-fp8" in text
    for option in OPTIONS:
        assert option in text
    if arguments[0] != "convert":
        for command in ("inspect", "manifests", "demo"):
            assert f"\n  {command} " in text


def test_no_arguments_show_the_help() -> None:
    result = run(code=2)
    assert "Example:" in result.output


@pytest.mark.parametrize("command", ["inspect", "manifests", "demo", "verify", "push", "dequantize", "import"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"fp8-convert {command}" in run(command, "-h").stdout


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["inspct"], "inspect"),
        (["inspct", "folder"], "inspect"),
        (["inspct", "folder", "--json"], "inspect"),
        (["--json", "manifest"], "manifests"),
        (["convrt", "Qwen/Qwen-Image", "-o", "out"], "convert"),
        (["dmeo"], "demo"),
    ],
)
def test_mistyped_command_is_suggested(arguments: list[str], command: str) -> None:
    result = run(*arguments, code=2)
    assert f"did you mean the command `fp8-convert {command}`?" in result.stderr


def test_an_options_value_is_no_mistyped_command() -> None:
    run("-o", "converted", saved("z_image"), "--dry-run")


def test_mistyped_option_is_suggested() -> None:
    assert "--ignored-layers" in run(saved("z_image"), "--ignore-layers", "img_mlp", code=2).stderr


def test_a_folder_with_a_commands_name_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(saved("z_image"), tmp_path / "inspct")
    monkeypatch.chdir(tmp_path)
    assert run("inspct", "--dry-run").stdout.startswith("inspct (ZImagePipeline)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the output folder with -o, or pass --dry-run"),
        (["-o", "out", "--quantization", "int4"], "'int4' is not 'fp8'"),
        (["-o", "out", "--activation-scheme", "quiet"], "'quiet' is not one of 'dynamic', 'static'"),
        (["-o", "out", "--weight-block-size", "128"], "requires 2 arguments"),
        (["-o", "out", "--workers", "0"], "0 is not in the range"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    assert message in run(saved("z_image"), *arguments, code=2).stderr


# Tables and JSON


def _amount(count: int) -> str:
    """Bytes as the tables show them."""
    units = [(1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)]
    scale, unit, digits = next((u for u in units if count >= u[0]), (1, "B", 0))
    return f"{count / scale:.{digits}f} {unit}"


@pytest.mark.parametrize("options", [[], ["--compact"], ["--ignored-layers", "to_q"]])
@pytest.mark.parametrize("name", ["z_image", "qwen_image", "wan22", "flux"])
def test_dry_run_shows_counts_bytes_and_reasons(name: str, options: list[str]) -> None:
    text = run(saved(name), "--dry-run", *options).stdout
    plan = plan_of(name, options)
    lines = [line.split() for line in text.splitlines()]
    for component in plan.components:
        before, after = component.weight_bytes
        title = f"{component.source.name} ({component.source.class_name}): {_amount(before)} -> {_amount(after)} "
        assert f"\n{title}" in text
        for row in rows(component):
            decision = f"fp8 {row.mode} {row.scheme}" if row.mode else "kept"
            cells = f"{decision} {row.kind or '-'} {row.count}".split()
            rest = f"{_amount(row.bytes_before)} {_amount(row.bytes_after)} {row.rule} {row.why}".split()
            assert any(line[: len(cells)] == cells and line[len(cells) + 1 :] == rest for line in lines), row
            assert row.why
    if "--ignored-layers" in options:
        assert "note: the ignored layer 'to_q' names one member of a fused projection" in text
    before, after = plan.bytes_to_read, sum(s.size for s in plan.shards)
    assert f"total: {_amount(before)} -> {_amount(after)} ({100 * after / before:.1f}%)" in text


def plan_of(name: str, options: list[str]) -> Plan:
    ignored = options[1:] if "--ignored-layers" in options else []
    return plan_conversion(saved(name), compact="--compact" in options, ignored_layers=ignored)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    run(saved("z_image"), "--dry-run", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_run_json_foretells_the_conversion(converted: Path) -> None:
    plan = json.loads(run(saved("z_image"), "--dry-run", "--json").stdout)
    assert plan["pipeline"] == "ZImagePipeline"
    assert plan["recipe"]["manifest"] == "z-image"
    written = [p for p in converted.rglob("*") if p.is_file() and p.name != "fp8_convert.json"]
    assert plan["bytes_to_write"] == sum(p.stat().st_size for p in written)
    for shard in (s for c in plan["components"] for s in c["shards"]):
        (path,) = shard["paths"]
        tensors = load_file(converted / path)
        assert (converted / path).stat().st_size == shard["bytes_after"]
        for tensor in shard["tensors"]:
            stored = tensors[tensor["name"]]
            assert (stored.dtype == torch.float8_e4m3fn) == (tensor["decision"] == "fp8")
            assert list(stored.shape) == tensor["shape"]
            assert tensor["rule"]
            assert tensor["why"]


def test_convert_json(tmp_path: Path) -> None:
    result = run(saved("z_image"), "-o", tmp_path / "out", "--json", "--ignored-layers", "to_k")
    summary = json.loads(result.stdout)
    assert summary["output"] == str(tmp_path / "out")
    assert summary["manifest"] == "z-image"
    before = sum(p.stat().st_size for p in saved("z_image").rglob("*.safetensors"))
    after = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.safetensors"))
    assert (summary["bytes_before"], summary["bytes_after"]) == (before, after)
    assert "to_k" in summary["notes"][0]
    assert f"note: {summary['notes'][0]}" in result.stderr


def test_summary_in_one_line(tmp_path: Path) -> None:
    line, readers = run(saved("z_image"), "-o", tmp_path / "out").stdout.splitlines()
    assert line.startswith(f"wrote {tmp_path / 'out'}: ")
    for part in (" -> ", "%) in ", " GB/s, peak RSS ", " MiB)"):
        assert part in line
    assert readers.startswith("target native: for fp8-convert's own load_pipeline; other targets: ")


def test_inspect_converted(converted: Path) -> None:
    text = run("inspect", converted).stdout
    assert text.startswith(f"{converted}: fp8-convert ")
    assert "quant_method fp8" in text
    assert "PROBLEM" not in text
    found = json.loads(run("inspect", converted, "--json").stdout)
    dit, encoder, vae = (component(found, n) for n in ("transformer", "text_encoder", "vae"))
    weights = load_file(converted / DIT)
    fp8 = [n for n, w in weights.items() if w.dtype == torch.float8_e4m3fn]
    group = next(g for g in dit["groups"] if g["what"] == "fp8")
    assert (group["mode"], group["scheme"], group["kind"], group["tensors"]) == ("w8a8", "tensor", "Linear", len(fp8))
    assert group["bytes"] == sum(weights[n].numel() for n in fp8)
    assert next(g for g in dit["groups"] if g["what"] == "scale")["tensors"] == len(fp8)
    kept = next(g for g in dit["groups"] if g["what"] == "kept" and g["kind"] == "Linear")
    for rule in ("adaLN_modulation", "cap_embedder", "t_embedder"):
        assert rule in kept["why"]
    assert {(g["mode"], g["scheme"]) for g in encoder["groups"] if g["what"] == "fp8"} == {("storage", "block128x128")}
    assert vae["quant_method"] is None
    assert {g["what"] for g in vae["groups"]} == {"kept"}


def component(found: Any, name: str) -> Any:
    return next(c for c in found["components"] if c["name"] == name)


@pytest.mark.parametrize("name", ["wan22", "z_image", "qwen_image"])
def test_reasons_count_the_tensors_of_their_row(name: str, tmp_path: Path) -> None:
    run(saved(name), "-o", tmp_path / "out", "--ignored-layers", "to_q")
    found = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    for shown in found["components"]:
        rows = [g for g in shown["groups"] if g["what"] == "kept"]
        for row in rows:
            counts = [int(n) for n in re.findall(r" \((\d+)\)(?:; |$)", row["why"])]
            assert row["why"]
            assert sum(counts) == (row["tensors"] if shown["quant_method"] else 0), row  # none: kept as a whole


def test_reasons_tell_dtypes_apart(tmp_path: Path) -> None:
    """A kind that the class keeps in FP32 in part, and rules keep in part."""
    run(saved("wan22"), "-o", tmp_path / "out")
    found = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    rows = component(found, "transformer")["groups"]
    kept = {g["dtype"]: g["why"] for g in rows if (g["what"], g["kind"]) == ("kept", "Linear")}
    assert kept == {"BF16": "condition_embedder (3); proj_out (1)", "F32": "_keep_in_fp32_modules (2)"}


def test_inspect_lone_component(converted: Path) -> None:
    found = json.loads(run("inspect", converted / "transformer", "--json").stdout)
    assert found["converted_by"] == "fp8-convert; fp8_convert.json is not here"
    assert {g["what"] for g in component(found, "")["groups"]} == {"fp8", "scale", "kept"}


def test_inspect_unconverted() -> None:
    text = run("inspect", saved("qwen_image")).stdout
    assert "not converted by fp8-convert" in text
    found = json.loads(run("inspect", saved("qwen_image"), "--json").stdout)
    assert found["converted_by"] is None
    groups = [g for c in found["components"] for g in c["groups"]]
    assert {g["what"] for g in groups} == {"kept"}
    assert {"Linear", "Conv2d", "Conv3d", "Embedding"} <= {g["kind"] for g in groups}
    weights = list(saved("qwen_image").rglob("*.safetensors"))
    assert sum(g["bytes"] for g in groups) == sum(t.nbytes for p in weights for t in load_file(p).values())


def test_inspect_tells_of_a_missing_scale(converted: Path, tmp_path: Path) -> None:
    broken = copied(converted, tmp_path / "broken")
    tensors = load_file(broken / DIT)
    del tensors["layers.0.attention.to_q.weight_scale"]
    save_file(tensors, broken / DIT)
    text = run("inspect", broken, code=1).stdout
    assert "PROBLEM: 1 FP8 weight has no scale: layers.0.attention.to_q.weight\n" in text


@pytest.mark.parametrize("width", [100, 200])
def test_tables_fit_the_terminal(converted: Path, width: int) -> None:
    plan = plan_conversion(saved("qwen_image"))
    texts = [render_plan(plan, width), render_inspection(inspect(converted), width)]
    texts.append(render_manifests(list(shipped().values()), width))
    for text in texts:
        assert max(len(line) for line in text.splitlines()[1:]) <= width
    words = texts[0].split()
    for component in plan.components:
        for row in rows(component):
            assert set(row.why.split()) <= set(words)


def test_options_of_the_source_need_a_source(converted: Path) -> None:
    assert "--source" in run("verify", converted, "--manifest", "z-image", code=2).stderr
    assert "--source" in run("verify", converted, "--revision", "main", code=2).stderr


def test_compact_that_changes_nothing_says_so() -> None:
    assert "note: --compact changes nothing here" in run(saved("wan22"), "--dry-run", "--compact").stdout
    assert "note:" not in run(saved("qwen_image"), "--dry-run", "--compact").stdout


def test_an_error_closes_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    tensors = load_file(source / DIT)
    tensors["layers.0.attention.to_q.weight"][0, 0] = float("nan")
    save_file(tensors, source / DIT)
    events: list[str] = []

    class Recorded(Silent):
        def close(self) -> None:
            events.append("closed")

    monkeypatch.setattr("fp8_convert.converter.cli.session.for_terminal", lambda **_: Recorded())
    assert "NaN" in run(source, "-o", tmp_path / "out", code=1).stderr
    assert events == ["closed"]


def test_inspect_what_is_no_snapshot(tmp_path: Path) -> None:
    assert run("inspect", tmp_path / "none", code=1).stderr.startswith("error: ")
    assert run("inspect", tmp_path, code=1).stderr.startswith("error: ")


def test_manifests() -> None:
    text = run("manifests").stdout
    entries = json.loads(run("manifests", "--json").stdout)
    assert [e["name"] for e in entries] == list(shipped())
    for entry in entries:
        line = next(line for line in text.splitlines() if line.split()[0] == entry["name"])
        assert entry["description"] in line
        assert all(repo in line for repo in entry["repos"])
        found = entry["evidence"]
        assert line.endswith(
            f"{found['lines']} lines: {', '.join(found['sources'])}; {found['ours']} of our own reasoning"
        )
    repos = {repo for e in entries for repo in e["repos"]}
    assert {"Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen-Image", "Qwen/Qwen-Image-2512", "Qwen/Qwen-Image-Edit"} <= repos
    assert {"Qwen/Qwen-Image-Layered", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"} <= repos


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_demo_replaces_nothing_but_a_demo(converted: Path, tmp_path: Path) -> None:
    before = contents(converted)
    result = run("demo", "-o", converted, code=1)
    assert result.stderr == (
        f"error: {converted} holds an FP8 snapshot that is not the demo's; name another folder with -o.\n"
    )
    assert contents(converted) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("kept")
    assert "choose another folder" in run("demo", "-o", tmp_path / "foreign", code=1).stderr
    assert contents(tmp_path / "foreign") == {"thesis.txt": b"kept"}


def test_demo_knows_its_folder_until_another_snapshot_replaces_it(tmp_path: Path) -> None:
    build_tiny_pipeline(tmp_path / "tiny", seed=1)
    (tmp_path / "tiny" / "README.md").write_text(demo._README)
    convert(tmp_path / "tiny", tmp_path / "out")  # as a demo whose model is not this one's left it
    run("demo", "-o", tmp_path / "out")
    (tmp_path / "tiny" / "README.md").write_text("# A model of one's own\n")
    run(tmp_path / "tiny", "-o", tmp_path / "out", "--force")
    before = contents(tmp_path / "out")
    assert "not the demo's" in run("demo", "-o", tmp_path / "out", code=1).stderr
    assert contents(tmp_path / "out") == before


def test_a_manifest_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(own_manifests.text("feed_forward", name="mine"))
    plan = json.loads(run(saved("z_image"), "--dry-run", "--json", "--manifest", path).stdout)
    fp8 = [t["name"] for c in plan["components"] for s in c["shards"] for t in s["tensors"] if t["decision"] == "fp8"]
    assert fp8
    assert all(".feed_forward." in name for name in fp8)


def test_ignored_layers_by_commas_and_repeated() -> None:
    def fp8(*options: str) -> set[str]:
        plan = json.loads(run(saved("z_image"), "--dry-run", "--json", *options).stdout)
        tensors = [t for c in plan["components"] for s in c["shards"] for t in s["tensors"]]
        return {t["name"] for t in tensors if t["decision"] == "fp8"}

    everything = fp8()
    kept = everything - fp8("--ignored-layers", "layers.0,to_qkv", "--ignored-layers", "w13")
    by_name = {n for n in everything if n.startswith("layers.0.attention") or n.startswith("layers.0.feed_forward")}
    fused = {n for n in everything if n.split(".")[-2] in ("to_q", "to_k", "to_v", "w1", "w3")}
    assert kept == by_name | fused


def test_lone_component_folder(tmp_path: Path) -> None:
    run(saved("z_image") / "transformer", "-o", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "fp8_convert.json",
    ]


def test_variant(tmp_path: Path) -> None:
    source = saved("z_image", dtype=torch.float16, variant="fp16")
    assert "--variant fp16" in run(source, "-o", tmp_path / "out", code=1).stderr
    run(source, "-o", tmp_path / "out", "--variant", "fp16")
    assert (tmp_path / "out" / DIT).is_file()


# The process itself


def started(command: list[str | Path]) -> subprocess.Popen[str]:
    """The command as it imports PyTorch."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}  # imports are told on stderr
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stderr is not None
    while "| " in (line := process.stderr.readline()):
        if "torch" in line:
            return process
    raise AssertionError(f"PyTorch was not imported: {line}")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_pytorch_is_imported(signum: signal.Signals) -> None:
    process = started([COMMAND, "inspect", saved("z_image")])
    process.send_signal(signum)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; run the same command again."
    assert "Traceback" not in errors
    assert said == ""


def test_an_ignored_signal_stays_ignored() -> None:
    process = started(["sh", "-c", 'trap "" INT; exec "$0" inspect "$1"', COMMAND, saved("z_image")])
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "ZImageTransformer2DModel" in said


def test_a_command_leaves_the_handlers_of_signals() -> None:
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        run("inspect", saved("z_image"))
        assert {signal.getsignal(n) for n in before} == {signal.SIG_DFL}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_version_does_not_wait_for_pytorch() -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == run("--version").stdout
    assert "importlib" in done.stderr
    assert "torch" not in done.stderr


# First words


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_first_line_names_source_and_manifest(name: str) -> None:
    result = run(saved(name), "--dry-run")
    manifest = plan_of(name, []).recipe.manifest.name
    assert result.stderr.splitlines()[0] == f"{saved(name)} (a folder), manifest {manifest}"


def test_the_first_line_for_a_component_alone_and_for_an_own_manifest(tmp_path: Path) -> None:
    lone = saved("z_image") / "transformer"
    assert run(lone, "--dry-run").stderr.splitlines()[0] == f"{lone} (a folder), manifest z-image"
    named = run(saved("z_image"), "--dry-run", "--manifest", "default").stderr.splitlines()[0]
    assert named == f"{saved('z_image')} (a folder), manifest default"


def test_the_first_line_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("org/model", saved("z_image"))
        commit = hub.commit("org/model")
        first = run("org/model", "--dry-run").stderr.splitlines()[0]
        assert first == f"org/model (commit {commit}), manifest z-image"


def in_a_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_the_first_line_comes_before_pytorch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fp8_convert.converter.telling import progress\nsay = progress.Lines.say\n"
        "def told(self, line):\n    print('torch' in sys.modules)\n    say(self, line)\n"
        "progress.Lines.say = told\n"
        "from fp8_convert.converter.cli.commands import main\nmain()"
    )
    child = in_a_child(code, saved("z_image"), "-o", tmp_path / "out")
    assert child.stdout.splitlines()[0] == "False"
    assert child.stderr.startswith(f"{saved('z_image')} (a folder), manifest z-image")


@pytest.mark.parametrize("arguments", [["--help"], ["-V"], ["manifests"], ["manifests", "show", "z-image"]], ids=str)
def test_what_needs_no_pytorch_imports_none(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom fp8_convert.converter.cli.commands import main\ntry:\n    main()\n"
        "except SystemExit:\n    pass\nprint({'torch', 'diffusers', 'transformers'} & {*sys.modules})"
    )
    assert in_a_child(code, *arguments).stdout.splitlines()[-1] == "set()"


def test_the_log_ends_with_what_identifies_the_snapshot(tmp_path: Path) -> None:
    result = run(saved("z_image"), "-o", tmp_path / "out", "--json")
    summary = json.loads(result.stdout)
    record = json.loads((tmp_path / "out" / "fp8_convert.json").read_text())
    assert summary["snapshot_sha256"] == record["record_sha256"]
    assert summary["recipe_sha256"] == record["recipe_sha256"]
    assert summary["commit"] is None
    last = result.stderr.splitlines()[-1]
    assert last == f"commit none (a folder), recipe {record['recipe_sha256']}, snapshot {record['record_sha256']}"


def test_quiet_leaves_errors_and_the_result(tmp_path: Path) -> None:
    result = run(saved("z_image"), "-o", tmp_path / "out", "-q", "--ignored-layers", "to_q")
    assert result.stderr == ""
    assert result.stdout.startswith("wrote ")
    assert run("verify", tmp_path / "out", "-q").stderr == ""
    assert run(saved("z_image"), "-o", tmp_path / "out", "-q", code=1).stderr.startswith("error: ")


def test_the_same_command_again_is_done_already(tmp_path: Path) -> None:
    run(saved("z_image"), "-o", tmp_path / "out")
    again = run(saved("z_image"), "-o", tmp_path / "out", "--check")
    assert again.stdout.startswith(f"already done: {tmp_path / 'out'}, ")


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option: str) -> None:
    assert run(option).stdout == f"fp8-convert, version {version('fp8-convert')}\n"
    installed = subprocess.run([COMMAND, option], capture_output=True, text=True, check=True)
    assert installed.stdout == run(option).stdout
