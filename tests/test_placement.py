"""Where the teacher's experts are: decided by bytes, and swapped without losing any."""

import copy
from types import SimpleNamespace

import pytest
import torch

from config.config import load_config
from config.errors import UserError
from distillation.objective import settings_of
from distillation.plan import check_experts, check_sharding
from distributed.placement import choose_placement, keep_one_resident, place
from distributed.process_group import Ranks
from models.folding import fold_text
from models.scores import fake_scores
from models.teacher import Teacher

CPU, GB = torch.device("cpu"), 10**9
PLAIN = SimpleNamespace(quantised={})  # a teacher


def ranks_of(world_size: int, device: torch.device = CPU) -> Ranks:
    return Ranks(0, world_size, 0, world_size, device, launched_by_torchrun=world_size > 1)


@pytest.mark.parametrize(
    ("asked", "world_size", "memory", "strategy", "why"),
    [
        ("auto", 1, None, "replicate", "no CUDA device"),
        ("shard", 2, None, "shard", ""),
        ("shard", 1, 80, "replicate", "one rank alone"),
        ("offload", 1, None, "replicate", "offload needs a CUDA device"),
        ("group_offload", 4, None, "replicate", "group_offload needs a CUDA device"),
        ("cpu", 1, None, "cpu", ""),
        ("offload", 1, 80, "offload", ""),
        ("auto", 1, 96, "replicate", "it fits: 57.2 GB beside 15 GB on a GPU of 96 GB"),
        ("auto", 8, 80, "shard", "it does not fit whole: 57.2 GB beside 15 GB on a GPU of 80 GB"),
        ("auto", 1, 80, "offload", "one expert fits, two do not: 57.2 GB beside 15 GB on a GPU of 80 GB"),
        ("auto", 1, 24, "group_offload", "not even one expert fits: 57.2 GB beside 15 GB on a GPU of 24 GB"),
    ],
)
def test_where_two_experts_of_14_billion_go(asked, world_size, memory, strategy, why):
    experts = [28.6 * GB, 28.6 * GB]
    ranks = ranks_of(world_size, torch.device("cuda") if memory else CPU)
    chosen = choose_placement(asked, ranks, memory and memory * GB, experts, 15 * GB)
    assert chosen == (strategy, why)


def test_one_expert_that_does_not_fit_goes_block_by_block():
    assert (
        choose_placement("auto", ranks_of(1, torch.device("cuda")), 24 * GB, [20 * GB], 10 * GB).strategy
        == "group_offload"
    )


