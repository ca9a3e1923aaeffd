"""Batches of one source, in one process and on Ray on this machine: seconds, and JSON with --json.

    python benchmarks/batch.py [--jobs 8] [--gigabytes 1.3] [--folder FOLDER] [--json FILE]

Each job converts the same source (`convert_source.py`), which is in the page cache, to an output of its own. Seconds
are those of the summary: starting Ray and its workers' imports included, this process's imports not.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from convert import machine, set_page_cache
from convert_source import make_source

from fp8_convert.converter import batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--gigabytes", type=float, default=1.3, help="of the Qwen-Image source")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fp8-convert-bench")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    options = parser.parse_args()
    source = make_source("bf16", options.folder, options.gigabytes)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    result: dict[str, Any] = {"machine": machine(), "source_bytes": size, "jobs": options.jobs, "runs": []}
    ways: list[tuple[str, dict[str, Any]]] = [("one process", {})]
    ways += [(f"Ray, CPUs a job: {cpus}", {"ray": True, "cpus_per_job": cpus}) for cpus in (1, 2)]
    for name, how in ways:
        set_page_cache(source, warm=True)
        outputs = options.folder / "batch"
        done = batch([{"source": source, "output": outputs / str(n)} for n in range(options.jobs)], **how)
        shutil.rmtree(outputs)
        assert done.counts == {"converted": options.jobs}
        rate = options.jobs * size / 1e9 / done.seconds
        result["runs"].append({"how": name, "seconds": done.seconds, "gb_per_s": rate})
        print(f"{name}: {done.seconds:.1f} s, {rate:.2f} GB/s")
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
