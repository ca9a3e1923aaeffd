"""Load FP8 snapshots into diffusers pipelines."""