@pytest.fixture
def asked() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    text = fold_text(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    return torch.randn(2, 16, 1, 4, 4), text


def networks_of(teacher: Teacher) -> list[torch.nn.Module]:
    return [expert.field.transformer for expert in teacher.experts]


def places_of(network: torch.nn.Module) -> list[int]:
    """Where in memory its tensors are."""
    return [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]


def test_one_expert_is_away_from_home_at_a_time_and_none_is_changed(teacher, asked):
    """Home and device are both the CPU here; a tensor that travels is another one."""
    x, text = asked
    high, low = networks_of(teacher)
    homes = {network: places_of(network) for network in (high, low)}
    expected = {t: teacher(x, t, text) for t in (0.95, 0.5)}
    keep_one_resident([high, low], CPU)
    for t, runs, waits in ((0.95, high, low), (0.9, high, low), (0.5, low, high), (0.95, high, low), (0.5, low, high)):
        got = teacher(x, t, text)
        assert t == 0.9 or torch.equal(got, expected[t])
        assert places_of(waits) == homes[waits] and not set(places_of(runs)) & set(homes[runs])
        if t == 0.5:  # what happens to it on the device does not come home
            with torch.no_grad():
                low.proj_out.weight.zero_()


def test_offloaded_experts_answer_as_ever_with_adapters_and_copies_too(teacher, asked):
    x, text = asked
    expected = {t: teacher(x, t, text) for t in (0.95, 0.5)}
    keep_one_resident(networks_of(teacher), CPU)
    fake_scores(teacher, "lora", rank=2)
    assert all(torch.equal(teacher(x, t, text), v) for t, v in expected.items())
    copied = copy.deepcopy(networks_of(teacher)[0])
    with torch.no_grad():
        copied.proj_out.weight.zero_()
        copied(x, torch.tensor([500.0, 500.0]), text)
    assert all(torch.equal(teacher(x, t, text), v) for t, v in expected.items())


def test_experts_that_come_block_by_block_answer_as_ever(teacher, asked):
    x, text = asked
    expected = {t: teacher(x, t, text) for t in (0.95, 0.5)}
    place(networks_of(teacher), "group_offload", ranks_of(1))
    assert all(torch.equal(teacher(x, t, text), v) for t, v in expected.items())


@pytest.mark.parametrize("strategy", ["replicate", "offload", "group_offload", "cpu"])
def test_float8_rounds_the_blocks_weights_and_computes_as_before(strategy, teacher, asked):
    x, text = asked
    expected = teacher(x, 0.5, text)
    for network in networks_of(teacher):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    place(networks_of(teacher), strategy, ranks_of(1))
    stored = {p.dtype for p in networks_of(teacher)[1].blocks[0].ffn.parameters()}
    assert stored == {torch.float8_e4m3fn}
    assert networks_of(teacher)[1].scale_shift_table.dtype == torch.float32
    got = teacher(x, 0.5, text)
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < 0.2  # 3 bits of mantissa
    assert torch.equal(got, teacher(x, 0.5, text)), "rounded once"


def test_in_step_every_expert_runs_in_every_call(teacher, asked):
    x, text = asked
    calls = []
    for network in networks_of(teacher):
        network.register_forward_pre_hook(lambda module, args: calls.append(module))
    t = torch.tensor([0.95, 0.9])  # the high-noise expert's alone
    expected = teacher(x, t, text)
    assert len(calls) == 1
    teacher.in_step = True
    assert torch.equal(teacher(x, t, text), expected) and len(calls) == 3
    teacher(x, t, text, expert=1)
    assert calls[3:] == networks_of(teacher)[1:], "the one that is asked, whatever t is"


# ------------------------------------------------------------------------------------------------ refused


def config_of(*flags: str):
    needed = ["--teacher_path", "models/tiny_wan", "--data_path", "data/scene_prompts.txt", "--num_steps", "9"]
    return load_config([*needed, *flags], settings_of)


@pytest.mark.parametrize("strategy", ["cpu", "group_offload"])
def test_dmd_trains_on_no_expert_that_is_off_the_device(strategy):
    config = config_of("--objective", "dmd")
    with pytest.raises(UserError, match=f"--objective dmd: .*--teacher_device_strategy {strategy}"):
        check_experts(config.phases, config, strategy, PLAIN)
    check_experts(config.phases, config, "offload", PLAIN)


def test_dmd_trains_on_no_expert_in_float8():
    config = config_of("--objective", "dmd", "--teacher_storage_dtype", "float8_e4m3fn")
    with pytest.raises(UserError, match="--objective dmd: .*--teacher_storage_dtype float8_e4m3fn"):
        check_experts(config.phases, config, "replicate", PLAIN)


def test_what_cannot_be_spread_is_refused():
    flags = ["--teacher_storage_dtype", "float8_e4m3fn", "--teacher_device_strategy", "balanced"]
    with pytest.raises(UserError, match="--teacher_storage_dtype float8_e4m3fn: .*--teacher_device_strategy balanced"):
        check_sharding(config_of(*flags), ranks_of(2))
    uneven = Ranks(0, 7, 0, 4, CPU, launched_by_torchrun=True)
    with pytest.raises(UserError, match="--student_sharding hybrid: 7 ranks"):
        check_sharding(config_of("--student_sharding", "hybrid"), uneven)
