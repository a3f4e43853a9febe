"""Ranks and reductions, alone and with two gloo processes."""

import os
import random
import socket
import subprocess
import sys

import pytest
import torch

from dpt import distributed
from dpt.config.recipe import load_recipe
from dpt.cpu.settings import limit_spinning
from dpt.errors import UserError
from tests.gloo import RANKS_TIMEOUT_S, run_ranks


def test_without_init_there_is_one_rank():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_reduce_sum({"a": 2.0}) == distributed.all_reduce_mean({"a": 2.0}) == {"a": 2.0}
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.broadcast_object({"k": 1}) == {"k": 1}
    distributed.barrier()
    distributed.shutdown()


def test_environment_is_filled_only_where_absent(monkeypatch):
    srun = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    monkeypatch.setattr(os, "environ", {**srun, "MASTER_PORT": "12345", "MASTER_ADDR": "node7"})
    distributed.set_environment()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[n] for n in names] == ["3", "1", "4", "node7", "12345"]
    assert distributed.local_world_size() == 2


def test_a_batch_scripts_own_shell_is_one_process(monkeypatch):
    monkeypatch.setattr(os, "environ", {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    distributed.set_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert int(os.environ["MASTER_PORT"]) > 0


def test_waiting_threads_do_not_spin_for_long_unless_the_user_says_how(monkeypatch):
    for given, expected in (({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        monkeypatch.setattr(os, "environ", dict(given))
        limit_spinning()
        assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_collectives_between_processes(capfd: pytest.CaptureFixture[str]) -> None:
    def on_rank() -> None:
        rank = distributed.rank()
        assert distributed.world_size() == 2
        assert distributed.all_reduce_sum({"b": rank, "a": 1.5}) == {"a": 3.0, "b": 1.0}
        assert distributed.all_reduce_mean({"a": rank}) == {"a": 0.5}
        assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert distributed.broadcast_object(rank, source=1) == 1
        distributed.log(f"from rank {rank}")

    run_ranks(2, on_rank, as_launched=True)
    printed = capfd.readouterr().out
    assert "from rank 0" in printed
    assert "from rank 1" not in printed


@pytest.mark.slow
def test_a_rank_that_fails_before_an_inner_block_of_shared_errors_ends_all():
    def fail() -> None:
        with distributed.shared_errors():
            if distributed.rank():
                raise UserError("no such file on this node")
            with distributed.shared_errors():
                pass
            raise AssertionError("rank 0 did not hear of it")

    def work() -> str:
        with pytest.raises(UserError) as caught:
            fail()
        distributed.barrier()
        return str(caught.value)

    assert run_ranks(2, work, timeout_s=RANKS_TIMEOUT_S) == ["no such file on this node"] * 2


def test_the_time_limit_holds_for_every_group_that_training_makes():
    """DeepSpeed's for experts and for those who share them, and our own for signals, as well as the first one."""
    model = {"input_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 8, "num_experts": 4}
    fields = {"train_batch_size": 4, "zero_optimization.stage": 1, "training.ep_size": 2}
    recipe = load_recipe(None, fields | {f"model.{name}": value for name, value in model.items()})

    def on_rank() -> list[float]:
        from deepspeed.utils import groups

        from dpt.models.dit import DiT
        from dpt.training.control import Control
        from dpt.training.engine import Engine
        from dpt.training.step import LossModule

        Engine(recipe, LossModule(DiT(recipe.dpt.model, ep_size=2), recipe.dpt))
        Control()
        made = list(torch.distributed.distributed_c10d._world.pg_map)
        named = {groups._get_expert_parallel_group("ep_size_2"), groups._get_expert_data_parallel_group("ep_size_2")}
        assert named <= set(made)
        return [one._get_backend(torch.device("cpu")).options._timeout.total_seconds() for one in made]

    for seconds in run_ranks(2, on_rank, as_launched=True):
        assert len(seconds) >= 4
        assert set(seconds) == {RANKS_TIMEOUT_S}


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_for_the_next_tensor():
    """After a few times (glibc's aligned blocks need some to find their places), a large tensor costs no page faults."""
    code = (
        "import resource, torch; from dpt.cpu.settings import keep_freed_memory; keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): before = faults(); torch.ones(4 << 20)\n"
        "print(faults() - before)"
    )
    faults = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(faults) < 400  # 16 MiB are 4096 pages


def test_a_free_port_is_one_that_nothing_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", distributed.free_port()))
        busy = taken.getsockname()[1]
        assert busy < 32768
        monkeypatch.setattr(random.Random, "sample", lambda self, ports, count: [busy, busy])
        with pytest.raises(UserError, match="set MASTER_PORT"):
            distributed.free_port()
