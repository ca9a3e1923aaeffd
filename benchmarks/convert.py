"""Conversion against its limit and other tools, in one run: a table, and JSON with --json.

    python benchmarks/convert.py [--gigabytes 2] [--shards 1,2,4,8] [--peers FOLDER] [--json FILE]

The limit is the same pipeline with the conversion off: same reads, hashes, copies, writes and syncs.
Unmeasured is the conversion without the errors of weights, read_back the one that reads again what it wrote. Each runs
in a process of its own, cold (source dropped from the page cache) and warm, and its output is checked.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from convert_source import KINDS, make_source
from safetensors import safe_open

from fp8_convert.converter.stream import compiled as native

CASE = Path(__file__).with_name("convert_case.py")
SCHEMES: dict[str, list[int] | None] = {"tensor": None, "block": [128, 128]}
OURS = ("ours", "unmeasured", "read_back", "limit")
PEERS = ("llm_compressor", "convert_to_quant")
TOOLS = (*OURS, "naive", *PEERS)
MEASURES = (
    "seconds",
    "user_cpu",
    "system_cpu",
    "peak_rss",
    "peak_rss_over_imports",
    "source_cached",
    "output_cached",
)


@dataclass
class Case:
    """One row: what runs, on what; `runs` are its measurements. shards: under way at most, None is our own choice."""

    tool: str
    device: str
    source: str
    scheme: str
    cache: str
    shards: int | None = None
    runs: list[dict[str, float]] = field(default_factory=list)

    def median(self, measure: str) -> float:
        return statistics.median(run[measure] for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "median": {m: self.median(m) for m in MEASURES}}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every case of the run; other tools get the first source and cache only, for they are slow."""
    for source in options.sources:
        for scheme in options.schemes:
            for cache in options.caches:
                for device in options.devices:
                    for shards in options.shards:
                        for tool in options.tools:
                            if tool in OURS:
                                yield Case(tool, device, source, scheme, cache, shards)
                if (source, cache) != (options.sources[0], options.caches[0]):
                    continue
                if scheme == "tensor" and "naive" in options.tools:
                    yield Case("naive", "cpu", source, scheme, cache)
                for tool in PEERS:
                    if tool in options.tools and (_python(options, tool)).exists():
                        yield Case(tool, "cpu", source, scheme, cache)


