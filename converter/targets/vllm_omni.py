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

    def problems(
        self, component: Component, layers: Sequence[Layer], ignored: Collection[str], components: Sequence[Component]
    ) -> Iterator[str]:
        dit = _DITS.get(component.class_name or "")
        if dit is not None:
            yield from dit.problems(layers, ignored, is_layer_skipped, "vLLM-Omni")
            if component.class_name in _OWN_ENCODER and not any(c.library == "transformers" for c in components):
                yield (
                    f"vLLM-Omni builds the text encoder beside {component.class_name} under the same config, and it "
                    "is not here to be named in it; convert the whole pipeline"
                )
        elif component.library == "diffusers":
            yield f"this target knows how vLLM-Omni runs {', '.join(_DITS)}, and not {component.class_name}"


def is_layer_skipped(name: str, ignored: Collection[str], fused: Mapping[str, Sequence[str]]) -> bool:
    """vLLM's rule: exact names; a fused module by its own name, or by those of all its members.

    Raises ValueError where some members are named and others are not, which vLLM refuses.
    """
    parent, _, last = name.rpartition(".")
    if name in ignored or last not in fused:
        return name in ignored
    named = {f"{parent}.{member}" in ignored for member in fused[last]}
    if len(named) > 1:
        raise ValueError(name)
    return named.pop()


def _encoder_linears(component: Component) -> Iterator[str]:
    """The names of a text encoder's linears in the causal model that vLLM-Omni builds of it, its head included.

    Every 2-D weight counts: an embedding that is named too is never looked for.
    """
    for tensor in component.tensors:
        if tensor.name.endswith(WEIGHT) and len(tensor.shape) == 2:
            module = tensor.name.removesuffix(WEIGHT)
            yield module if re.match(r"(model|lm_head)\b", module) else f"model.{module}"
    yield "lm_head"
