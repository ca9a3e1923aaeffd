"""The Dockerfile: its one long step runs here as it stands, twice, and its layers are the snapshot.

No engine is needed: paths of the image become folders, and the base images' commands are those of this environment.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hub_server import HubServer, running_hub
from pipelines import copied, saved

from fp8_convert.converter import verify
from fp8_convert.converter.cli.commands import main

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
MODEL = "Tongyi-MAI/Z-Image-Turbo"
TOKEN = "hf_secretOne"
MTIME = 315532800  # 1980-01-01


def instructions() -> list[tuple[str, str]]:
    """(name, the rest) of each instruction; comments and line ends are gone."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def bake_step() -> str:
    (step,) = [rest for name, rest in instructions() if name == "RUN" and "bake.py" in rest]
    return step


def defaults() -> dict[str, str]:
    arguments = [rest.partition("=") for name, rest in instructions() if name == "ARG"]
    return {name: value.strip('"') for name, _, value in arguments}


@dataclass
class Builder:
    """A machine with a build cache, on which the bake step runs again and again."""

    hub: HubServer
    root: Path

    def bake(self, **arguments: str) -> str:
        """Run the step with build arguments; returns what it prints. The layers are written anew, the cache stays."""
        shutil.rmtree(self.root / "layers", ignore_errors=True)
        shell = re.sub(r"--mount=\S+ ", "", bake_step())
        for place in ("/cache", "/layers", "/run/secrets"):
            shell = shell.replace(f" {place}", f" {self.root}{place}").replace(f"={place}", f"={self.root}{place}")
        shell = shell.replace("/fp8-convert/", f"{ROOT}/").replace("python ", f"{sys.executable} ")
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        environment = self.hub.client_env(self.root / "home") | {"PATH": path, "PYTHONPATH": str(ROOT)}
        environment |= {"MODEL": MODEL, "REVISION": "main", "OPTIONS": ""}
        environment |= {"MAX_SHARD_SIZE": "300KB", "LAYER_SIZE": "1MB", **arguments}
        done = subprocess.run(["sh", "-c", shell], env=environment, cwd=self.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def cached(self) -> list[Path]:
        return sorted((self.root / "cache").iterdir())

    def image(self) -> Path:
        """What the final stage copies, below the folder `image`."""
        shutil.rmtree(self.root / "image", ignore_errors=True)
        for name, rest in instructions():
            if name == "COPY" and (found := re.fullmatch(r"--link --from=bake (/\S+) (/\S*)", rest)):
                shutil.copytree(f"{self.root}{found[1]}", f"{self.root}/image{found[2]}", dirs_exist_ok=True)
        return self.root / "image" / "model"


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """One that has baked once, a private model with a token that only a file has."""
    root = tmp_path_factory.mktemp("builder")
    (root / "cache").mkdir()
    (root / "run" / "secrets").mkdir(parents=True)
    (root / "run" / "secrets" / "hf_token").write_text(f"{TOKEN}\n")
    with HubServer() as hub:
        hub.add_repo(MODEL, saved("z_image"), private_token=TOKEN)
        builder = Builder(hub, root)
        assert "already done" not in builder.bake()
        yield builder


@pytest.fixture
def bake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with fp8-convert in this process."""

    def run(command: tuple[str, ...], **_: Any) -> subprocess.CompletedProcess[str]:
        result = CliRunner().invoke(main, list(command[1:]), catch_exceptions=False)
        sys.stderr.write(result.stderr)
        return subprocess.CompletedProcess(command, result.exit_code, result.stdout)

    spec = importlib.util.spec_from_file_location("bake", ROOT / "docker" / "bake.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script.subprocess, "run", run)
    return script


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Times and bytes of all below a folder, folders included."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths}


def test_the_image_holds_the_snapshot_in_layers_of_their_size(builder: Builder) -> None:
    image = builder.image()
    assert verify(image).ok
    record = json.loads((image / "fp8_convert.json").read_text())
    assert record["source"]["commit"] == builder.hub.commit(MODEL)
    layers = sorted((builder.root / "layers").iterdir())
    files = [[path for path in layer.rglob("*") if path.is_file()] for layer in layers]
    assert len([paths for paths in files if paths]) > 4
    for paths in files[1:]:
        assert {path.suffix for path in paths} <= {".safetensors"}
        assert sum(path.stat().st_size for path in paths) <= 1_000_000
    assert not [path for path in files[0] if path.suffix == ".safetensors"]
    assert {time for time, _ in state(builder.root / "layers").values()} == {MTIME * 10**9}
    assert not [path for paths in files for path in paths if TOKEN.encode() in path.read_bytes()]


def test_a_second_build_converts_nothing_and_gives_the_same_layers(builder: Builder) -> None:
    first, (snapshot,) = state(builder.root / "layers"), builder.cached
    changed = {path: path.stat().st_ctime_ns for path in snapshot.rglob("*")}
    weights = builder.hub.bytes_sent(".safetensors")
    builder.hub.clear_log()
    assert "already done" in builder.bake()
    assert builder.hub.bytes_sent(".safetensors") < weights / 10  # headers
    assert builder.cached == [snapshot]
    assert {path: path.stat().st_ctime_ns for path in snapshot.rglob("*")} == changed
    assert state(builder.root / "layers") == first


def test_each_commit_and_recipe_has_its_own_place_in_the_cache(
    bake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def layers(*options: str) -> Path:
        shutil.rmtree(tmp_path / "layers", ignore_errors=True)
        bake.main(["--cache", str(tmp_path / "cache"), "--layers", str(tmp_path / "layers"), "--", *options])
        return tmp_path / "layers" / "00" / "model"

    with running_hub(monkeypatch, tmp_path / "home") as hub:
        old = hub.add_repo(MODEL, saved("z_image"))
        layers(MODEL)
        record = json.loads((layers(MODEL, "--component", "transformer") / "fp8_convert.json").read_text())
        assert record["recipe"]["components"] == ["transformer"]
        newer = copied(saved("z_image"), tmp_path / "newer")
        (newer / "README.md").write_text("newer")
        hub.add_repo(MODEL, newer)
        assert (layers(MODEL) / "README.md").read_text() == "newer"
        assert len([*(tmp_path / "cache").iterdir()]) == 3
        capsys.readouterr()
        assert not (layers(MODEL, "--revision", old) / "README.md").exists()
        assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--", str(ROOT / "none" / "model")], "does not exist; check the path"),
        (["--", MODEL, "--ignored-layers", "nothing"], "'nothing'"),
        (["--layer-size", "60KB", "--", MODEL, "--max-shard-size", "50KB"], "layers, and there are 16; pass a larger"),
        (["--layer-size", "much", "--", MODEL], "'much' is not such as 5GB or 500MB"),
        ([], "required: SOURCE"),
    ],
)
def test_what_cannot_be_baked_is_said(
    bake: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo(MODEL, saved("z_image"))
        with pytest.raises(SystemExit) as stopped:
            bake.main(["--cache", str(tmp_path / "cache"), "--layers", str(tmp_path / "layers"), *options])
    assert message in f"{capsys.readouterr().err}{stopped.value.code}"
    assert not (tmp_path / "layers").exists()


def test_a_branch_that_moves_meanwhile(bake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    newer, run = copied(saved("z_image"), tmp_path / "newer"), bake.subprocess.run
    (newer / "README.md").write_text("newer")

    def moving(*arguments: Any, **more: Any) -> Any:
        done = run(*arguments, **more)
        hub.add_repo(MODEL, newer)
        return done

    with running_hub(monkeypatch, tmp_path / "home") as hub:
        planned = hub.add_repo(MODEL, saved("z_image"))
        monkeypatch.setattr(bake.subprocess, "run", moving)
        bake.main(["--cache", str(tmp_path / "cache"), "--layers", str(tmp_path / "layers"), "--", MODEL])
        record = json.loads((tmp_path / "layers" / "00" / "model" / "fp8_convert.json").read_text())
    assert record["source"]["commit"] == planned


def test_a_folder_has_no_commit(bake: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is a folder; give the id of a Hub repository"):
        bake.main(["--cache", str(tmp_path), "--layers", str(tmp_path / "layers"), "--", str(saved("z_image"))])


def test_the_final_stage_copies_every_layer_and_is_offline() -> None:
    copies = [rest for name, rest in instructions() if name == "COPY" and "--from=bake" in rest]
    assert copies == [f"--link --from=bake /layers/{number:02} /" for number in range(16)]
    assert ("ENV", "HF_HUB_OFFLINE=1") in instructions()[-1:]


def test_the_bake_stage_keeps_cache_and_token_out_of_the_image() -> None:
    mounts = re.findall(r"--mount=(\S+)", bake_step())
    assert mounts == ["type=cache,id=fp8-convert,target=/cache,sharing=locked", "type=secret,id=hf_token"]
    assert not re.search(r"(?i)token", str(defaults()))


def test_its_torch_is_the_one_that_is_tested() -> None:
    (pinned,) = re.findall(r"(?m)^torch==([\d.]+)", (ROOT / "constraints.txt").read_text())
    assert defaults()["TORCH"] == pinned


def test_the_build_context_has_what_the_dockerfile_copies() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for path in ("docker", "converter", "loader", "manifests", "fp8_convert", "pyproject.toml", "LICENSE", "README.md"):
        assert (ROOT / path).exists()
        assert not [pattern for pattern in ignored if fnmatch.fnmatch(path, pattern)]
