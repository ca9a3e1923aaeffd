"""Bytes and names on disk: the contract of an FP8 snapshot, safetensors headers, files taken with care."""
