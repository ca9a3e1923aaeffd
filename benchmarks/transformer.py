"""Diffusion transformers of the published sizes in BF16, W8A8 and as other tools make them, on one CUDA device.

    python benchmarks/transformer.py [--json FILE] [--cases NAME...] [--only ours] [--quick]
    python benchmarks/transformer.py --profile CASE

The real classes with random weights, one forward (a denoising step without guidance) at the models' token counts,
layers as the shipped manifests choose them. Milliseconds are medians; "compiled" is `compile_repeated_blocks()`,
"recorded" is `cuda_graphs=True`, of BF16's blocks too, "both" is compiled and recorded. The realised saving is the
share of what FP8 products save over BF16 ones that arrives in the whole: (T_bf16 - T_fp8) / (products_bf16 -
products_fp8). `busy` is the sum of the kernels' times in one profiled eager forward, without the gaps between them.
`resident` is GPU memory before a forward, `peak` the most during an eager one.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from gpu_models import decisions, linears_of, make_fp8, random_model
from linear import gemm_times
from recording import Recording
from timing import DEVICE, kernel_times, limited, median, peak_gigabytes
from torch import Tensor, nn

from fp8_convert.loader.cuda_graphs import record_blocks, recorded_blocks

Product = tuple[int, int, int]  # tokens, K, N
RECORDED = ("both", "recorded")  # modes of BF16 and ours, in which CUDA graphs of the blocks are replayed
LIMIT = 180  # seconds for one form of a model, compiling included
FAMILIES = {  # of kernels, by the first pattern that their names match
    "attention": r"flash|fmha|attention|sdpa",
    "quantise": r"^_(rows|groups|static|dequantize_tensor|dequantize_block)$",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|_few_tokens|_one_token|_mm",
    "compiled": r"^triton_",
}


@dataclass(frozen=True)
class Case:
    """A model, what it is run on, and the rules by which it becomes FP8: what they are called to (manifest, --compact).

    The last rule without `compact` is the one whose layers other tools are given.
    """

    class_name: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    rules: Mapping[str, tuple[str, bool]]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=torch.Generator(DEVICE).manual_seed(1))


def qwen_inputs(edge: int = 64, text: int = 256) -> dict[str, Any]:
    """4096 image and 256 text tokens, or edge * edge and others."""
    return {
        "hidden_states": normal(1, edge * edge, 64),
        "encoder_hidden_states": normal(1, text, 3584),
        "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.int64, device=DEVICE),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16, device=DEVICE),
        "img_shapes": [[(1, edge, edge)]],
    }


def small_qwen_inputs() -> dict[str, Any]:
    """512x512 pixels, 1024 tokens, and 64 of text."""
    return qwen_inputs(32, 64)


def z_image_inputs() -> dict[str, Any]:
    """1024x1024 pixels, 4096 tokens, and 160 of text."""
    return {
        "x": [normal(16, 1, 128, 128)],
        "t": torch.tensor([0.5], dtype=torch.bfloat16, device=DEVICE),
        "cap_feats": [normal(160, 2560)],
    }


def wan_inputs() -> dict[str, Any]:
    """81 frames of 832x480: 32,760 tokens; 512 of text."""
    return {
        "hidden_states": normal(1, 16, 21, 60, 104),
        "encoder_hidden_states": normal(1, 512, 4096),
        "timestep": torch.tensor([500], device=DEVICE),
    }


QWEN_RULES = {
    "default": ("qwen-image", False),
    "--compact": ("qwen-image", True),
    "all but modulation": ("qwen-image-edit", False),
}
WAN = {"num_attention_heads": 40, "ffn_dim": 13824}
CASES = {
    "qwen-4": Case("QwenImageTransformer2DModel", {"num_layers": 4}, qwen_inputs, QWEN_RULES),
    "qwen-4-small": Case(
        "QwenImageTransformer2DModel", {"num_layers": 4}, small_qwen_inputs, {"default": ("qwen-image", False)}
    ),
    "qwen-60": Case("QwenImageTransformer2DModel", {"num_layers": 60}, qwen_inputs, QWEN_RULES),
    "z-image": Case("ZImageTransformer2DModel", {}, z_image_inputs, {"default": ("z-image", False)}),
    "wan-1": Case("WanTransformer3DModel", {**WAN, "num_layers": 1}, wan_inputs, {"default": ("wan2.2", False)}),
    "wan": Case("WanTransformer3DModel", {**WAN, "num_layers": 40}, wan_inputs, {"default": ("wan2.2", False)}),
}


class Bench:
    """One case, measured: BF16 first, which the others are held against."""

    def __init__(self, recording: Recording, name: str, budget_ms: int, compiled_peers: bool) -> None:
        self.recording, self.name, self.case = recording, name, CASES[name]
        self.budget_ms, self.compiled_peers = budget_ms, compiled_peers
        self.inputs = self.case.inputs()
        self.bf16: dict[str, float] = {}
        self.expected: Tensor | None = None
        self.products: dict[str, Product] = {}
        self._saving: dict[Product, float] = {}

    def run(self, only_ours: bool) -> None:
        model = self.build()
        self.expected = self.output(model)
        self.products = products_of(model, self.output)
        self.measure("bf16", model)
        del model
        for rule in self.case.rules:
            with self.recording.failing(case=self.name, what="ours", rule=rule):
                self.ours(rule)
        if only_ours:
            return
        names = self.names([rule for rule, (_, compact) in self.case.rules.items() if not compact][-1])
        self.peer("layerwise casting", peers.layerwise, compiled=False)
        for what, convert in {"torchao": peers.torchao, "SDNQ": peers.sdnq}.items():
            self.peer(what, lambda model, convert=convert: convert(model, names), compiled=self.compiled_peers)

    def build(self) -> Any:
        return random_model("diffusers", self.case.class_name, self.case.config)

    def form(self, rule: str | None) -> Any:
        """The model in FP8 by `rule`, in BF16 by none."""
        model = self.build()
        if rule is not None:
            make_fp8(model, self.decided(model, rule))
        return model

    def decided(self, model: nn.Module, rule: str) -> Any:
        manifest, compact = self.case.rules[rule]
        return decisions(model, manifest, "transformer", self.case.class_name, compact)

    def names(self, rule: str) -> set[str]:
        return linears_of(self.decided(self.build(), rule))

    def busy(self) -> None:
        """Add `busy_ms` to the eager rows of BF16 and ours; last, since a profile slows what is timed after it."""
        for rule in (None, *self.case.rules):
            row = {"case": self.name, "what": "bf16" if rule is None else "ours", **({"rule": rule} if rule else {})}
            with self.recording.failing(**row), limited(LIMIT):
                model = self.form(rule)
                self.output(model)
                times = kernel_times(lambda model=model: self.output(model))
                self.recording.complete({**row, "mode": "eager"}, busy_ms=sum(times.values()))
                del model

    def ours(self, rule: str) -> None:
        model = self.build()
        decided = self.decided(model, rule)
        make_fp8(model, decided)
        called = [self.products[name] for name in linears_of(decided) if name in self.products]
        saving = sum(self.saving(product) for product in called)
        self.measure("ours", model, rule=rule, saving_ms=saving)

    def peer(self, what: str, convert: Callable[[Any], None], compiled: bool) -> None:
        with self.recording.failing(case=self.name, what=what):
            with limited(LIMIT):
                model = self.build()
                convert(model)
            self.measure(what, model, compiled=compiled)

    def output(self, model: Any) -> Tensor:
        found = model(**self.inputs).sample
        return found[0] if isinstance(found, list) else found

    def measure(self, what: str, model: Any, compiled: bool = True, **row: Any) -> None:
        """Add a row for each mode; other tools are not recorded."""
        from torch._dynamo.utils import counters

        expected = self.expected
        assert expected is not None
        modes = ["eager", *(["compiled"] if compiled else [])]
        modes += RECORDED if what in ("bf16", "ours") else ()
        for mode in modes:  # in this order: what is recorded stays so
            named = {"case": self.name, "what": what, "mode": mode, **row}
            with self.recording.failing(**named), limited(LIMIT):
                if mode == "compiled":
                    torch._dynamo.reset()
                    counters.clear()
                    model.compile_repeated_blocks()
                if mode == "recorded":
                    uncompile(model)
                if mode in RECORDED:
                    record_blocks(model)
                    for _ in range(4):  # the third call replays
                        self.output(model)
                found: dict[str, Any] = {"ms": median(lambda: self.output(model), self.budget_ms)}
                if mode == "compiled":
                    found["graphs"] = counters["stats"]["unique_graphs"]
                    found["graph_breaks"] = sum(counters["graph_break"].values())
                if mode in RECORDED:
                    found["blocks"], found["with_recordings"], _ = recorded_blocks(model)
                if what == "bf16":
                    self.bf16[mode] = found["ms"]
                elif row.get("saving_ms") and mode in self.bf16:
                    found["realised"] = (self.bf16[mode] - found["ms"]) / row["saving_ms"]
                if mode == "eager":
                    torch.cuda.empty_cache()
                    found["resident_gb"] = torch.cuda.memory_allocated() / 1e9
                    found["peak_gb"] = peak_gigabytes(lambda: self.output(model))
                    error = (self.output(model) - expected).float().norm() / expected.float().norm()
                    found["relative_difference"] = float(error)
                self.recording.add(**named, **found)
        uncompile(model)

    def saving(self, product: Product) -> float:
        """Milliseconds that FP8 can take off one product."""
        if product not in self._saving:
            times = gemm_times(*product)
            self._saving[product] = times["bf16"] - min(times["gemm rows"], times["gemm tensor"])
        return self._saving[product]


def products_of(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Product]:
    """The (tokens, K, N) of every linear that `run` calls of the model."""
    seen: dict[str, Product] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, given: tuple[Tensor, ...]) -> None:
            seen[name] = given[0].numel() // given[0].shape[-1], module.in_features, module.out_features

        return hook

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


def uncompile(model: nn.Module) -> None:
    """Undo `compile_repeated_blocks`."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def family(kernel: str) -> str:
    name = kernel.lower()
    return next((label for label, pattern in FAMILIES.items() if re.search(pattern, name)), "other")


