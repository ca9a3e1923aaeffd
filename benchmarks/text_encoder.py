"""The text model of Qwen2.5-VL-7B, its linears in FP8 storage, against BF16 and other tools, on one CUDA device.

    python benchmarks/text_encoder.py [--json FILE] [--tokens 64 256 512 2048] [--only ours] [--layers 28]

Random weights of the published size, layers as Qwen-Image's manifest chooses them. Milliseconds of one forward are
medians; "compiled" compiles each decoder layer. `busy`, of BF16 and ours, is the sum of the kernels' times in a
profiled forward. Ratios are to BF16 in the same mode, `peak` is GPU memory of an eager forward.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from gpu_models import decisions, make_fp8, random_model
from recording import Recording
from timing import DEVICE, kernel_times, limited, median, peak_gigabytes

CONFIG = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
LIMIT = 180  # seconds for one form of the model
OURS = ("bf16", "ours")  # BF16 first, which the others are held against


def stored(model: Any) -> dict[str, Any]:
    return decisions(model, "qwen-image", "text_encoder", "Qwen2_5_VLForConditionalGeneration")


FORMS: dict[str, Callable[[Any], None]] = {
    "bf16": lambda model: None,
    "ours": lambda model: make_fp8(model, stored(model)),
    "layerwise casting": peers.layerwise,
    "torchao": lambda model: peers.torchao_storage(model, set(stored(model))),
    "SDNQ": lambda model: peers.sdnq(model, set(stored(model)), multiply=False),
}


def forwards(model: Any, what: str, asked: Sequence[int]) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(mode, tokens, a forward of so many) of one form."""
    for mode in ("eager", "compiled"):
        if mode == "compiled" and what == "layerwise casting":
            continue  # its hooks break every graph
        for tokens in asked:
            torch._dynamo.reset()
            for layer in model.layers if mode == "compiled" else ():
                layer.compile(dynamic=False)
            ids = torch.randint(0, CONFIG["vocab_size"], (1, tokens), device=DEVICE)
            yield mode, tokens, partial(model, ids, use_cache=False)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all numbers there, after every row")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 512, 2048])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--only", choices=["ours"], help="BF16 and ours, without the other tools")
    arguments = parser.parse_args()
    recording = Recording(arguments.json)

    def build(what: str) -> Any:
        config = {**CONFIG, "num_hidden_layers": arguments.layers}
        model = random_model("transformers", "Qwen2_5_VLTextModel", config)
        FORMS[what](model)
        return model

    plain: dict[tuple[str, int], float] = {}
    for what in OURS if arguments.only else FORMS:
        with recording.failing(what=what), limited(LIMIT):
            model = build(what)
            resident = torch.cuda.memory_allocated() / 1e9
            for mode, tokens, run in forwards(model, what, arguments.tokens):
                ms = median(run)
                if what == "bf16":
                    plain[mode, tokens] = ms
                row = {"what": what, "mode": mode, "tokens": tokens, "ms": ms, "ratio": ms / plain[mode, tokens]}
                row["resident_gb"] = resident
                if mode == "eager":
                    row["peak_gb"] = peak_gigabytes(run)
                recording.add(**row)
            del model, run
    plain.clear()
    for what in OURS:
        with recording.failing(what=what), limited(LIMIT):
            model = build(what)
            for mode, tokens, run in forwards(model, what, arguments.tokens):
                run()
                ms = sum(kernel_times(run).values())
                if what == "bf16":
                    plain[mode, tokens] = ms
                row = {"what": what, "mode": mode, "tokens": tokens}
                recording.complete(row, busy_ms=ms, busy_ratio=ms / plain[mode, tokens])
            del model, run


if __name__ == "__main__":
    main()
