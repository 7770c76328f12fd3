"""The device's own limit: random reads by fio, past the page cache."""

import json
import shutil
import subprocess
from pathlib import Path

from fremap.bench.harness import BenchError

QUEUE_DEPTH = 32


def unavailable(path: Path) -> str | None:
    """Return why fio cannot measure the device under `path`, or None."""
    if shutil.which("fio") is None:
        return "fio is not installed: no figure for the device's own limit"
    try:
        random_read_seconds(path, 1, 4096)
    except BenchError as error:
        return f"{error}: no figure for the device's own limit"
    return None


def random_read_seconds(path: Path, page_count: int, page_bytes: int) -> float:
    """Time `page_count` random reads by fio at depth 32, with fresh offsets."""
    done = subprocess.run(
        [
            "fio", "--name=randread", f"--filename={path}", "--readonly", "--rw=randread",
            "--ioengine=io_uring", "--direct=1", f"--bs={page_bytes}", f"--iodepth={QUEUE_DEPTH}",
            "--randrepeat=0", f"--io_size={page_count * page_bytes}",
            "--output-format=json",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BenchError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    read = json.loads(done.stdout)["jobs"][0]["read"]
    return float(page_count / read["iops"])
