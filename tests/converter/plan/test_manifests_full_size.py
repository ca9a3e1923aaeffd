"""Every shipped manifest against its models at their published size: what becomes FP8, what is kept, to the byte.

The models are built on the meta device and saved as sparse safetensors files (real headers, no data), so the plan
is the one that a user's `--dry-run` prints. What it decides stands in golden_manifests.json; after a deliberate
change
`PYTHONPATH=tests:. python tests/converter/plan/test_manifests_full_size.py`
writes that file anew, and the diff is to be reviewed.
"""

from __future__ import annotations

import functools
import inspect
import json
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8_convert.converter.conversion import plan_conversion
from fp8_convert.converter.plan.manifest import shipped
from fp8_convert.converter.plan.pattern import matches
from fp8_convert.converter.plan.plan import ComponentPlan, Plan
from fp8_convert.converter.plan.showing import rows
from fp8_convert.converter.snapshot.building import build_on_meta, quiet_libraries
from fp8_convert.converter.snapshot.naming import name_tensors
from fp8_convert.converter.tiny import image_vae

GOLDEN = Path(__file__).with_name("golden_manifests.json")
COMMAND = "PYTHONPATH=tests:. python tests/converter/plan/test_manifests_full_size.py"
REGENERATE = f"if the change is meant, run `{COMMAND}` and review the diff"

# Qwen2.5-VL as Qwen-Image publishes it, and as transformers saves it today. Qwen3 as Z-Image publishes it (a
# Qwen3ForCausalLM without head, loaded as Qwen3Model), and as Qwen3Model saves it.
PUBLISHED, NEWER = "published", "newer"
VARIANTS = ("plain", "compact")
_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d")


def _qwen_dit(**flags: bool) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(**flags)


def _z_image_dit() -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel()


def _wan_dit(**options: int) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**{"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824} | options)


def _dit(class_name: str, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, class_name)(**options)


def _qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_vl_text() -> Any:
    import transformers

    return transformers.Qwen2_5_VLTextModel(built(_qwen_vl).config.text_config)


def _qwen3_vl() -> Any:
    import transformers

    text = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def _mistral3() -> Any:
    """Mistral Small 3 with its vision tower, as FLUX.2-dev has it."""
    import transformers

    text = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    }
    vision = {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def _gemma3() -> Any:
    """Gemma 3 12B with its vision tower, as LTX-2 has it."""
    import transformers

    text = {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 262208,
    }
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision)
    )


def _clip(class_name: str, width: int, layers: int) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    return getattr(transformers, class_name)(config)


def _t5(**options: int) -> Any:
    """T5 XXL, or a smaller one."""
    import transformers

    xxl = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    config = transformers.T5Config(**xxl | options, d_kv=64, feed_forward_proj="gated-gelu")
    return transformers.T5EncoderModel(config)


def _siglip() -> Any:
    import transformers

    config = transformers.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384
    )
    return transformers.SiglipVisionModel(config)


def _ltx2_part(class_name: str) -> Any:
    from diffusers.pipelines import ltx2

    return getattr(ltx2, class_name)()


def _qwen3(class_name: str = "Qwen3Model") -> Any:
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    return getattr(transformers, class_name)(config)


def _umt5() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        d_model=4096,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        d_kv=64,
        feed_forward_proj="gated-gelu",
        vocab_size=256384,
    )
    return UMT5EncoderModel(config)


def _qwen_vae(**options: int) -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(**options)


def _wan_vae(**options: int) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**options)


def _z_image_vae() -> Any:
    return image_vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, sample_size=1024)


