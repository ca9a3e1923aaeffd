"""vLLM-Omni: one FP8 config for a DiT, exact names, its own VAE reader and, for Z-Image, its own text encoder.

Read from vLLM-Omni 0.30 and vLLM 0.30: `diffusion/models/*/`, `diffusion/models/utils.py` and
`model_executor/layers/quantization/{fp8.py,utils/quant_utils.py}`. `tests/readers/vllm_omni` runs them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ..format.layout import WEIGHT, Block
from ..snapshot.snapshot import Component
from .serving import Dit
from .target import Layer, Target

_DITS: Mapping[str, Dit] = {
    "QwenImageTransformer2DModel": Dit(
        fp8=r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2))",
        fused={"to_qkv": ("to_q", "to_k", "to_v"), "add_kv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")},
    ),
    "ZImageTransformer2DModel": Dit(
        fp8=r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
        fused={"to_qkv": ("to_q", "to_k", "to_v"), "w13": ("w1", "w3")},
    ),
    "WanTransformer3DModel": Dit(
        fp8=r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|attn2\.add_[kv]_proj|ffn\.net\.(0\.proj|2))",
        renames=(
            (r"(.*\.ffn)\.net\.0\.proj", r"\1.net_0.proj"),
            (r"(.*\.ffn)\.net\.2", r"\1.net_2"),
            (r"(.*\.to_out)\.0", r"\1"),
        ),
        fused={"to_qkv": ("to_q", "to_k", "to_v")},
        fused_in=r".*\.attn1",
    ),
}
# Pipelines whose text encoder vLLM-Omni builds from its own linears, under the DiT's config, as a causal model.
_OWN_ENCODER = ("ZImageTransformer2DModel",)
_SECOND_DIT = "transformer_2"


class VllmOmni(Target):
    name = "vllm-omni"
    readers = "vLLM-Omni"

    def settings_problem(self, *, compact: bool, block: Block | None) -> str | None:
        if compact:
            return "vLLM-Omni runs every FP8 linear of a DiT in W8A8, which --compact is not for; drop it."
        if block is not None:
            return "vLLM-Omni was checked with one scale per tensor in the DiT alone; drop --weight-block-size."
        return None

    def why_kept(self, component: Component, components: Sequence[Component]) -> str | None:
        if component.class_name in _DITS:
            return None
        if component.library == "diffusers":
            if "Transformer" in (component.class_name or ""):
                return None  # a DiT: `problems` refuses it by name
            return "vLLM-Omni loads it through diffusers, which reads no FP8"
        if any(c.class_name in _OWN_ENCODER for c in components):
            return "vLLM-Omni builds it under the DiT's config, which has other scales"
        return None

    def block(self, component: Component, block: Block | None) -> Block | None:
        return None if component.library == "diffusers" else block

    def ignored_layers(
        self, component: Component, kept: Iterable[str], components: Sequence[Component]
    ) -> Collection[str]:
        dit = _DITS.get(component.class_name or "")
        if dit is None:
            return set(kept)
        names = dit.spellings(kept)
        if component.class_name in _OWN_ENCODER:
            names |= {name for c in components if c.library == "transformers" for name in _encoder_linears(c)}
        return names

    def snapshot_problem(self, components: Sequence[Component], converted: Collection[str]) -> str | None:
        if not any(c.library == "diffusers" for c in components):
            return "How vLLM-Omni reads a text encoder depends on the DiT beside it; convert the whole pipeline."
        for component in components:
            if component.class_name in _OWN_ENCODER and not any(c.library == "transformers" for c in components):
                return (
                    f"vLLM-Omni builds the text encoder beside {component.class_name} under the DiT's config, and it "
                    "is not here to be named there; convert the whole pipeline."
                )
            if component.name == _SECOND_DIT and component.name not in converted and "transformer" in converted:
                return (
                    f"vLLM-Omni with --quantization fp8 reads a {component.name} that is not FP8 under the config of "
                    f"transformer, and gives garbage; add --component {component.name}."
                )
        return None

    def notes(self, components: Sequence[Component]) -> Iterator[str]:
        if any(c.class_name in _OWN_ENCODER for c in components):
            for encoder in (c for c in components if c.library == "transformers"):
                if not all(re.match(r"(model|lm_head)\.", t.name) for t in encoder.tensors):
                    yield (
                        f"vLLM-Omni does not find the weights of {encoder.label}, converted or not: it wants them as "
                        "Qwen3ForCausalLM saves them, under model."
                    )

    def problems(self, component: Component, layers: Sequence[Layer], ignored: Collection[str]) -> Iterator[str]:
        dit = _DITS.get(component.class_name or "")
        if dit is not None:
            yield from dit.problems(layers, ignored, is_layer_skipped, "vLLM-Omni")
        elif component.library == "diffusers":
            yield f"this target knows how vLLM-Omni runs {', '.join(_DITS)}, and not {component.class_name}"


def is_layer_skipped(name: str, ignored: Collection[str]) -> bool:
    """vLLM's rule in vLLM-Omni: exact names. Which modules are fused is not bound there: their members name nothing."""
    return name in ignored


def _encoder_linears(component: Component) -> Iterator[str]:
    """The names of a text encoder's linears in the causal model that vLLM-Omni builds of it, its head included.

    Every 2-D weight counts: an embedding that is named too is never looked for.
    """
    for tensor in component.tensors:
        if tensor.name.endswith(WEIGHT) and len(tensor.shape) == 2:
            module = tensor.name.removesuffix(WEIGHT)
            yield module if re.match(r"(model|lm_head)\b", module) else f"model.{module}"
    yield "lm_head"
