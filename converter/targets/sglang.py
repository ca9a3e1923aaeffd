"""SGLang's diffusion server: dotted-segment containment, unfused projections but for Z-Image, VAE in BF16.

Read from SGLang 0.5.23: `srt/layers/quantization/utils.py` (the skip rule), `multimodal_gen/runtime/models/dits/`
(modules and their prefixes) and `multimodal_gen/configs/models/dits/` (names of tensors). `tests/readers/sglang` runs
them, and `tests/converter/targets/recorded/sglang.json` is what they said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ..format.layout import Block
from ..snapshot.snapshot import Component
from .serving import Dit
from .target import Layer, Target

DITS: Mapping[str, Dit] = {
    "QwenImageTransformer2DModel": Dit(
        fp8=r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)|img_in|txt_in|proj_out",
        renames=((r"(.*\.(img|txt)_mod)\.1", r"\1"),),
    ),
    "ZImageTransformer2DModel": Dit(
        fp8=r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
        fused={"to_qkv": ("to_q", "to_k", "to_v"), "w13": ("w1", "w3")},
    ),
    "WanTransformer3DModel": Dit(
        fp8=r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|attn2\.add_[kv]_proj|ffn\.net\.(0\.proj|2))|proj_out",
        renames=(
            (r"(.*\.ffn)\.net\.0\.proj", r"\1.fc_in"),
            (r"(.*\.ffn)\.net\.2", r"\1.fc_out"),
            (r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.to_out"),
            (r"(blocks\.\d+)\.attn1\.(.*)", r"\1.\2"),
            (r"(.*\.to_out)\.0", r"\1"),
        ),
    ),
}
_FOUND_BY_MEMBERS = {"w13": ("w1", "w3")}
# Of the fused projections of Z-Image SGLang maps block scales alone, and of w1 and w3 no scales at all.
_BLOCKS = {"ZImageTransformer2DModel": (128, 128)}
_KEPT = {
    "ZImageTransformer2DModel": (
        ("re:.*\\.feed_forward\\.w[13]", "SGLang fuses w1 and w3 and finds no scales for the fused weight"),
    )
}


class Sglang(Target):
    name = "sglang"
    readers = "SGLang's diffusion server"

    def settings_problem(self, *, compact: bool, block: Block | None) -> str | None:
        if compact:
            return "SGLang runs every FP8 linear of a DiT in W8A8, which --compact is not for; drop it."
        if block is not None:
            return "The target sglang chooses the blocks that SGLang reads; drop --weight-block-size."
        return None

    def why_kept(self, component: Component, components: Sequence[Component]) -> str | None:
        if component.library != "diffusers":
            return "SGLang builds text encoders from classes of its own, which were not checked with FP8"
        if component.class_name in DITS or "Transformer" in (component.class_name or ""):
            return None  # of a DiT that is not known `problems` says so
        return "SGLang loads it with no FP8"

    def kept_layers(self, component: Component) -> Sequence[tuple[str, str]]:
        return _KEPT.get(component.class_name or "", ())

    def block(self, component: Component, block: Block | None) -> Block | None:
        return _BLOCKS.get(component.class_name or "")

    def ignored_layers(
        self, component: Component, kept: Iterable[str], components: Sequence[Component]
    ) -> Collection[str]:
        dit = DITS.get(component.class_name or "")
        return set(kept) if dit is None else dit.spellings(kept)

    def problems(self, component: Component, layers: Sequence[Layer], ignored: Collection[str]) -> Iterator[str]:
        dit = DITS.get(component.class_name or "")
        if dit is None:
            yield f"this target knows how SGLang runs {', '.join(DITS)}, and not {component.class_name}"
            return
        yield from dit.problems(layers, ignored, is_layer_skipped, "SGLang")


def is_layer_skipped(name: str, ignored: Collection[str]) -> bool:
    """SGLang's rule: a name is skipped if an entry's dotted segments stand somewhere in it, one after the other.

    Of the fused modules SGLang's DiTs tell their configs w13 alone: it is looked for by the names of its members, all
    of them or none (SGLang refuses some), and to_qkv by its own.
    """
    parent, _, last = name.rpartition(".")
    names = [f"{parent}.{member}" for member in _FOUND_BY_MEMBERS.get(last, (last,))] if parent else [name]
    return all(any(f".{entry}." in f".{each}." for entry in ignored) for each in names)