_QWEN_IMAGE = {"transformer": (_qwen_dit, {}), "text_encoder": (_qwen_vl, {}), "vae": (_qwen_vae, {})}
_LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}
_CLIP_L = (_clip, {"class_name": "CLIPTextModel", "width": 768, "layers": 12})
_PROJECTED_CLIP_L = (_clip, {"class_name": "CLIPTextModelWithProjection", "width": 768, "layers": 12})
_CLIP_G = (_clip, {"class_name": "CLIPTextModelWithProjection", "width": 1280, "layers": 32})
_BYT5 = (_t5, {"d_model": 1472, "d_ff": 3584, "num_layers": 12, "num_heads": 6, "vocab_size": 1510})
_FLUX1 = {"text_encoder": _CLIP_L, "text_encoder_2": (_t5, {}), "vae": (_z_image_vae, {})}
_FLUX2_VAE = {"vae": (_dit, {"class_name": "AutoencoderKLFlux2"})}
_SD3 = {
    "text_encoder": _PROJECTED_CLIP_L,
    "text_encoder_2": _CLIP_G,
    "text_encoder_3": (_t5, {}),
    "vae": (_z_image_vae, {}),
}
_HUNYUAN = {
    "transformer": (_dit, {"class_name": "HunyuanVideo15Transformer3DModel"}),
    "text_encoder": (_qwen_vl_text, {}),
    "text_encoder_2": _BYT5,
    "vae": (_dit, {"class_name": "AutoencoderKLHunyuanVideo15"}),
}
_LTX2 = {
    "text_encoder": (_gemma3, {}),
    "connectors": (_ltx2_part, {"class_name": "LTX2TextConnectors"}),
    "vae": (_dit, {"class_name": "AutoencoderKLLTX2Video"}),
    "audio_vae": (_dit, {"class_name": "AutoencoderKLLTX2Audio"}),
    "vocoder": (_ltx2_part, {"class_name": "LTX2Vocoder"}),
}
_LTX23_FLAGS = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn")


def _sized(class_name: str, **options: Any) -> dict[str, Any]:
    return {"transformer": (_dit, {"class_name": class_name, **options})}


# manifest, or manifest/model for further ones of the family: (pipeline class, {component: (constructor, arguments)})
MODELS: dict[str, tuple[str, dict[str, tuple[Any, dict[str, Any]]]]] = {
    "qwen-image": ("QwenImagePipeline", _QWEN_IMAGE),
    "qwen-image-edit": (
        "QwenImageEditPlusPipeline",
        {**_QWEN_IMAGE, "transformer": (_qwen_dit, {"zero_cond_t": True})},
    ),
    "qwen-image-layered": (
        "QwenImageLayeredPipeline",
        {**_QWEN_IMAGE, "transformer": (_qwen_dit, _LAYERED), "vae": (_qwen_vae, {"input_channels": 4})},
    ),
    "wan2.2": (
        "WanPipeline",
        {
            "transformer": (_wan_dit, {}),
            "transformer_2": (_wan_dit, {}),
            "text_encoder": (_umt5, {}),
            "vae": (_wan_vae, {}),
        },
    ),
    "z-image": (
        "ZImagePipeline",
        {"transformer": (_z_image_dit, {}), "text_encoder": (_qwen3, {}), "vae": (_z_image_vae, {})},
    ),
    "wan2.2/i2v-a14b": (
        "WanImageToVideoPipeline",
        {
            "transformer": (_wan_dit, {"in_channels": 36}),
            "transformer_2": (_wan_dit, {"in_channels": 36}),
            "text_encoder": (_umt5, {}),
            "vae": (_wan_vae, {}),
        },
    ),
    "wan2.2/ti2v-5b": (
        "WanPipeline",
        {
            "transformer": (
                _wan_dit,
                {
                    "in_channels": 48,
                    "out_channels": 48,
                    "num_layers": 30,
                    "num_attention_heads": 24,
                    "ffn_dim": 14336,
                },
            ),
            "text_encoder": (_umt5, {}),
            "vae": (_wan_vae, {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12}),
        },
    ),
    "qwen-image-2.1": (
        "QwenImage21Pipeline",
        {
            **_sized("QwenImage21Transformer2DModel"),
            "text_encoder": (_qwen3_vl, {}),
            "vae": (_dit, {"class_name": "AutoencoderKLQwenImage21"}),
        },
    ),
    "flux.1": ("FluxPipeline", {**_sized("FluxTransformer2DModel", guidance_embeds=True), **_FLUX1}),
    "flux.1/fill": (
        "FluxFillPipeline",
        {**_sized("FluxTransformer2DModel", guidance_embeds=True, in_channels=384, out_channels=64), **_FLUX1},
    ),
    "flux.2": (
        "Flux2Pipeline",
        {**_sized("Flux2Transformer2DModel"), "text_encoder": (_mistral3, {}), **_FLUX2_VAE},
    ),
    "flux.2/klein-4b": (
        "Flux2KleinPipeline",
        {
            **_sized(
                "Flux2Transformer2DModel",
                num_layers=5,
                num_single_layers=20,
                num_attention_heads=24,
                joint_attention_dim=7680,
                guidance_embeds=False,
            ),
            "text_encoder": (_qwen3, {"class_name": "Qwen3ForCausalLM"}),
            **_FLUX2_VAE,
        },
    ),
    "sd3.5": (
        "StableDiffusion3Pipeline",
        {
            **_sized(
                "SD3Transformer2DModel",
                num_layers=38,
                num_attention_heads=38,
                caption_projection_dim=2432,
                pos_embed_max_size=192,
                qk_norm="rms_norm",
            ),
            **_SD3,
        },
    ),
    "sd3.5/medium": (
        "StableDiffusion3Pipeline",
        {
            **_sized(
                "SD3Transformer2DModel",
                num_layers=24,
                num_attention_heads=24,
                caption_projection_dim=1536,
                pos_embed_max_size=384,
                qk_norm="rms_norm",
                dual_attention_layers=tuple(range(13)),
            ),
            **_SD3,
        },
    ),
    "hunyuanvideo-1.5": ("HunyuanVideo15Pipeline", _HUNYUAN),
    "hunyuanvideo-1.5/i2v": ("HunyuanVideo15ImageToVideoPipeline", {**_HUNYUAN, "image_encoder": (_siglip, {})}),
    "ltx-2": ("LTX2Pipeline", {**_sized("LTX2VideoTransformer3DModel"), **_LTX2}),
    "ltx-2/2.3": (
        "LTX2ImageToVideoPipeline",
        {
            **_sized("LTX2VideoTransformer3DModel", use_prompt_embeddings=False, **dict.fromkeys(_LTX23_FLAGS, True)),
            **_LTX2,
        },
    ),
}


