"""FP8 checkpoints for diffusion pipelines: `fp8_convert.converter` makes them, `fp8_convert.loader` runs them."""
