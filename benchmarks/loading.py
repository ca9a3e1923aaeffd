"""Loading at full size: a Qwen-Image transformer and a Qwen2.5-VL-7B text encoder with random weights.

    python benchmarks/loading.py --source /dev/shm/source --output /tmp/fp8 [--layers 60] [--device cuda]

Writes the BF16 snapshot to SOURCE and converts it to OUTPUT, if they are not there; then loads each component
from both, checks that codes, scales and everything else are equal bit for bit, runs it once, and prints
seconds, GB/s of file bytes, memory and `report`. The converted files are in the page cache when they are
read, as after any conversion.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from qwen_inputs import qwen_inputs
from torch import nn

from fp8_convert.converter import convert
from fp8_convert.converter.format.header import TensorInfo, encode_header
from fp8_convert.converter.format.layout import encode_json, index_name, shard_name
from fp8_convert.loader import load_component, report

SHARD_BYTES = 5 * 10**9
PLAIN_BYTES = 64 * 1024 * 1024


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


def prepare(source: Path, output: Path, layers: int, device: str) -> None:
    if not source.exists():
        started = time.monotonic()
        write_random(source / "transformer", *transformer(layers), "diffusion_pytorch_model")
        write_random(source / "text_encoder", *text_encoder(), "model")
        entries = {
            "_class_name": "QwenImagePipeline",
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        }
        (source / "model_index.json").write_text(json.dumps(entries))
        print(f"source written in {time.monotonic() - started:.1f} s", flush=True)
    if not output.exists():
        result = convert(source, output, device=device)
        print(f"converted in {result.seconds:.1f} s, {result.gigabytes_per_second:.2f} GB/s", flush=True)


def bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def plain_read(folder: Path) -> float:
    """Seconds to read the files once more, from the page cache, by one thread."""
    buffer = bytearray(PLAIN_BYTES)
    started = time.monotonic()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - started


def timed_load(folder: Path, part: str, device: str, **options: Any) -> nn.Module:
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    started = time.monotonic()
    model = load_component(folder, part, device=device, **options)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    size = bytes_of(folder / part)
    line = f"{part} from {folder.name}: {seconds:.2f} s, {size / 1e9 / seconds:.1f} GB/s of {size / 1e9:.2f} GB"
    if cuda:
        final = torch.cuda.memory_allocated() - before
        over = torch.cuda.max_memory_allocated() - before - final
        line += f"; GPU {final / 1e9:.2f} GB, at most {over / 2**20:.0f} MiB more while loading"
    print(line, flush=True)
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(v.dtype == b[k].dtype and torch.equal(v, b[k]) for k, v in a.items())


@torch.no_grad()
def run(part: str, model: nn.Module, device: str) -> None:
    with torch.device(device):
        if part == "text_encoder":
            inputs = {"input_ids": torch.randint(0, 150000, (1, 256)), "logits_to_keep": 1}
        else:
            inputs = qwen_inputs()
    for _ in range(2):
        started = time.monotonic()
        out = model(**inputs)[0]
        if device == "cuda":
            torch.cuda.synchronize()
    seconds = time.monotonic() - started
    print(f"{part} runs: {seconds * 1e3:.0f} ms, output finite: {bool(out.isfinite().all())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", default=["transformer", "text_encoder"])
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda":
        print(torch.cuda.get_device_name())
        torch.empty(1, device="cuda")
    prepare(arguments.source, arguments.output, arguments.layers, device)
    for part in arguments.parts:
        size, seconds = bytes_of(arguments.output / part), plain_read(arguments.output / part)
        print(f"plain read of {part}: {size / 1e9 / seconds:.1f} GB/s")
        model = timed_load(arguments.output, part, device)
        print(report(model))
        run(part, model, device)
        online = timed_load(arguments.source, part, device, quantization="fp8")
        print(f"{part}: both modes equal bit for bit: {equal(model, online)}", flush=True)
        del model, online


if __name__ == "__main__":
    main()