def manifest_of(model: str) -> str:
    return model.partition("/")[0]


@functools.cache
def built(constructor: Any, arguments: tuple[tuple[str, Any], ...] = ()) -> Any:
    with torch.device("meta"), quiet_libraries():
        return constructor(**dict(arguments))


def model_of(model: str, component: str) -> Any:
    constructor, arguments = MODELS[model][1][component]
    return built(constructor, tuple(arguments.items()))


def fp8_replaced(class_name: str | None, config: Mapping[str, Any]) -> torch.nn.Module:
    """The model as transformers prepares it for FP8 weights on a GPU, on the meta device."""
    from transformers.quantizers import AutoHfQuantizer

    model = build_on_meta("transformers", class_name, config)
    quantizer = AutoHfQuantizer.from_config(dict(config["quantization_config"]), pre_quantized=True)
    quantizer.preprocess_model(model)
    return model


def published_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """{name in the model: name in the published checkpoint}."""
    if type(model).__name__ == "Qwen2_5_VLForConditionalGeneration":
        return {n: n.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for n in names}
    if type(model).__name__ == "Qwen3Model":
        return {n: f"model.{n}" for n in names}
    if type(model).__name__ == "CLIPTextModel":
        return {n: f"text_model.{n}" for n in names}
    if type(model).__name__ in ("Mistral3ForConditionalGeneration", "Gemma3ForConditionalGeneration"):
        return {n: _older_vision_language_name(n) for n in names}
    return {n: n for n in names}


def _older_vision_language_name(name: str) -> str:
    """As the checkpoints of Mistral 3 and Gemma 3 spell it, which are older than transformers' names of today."""
    for prefix, older in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(prefix):
            return older + name.removeprefix(prefix)
    return "language_model.lm_head" if name == "lm_head" else name


