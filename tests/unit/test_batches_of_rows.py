"""Batches of real rows: in files, beside readers, in other processes, within bounded memory."""

import subprocess
import sys
from pathlib import Path

import fremap
import numpy as np
import pytest


def test_an_epoch_of_shards_is_all_their_rows(tmp_path: Path) -> None:
    files = []
    for number in range(20):
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], np.arange(number * 100, number * 100 + 100).reshape(50, 2))
    with fremap.rows(files) as rows:
        seen = np.concatenate(list(rows.batches(64, seed=2)))
        np.testing.assert_array_equal(np.sort(seen.ravel()), np.arange(2000))
        chosen = np.array([999, 0, -1])
        (batch,) = rows.batches(8, chosen)
        np.testing.assert_array_equal(batch, rows.take(chosen))


def test_a_file_cut_short_is_an_exception_at_its_batch(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    np.arange(1 << 16, dtype=np.int64).tofile(path)
    with fremap.rows(path, np.int64, 512) as rows, rows.batches(16, "sequential") as batches:
        next(batches)
        with path.open("r+b") as file:
            file.truncate(100 * 4096)
        with pytest.raises(fremap.TruncatedError) as raised:
            for _ in batches:
                pass
        assert batches.state()["next_batch"] == 100 // 16
        assert raised.value.filename == str(path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_other_processes(method: str) -> None:
    script = Path(__file__).with_name("batches_in_workers.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", script, method],
        capture_output=True, text=True, timeout=85, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 0 0 0 {0}\n"


EPOCH = """
import sys, fremap, numpy as np
from pathlib import Path

def rss():
    fields = Path("/proc/self/status").read_text()
    return sum(int(fields.split(name + ":")[1].split()[0]) for name in ("VmRSS", "VmPTE")) / 1024

files = sorted(map(str, Path(sys.argv[1]).iterdir()))
budget = 32 << 20
with fremap.rows(files, np.uint8, 4096, budget=budget) as rows:
    # What is in the page cache is mapped, up to the budget: before the epoch, so that
    # memory has no more reason to grow.
    for _ in range(40):
        rows.take(range(2 * budget // 4096))
    assert rows.stats().mapped_bytes >= budget // 4
    with rows.batches(256, seed=1, return_ids=True) as batches:
        sizes, seen, last = [], np.zeros(len(rows), bool), int(rows.shard_rows[0]) - 1
        for ids, batch in batches:
            assert not seen[ids].any()
            seen[ids] = True
            # Each shard ends with its number, and is a hole before that.
            whole = batch[:, -8:].copy().view(np.int64)[:, 0]
            assert (whole == np.where(ids % (last + 1) == last, ids // (last + 1) + 1, 0)).all()
            sizes.append(rss())
        assert seen.all()
settled = sizes[len(sizes) // 10 :]  # the batches that are read ahead have their memory by then
print(max(settled) / min(settled), min(settled), max(settled), len(files), len(seen))
"""


def sparse_shards(folder: Path, count: int, shard_bytes: int) -> None:
    for number in range(count):
        with (folder / f"{number:04d}").open("wb") as file:
            file.truncate(shard_bytes)
            file.seek(shard_bytes - 8)
            file.write((number + 1).to_bytes(8, "little"))


@pytest.mark.any_user
@pytest.mark.slow
@pytest.mark.parametrize(
    "shard_bytes", [1 << 20, pytest.param(35 << 20, marks=[pytest.mark.long], id="20 GiB")]
)
def test_memory_is_flat_through_an_epoch_over_600_shards(tmp_path: Path, shard_bytes: int) -> None:
    sparse_shards(tmp_path, 600, shard_bytes)
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ratio, _, _, files, rows = map(float, done.stdout.split())
    assert (files, rows) == (600, 600 * shard_bytes // 4096)
    assert ratio <= 1.1, done.stdout
