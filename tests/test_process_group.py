import os
import socket
import sys
import time
from datetime import timedelta

import pytest
import torch

from config.errors import UserError
from distributed import process_group
from distributed.process_group import LAUNCH_VARIABLES, Ranks, check_launch, init_process_group
from tests.ranks import TIME_LIMIT, run_ranks

STORE = torch.distributed.HashStore()


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    for name in (*LAUNCH_VARIABLES, "LOCAL_WORLD_SIZE", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.delenv("TORCH_NCCL_TRACE_BUFFER_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def launch(monkeypatch, rank, world_size, local_rank=None):
    local_rank = rank if local_rank is None else local_rank
    for name, value in zip(LAUNCH_VARIABLES, (rank, world_size, local_rank, "127.0.0.1", 1), strict=True):
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that seems to have two GPUs; what init_process_group asks of PyTorch, in order."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    group = process_group.dist
    monkeypatch.setattr(
        group,
        "init_process_group",
        lambda backend, **kwargs: calls.append((backend, kwargs, os.environ.get("TORCH_FR_BUFFER_SIZE"))),
    )
    monkeypatch.setattr(group, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(group, "rendezvous", lambda url, timeout: iter([(STORE, 3, 4)]))
    return calls


def test_plain_python_is_one_rank_without_a_group():
    ranks = init_process_group(5)
    assert ranks == Ranks(0, 1, 0, 1, torch.device("cpu"), False, 5)
    assert ranks.is_main and not torch.distributed.is_initialized()
    process_group.barrier()
    assert process_group.gather_objects("x") == ["x"]
    assert process_group.broadcast_object({"a": 1}) == {"a": 1}
    assert process_group.together(max, 1, 2) == 2
    process_group.destroy()


def test_mps_is_used_by_a_single_process_only(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert init_process_group(5).device == torch.device("mps")
    launch(monkeypatch, 0, 2)
    assert process_group._ranks_from_environment(5).device == torch.device("cpu")


def test_cuda_order_and_backends(monkeypatch, two_gpus):
    launch(monkeypatch, 3, 4, local_rank=1)
    ranks = init_process_group(3600)
    device = torch.device("cuda", 1)
    assert two_gpus == [
        ("set_device", device),
        (
            "cpu:gloo,cuda:nccl",
            {"store": STORE, "rank": 3, "world_size": 4, "timeout": timedelta(hours=1), "device_id": device},
            "2000",
        ),
        "barrier",
    ]
    assert ranks == Ranks(3, 4, 1, 4, device, launched_by_torchrun=True) and not ranks.is_main
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


def test_a_restart_does_not_read_what_the_start_before_has_written(monkeypatch):
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch(monkeypatch, 0, 1)
    for name, value in {
        "MASTER_PORT": server.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "GROUP_WORLD_SIZE": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    stores = []
    for start in ("0", "1", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        stores.append(process_group._meet(timedelta(seconds=5))["store"])
    stores[0].set("address of rank 0", "an old one")
    assert [store.check(["address of rank 0"]) for store in stores] == [True, False, False]
    stores[1].set("address of rank 0", "the new one")
    assert stores[2].get("address of rank 0") == b"the new one"


def test_flight_recorder_leaves_a_users_setting_alone(monkeypatch, two_gpus):
    launch(monkeypatch, 0, 1)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    init_process_group(5)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"


def test_more_ranks_than_gpus_is_refused_before_the_group(monkeypatch, two_gpus):
    launch(monkeypatch, 2, 4)
    with pytest.raises(UserError, match=r"LOCAL_RANK=2, .* 2 GPU\(s\).* --nproc_per_node=2 "):
        init_process_group(5)
    assert two_gpus == []


def test_two_ranks_on_one_gpu_are_a_users_mistake(monkeypatch, two_gpus):
    def refuse(backend, **kwargs):
        raise torch.distributed.DistBackendError(said)

    launch(monkeypatch, 1, 2, local_rank=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(process_group.dist, "init_process_group", refuse)
    said = "ncclInvalidUsage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 41000"
    with pytest.raises(UserError, match="rank 1 is on cuda:0 .*DEVICES=3, .* a GPU for each"):
        init_process_group(5)
    said = "unhandled system error"
    with pytest.raises(RuntimeError, match="unhandled"):
        init_process_group(5)


def test_torchrun_that_has_gone_is_not_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        launch(monkeypatch, 0, 2)
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setattr(process_group, "STORE_SECONDS", 0.5)
        process_group._check_torchrun_is_there()
    with pytest.raises(ConnectionError, match="torchrun does not answer at 127.0.0.1:"):
        init_process_group(3600)


def test_distributed_without_torchrun_shows_the_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["train_distillation.py", "--sample_prompts", "A cat", "--distributed"])
    line = "torchrun --nproc_per_node=4 train_distillation.py --sample_prompts 'A cat' --distributed"
    with pytest.raises(UserError, match=line):
        check_launch(distributed=True)
    check_launch(distributed=False)


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="WORLD_SIZE=8 needs torchrun, which sets LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        check_launch(distributed=False)
    launch(monkeypatch, 3, 8)
    check_launch(distributed=False)
    check_launch(distributed=True)


def talk(ranks):
    def work():
        if ranks.rank == 1:
            raise OSError("disk full")

    heard = {
        "gathered": process_group.gather_objects(ranks.rank * 10),
        "broadcast": process_group.broadcast_object({"from": ranks.rank}, src=1),
    }

    def refuse():
        if ranks.is_main:
            raise UserError("wrong flag")

    for name, of_one in {"raised": work, "refused": refuse}.items():
        try:
            process_group.together(of_one)
        except Exception as error:
            heard[name] = f"{type(error).__name__}: {error}"
    process_group.check_alike({"--lr": 0.1})
    try:
        process_group.check_alike({"--lr": 0.1 * ranks.rank, "--seed": 0})
    except UserError as error:
        heard["unlike"] = str(error)
    process_group.destroy()
    return ranks, heard


def test_two_ranks_hear_each_other():
    (first, heard_first), (second, heard_second) = run_ranks(talk, 2)
    assert first == Ranks(0, 2, 0, 2, torch.device("cpu"), True, TIME_LIMIT)
    assert second == Ranks(1, 2, 1, 2, torch.device("cpu"), True, TIME_LIMIT)
    # Each hears in its own words what was raised: the rank that failed its own error, the other one whose it was.
    assert heard_first.pop("raised") == "PeerFailed: rank 1: OSError: disk full"
    assert heard_second.pop("raised") == "OSError: disk full"
    # A user's mistake stays one on all ranks.
    assert heard_first.pop("refused") == "UserError: wrong flag"
    assert heard_second.pop("refused") == "UserError: rank 0: wrong flag"
    assert heard_first == heard_second
    unlike = heard_first.pop("unlike")
    assert unlike == heard_second.pop("unlike") and unlike.startswith("--lr is 0.1 on rank 1, but 0.0 on rank 0; ")
    assert heard_first == {"gathered": [0, 10], "broadcast": {"from": 1}}


def fail_on_rank_1(ranks):
    if ranks.rank == 1:
        raise ValueError("no such thing")
    time.sleep(2 * TIME_LIMIT)


def test_run_ranks_does_not_wait_for_the_others_when_one_fails():
    with pytest.raises(AssertionError, match="(?s)rank 1: .*ValueError: no such thing"):
        run_ranks(fail_on_rank_1, 2)
