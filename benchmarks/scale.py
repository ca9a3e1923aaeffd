"""What converting a catalogue takes, from the measured rates of one machine: the tables of docs/scale.md.

    python benchmarks/scale.py

CPU seconds a GB are those of `results/convert-2-cores.json` (BF16, per tensor, cold; user and system, everything hashed
and read back), bytes those of the DiTs at their published sizes.
"""

import json
from pathlib import Path

from tables import table

RESULT = Path(__file__).parent / "results" / "convert-2-cores.json"
CATALOGUE = 10_000
LINK_GB_PER_S = 1.25  # 10 Gbit/s, in each direction
MODELS = {  # GB of weights before and after
    "Qwen-Image's DiT": (40.9, 31.9),
    "Qwen-Image's DiT, `--compact`": (40.9, 20.6),
    "Z-Image's DiT": (12.5, 6.4),
    "Wan2.2's two DiTs": (57.6, 29.4),
}


def cpu_seconds_per_gb() -> float:
    cases = json.loads(RESULT.read_text())
    (case,) = [
        case["median"]
        for case in cases["cases"]
        if [case[key] for key in ("tool", "source", "scheme", "cache")] == ["ours", "bf16", "tensor", "cold"]
    ]
    return float((case["user_cpu"] + case["system_cpu"]) / cases["source_bytes"]["bf16"] * 1e9)


def catalogue() -> str:
    rows = []
    for name, (before, after) in MODELS.items():
        read, written = before * CATALOGUE, after * CATALOGUE
        cores = read * cpu_seconds_per_gb() / 3600
        link = max(read, written) / LINK_GB_PER_S / 3600
        rows.append([name, f"{read / 1e3:.0f}", f"{written / 1e3:.0f}", f"{cores:.0f}", f"{link:.0f}"])
    return table(["10,000 fine-tunes of", "TB read", "TB written", "core hours", "hours of one 10 Gbit/s link"], rows)


if __name__ == "__main__":
    print(f"{cpu_seconds_per_gb():.2f} CPU seconds a GB")
    print(f"{LINK_GB_PER_S * cpu_seconds_per_gb():.1f} cores keep up with {LINK_GB_PER_S} GB/s")
    print(catalogue())
