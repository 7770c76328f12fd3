"""Two of Ray's nodes on this machine, for all tests of tables on several machines."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "provided"))
sys.path.insert(0, str(Path(__file__).parent))
from nodes import COUNTS, TABLE, opened, processes_of, wait_until

# The least that Ray takes is 75 MB.
STORE_BYTES = 80 << 20


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Ray with two nodes, of a processor each."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path has 107 bytes at most
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TMPDIR": folder,
        "RAY_DEDUP_LOGS": "0",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        try:
            second = made.add_node(resources={"second": 4}, **{**node, "include_dashboard": None})
            ray.init(made.address, log_to_driver=False, logging_level="ERROR")
            first = made.head_node
            yield SimpleNamespace(
                made=made, address=made.address, node=node, first=first.node_id,
                second=second.node_id,
            )  # fmt: skip
        finally:
            ray.shutdown()
            made.shutdown()
            wait_until(lambda: not processes_of(folder), f"there are {processes_of(folder)}")
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of a table."""
    folder = tmp_path_factory.mktemp("parts")
    paths = []
    for number, rows in enumerate(np.split(TABLE, np.cumsum(COUNTS)[:-1])):
        paths.append(folder / f"part-{number}.npy")
        np.save(paths[-1], rows)
    return paths


@pytest.fixture(scope="session")
def table(cluster: Any, parts: list[Path]) -> Iterator[Any]:
    """A table for all tests that leave it as it is."""
    with opened(parts) as made:
        yield made


@pytest.fixture
def own_table(cluster: Any, parts: list[Path]) -> Iterator[Any]:
    """A table whose actors the test may kill."""
    with opened(parts) as made:
        yield made