def save_sparse(model: Any, folder: Path, spelling: str) -> None:
    """config.json and a safetensors file that takes no space: BF16, but FP32 for Wan's DiTs, as they are published."""
    folder.mkdir(parents=True)
    name = type(model).__name__
    is_diffusers = type(model).__module__.startswith("diffusers.")
    if is_diffusers:
        model.save_config(folder)
    else:
        model.config.architectures = [name]
        model.config.save_pretrained(folder)
    dtype, size = ("F32", 4) if name == "WanTransformer3DModel" else ("BF16", 2)
    every, distinct = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_parameters())
    state = {k: v for k, v in model.state_dict().items() if k in distinct or k not in every}  # tied weights once
    names = published_names(model, state) if spelling == PUBLISHED else {n: n for n in state}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, value in state.items():
        start, end = end, end + value.numel() * size
        header[names[key]] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file = folder / ("diffusion_pytorch_model.safetensors" if is_diffusers else "model.safetensors")
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with open(file, "r+b") as opened:
        opened.truncate(8 + len(text) + end)


def save_pipeline(name_of_model: str, folder: Path, spelling: str) -> None:
    pipeline, components = MODELS[name_of_model]
    index: dict[str, Any] = {"_class_name": pipeline}
    for name in components:
        model = model_of(name_of_model, name)
        save_sparse(model, folder / name, spelling)
        index[name] = [type(model).__module__.partition(".")[0], type(model).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


class Plans:
    """Plans by model, spelling and --compact, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plans: dict[tuple[str, str, bool], Plan] = {}

    def get(self, model: str, spelling: str = PUBLISHED, compact: bool = False) -> Plan:
        key = model, spelling, compact
        if key not in self._plans:
            folder = self._folder / f"{model.replace('/', '-')}-{spelling}"
            if not folder.exists():
                save_pipeline(model, folder, spelling)
            self._plans[key] = plan_conversion(folder, compact=compact)
        return self._plans[key]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return Plans(tmp_path_factory.mktemp("full-size"))


def summary(plan: Plan) -> dict[str, Any]:
    """What the golden file holds of one plan."""
    return {c.source.name: _component_summary(c) for c in plan.components}


def _component_summary(component: ComponentPlan) -> dict[str, Any]:
    sums: dict[str, list[int]] = {}
    decisions = []
    for row in rows(component):
        numbers = [row.count, row.params, row.bytes_before, row.bytes_after]
        decision = " ".join(filter(None, (row.mode or "kept", row.scheme)))
        sums[decision] = [a + b for a, b in zip(sums.get(decision, [0, 0, 0, 0]), numbers, strict=True)]
        decisions.append([decision, row.kind or "-", row.rule, *numbers])
    before, after = component.weight_bytes
    config = (component.config or {}).get("quantization_config", {})
    return {
        "class": component.source.class_name,
        "params": sum(t.numel for t in component.source.tensors),
        "bytes": [before, after],
        "quant_method": config.get("quant_method"),
        "ignored_layers": len(config.get("ignored_layers", ())),
        "sums": sums,
        "decisions": decisions,
    }


def golden_text(plans: Plans) -> str:
    """Every model, one decision a line: [decision, kind, rule, tensors, parameters, bytes before, after]."""
    data = {m: {v: summary(plans.get(m, compact=v == "compact")) for v in VARIANTS} for m in MODELS}
    return _one_list_a_line(data) + "\n"


def _one_list_a_line(value: Any, indent: str = "") -> str:
    if isinstance(value, dict):
        lines = [f"{indent} {json.dumps(k)}: {_one_list_a_line(v, indent + ' ')}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + ",\n".join(f"{indent} {json.dumps(line)}" for line in value) + f"\n{indent}]"
    return json.dumps(value)


each_plan = pytest.mark.parametrize(("model", "variant"), [(m, v) for m in MODELS for v in VARIANTS])


@each_plan
def test_decisions_are_the_golden_ones(plans: Plans, model: str, variant: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    plan = plans.get(model, compact=variant == "compact")
    assert plan.recipe.manifest.name == manifest_of(model), "chosen by the pipeline's and the components' classes"
    found = summary(plan)
    assert found.keys() == golden[model][variant].keys(), REGENERATE
    for component, expected in golden[model][variant].items():
        assert found[component] == expected, f"{model}, {component}: {REGENERATE}"


def test_the_golden_file_is_what_the_script_writes(plans: Plans) -> None:
    assert GOLDEN.read_text() == golden_text(plans), REGENERATE


@each_plan
def test_what_a_manifest_keeps_by_design_is_no_news(plans: Plans, model: str, variant: str) -> None:
    notes = plans.get(model, compact=variant == "compact").notes
    assert [n for n in notes if not n.startswith("--compact changes nothing here")] == []


@each_plan
def test_nothing_is_kept_by_accident(plans: Plans, model: str, variant: str) -> None:
    """Every linear and convolution of a converted component is FP8, or kept by a rule that was written for it."""
    for component in plans.get(model, compact=variant == "compact").components:
        if component.rules is None:
            continue
        assert component.problem is None
        written = {r.pattern for r in (*component.rules.never_layers, *component.rules.ignored_layers)}
        written |= {f"kind {kind}" for kind in {*_KINDS} - {*component.rules.kinds}}
        written.add("_keep_in_fp32_modules")
        for tensor in component.tensors:
            d = tensor.decision
            assert d.rule not in ("not eligible", "unknown module"), tensor.info.name
            if not d.fp8 and d.kind in _KINDS:
                assert d.rule in written, f"{tensor.info.name} is kept by {d.rule!r}"


# Parameters in millions: (component's, of which FP8 in the plain conversion, of which FP8 with --compact).
_TOTALS = {
    ("qwen-image", "transformer"): (20_430, 9_060, 20_384),
    ("qwen-image", "text_encoder"): (8_292, 6_525, 6_525),
    ("qwen-image", "vae"): (127, 126, 126),
    ("qwen-image-edit", "transformer"): (20_430, 13_590, 20_384),
    ("qwen-image-layered", "transformer"): (20_430, 13_590, 20_384),
    ("z-image", "transformer"): (6_155, 6_016, 6_142),
    ("z-image", "text_encoder"): (4_022, 3_633, 3_633),
    ("z-image", "vae"): (84, 0, 0),
    ("wan2.2", "transformer"): (14_288, 14_051, 14_051),
    ("wan2.2", "transformer_2"): (14_288, 14_051, 14_051),
    ("wan2.2", "text_encoder"): (5_681, 0, 0),
    ("wan2.2", "vae"): (127, 0, 0),
}


@pytest.mark.parametrize(("model", "component"), _TOTALS)
def test_totals_are_those_of_the_published_models(plans: Plans, model: str, component: str) -> None:
    found = []
    for compact in (False, True):
        plan = plans.get(model, compact=compact)
        planned = next(c for c in plan.components if c.source.name == component)
        found.append(round(sum(t.info.numel for t in planned.tensors if t.decision.fp8) / 1e6))
    params = round(sum(t.numel for t in planned.source.tensors) / 1e6)
    assert (params, *found) == _TOTALS[model, component]


def test_qwen_images_dit_shrinks_as_documented(plans: Plans) -> None:
    """40.9 GB to 31.8 GB where W8A8 must skip modulation and img_mlp, to half with their storage."""
    dits = [next(c for c in plans.get("qwen-image", compact=compact).components) for compact in (False, True)]
    gigabytes = [round(size / 1e9, 1) for size in (dits[0].weight_bytes[0], *(d.weight_bytes[1] for d in dits))]
    assert gigabytes == [40.9, 31.8, 20.5]


@each_plan
def test_bytes_follow_from_the_contract(plans: Plans, model: str, variant: str) -> None:
    """A code is one byte, a scale four for a tensor or a 128x128 block; what is kept keeps its size."""
    for component in plans.get(model, compact=variant == "compact").components:
        expected = 0
        for tensor in component.tensors:
            if not tensor.decision.fp8:
                expected += tensor.info.nbytes
            elif tensor.decision.scheme == "tensor":
                expected += tensor.info.numel + 4
            else:
                rows_, columns = tensor.info.shape
                assert tensor.decision.scheme == "block128x128"
                expected += rows_ * columns + 4 * -(-rows_ // 128) * -(-columns // 128)
        assert component.weight_bytes[1] == expected


@each_plan
def test_ignored_layers_are_all_linears_without_fp8(plans: Plans, model: str, variant: str) -> None:
    """Against the model itself: checkpoint names of its nn.Linear modules, less those that become FP8.

    A head that shares the embedding's weight has no name in the checkpoint: it is listed by the model's own.
    """
    for component in plans.get(model, compact=variant == "compact").components:
        if component.config is None:
            continue
        module = model_of(model, component.source.name)
        linears = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
        stored = {t.module for t in component.tensors}
        names = {new if new in stored else own for own, new in published_names(module, linears).items()}
        fp8 = {t.module for t in component.tensors if t.decision.fp8}
        assert component.config["quantization_config"]["ignored_layers"] == sorted(names - fp8)


# Those whose text encoder was published under other names than transformers gives it today.
_SPELLED = ["qwen-image", "qwen-image-edit", "qwen-image-layered", "z-image", "flux.1", "flux.2", "ltx-2"]
_ENCODERS = [(model, spelling) for model in _SPELLED for spelling in (PUBLISHED, NEWER)]
_ENCODERS += [(model, NEWER) for model in ("qwen-image-2.1", "sd3.5", "hunyuanvideo-1.5", "flux.2/klein-4b")]


@pytest.mark.parametrize("model", _SPELLED)
def test_both_spellings_of_a_text_encoder_decide_alike(plans: Plans, model: str) -> None:
    published, newer = (plans.get(model, spelling) for spelling in (PUBLISHED, NEWER))
    assert summary(published) == summary(newer)
    ours, theirs = (next(c for c in p.components if c.source.name == "text_encoder") for p in (published, newer))
    names = published_names(model_of(model, "text_encoder"), [t.info.name for t in theirs.tensors])
    assert {t.info.name: t.decision for t in ours.tensors} == {names[t.info.name]: t.decision for t in theirs.tensors}


@pytest.mark.parametrize(("model", "spelling"), _ENCODERS)
def test_transformers_expects_the_planned_text_encoder(plans: Plans, model: str, spelling: str) -> None:
    """transformers' own FP8 module replacement at full size: FP8 where we say so, and with our scales' shapes."""
    planned = next(c for c in plans.get(model, spelling).components if c.source.name == "text_encoder")
    assert planned.config is not None
    replaced = fp8_replaced(planned.source.class_name, planned.config)
    state = replaced.state_dict()
    names = name_tensors(replaced, [f"{t.module}.weight" for t in planned.tensors]).names
    module_names = {key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in names.items()}
    fp8 = {module_names[t.module] for t in planned.tensors if t.decision.fp8}
    assert {n for n, m in replaced.named_modules() if type(m).__name__ == "FP8Linear"} == fp8
    assert {n.removesuffix(".weight_scale_inv") for n in state if n.endswith(".weight_scale_inv")} == fp8
    for output in (o for shard in planned.shards for o in shard.schedule.outputs):
        module, _, last = output.name.rpartition(".")
        if last == "weight_scale_inv":
            assert tuple(state[f"{module_names[module]}.{last}"].shape) == output.shape, output.name


_GROUPS = {
    "qwen-image": {"transformer": {3: 120}},
    "qwen-image-edit": {"transformer": {3: 120}},
    "qwen-image-layered": {"transformer": {3: 120}},
    "z-image": {"transformer": {3: 34, 2: 34}},
    "wan2.2": {"transformer": {3: 40}, "transformer_2": {3: 40}},
    "wan2.2/i2v-a14b": {"transformer": {3: 40}, "transformer_2": {3: 40}},
    "wan2.2/ti2v-5b": {"transformer": {3: 30}},
    "qwen-image-2.1": {"transformer": {3: 32}},
    "flux.1": {"transformer": {3: 19 + 19 + 38}},
    "flux.1/fill": {"transformer": {3: 19 + 19 + 38}},
    "flux.2": {"transformer": {3: 8 + 8}},  # the single-stream blocks have one matrix for all
    "flux.2/klein-4b": {"transformer": {3: 5 + 5}},
    "sd3.5": {"transformer": {3: 38 + 38}},
    "sd3.5/medium": {"transformer": {3: 24 + 24 + 13}},
    "hunyuanvideo-1.5": {"transformer": {3: 54 + 54}},
    "hunyuanvideo-1.5/i2v": {"transformer": {3: 54 + 54}},
    "ltx-2": {"transformer": {3: 48 + 48}},
    "ltx-2/2.3": {"transformer": {3: 48 + 48}},
}


@pytest.mark.parametrize("model", MODELS)
def test_fusion_groups_are_whole_in_every_block(plans: Plans, model: str) -> None:
    """{component: {members: groups}}."""
    found = {}
    for component in plans.get(model).components:
        groups = Counter(t.decision.group for t in component.tensors if t.decision.group is not None)
        if groups:
            found[component.source.name] = dict(Counter(groups.values()))
    assert found == _GROUPS[model]


@pytest.mark.parametrize("manifest", sorted({manifest_of(model) for model in MODELS}))
def test_every_pattern_is_needed(plans: Plans, manifest: str) -> None:
    """Each pattern decides at least one weight of a class that the manifest names."""
    family = [model for model in MODELS if manifest_of(model) == manifest]
    plans_of_it = [plans.get(model, compact=compact) for model in family for compact in (False, True)]
    for rules in shipped()[manifest].components:
        if rules.mode == "keep":
            assert rules.why
            continue
        components = [c for plan in plans_of_it for c in plan.components if c.rules == rules]
        decisions = [t.decision for c in components for t in c.tensors]
        fp8 = {(d.mode, d.rule) for d in decisions if d.fp8}
        kept = {d.rule for d in decisions if not d.fp8}
        others = [n for class_name in rules.classes for n in _more_modules(class_name)]
        for rule in rules.eligible:
            assert (rules.mode, rule.pattern) in fp8, rule.pattern
        for rule in rules.storage_layers:
            assert ("storage", rule.pattern) in fp8, rule.pattern
        for rule in rules.ignored_layers:
            assert rule.pattern in kept, rule.pattern
        for rule in rules.never_layers:  # convolutions among them are kept by their kind already
            names = [
                t.module for c in components for t in c.tensors if t.decision.kind in ("Linear", "Conv2d", "Conv3d")
            ]
            assert any(matches(rule.pattern, name) for name in (*names, *others)), rule.pattern


def _more_modules(class_name: str) -> list[str]:
    """Modules of a class that a manifest names beside the pipeline's own, or that share a weight with others."""
    if class_name in ("Qwen3Model", "Qwen3ForCausalLM"):
        return [n for n, _ in built(_qwen3, (("class_name", class_name),)).named_modules()]
    return [n for n, _ in built(_gemma3).named_modules()] if class_name == "Gemma3ForConditionalGeneration" else []


# For default.toml: architectures of which each has names of its own, with one block of each kind.
_DITS: dict[str, dict[str, Any]] = {
    "AuraFlowTransformer2DModel": {},
    "ChromaTransformer2DModel": {},
    "ConsisIDTransformer3DModel": {"is_train_face": True},
    "CosmosTransformer3DModel": {"img_context_dim_in": 1152},
    "Flux2Transformer2DModel": {},
    "FluxTransformer2DModel": {},
    "Ideogram4Transformer2DModel": {},
    "JoyImageEditTransformer3DModel": {},
    "Kandinsky5Transformer3DModel": {},
    "Krea2Transformer2DModel": {},
    "LTX2VideoTransformer3DModel": {},
    "MiniMaxH3Transformer3DModel": {},
    "MiniMaxMusic3Transformer1DModel": {},
    "NucleusMoEImageTransformer2DModel": {"dense_moe_strategy": "all_moe"},
    "PRXTransformer2DModel": {},
    "QwenImage21Transformer2DModel": {},
    "QwenImageTransformer2DModel": {},
    "SanaWMTransformer3DModel": {},
    "WanAnimateTransformer3DModel": {"num_layers": 5},
    "ZImageTransformer2DModel": {},
}
_DEPTHS = ("num_layers", "n_layers", "num_single_layers", "num_mmdit_layers", "num_single_dit_layers")


@functools.cache
def _default_names() -> dict[str, list[str]]:
    """Module names under the default manifest's two entries."""
    import diffusers
    import transformers

    def small(model: Any) -> list[str]:
        return [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)]

    with torch.device("meta"), quiet_libraries():
        dits = []
        for name, options in _DITS.items():
            dit = getattr(diffusers, name)
            depths = {k: 1 for k in inspect.signature(dit.__init__).parameters if k in _DEPTHS}
            dits += small(build_on_meta("diffusers", name, depths | options))
        gemma = transformers.Gemma3Config(text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1})
        encoders = [
            transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(num_hidden_layers=1)),
            transformers.Gemma3ForConditionalGeneration(gemma),
            transformers.Qwen3_5TextModel(transformers.Qwen3_5TextConfig(num_hidden_layers=4)),
            transformers.T5EncoderModel(transformers.T5Config(num_layers=1)),
            transformers.UMT5EncoderModel(transformers.UMT5Config(num_layers=1)),
        ]
        texts = [n for encoder in encoders for n in small(encoder)]
    texts += small(built(_qwen_vl))
    return {"*transformer*": dits, "text_encoder*": texts}


