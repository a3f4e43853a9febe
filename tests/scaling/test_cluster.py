"""The model of a cluster: limits by hand, consistency, and its traffic against what DeepSpeed's ranks exchange."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpt import cli
from dpt.config.presets import preset_values
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models import costs
from dpt.models.memory import memory
from dpt.scaling.cluster import Cluster, Layout, Traffic, best_layout, project, sample_bytes, seconds, traffic

MOE = ModelConfig(**preset_values("L/2-8E2A"))
DENSE = ModelConfig(**preset_values("XL/2"))
H100 = Cluster()


def by_name(config, layout):
    return {one.what: one for one in traffic(config, layout)}


def test_one_rank_exchanges_nothing_and_runs_at_its_own_speed():
    layout = Layout(ranks=1, micro_batch_size=8)
    assert traffic(MOE, layout) == []
    one = project(MOE, layout, H100)
    assert one.tokens_s == one.gradients_s == one.straggling_s == 0
    assert one.compute_s == pytest.approx(2 * costs.macs(MOE).training * 8 / (989e12 * 0.4))


def test_traffic_by_hand():
    """XL/2's weights and gradients are 675 M numbers of two bytes; tokens: L/2-8E2A, 256 a sample, to two experts each."""
    numel = costs.num_params(DENSE).total - 256 * 1152
    found = by_name(DENSE, Layout(ranks=16, micro_batch_size=4, accumulation=3))
    assert {name: (t.kind, t.group, t.payload, t.calls) for name, t in found.items()} == {
        "gradients of weights": ("all_reduce", 16, 2 * numel, 1),
        "weights": ("all_gather", 16, 2 * numel, 1),
    }
    found = by_name(DENSE, Layout(ranks=16, micro_batch_size=4, accumulation=3, zero_stage=2))
    assert found["gradients of weights"].payload == 3 * 2 * numel
    found = by_name(MOE, Layout(ranks=16, micro_batch_size=4, ep_size=8, zero_stage=2))
    assert found["tokens"].payload == 4 * 24 * (4 * 256 * 2 * 1024 * 2)
    assert (found["tokens"].group, found["tokens"].stride) == (8, 1)
    assert found["experts"].payload == 2 * costs.num_params(MOE).routed / 8
    assert (found["experts"].group, found["experts"].stride) == (2, 8)
    recomputed = by_name(MOE, Layout(ranks=16, micro_batch_size=4, ep_size=8, zero_stage=2, activation_checkpointing=True))
    assert recomputed["tokens"].payload == 1.5 * found["tokens"].payload


def test_times_of_exchanges_by_hand():
    cluster = Cluster(gpus_per_node=8, node_bandwidth=100.0, network_bandwidth=10.0, latency_s=0.0)

    def time(kind, group, stride):
        return seconds(Traffic(what="", kind=kind, group=group, stride=stride, payload=1000.0, calls=1), cluster)

    assert time("all_reduce", 8, 1) == pytest.approx(2 * 1000 * 7 / 8 / 100)
    assert time("all_reduce", 16, 1) == pytest.approx(2 * 1000 * 15 / 16 / 80)  # eight cards a node at once
    assert time("all_gather", 2, 8) == pytest.approx(1000 / 2 / 10)  # one member a node: its own card
    assert time("all_to_all", 8, 1) == pytest.approx(1000 * 7 / 8 / 100)
    assert time("all_to_all", 16, 1) == pytest.approx(1000 * 8 / 16 / 10)  # half of the rows leave the node
    late = dataclasses.replace(cluster, latency_s=1.0)
    assert seconds(Traffic(what="", kind="all_reduce", group=8, stride=1, payload=0.0, calls=2), late) == pytest.approx(12)


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.sampled_from([8, 16, 64, 1024]),
    micro=st.sampled_from([1, 4, 16]),
    ep_and_stage=st.sampled_from([(1, 1), (1, 2), (1, 3), (4, 1), (8, 2)]),
    checkpointing=st.booleans(),
)
def test_projections_are_consistent(ranks, micro, ep_and_stage, checkpointing):
    ep_size, stage = ep_and_stage
    layout = Layout(
        ranks=ranks, micro_batch_size=micro, ep_size=ep_size, zero_stage=stage, activation_checkpointing=checkpointing
    )
    one = project(MOE, layout, H100)
    assert one.samples_per_second == pytest.approx(layout.global_batch_size / one.step_s)
    assert 0 < one.mfu <= H100.efficiency
    assert one.efficiency == pytest.approx(one.mfu / H100.efficiency)
    faster = dataclasses.replace(H100, network_bandwidth=1e12, node_bandwidth=1e12)
    assert project(MOE, layout, faster).step_s <= one.step_s
    assert project(MOE, dataclasses.replace(layout, overlap=False), H100).step_s >= one.step_s
    assert one.checkpoint_bytes == 16 * costs.num_params(MOE).total
    assert one.memory_bytes == pytest.approx(
        memory(
            MOE, ranks=ranks, ep_size=ep_size, zero_stage=stage, micro_batch_size=micro, activation_checkpointing=checkpointing
        ).total
    )


def test_the_best_layout_fits_divides_and_is_not_beaten():
    best = best_layout(MOE, 16, 256, H100)
    assert best.layout.global_batch_size == 256
    assert best.memory_bytes <= 0.85 * 80e9
    assert best.step_s <= best_layout(MOE, 16, 256, H100, ep_size=8).step_s
    assert best_layout(MOE, 16, 256, H100, ep_size=8).layout.ep_size == 8
    assert best_layout(MOE, 16, 256, H100, zero_stage=1).layout.zero_stage == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="8 GPUs of 24 GB cannot train"):
        best_layout(ModelConfig(**preset_values("G/2-16E2A")), 8, 256, dataclasses.replace(H100, memory_bytes=24e9))
    with pytest.raises(UserError, match="a batch that they divide"):
        best_layout(MOE, 7, 256, H100)


def test_a_layouts_recipe_says_the_same():
    assert Layout(ranks=8, micro_batch_size=4, accumulation=2, ep_size=8, zero_stage=2).recipe() == {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "dpt": {"training": {"ep_size": 8, "activation_checkpointing": False}},
        "bf16": {"enabled": True},
    }


def test_sample_bytes_are_those_of_a_shard(tmp_path):
    """Two members of 16 KiB with their headers, a label, the description."""
    import numpy as np

    from data_tools.encoding.shards import ShardWriter

    config = ModelConfig()
    moments = np.zeros((2, 4, 32, 32), np.float16)
    with ShardWriter(tmp_path / "000000.tar") as writer:
        for number in range(20):
            writer.add(f"{number}", {"label": np.array(1), "latents": moments, "latents_mirrored": moments}, {"width": 256})
        record = writer.commit()
    assert record.bytes == pytest.approx(20 * sample_bytes(config), rel=0.03)  # a tar ends in empty blocks


def test_the_command_shows_layouts_and_recipes(capsys):
    assert cli.main(["cluster", "L/2-8E2A", "--gpus", "8", "7", "16", "--recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7 GPUs of 80 GB cannot train")
    assert sum(line.startswith(("8 ", "16 ")) for line in lines) == 6
    assert any('"train_batch_size": 256' in line for line in lines)
