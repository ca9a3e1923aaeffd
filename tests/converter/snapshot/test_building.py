"""Classes are built from configs alike for the converter and for the loader, and without memory for weights."""

import contextlib
import gc

import pytest
import torch
from diffusers import AutoencoderKL
from pipelines import saved

from fp8_convert.converter.snapshot.building import NoModelError, build_on_meta, default_dtype
from fp8_convert.converter.snapshot.describing import describe
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.snapshot.snapshot import Component


def component_of(name: str, part: str) -> Component:
    return next(c for c in describe(LocalFiles(saved(name))).components if c.name == part)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_converter_and_loader_see_the_same_modules(part: str) -> None:
    component = component_of("z_image", part)
    args = component.library, component.class_name, component.config
    converters, loaders = build_on_meta(*args), build_on_meta(*args, dtype=torch.bfloat16, buffers=True)
    assert {n: type(m) for n, m in converters.named_modules()} == {n: type(m) for n, m in loaders.named_modules()}
    assert {n: p.shape for n, p in converters.named_parameters()} == {n: p.shape for n, p in loaders.named_parameters()}
    assert all(t.is_meta for t in (*converters.parameters(), *converters.buffers(), *loaders.parameters()))
    assert not any(b.is_meta for b in loaders.buffers())


@pytest.mark.parametrize(
    ("library", "name", "clause"),
    [
        ("numpy", "ndarray", "no class of diffusers or transformers, library 'numpy'"),
        ("diffusers", None, "no class of diffusers or transformers"),
        ("diffusers", "ZImageTransformer9", r"^diffusers \S+ has no class ZImageTransformer9$"),
        ("transformers", "Qwen2Tokenizer", r"^Qwen2Tokenizer of transformers \S+ is no model$"),
        ("transformers", "logging", "is no model$"),
    ],
)
def test_what_is_no_model(library: str, name: str | None, clause: str) -> None:
    with pytest.raises(NoModelError, match=clause):
        build_on_meta(library, name, {})


def test_the_default_dtype_is_what_it_was() -> None:
    before = torch.get_default_dtype()
    with contextlib.suppress(ZeroDivisionError), default_dtype(torch.float64):
        assert torch.get_default_dtype() == torch.float64
        raise ZeroDivisionError
    assert torch.get_default_dtype() == before
    build_on_meta("diffusers", AutoencoderKL.__name__, {}, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == before


def test_garbage_is_collected_again_afterwards() -> None:
    with contextlib.suppress(NoModelError):
        build_on_meta("diffusers", "Unknown", {})
    assert gc.isenabled()
    gc.disable()
    try:
        build_on_meta("diffusers", AutoencoderKL.__name__, {})
        assert not gc.isenabled()  # as its caller had it
    finally:
        gc.enable()
