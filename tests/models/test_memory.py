"""What the memory model counts, and where."""

import pytest

from dpt.config.presets import preset_values
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.costs import num_params
from dpt.models.memory import REDUCE_BUCKET_SIZE, memory
from tests.models.networks import SIZES


def test_pictures_count_as_far_as_activations_leave_no_room():
    config = ModelConfig(**SIZES)
    without = memory(config)
    assert memory(config, pictures=without.activations).total == without.total
    assert memory(config, pictures=without.activations + 7).total == without.total + 7


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_offloading_moves_what_deepspeed_moves(stage):
    """All but device and host: the same bytes, the optimizer's copy of the weights (stages 1 and 2) and stage 1's gradients."""
    config = ModelConfig(**preset_values("S/2"))
    plain = memory(config, ranks=4, zero_stage=stage)
    moved = memory(config, ranks=4, zero_stage=stage, offload_optimizer=True)
    if stage == 0:
        assert moved == plain
        return
    assert moved.master_weights == moved.moments == moved.ema == 0
    assert (moved.weights, moved.activations, moved.buckets) == (plain.weights, plain.activations, plain.buckets)
    assert (moved.gradients > 0) == (stage == 1)
    share = num_params(config).total // 4
    copies = 2 * share if stage < 3 else 0
    assert moved.host == plain.master_weights + plain.moments + plain.ema + 4 * share + copies
    both = memory(config, ranks=4, zero_stage=stage, offload_optimizer=True, offload_param=True)
    assert both.weights == (0 if stage == 3 else plain.weights)
    assert both.total + both.host == moved.total + moved.host


def test_bytes_of_states():
    config = ModelConfig(**preset_values("S/2-8E2A"))
    n = num_params(config)
    one = memory(config, zero_stage=0, precision="fp32")
    assert (one.weights, one.gradients, one.moments, one.ema, one.master_weights) == tuple(n.total * b for b in (4, 4, 8, 4, 0))
    four = memory(config, ranks=4, ep_size=4, zero_stage=2, precision="bf16")
    held = n.total - n.routed + n.routed // 4
    share = n.total // 4
    assert (four.weights, four.gradients, four.moments, four.ema) == (2 * held, 4 * share, 8 * share, 4 * share)
    assert four.buckets == 2 * 4 * min(held, REDUCE_BUCKET_SIZE)  # one is filled while the other is reduced, in fp32
    one_rank = memory(config, zero_stage=2, precision="bf16")  # as ZeRO 1: nothing to reduce
    assert one_rank.gradients == 4 * n.total
    assert memory(config, ranks=4, zero_stage=3).weights == 2 * share
    assert four.total == sum(v for k, v in vars(four).items())
    with pytest.raises(UserError, match="must divide"):
        memory(config, ranks=4, ep_size=3)
    for name in ("ranks", "ep_size", "micro_batch_size"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            memory(config, **{name: 0})
    with pytest.raises(UserError, match="stage 3"):
        memory(config, ranks=4, ep_size=4, zero_stage=3)
