"""The stream: a function of (shards, seed, global batch size) alone, every sample once, resumable anywhere."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt.data import stream as stream_module
from dpt.data.reader import ShardReader
from dpt.data.stream import LatentStream
from dpt.errors import UserError
from tests.data.streams import stream, take


def global_batches(folder: Path, steps: int, *, batch: int, ranks: int, micro: int, workers: int, start: int = 0) -> list[list]:
    """Per step, the sorted (sample_index, label, key) of all ranks."""
    accumulation = batch // (micro * ranks)
    found: list[list] = [[] for _ in range(steps)]
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks, "micro_batch_size": micro, "num_workers": workers, "start_sample": start}
        for number, part in enumerate(take(folder, steps * accumulation, global_batch_size=batch, **options)):
            rows = zip(part["sample_index"].tolist(), part["label"].tolist(), part["key"], strict=True)
            found[number // accumulation] += rows
            assert torch.equal(part["latents"][:, 0, 0, 0, 0].long(), part["label"] % 1024)
            assert [int(key[1:]) for key in part["key"]] == part["label"].tolist()
    return [sorted(step) for step in found]


@pytest.fixture(scope="module")
def folder(make_shards) -> Path:
    return make_shards([7, 5, 8, 1, 6])


@pytest.fixture(scope="module")
def in_order(folder: Path) -> list:
    """What one rank reads of 120 samples, six at a time."""
    return [row for step in global_batches(folder, 20, batch=6, ranks=1, micro=6, workers=0) for row in step]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_same_batches_for_any_ranks_and_workers(folder: Path, ranks: int, workers: int) -> None:
    expected = global_batches(folder, 6, batch=12, ranks=1, micro=12, workers=0)
    assert global_batches(folder, 6, batch=12, ranks=ranks, micro=3, workers=workers) == expected
    assert [row[0] for step in expected for row in step] == list(range(72))


@given(start=st.integers(0, 100), workers=st.sampled_from([0, 0, 0, 2]))
@settings(max_examples=12)
def test_resumes_at_any_sample(folder: Path, in_order: list, start: int, workers: int) -> None:
    resumed = global_batches(folder, 3, batch=6, ranks=2, micro=3, workers=workers, start=start)
    assert [row for step in resumed for row in step] == in_order[start : start + 18]


def test_cursor_counts_what_was_handed_out(folder: Path) -> None:
    options = {"global_batch_size": 12, "micro_batch_size": 2, "rank": 1, "world_size": 2}
    found = stream(folder, **options, start_sample=5)
    assert (found.samples_seen, found.accumulation_steps, found.num_samples) == (5, 3, 27)
    first = list(islice(found, 4))
    assert found.samples_seen == 5 + 4 * 2 * 2
    again = stream(folder, **options, start_sample=found.samples_seen)
    for one, other in zip(islice(found, 2), again, strict=False):  # the same object continues where it was
        assert one["key"] == other["key"]
    assert first[0]["sample_index"].tolist() == [6, 8]


def test_seed_and_batch_size_change_the_order(folder: Path) -> None:
    base = take(folder, 1, global_batch_size=12)[0]["key"]
    assert take(folder, 1, global_batch_size=12, seed=4)[0]["key"] != base
    assert take(folder, 2, global_batch_size=10)[0]["key"] != base[:10]


def test_readers_without_a_sample_in_some_batches(folder: Path) -> None:
    options = {"global_batch_size": 8, "micro_batch_size": 1, "world_size": 2, "rank": 1}
    expected = [batch["key"] for batch in take(folder, 40, **options)]
    assert [batch["key"] for batch in take(folder, 40, num_workers=3, **options)] == expected


def test_a_rare_set_is_not_read_again_and_again(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_LOCATED", 64)
    rows: Counter = Counter()
    original = ShardReader.read

    def read_rows(self, *arguments):
        rows[self._file.name] += 1
        return original(self, *arguments)

    monkeypatch.setattr(ShardReader, "read", read_rows)
    common, rare = make_shards([400]), make_shards([64 * 8])
    found = list(islice(LatentStream([str(common), str(rare)], global_batch_size=8, weights=[31, 1]), 31))
    assert 5 <= sum(int((batch["source"] == 1).sum()) for batch in found) <= 10
    assert rows[f"{rare}/000000.tar"] <= 8  # a block a lane at most


def test_a_block_for_each_sample(make_shards) -> None:
    """As many blocks as there may be: those of all batches read ahead, and the one of each lane."""
    singles = make_shards([1] * 150)
    for workers in (0, 4):
        found = take(singles, 5, global_batch_size=64, prefetch=1, num_workers=workers)
        seen = torch.cat([batch["label"] for batch in found])
        assert all((batch["latents"][:, 0, 0, 0, 0].long() == batch["label"]).all() for batch in found)
        assert sorted(seen[:150].tolist()) == sorted(seen[150:300].tolist()) == list(range(150))


def test_one_tiny_shard_for_more_readers_than_lanes(make_shards) -> None:
    batches = take(make_shards([1]), 3, global_batch_size=16, world_size=4, rank=3, num_workers=16)
    assert [batch["label"].tolist() for batch in batches] == [[0] * 4] * 3


def test_batches_that_do_not_split(folder: Path) -> None:
    with pytest.raises(UserError, match="global batch of 10 does not split into micro-batches of 4 on 1 ranks"):
        LatentStream([str(folder)], global_batch_size=10, micro_batch_size=4)
    with pytest.raises(UserError, match=r"names .* twice; name it once"):
        LatentStream([str(folder), str(folder)], global_batch_size=10)
    with pytest.raises(UserError, match="shards is empty"):
        LatentStream([], global_batch_size=10)


def flow_sample(number: int) -> dict[str, np.ndarray]:
    return {
        "cond_latents": np.full((2, 2, 4, 2, 2), number, np.float16),
        "target_latents": np.full((2, 2, 4, 2, 2), number, np.float16),
    }


def amodal_sample(number: int) -> dict[str, np.ndarray]:
    sample = flow_sample(number)
    return {**sample, "target_latents": sample["target_latents"][:1], "clip": np.full(5, number, np.float32)}


@pytest.mark.parametrize("workers", [0, 2])
def test_mixtures_fill_up_with_zeros(make_shards, workers: int) -> None:
    sources = [str(make_shards([6], flow_sample, task="flow")), str(make_shards([3, 3], amodal_sample, task="amodal"))]
    found = LatentStream(sources, global_batch_size=8, weights=[3, 1], num_workers=workers)
    batches = list(islice(found, 4))
    assert [int((batch["source"] == 0).sum()) for batch in batches] == pytest.approx([6] * 4, abs=1)
    for batch in batches:
        for slot, source in enumerate(batch["source"].tolist()):
            number = float(batch["key"][slot][1:])
            assert (batch["cond_latents"][slot] == number).all()
            assert (batch["target_latents"][slot, 0] == number).all()
            assert (batch["target_latents"][slot, 1] == (number if source == 0 else 0)).all()
            assert (batch["clip"][slot] == (0 if source == 0 else number)).all()
    assert list(found.manifests) == sources


def test_members_can_be_chosen(make_shards) -> None:
    def sample(number: int) -> dict[str, np.ndarray]:
        image = np.full((40, 40, 3), number, np.uint8)
        return {"label": np.array(number, np.int64), "image": image, "latents_mirrored": np.ones((2, 4, 4, 4), np.float16)}

    evaluation = make_shards([3], sample)
    assert set(take(evaluation, 1, global_batch_size=2)[0]) == {"label", "latents_mirrored", "sample_index", "source", "key"}
    batch = take(evaluation, 1, global_batch_size=2, members=["label", "image"])[0]
    assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
    with pytest.raises(UserError, match="hold no clip"):
        take(evaluation, 1, global_batch_size=2, members=["clip"])
