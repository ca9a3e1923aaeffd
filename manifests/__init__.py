"""Manifests: which weights of a model family become FP8, and why."""