@pytest.mark.parametrize("component", ["*transformer*", "text_encoder*"])
def test_every_pattern_of_the_default_manifest_matches_some_model(component: str) -> None:
    rules = next(r for r in shipped()["default"].components if r.component == component)
    names = _default_names()[component]
    for rule in (*rules.eligible, *rules.never_layers, *rules.ignored_layers, *rules.storage_layers):
        assert any(matches(rule.pattern, name) for name in names), rule.pattern
    for group in rules.fusion_groups:
        parents = {n.rpartition(".")[0] for n in names if matches(group.parent, n.rpartition(".")[0])}
        assert any({f"{parent}.{m}" for m in group.members} <= set(names) for parent in parents), group.parent


# A DiT's size in GB at its class's own configuration: as it is, converted by `default`, converted with --compact.
_BY_DEFAULT = {
    "CosmosTransformer3DModel": (14.5, 7.7, 7.3),
    "FluxTransformer2DModel": (23.8, 15.2, 12.0),
    "Ideogram4Transformer2DModel": (18.6, 9.9, 9.6),
    "Krea2Transformer2DModel": (25.6, 13.1, 13.1),
    "MiniMaxH3Transformer3DModel": (66.3, 46.2, 33.2),
    "MiniMaxMusic3Transformer1DModel": (4.86, 2.45, 2.45),
    "NucleusMoEImageTransformer2DModel": (45.4, 44.4, 44.0),  # 42.3 of them are experts
    "QwenImage21Transformer2DModel": (14.2, 7.3, 7.2),
    "WanAnimateTransformer3DModel": (30.3, 15.5, 15.5),
}


