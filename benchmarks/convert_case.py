"""One conversion in a process of its own, for `convert.py`: python convert_case.py '{"case": …}' prints one JSON line.

Imports are done before the clock starts and the memory baseline is taken. Runs under the Python of the tool that
it measures, so the other tools need not be installed beside this one.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERYTHING = Path(__file__).with_name("convert_everything.toml")
Run = Callable[[], Any]


def ours(source: Path, output: Path, *, block: list[int] | None, device: str, **options: Any) -> Run:
    """`convert`, with the model class that the plan needs imported beforehand."""
    import diffusers

    from fp8_convert.converter import convert

    getattr(diffusers, json.loads((source / "config.json").read_text())["_class_name"])
    if device == "cuda":
        import torch

        torch.zeros(1, device="cuda")

    def run() -> Any:
        return convert(source, output, manifest=str(EVERYTHING), weight_block_size=block, device=device, **options)

    return run


def limit(source: Path, output: Path, **options: Any) -> Run:
    """The same pipeline with the conversion off: same reads, hashes, copies and writes; no arithmetic."""
    import numpy as np

    from fp8_convert.converter.stream import measuring
    from fp8_convert.converter.stream import shard_stream as stream

    def no_codes(x: Any, scale: Any, out: Any = None, missed: Any = None) -> Any:
        return x.view(stream.torch.uint8).view(-1)[: x.numel()]

    def no_blocks(x: Any, block: tuple[int, int], out: Any = None, missed: Any = None) -> Any:
        rows, columns = (-(-size // edge) for size, edge in zip(x.shape, block, strict=True))
        return no_codes(x.view(-1), 1), np.ones((rows, columns), np.float32), True

    stream.amax = measuring.amax = lambda x: 1.0
    stream.quantize_tensor = no_codes
    stream.quantize_blocks = no_blocks
    return ours(source, output, **options)


def unmeasured(source: Path, output: Path, **options: Any) -> Run:
    """The same conversion without the errors of weights."""
    from fp8_convert.converter.output import run

    measured = run.begin_shards
    run.begin_shards = lambda *arguments, with_errors, **how: measured(*arguments, **how)
    return ours(source, output, **options)


def read_back(source: Path, output: Path, **options: Any) -> Run:
    """The same conversion, and everything that was written read from the disk again."""
    return ours(source, output, read_back=True, **options)


def naive(source: Path, output: Path, **_: Any) -> Run:
    """The script that everybody writes first."""
    import torch
    from safetensors.torch import load_file, save_file

    def run() -> None:
        output.mkdir()
        for shard in sorted(source.glob("*.safetensors")):
            tensors = load_file(shard)
            for name, weight in list(tensors.items()):
                if "blocks." in name and name.endswith(".weight") and weight.ndim == 2:
                    scale = weight.float().abs().max() / 448
                    tensors[name] = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                    tensors[name + "_scale"] = scale
            save_file(tensors, output / shard.name)

    return run


def llm_compressor(source: Path, output: Path, *, block: list[int] | None, device: str, **_: Any) -> Run:
    """llm-compressor's `model_free_ptq`, one shard at a time as by default."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import model_free_ptq

    weights = QuantizationArgs(
        num_bits=8, type="float", symmetric=True, strategy="block" if block else "tensor", block_structure=block
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return lambda: model_free_ptq(
        str(source), str(output), scheme, ignore=["re:^(?!.*blocks\\.)", "re:.*norm"], device=device
    )


def convert_to_quant(source: Path, output: Path, *, block: list[int] | None, device: str, **_: Any) -> Run:
    """convert_to_quant without its optimisation (`--simple`): its CLI takes one file, so one call for each shard."""
    from convert_to_quant.cli.main import main

    scaling = ["--scaling_mode", "block", "--block_size", str(block[0])] if block else []

    def run() -> None:
        output.mkdir()
        for shard in sorted(source.glob("*.safetensors")):
            options = ["--simple", "--comfy_quant", "--device", device, *scaling]
            sys.argv = ["convert_to_quant", "-i", str(shard), "-o", str(output / shard.name), *options]
            main()

    return run


CASES = {f.__name__: f for f in (ours, unmeasured, read_back, limit, naive, llm_compressor, convert_to_quant)}


def measure(run: Run) -> dict[str, float]:
    """Seconds, CPU seconds and bytes of peak memory of one call."""
    baseline = _peak()
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    run()
    seconds = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "user_cpu": used.ru_utime - cpu.ru_utime,
        "system_cpu": used.ru_stime - cpu.ru_stime,
        "peak_rss": _peak(),
        "peak_rss_over_imports": _peak() - baseline,
    }


def _peak() -> int:
    """VmHWM in bytes; unlike ru_maxrss it does not begin at the parent's size."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    arguments = json.loads(sys.argv[1])
    case = CASES[arguments.pop("case")]
    paths = {name: Path(arguments.pop(name)) for name in ("source", "output")}
    result_fd = os.dup(1)
    os.dup2(2, 1)  # tools print what they like; the result alone goes to stdout
    result = measure(case(**paths, **arguments))
    os.write(result_fd, json.dumps(result).encode() + b"\n")


if __name__ == "__main__":
    main()