def run(case: Case, source: Path, options: argparse.Namespace, outputs: dict[tuple[str, str], Any]) -> None:
    """Run a case once and check what it wrote. outputs: digests and sizes of ours so far, by source and scheme."""
    output = options.folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    set_page_cache(source, warm=case.cache == "warm")
    arguments: dict[str, Any] = {
        "case": case.tool,
        "source": str(source),
        "output": str(output),
        "block": SCHEMES[case.scheme],
        "device": case.device,
    }
    if case.tool in OURS:
        chosen = {"workers": options.workers, "shards": case.shards}
        arguments |= {name: value for name, value in chosen.items() if value is not None}
    child = subprocess.run(
        [str(_python(options, case.tool)), "-W", "ignore", str(CASE), json.dumps(arguments)],
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise SystemExit(f"{case.tool} failed:\n{child.stderr[-2000:]}")
    result = json.loads(child.stdout.splitlines()[-1])
    result["source_cached"] = cached_bytes(source)
    result["output_cached"] = cached_bytes(output)
    key = case.source, case.scheme
    sizes = {p.name: p.stat().st_size for p in output.glob("*.safetensors")}
    if case.tool in ("ours", "unmeasured", "read_back"):
        digests = {p.name: _sha256(p) for p in output.glob("*.safetensors")}
        if outputs.setdefault(key, (digests, sizes)) != (digests, sizes):
            raise SystemExit(f"{case} wrote other bytes than the run before")
    elif case.tool == "limit" and key in outputs and sizes != outputs[key][1]:
        raise SystemExit(f"{case} wrote other sizes than the conversion")
    if case.tool != "limit":
        check_codes(source, output, case.scheme)
    case.runs.append(result)
    shutil.rmtree(output)


def set_page_cache(folder: Path, *, warm: bool) -> None:
    """Put the folder's files into the page cache, or out of it."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED if warm else os.POSIX_FADV_DONTNEED)
            while warm and file.read(2**24):
                pass


def cached_bytes(folder: Path) -> float:
    """Bytes of the folder's files in the page cache."""
    return float(sum(_resident(path) for path in folder.rglob("*") if path.is_file() and path.stat().st_size))


def _resident(path: Path) -> int:
    """Bytes of a file's resident pages, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
        pages = (ctypes.c_ubyte * -(-len(m) // mmap.PAGESIZE))()
        view = ctypes.c_char.from_buffer(m)
        failed = libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(m)), pages)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return mmap.PAGESIZE * sum(page & 1 for page in pages)


def check_codes(source: Path, output: Path, scheme: str) -> None:
    """Every weight of the blocks is FP8, and the first one, times the best scale, is near the source."""
    checked = 0
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as before, safe_open(output / path.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118 - a safe_open is no mapping
                shape = before.get_slice(name).get_shape()
                if "blocks." not in name or not name.endswith(".weight") or len(shape) != 2:
                    continue
                if after.get_slice(name).get_dtype() != "F8_E4M3":
                    raise SystemExit(f"{output}: {name} is no FP8")
                checked += 1
                if checked == 1:
                    w, q = (f.get_slice(name)[:128, :128].float() for f in (before, after))
                    error = (w - q * ((w * q).sum() / (q * q).sum())).norm() / w.norm()
                    if not error < 0.04:
                        raise SystemExit(f"{output}: the codes of {name} ({scheme}) are {error:.3f} off")
    if not checked:
        raise SystemExit(f"{source} has no weight to check")


def table(done: Sequence[Case], sizes: dict[str, int]) -> str:
    """The medians, as Markdown."""
    head = ["source", "scheme", "cache", "tool", "shards", "s", "limit / s", "GB/s", "user CPU s", "system CPU s"]
    head += ["peak RSS MiB", "over imports", "source cached MB", "output cached MB"]
    rows = [head, ["---"] * 4 + ["---:"] * (len(head) - 4)]

    def setting(c: Case) -> tuple[object, ...]:
        return c.device, c.source, c.scheme, c.cache, c.shards

    limits = {setting(c): c.median("seconds") for c in done if c.tool == "limit"}
    for c in done:
        limit = limits.get(setting(c))
        seconds = c.median("seconds")
        rows.append(
            [
                f"{c.source}, read twice" if c.source == "wan-fp32" else c.source,
                c.scheme,
                c.cache,
                f"{c.tool} {c.device}",
                f"{c.shards or ''}",
                f"{seconds:.2f}",
                f"{limit / seconds:.2f}" if limit else "",
                f"{sizes[c.source] / 1e9 / seconds:.2f}",
                f"{c.median('user_cpu'):.1f}",
                f"{c.median('system_cpu'):.1f}",
                f"{c.median('peak_rss') / 2**20:.0f}",
                f"{c.median('peak_rss_over_imports') / 2**20:.0f}",
                f"{c.median('source_cached') / 1e6:.0f}",
                f"{c.median('output_cached') / 1e6:.0f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _python(options: argparse.Namespace, tool: str) -> Path:
    return options.peers / tool / "bin" / "python" if tool in PEERS else Path(sys.executable)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(allowed: Sequence[str]) -> Any:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(allowed):
            raise argparse.ArgumentTypeError(f"choose from {', '.join(allowed)}")
        return chosen

    return names


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fp8-convert-bench")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of a Qwen-Image source")
    parser.add_argument("--sources", type=_names(list(KINDS)), default=["bf16", "fp16", "fp32", "wan-fp32"])
    parser.add_argument("--schemes", type=_names(list(SCHEMES)), default=list(SCHEMES))
    parser.add_argument("--caches", type=_names(["cold", "warm"]), default=["warm", "cold"])
    parser.add_argument("--tools", type=_names(TOOLS), default=list(TOOLS))
    parser.add_argument("--devices", type=_names(["cpu", "cuda"]), default=devices, help="for ours")
    parser.add_argument("--shards", type=_numbers, default=[None], help="under way, such as 1,2,4,8; ours by default")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder of the other tools' environments")
    parser.add_argument("--repeats", type=int, default=3, help="of ours and the limit; the slow ones run once")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--json", type=Path, help="write every measurement there")
    parser.add_argument("--plot", type=Path, help="write a PNG there (needs matplotlib)")
    options = parser.parse_args()
    for peer in PEERS:
        if peer in options.tools and not _python(options, peer).exists():
            print(f"{peer} is skipped: {_python(options, peer)} does not exist (see benchmarks/README.md)")
    sources = {kind: make_source(kind, options.folder, options.gigabytes) for kind in options.sources}
    sizes = {kind: sum(p.stat().st_size for p in path.glob("*.safetensors")) for kind, path in sources.items()}
    done = list(cases(options))
    outputs: dict[tuple[str, str], Any] = {}
    result: dict[str, Any] = {"machine": machine(), "source_bytes": sizes}
    for repeat in range(options.repeats):  # ours and the limit take turns, so that a slow minute hits both
        for case in done:
            if repeat == 0 or case.tool in OURS:
                run(case, sources[case.source], options, outputs)
                which = f"{case.tool} {case.device}" + (f", {case.shards} shards" if case.shards else "")
                print(f"{repeat + 1}/{options.repeats} {case.source} {case.scheme} {case.cache} {which}: "
                      f"{case.runs[-1]['seconds']:.2f} s", file=sys.stderr)  # fmt: skip
                result["cases"] = [c.to_json() for c in done if c.runs]
                if options.json:  # after every case: a run that is cut short keeps what it measured
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(done, sizes))
    if options.plot:
        from plot import plot_conversion

        plot_conversion(result, options.plot)


def machine() -> dict[str, Any]:
    found = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    found |= {"compiled": native.available()}
    return {**found, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else found


if __name__ == "__main__":
    main()