def print_profile(name: str, modes: Collection[str] = ("eager", "compiled")) -> None:
    """GPU milliseconds of one forward by family of kernels, then the longest kernels."""
    bench = Bench(Recording(None), name, 0, False)
    for rule in (None, *bench.case.rules):
        model = bench.form(rule)
        for mode in modes:
            if mode == "compiled":
                torch._dynamo.reset()
                model.compile_repeated_blocks()
            bench.output(model)
            bench.output(model)
            times = kernel_times(lambda model=model: bench.output(model))
            families: Counter[str] = Counter()
            for kernel, ms in times.items():
                families[family(kernel)] += ms
            print(f"\n{name}, {rule or 'BF16'}, {mode}: {sum(times.values()):.2f} ms of GPU time")
            print("  " + ", ".join(f"{label} {ms:.2f}" for label, ms in families.most_common()))
            for kernel, ms in times.most_common(12):
                print(f"  {ms:9.3f} {family(kernel):10} {kernel[:110]}", flush=True)
        uncompile(model)
        del model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all numbers there, after every row")
    parser.add_argument("--cases", nargs="+", default=["qwen-4", "z-image", "wan-1"], choices=list(CASES))
    parser.add_argument("--only", choices=["ours"], help="BF16 and ours, without the other tools")
    parser.add_argument("--quick", action="store_true", help="shorter medians, other tools in eager alone")
    parser.add_argument("--profile", choices=list(CASES), help="print where the GPU's time goes, and nothing else")
    arguments = parser.parse_args()
    if arguments.profile:
        print_profile(arguments.profile)
        return
    recording = Recording(arguments.json)
    measured = []
    for name in arguments.cases:
        with recording.failing(case=name):
            bench = Bench(recording, name, 200 if arguments.quick else 1000, not arguments.quick)
            bench.run(arguments.only == "ours")
            measured.append(bench)
    for bench in measured:
        bench.busy()


if __name__ == "__main__":
    main()