@pytest.mark.parametrize("class_name", _BY_DEFAULT)
def test_the_default_manifest_misses_no_large_part_of_other_families(tmp_path: Path, class_name: str) -> None:
    save_sparse(built(_dit, (("class_name", class_name),)), tmp_path / "dit", NEWER)
    plans = [plan_conversion(tmp_path / "dit", manifest="default", compact=compact) for compact in (False, True)]
    sizes = [plans[0].components[0].weight_bytes[0], *(p.components[0].weight_bytes[1] for p in plans)]
    assert sizes == pytest.approx([gigabytes * 1e9 for gigabytes in _BY_DEFAULT[class_name]], rel=0.02)
    notes = [note for note in plans[0].notes if " stay as they are" in note]
    assert len(notes) == (class_name == "NucleusMoEImageTransformer2DModel")
    assert all("experts (" in note and "which no FP8 layer holds yet" in note for note in notes)


def test_a_second_denoiser_of_any_name_is_converted(tmp_path: Path) -> None:
    """Ideogram 4 has an `unconditional_transformer` of the same class."""
    dit = built(_dit, (("class_name", "Ideogram4Transformer2DModel"),))
    index: dict[str, Any] = {"_class_name": "Ideogram4Pipeline"}
    for name in ("transformer", "unconditional_transformer"):
        save_sparse(dit, tmp_path / name, NEWER)
        index[name] = ["diffusers", "Ideogram4Transformer2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    plan = plan_conversion(tmp_path)
    assert plan.recipe.manifest.name == "default"
    first, second = ([t.decision for t in c.tensors] for c in plan.components)
    assert first == second
    assert plan.notes == ()


def test_every_manifest_has_its_models_here() -> None:
    assert {*map(manifest_of, MODELS), "default"} == set(shipped())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(golden_text(Plans(Path(temporary))))
