"""Loading at full size, from files in memory: a Qwen-Image transformer and its text encoder with random weights.

    python benchmarks/load.py --folder /dev/shm/bench [--layers 30] [--parts transformer text_encoder] [--json FILE]

Writes a BF16 snapshot of each component below FOLDER and converts it, if they are not there: 36 GB for the transformer,
28 for the text encoder. Then it is loaded from both (the second way converts it), compared bit for bit, and held
against other readers of the same files: what these leave on the GPU is tensors, not a model. Seconds are medians of
`--repeats`, GB/s are of file bytes, `peak over final` is the GPU memory that loading took beyond what is left.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import Recording
from timing import limited
from torch import nn

from fp8_convert.converter import convert
from fp8_convert.converter.format.header import TensorInfo, encode_header
from fp8_convert.converter.format.layout import encode_json, index_name, shard_name
from fp8_convert.loader import load_component, report

SHARD_BYTES = 5 * 10**9
LIMIT = 120  # seconds for one way to load
PARTS = ("transformer", "text_encoder")
DIFFUSERS_STEM = "diffusion_pytorch_model"


def text_encoder() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                       "out_hidden_size": 3584},
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return model, {**config.to_dict(), "architectures": ["Qwen2_5_VLForConditionalGeneration"]}


def transformer(layers: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=layers)
    return model, json.loads(model.to_json_string())


def write_random(folder: Path, model: nn.Module, config: dict[str, Any], stem: str) -> None:
    """The module as BF16 safetensors shards with an index, its values cut from one block of random
    numbers.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    block = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    values = memoryview(block.view(torch.uint8).numpy().data)
    shards: list[list[tuple[str, torch.Size]]] = [[]]
    size = 0
    for name, tensor in model.named_parameters():
        if size + 2 * tensor.numel() > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor.shape))
        size += 2 * tensor.numel()
    index = {}
    for number, tensors in enumerate(shards, 1):
        infos, end = [], 0
        for name, shape in tensors:
            start, end = end, end + 2 * math.prod(shape)
            infos.append(TensorInfo(name, "BF16", tuple(shape), start, end))
        path = folder / shard_name(stem, number, len(shards))
        index |= dict.fromkeys((i.name for i in infos), path.name)
        with path.open("wb") as file:
            file.write(encode_header(infos, {"format": "pt"}))
            for i, info in enumerate(infos):
                left, offset = info.nbytes, 2 * ((7919 * i) % (1 << 25))
                while left:
                    count = min(left, len(values) - offset)
                    file.write(values[offset : offset + count])
                    left, offset = left - count, 0
    if len(shards) > 1:
        (folder / index_name(stem)).write_bytes(encode_json({"metadata": {}, "weight_map": index}))


def prepare(folder: Path, part: str, layers: int) -> tuple[Path, Path]:
    """The BF16 snapshot and the converted one of a component; a DiT of one block stands beside the text encoder."""
    source, fp8 = folder / "source", folder / "fp8"
    if not source.exists():
        started = time.monotonic()
        write_random(source / "transformer", *transformer(layers if part == "transformer" else 1), DIFFUSERS_STEM)
        entries = {"_class_name": "QwenImagePipeline", "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
        if part == "text_encoder":
            write_random(source / part, *text_encoder(), "model")
            entries[part] = ["transformers", "Qwen2_5_VLForConditionalGeneration"]
        (source / "model_index.json").write_text(json.dumps(entries))
        print(f"source written in {time.monotonic() - started:.1f} s", flush=True)
    if not fp8.exists():
        result = convert(source, fp8, device="cuda")
        print(f"converted in {result.seconds:.1f} s, {result.gigabytes_per_second:.2f} GB/s", flush=True)
    return source, fp8


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def with_load_file(folder: Path) -> Any:
    from safetensors.torch import load_file

    return [load_file(path, device="cuda") for path in files_of(folder)]


def with_safe_open(folder: Path) -> Any:
    from safetensors import safe_open

    tensors = {}
    for path in files_of(folder):
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors |= {key: file.get_tensor(key).to("cuda") for key in file.keys()}  # noqa: SIM118
    return tensors


def with_fastsafetensors(folder: Path) -> Any:
    from fastsafetensors import fastsafe_open

    files = [str(path) for path in files_of(folder)]
    with fastsafe_open(filenames=files, nogds=True, device="cuda:0") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def with_diffusers(folder: Path) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")


def with_transformers(folder: Path) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")


def measure(run: Callable[[], Any], size: int, repeats: int) -> tuple[dict[str, Any], Any]:
    """What loading `size` bytes takes, and what it gave the last time."""
    seconds, loaded = [], None
    for _ in range(repeats):
        loaded = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.monotonic()
        loaded = run()
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    final = torch.cuda.memory_allocated()
    middle = statistics.median(seconds)
    found = {
        "seconds": middle,
        "all_seconds": seconds,
        "gb_per_s": size / 1e9 / middle,
        "file_gb": size / 1e9,
        "gpu_gb": (final - before) / 1e9,
        "peak_over_final_mib": (torch.cuda.max_memory_allocated() - final) / 2**20,
    }
    return found, loaded


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(v.dtype == b[k].dtype and torch.equal(v, b[k]) for k, v in a.items())


def bench_part(recording: Recording, source: Path, fp8: Path, part: str, repeats: int, only_ours: bool) -> None:
    sizes = {folder: sum(p.stat().st_size for p in files_of(folder / part)) for folder in (source, fp8)}
    found, model = measure(lambda: load_component(fp8, part, device="cuda"), sizes[fp8], repeats)
    recording.add(part=part, what="load_component", file="fp8", ok=report(model).ok, **found)
    converting, online = measure(
        lambda: load_component(source, part, device="cuda", quantization="fp8"), sizes[source], repeats
    )
    recording.add(part=part, what="converting", file="bf16", equal=equal(model, online), **converting)
    del model, online
    readers: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "safetensors load_file": (fp8, with_load_file),
        "safetensors safe_open": (fp8, with_safe_open),
        "fastsafetensors": (fp8, with_fastsafetensors),
        "from_pretrained": (source, with_diffusers if part == "transformer" else with_transformers),
    }
    for what, (folder, read) in readers.items() if not only_ours else ():
        file = "fp8" if folder is fp8 else "bf16"
        with recording.failing(part=part, what=what, file=file), limited(LIMIT):
            found, _ = measure(lambda read=read, folder=folder: read(folder / part), sizes[folder], repeats)
            recording.add(part=part, what=what, file=file, **found)
            del _


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="on a disk in memory, such as /dev/shm/bench")
    parser.add_argument("--layers", type=int, default=30, help="of the transformer's 60")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all numbers there, after every row")
    parser.add_argument("--only", choices=["ours"], help="without the other readers")
    arguments = parser.parse_args()
    recording = Recording(arguments.json)
    torch.empty(1, device="cuda")
    for part in arguments.parts:
        folder = arguments.folder / (f"{part}-{arguments.layers}" if part == "transformer" else part)
        with recording.failing(part=part):
            source, fp8 = prepare(folder, part, arguments.layers)
            bench_part(recording, source, fp8, part, arguments.repeats, arguments.only == "ours")


if __name__ == "__main__":
    main()
