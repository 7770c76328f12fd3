"""`fremap.torch.RowEmbedding`: what a layer of a model gives for ids, on the CPU."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
import safetensors.numpy
from fremap.errors import ArgumentError, ArgumentTypeError, PageRangeError, TruncatedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.needs("torch")

TABLE = np.random.default_rng(3).standard_normal((200, 12)).astype(np.float32)
IDS = [[3, 199, 3], [0, 3, 120]]


@pytest.fixture
def rows(tmp_path: Path) -> fremap.Rows:
    np.save(tmp_path / "rows.npy", TABLE)
    return fremap.rows(tmp_path / "rows.npy")


def embedding(rows: fremap.Rows, **options: Any) -> Any:
    from fremap.torch import RowEmbedding

    return RowEmbedding(rows, **options)


def test_it_gives_what_torchs_own_gives(rows: fremap.Rows) -> None:
    import torch

    embed, own = embedding(rows), torch.nn.Embedding.from_pretrained(torch.from_numpy(TABLE))
    for kind in (torch.int64, torch.int32, torch.uint8, torch.int16):
        ids = torch.tensor(IDS, dtype=kind)
        assert torch.equal(embed(ids), own(ids.long()))
    assert torch.equal(embed(torch.tensor(7)), own(torch.tensor(7)))
    assert embed(torch.empty((0, 3), dtype=torch.int64)).shape == (0, 3, 12)
    assert not list(embed.parameters())
    assert embed.state_dict() == {}
    assert (embed.num_embeddings, embed.device.type, embed.dtype) == (200, "cpu", torch.float32)
    assert repr(embed) == "RowEmbedding(200, (12,), dtype=torch.float32)"
    # Memory is used again, and what was returned is not.
    first = embed(torch.tensor(IDS))
    kept = first.clone()
    for _ in range(4):
        embed(torch.arange(200).flip(0))
    assert torch.equal(first, kept)


def test_each_row_is_read_once(rows: fremap.Rows) -> None:
    import torch

    before = rows.stats()
    embedding(rows)(torch.tensor([5] * 1000 + [6]))
    after = rows.stats()
    assert after.rows_read + after.rows_copied - before.rows_read - before.rows_copied == 2


def test_ids_that_are_wrong(rows: fremap.Rows) -> None:
    import torch

    embed = embedding(rows)
    for ids, error, text in (
        (torch.tensor([200]), PageRangeError, "row 200 is outside"),
        (torch.tensor([3, -1]), PageRangeError, "row -1 is negative"),
        (torch.tensor([1.0]), ArgumentTypeError, "float32"),
        (torch.tensor([True]), ArgumentTypeError, "bools"),
        ([1, 2], ArgumentTypeError, "list"),
    ):
        for call in (embed, embed.prefetch):
            with pytest.raises(error, match=text):
                call(ids)


def test_prefetched(rows: fremap.Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes what was read ahead for its ids; others stay, two of them."""
    import torch

    embed = embedding(rows)
    begun, late = embed._begun, []

    def begin(wanted: Any, *, wait: bool) -> Any:
        late.extend([wanted] * wait)
        return begun(wanted, wait=wait)

    monkeypatch.setattr(embed, "_begun", begin)
    batches = []
    for number in range(5):
        ids = torch.tensor([number, 7, number])
        wanted = torch.from_numpy(TABLE[ids.numpy()])
        batches.append(ids.clone())
        embed.prefetch(ids)
        ids += 1  # the caller may change them
        assert torch.equal(embed(batches[-1]), wanted)
    assert late == []
    for ids in batches:
        embed.prefetch(ids)
    for ids in reversed(batches):
        assert torch.equal(embed(ids), torch.from_numpy(TABLE[ids.numpy()]))
    assert [ids[0].item() for ids in late] == [2, 1, 0]
    assert torch.equal(embed(batches[4]), torch.from_numpy(TABLE[batches[4].numpy()]))
    assert len(late) == 4


def test_a_row_that_was_cut_is_an_error_of_the_call(rows: fremap.Rows, tmp_path: Path) -> None:
    import torch

    embed = embedding(rows)
    os.truncate(tmp_path / "rows.npy", 1000)
    embed.prefetch(torch.tensor([199]))
    for _ in range(2):
        with pytest.raises(TruncatedError, match="row 199"):
            embed(torch.tensor([199]))
    assert torch.equal(embed(torch.tensor([0])), torch.from_numpy(TABLE[:1]))


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float16", "int8", "uint8"])
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_types(tmp_path: Path, kind: str, columns: int) -> None:
    import safetensors.torch
    import torch

    table = torch.from_numpy(TABLE[:, :columns] * 20).to(getattr(torch, kind))
    safetensors.torch.save_file({"t": table.contiguous()}, tmp_path / "t.safetensors")
    ids = torch.tensor(IDS)
    with fremap.rows(tmp_path / "t.safetensors") as rows:
        same = embedding(rows)(ids)
        assert same.dtype is table.dtype
        assert torch.equal(same.view(torch.uint8), table.view(torch.uint8)[ids.flatten()].reshape(
            *ids.shape, -1
        ))  # fmt: skip
        cast = embedding(rows, dtype=torch.float32)(ids)
        assert torch.equal(cast, table.to(torch.float32)[ids])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (12,)])
@pytest.mark.parametrize("row_shape", [(12,), (2, 6), ()])
def test_scaled(tmp_path: Path, shape: tuple[int, ...], row_shape: tuple[int, ...]) -> None:
    import torch

    table = np.random.default_rng(1).integers(-127, 128, (50, *row_shape)).astype(np.int8)
    scale = np.random.default_rng(2).random((50, *shape)).astype(np.float16)
    safetensors.numpy.save_file({"t": table, "s": scale}, tmp_path / "t.safetensors")
    with (
        fremap.rows(tmp_path / "t.safetensors", tensor="t") as rows,
        fremap.rows(tmp_path / "t.safetensors", tensor="s") as factors,
    ):
        last, parts = (row_shape or (1,))[-1], (shape or (1,))[0]
        if last % parts:
            with pytest.raises(ArgumentError, match=f"divide {last}"):
                embedding(rows, scale=factors)
            return
        embed = embedding(rows, scale=factors)
        assert "scaled" in repr(embed)
        spread = np.repeat(scale.reshape(50, parts).astype(np.float32), last // parts, axis=1)
        spread = (
            spread.reshape(50, *(1 for _ in row_shape[:-1]), last) if row_shape else spread[:, 0]
        )
        wanted = table.astype(np.float32) * spread
        for ids in (torch.tensor([[4, 49], [4, 0]]), torch.tensor(3)):
            embed.prefetch(ids)
            for _ in range(2):
                found = embed(ids)
                assert found.dtype is torch.float32
                np.testing.assert_array_equal(found.numpy(), wanted[ids.numpy()])


def test_a_scale_of_another_table(rows: fremap.Rows, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.ones(3, np.float32))
    with (
        fremap.rows(tmp_path / "few.npy") as few,
        pytest.raises(ArgumentError, match="scale has 3 rows, the table 200"),
    ):
        embedding(rows, scale=few)


def test_types_that_torch_has_not(tmp_path: Path) -> None:
    np.zeros(40, np.uint8).tofile(tmp_path / "raw")
    with (
        fremap.rows(tmp_path / "raw", "M8[s]", 1) as rows,
        pytest.raises(ArgumentError, match="torch has no type"),
    ):
        embedding(rows)


def test_in_a_model(rows: fremap.Rows) -> None:
    """It moves, converts and copies with the model, and has nothing to be saved."""
    import torch

    model = torch.nn.Sequential(embedding(rows), torch.nn.Linear(12, 2)).half()
    assert model[0](torch.tensor([1])).dtype is torch.float32  # what it was told
    ids = torch.tensor(IDS)
    for other in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert torch.equal(other(ids), model[0](ids))
    assert set(model.state_dict()) == {"1.weight", "1.bias"}
    with torch.inference_mode():
        assert torch.equal(model[0](ids), torch.from_numpy(TABLE)[ids])


def test_threads_and_children(rows: fremap.Rows, in_child: Callable[..., int]) -> None:
    import torch

    embed = embedding(rows)
    failed = []

    def call(seed: int) -> None:
        try:
            draw = np.random.default_rng(seed)
            for _ in range(30):
                ids = draw.integers(0, 200, 50)
                if seed % 2:
                    embed.prefetch(torch.from_numpy(ids))
                np.testing.assert_array_equal(embed(torch.from_numpy(ids)).numpy(), TABLE[ids])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []

    ids = torch.tensor(IDS)
    embed.prefetch(ids)

    def child() -> None:
        assert torch.equal(embed(ids), torch.from_numpy(TABLE)[ids])

    in_child(child)
    assert torch.equal(embed(ids), torch.from_numpy(TABLE)[ids])
