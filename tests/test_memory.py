"""The memory plan against what is really held and computed: weights exactly, activations and operations as measured."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config

from benchmarks.shapes import write_shapes
from data.prompt_embeddings import Batch
from distillation.cost import cost_of, flops_of
from distillation.fit import fitting, is_possible
from distillation.memory import Layout, Memory, Row, Shapes, Task, backward, memory_of, shapes_of, total
from distillation.objective import Noise, Setup, build_objective, own_parameters, settings_of, work
from models.flow import few_step_grid
from models.folding import fold_text, fold_text_attention
from models.sizes import LiveBytes, WanSize, folded_length, measure, text_size, vae_bytes, wan_size
from models.student import build_student, read_student_config
from models.teacher import Expert, Teacher, inspect_teacher, load_text_pipeline, load_transformer
from models.vae import decode, load_vae

CPU, BF16 = torch.device("cpu"), torch.bfloat16
FAMILIES = ("random_pipeline_dir", "random_single_pipeline_dir", "random_ti2v_pipeline_dir")
GB = 1e9


def held(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_weights_are_counted_to_the_byte(family, dtype, request):
    folder = request.getfixturevalue(family)
    info = inspect_teacher(str(folder))
    for part, config in info.transformer_configs.items():
        assert wan_size(config).bytes(dtype) == held(load_transformer(folder, part, dtype))
    encoder = load_text_pipeline(info, CPU, dtype).text_encoder
    size = text_size(UMT5Config.from_json_file(folder / "text_encoder" / "config.json"))
    assert size.bytes(dtype) == sum(p.numel() * p.element_size() for p in encoder.parameters())
    assert vae_bytes(info.vae_config, info.latent_shape(64, 64))[0] == held(load_vae(folder, CPU))


def test_a_smaller_student_is_counted_to_the_byte(random_pipeline_dir, tmp_path):
    info = inspect_teacher(str(random_pipeline_dir))
    (tmp_path / "student.json").write_text('{"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 40}')
    spec = read_student_config(tmp_path / "student.json", info.transformer_configs, info.pixels_per_patch, (32, 32))
    student, _ = build_student(spec, load_transformer(random_pipeline_dir, "transformer_2", BF16), torch.float32)
    assert wan_size(spec.transformer_config).bytes(torch.float32) == held(student)


def test_fp8_storage_is_counted_as_diffusers_casts():
    network = WanTransformer3DModel(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=64).to(BF16)
    size, before = measure(network), held(network)
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    saved = size.bytes(BF16) - size.bytes(BF16, torch.float8_e4m3fn)
    assert before - held(network) == saved > 0


@pytest.mark.parametrize(
    ("name", "billions"), [("a14b", 14.29), ("ti2v_5b", 5.0), ("wan21_1.3b", 1.42), ("wan21_14b", 14.29)]
)
def test_published_shapes_have_the_published_sizes(shapes, name, billions):
    assert shapes[name].experts[0].parameters / 1e9 == pytest.approx(billions, rel=2e-3)
    assert shapes[name].text_encoder.parameters / 1e9 == pytest.approx(5.68, rel=2e-3)


# ---------------------------------------------------------------------------------------------- activations

TINY = dict(num_attention_heads=4, attention_head_dim=48, ffn_dim=640, num_layers=6, latents=(4, 8, 8))
MIDDLE = dict(num_attention_heads=8, attention_head_dim=64, ffn_dim=1408, num_layers=3, latents=(1, 24, 32))
TEXT_TOKENS = 24


def network_and_inputs(shape: dict, expand: bool) -> tuple[WanTransformer3DModel, WanSize, int, tuple]:
    """A random network in training, its size, the tokens of a latent, and what it is called with."""
    torch.manual_seed(0)
    shape = dict(shape)
    batch, height, width = shape.pop("latents")
    network = fold_text_attention(WanTransformer3DModel(text_dim=64, freq_dim=64, **shape)).train()
    text = fold_text(torch.randn(batch, TEXT_TOKENS, 64), torch.ones(batch, TEXT_TOKENS, dtype=torch.bool))
    tokens = height * width // 4
    times = torch.full((batch, tokens) if expand else (batch,), 500.0)
    return network, measure(network, expand), tokens, (torch.randn(batch, 16, 1, height, width), times, text)


def saved_by_autograd(network: torch.nn.Module, inputs: tuple, autocast: bool) -> int:
    """Bytes of the distinct tensors, but weights, that a forward keeps for its backward."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", BF16, enabled=autocast):
        network(*inputs, return_dict=False)
    return sum(sizes.values())


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [TINY, MIDDLE], ids=["tiny", "middle"])
def test_activations_are_those_that_autograd_saves(shape, checkpointing, autocast, expand):
    network, size, tokens, inputs = network_and_inputs(shape, expand)
    if checkpointing:
        network.enable_gradient_checkpointing()
    measured = saved_by_autograd(network, inputs, autocast)
    if autocast:  # its copies of weights are counted apart; those of checkpointed blocks are not kept
        measured -= 2 * (size.multiplied - checkpointing * size.layers * size.block_multiplied)
    itemsize = 2 if autocast else 4
    # A CPU computes RMSNorm in steps.
    planned = size.saved_bytes(tokens, folded_length(TEXT_TOKENS), itemsize, checkpointing, fused_norms=False)
    assert planned * len(inputs[0]) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_peak_of_a_forward_and_backward(checkpointing, autocast):
    network, size, tokens, inputs = network_and_inputs(MIDDLE, False)
    if checkpointing:
        network.enable_gradient_checkpointing()
    with LiveBytes() as live:
        with torch.autocast("cpu", BF16, enabled=autocast):
            v = network(*inputs, return_dict=False)[0]
        v.float().square().mean().backward()
    layout = Layout(mixed_precision=BF16 if autocast else None, gradient_checkpointing=checkpointing)
    text, batch = folded_length(TEXT_TOKENS), len(inputs[0])
    kept = batch * size.saved_bytes(tokens, text, layout.itemsize, checkpointing, fused_norms=False)
    block = batch * size.backward_bytes(tokens, text, layout.itemsize)
    copies = 2 * size.multiplied if autocast else 0
    stages = backward("student", size, size.parameters, kept, block, copies, layout, checkpointing)
    assert max(map(total, stages.values())) == pytest.approx(live.peak, rel=0.2)


def test_live_bytes_are_counted_until_they_are_freed():
    x = torch.empty(1000)
    with LiveBytes() as live:
        y = x + 1
        z = y.view(10, 100) * 2  # a view is no memory of its own
        del y
        assert (live.now, live.peak) == (4000, 8000)
        w = z[:5].clone()
        del z
    assert (live.now, live.peak, len(w)) == (2000, 8000, 5)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_decoding_holds_what_was_found_on_the_meta_device(family, request):
    folder = request.getfixturevalue(family)
    info, vae = inspect_teacher(str(folder)), load_vae(folder, CPU)
    latent_shape = info.latent_shape(64, 96)
    with torch.no_grad(), LiveBytes() as live:
        decode(vae, torch.zeros(2, *latent_shape))
    assert 2 * vae_bytes(info.vae_config, latent_shape)[1] == pytest.approx(live.peak, rel=0.02)


# ---------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("shape", [TINY, MIDDLE], ids=["tiny", "middle"])
def test_operations_are_those_that_are_counted(shape, expand):
    network, size, tokens, inputs = network_and_inputs(shape, expand)
    planned = len(inputs[0]) * size.forward_flops(tokens, folded_length(TEXT_TOKENS))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward, torch.no_grad():
        network(*inputs)
    assert planned == pytest.approx(forward.get_total_flops(), rel=1e-3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        network(*inputs, return_dict=False)[0].square().mean().backward()
    assert 3 * planned == pytest.approx(both.get_total_flops(), rel=1e-2)


class Counting(torch.nn.Module):
    """A velocity field that counts the latents it is asked for, with and without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.with_gradient, self.without, self.largest = 0, 0, 0

    def forward(self, x, t, text):
        if torch.is_grad_enabled():
            self.with_gradient += len(x)
            self.largest = max(self.largest, len(x))
        else:
            self.without += len(x)
        return self.weight * x


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("velocity", {"teacher_substeps": 3, "updates_per_rollout": 4}),
        ("trajectory", {"teacher_substeps": 2, "updates_per_rollout": 2}),
        ("trajectory", {"states": "student"}),
        ("trajectory", {"jumps": 8, "teach": "student", "teacher_substeps": 2}),
        ("consistency", {"teacher_substeps": 3, "updates_per_rollout": 3, "target_decay": 0.0}),
        ("consistency", {"states": "student", "target_decay": 0.0}),
    ],
)
def test_an_objective_asks_for_the_work_that_it_announces(name, settings, monkeypatch):
    monkeypatch.setattr("distillation.objective.read_text", lambda batch, like: torch.zeros(len(like), 1, 1))
    student, teacher, batch_size = Counting(), Counting(), 2
    setup = Setup(teacher, student, few_step_grid(4, 3.0), 3.0, network=student)
    own_settings = vars(settings_of(name)(**settings))
    objective = build_objective(name, setup, own_settings)
    copies = [c for c in (getattr(objective, "guide", None),) if isinstance(c, Counting) and c is not teacher]
    batch = Batch([0, 1], torch.zeros(batch_size, 3, 4), torch.ones(batch_size, 3, dtype=torch.bool))
    for update, network in enumerate(objective.schedule(0)):
        noise = Noise(0, 0, 0, update, latent_shape=(2, 1, 2, 2))
        objective.loss(network, batch, noise)
    planned = work(name, own_settings, 4)
    assert student.with_gradient == planned.trained * batch_size
    assert student.largest == planned.at_once * batch_size
    assert student.without + sum(c.without for c in copies) == planned.drawn * batch_size
    assert teacher.without == planned.guided * batch_size and teacher.with_gradient == 0
    assert len(objective.schedule(0)) == planned.updates


@pytest.mark.parametrize("anchor_weight", [0.0, 0.5])
def test_dmd_asks_for_the_work_that_it_announces(anchor_weight, monkeypatch):
    """Over many steps: it exits at random ones, and looks at contrast now and then."""
    for place in ("objective", "objectives.dmd", "objectives.trajectory"):
        monkeypatch.setattr(f"distillation.{place}.read_text", lambda batch, like: torch.zeros(len(like), 1, 1))
    student, steps, batch_size = Counting(), 400, 2
    expert = Counting()
    expert.transformer, expert.dtype = torch.nn.Linear(1, 1), torch.float32
    teacher = Teacher([Expert(expert, 1.0, 0.0)], torch.ones(1, 4))
    setup = Setup(teacher, student, few_step_grid(4, 3.0), 3.0, network=student)
    settings = {"fake_score": "full", "fake_updates": 3, "contrast_every": 4, "contrast_stop": 9.0}
    own_settings = vars(settings_of("dmd")(**settings, anchor_weight=anchor_weight))
    objective = build_objective("dmd", setup, own_settings)
    fakes = {name: Counting() for name in objective.networks()}
    objective.use(fakes)
    batch = Batch([0, 1], torch.zeros(batch_size, 3, 4), torch.ones(batch_size, 3, dtype=torch.bool))
    for step in range(steps):
        for update, network in enumerate(objective.schedule(step)):
            objective.loss(network, batch, Noise(0, 0, step, update, latent_shape=(2, 1, 2, 2)))
        objective.look(step + 1, [(batch, Noise(0, 0, step, 9, latent_shape=(2, 1, 2, 2)))], lambda tensor: tensor)
    planned, latents = work("dmd", own_settings, 4), steps * batch_size
    assert student.with_gradient == planned.trained * latents
    assert expert.without == planned.guided * latents
    assert sum(fake.with_gradient for fake in fakes.values()) == planned.fake_trained * latents
    assert sum(fake.without for fake in fakes.values()) == planned.fake * latents
    assert student.without == pytest.approx(planned.drawn * latents, rel=0.03)


# ---------------------------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, Shapes]:
    """The published teachers, each with a student of full depth and trajectory, then dmd."""
    folder, found = tmp_path_factory.mktemp("shapes"), {}
    for name in ("a14b", "ti2v_5b", "wan21_1.3b", "wan21_14b"):
        info = inspect_teacher(str(write_shapes(folder, name)))
        spec = read_student_config(None, info.transformer_configs, info.pixels_per_patch, (704, 1280))
        found[name] = replace(shapes_of(info, spec, [], 4, 120), tasks=tuple(map(task_of, ("trajectory", "dmd"))))
    return found


def task_of(name: str, **settings) -> Task:
    settings = vars(settings_of(name)(**settings))
    return Task(name, settings, 100, work(name, settings, 4))


LAYOUT = Layout(num_gpus=8, mixed_precision=BF16, use_ema=True, sample_batch=2)


def row(memory: Memory, component: str) -> Row:
    return memory.stages[memory.peak_stage][component]


def test_a14b_on_eight_gpus_is_the_sum_of_its_parts(shapes):
    memory = memory_of(shapes["a14b"], replace(LAYOUT, teacher="shard", student_sharding="fsdp"))
    assert row(memory, "teacher").weights == pytest.approx(57.27e9 / 8, rel=1e-3)
    assert row(memory, "student").optimizer == pytest.approx(8 * 14.288e9 / 8, rel=1e-3)
    whole = memory_of(shapes["a14b"], LAYOUT)
    assert row(whole, "teacher").weights == pytest.approx(57.27e9, rel=1e-3)
    assert whole.least > 20 * 14.288e9 + 57.27e9
    assert total(whole.stages["encode prompts"]) == pytest.approx(11.36e9 + 1e9, rel=0.2), "the encoder is there alone"


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "shard"},
        {"teacher": "offload"},
        {"teacher": "group_offload"},
        {"teacher": "cpu"},
        {"teacher_storage_dtype": torch.float8_e4m3fn},
        {"student_sharding": "fsdp"},
        {"use_8bit_adam": True},
        {"use_ema": False},
        {"lora_rank": 64},
        {"gradient_checkpointing": True},
        {"sample_batch": 0},
    ],
    ids=str,
)
def test_what_saves_memory_does(shapes, change):
    layout = replace(LAYOUT, train_batch_size=4, sample_batch=16)
    saving, plain = (memory_of(shapes["a14b"], way) for way in (replace(layout, **change), layout))
    assert saving.peak <= plain.peak
    sums = [sum(map(total, memory.stages.values())) for memory in (saving, plain)]
    assert sums[0] < sums[1]


def test_hybrid_sharding_spreads_over_a_node(shapes):
    layout = replace(LAYOUT, num_gpus=32, num_nodes=4)
    assert replace(layout, student_sharding="hybrid").shards == 8
    assert replace(layout, student_sharding="fsdp").shards == 32


def test_offloading_is_slower_than_holding_and_sharding_moves_more(shapes):
    layout, task = replace(LAYOUT, gradient_checkpointing=True), shapes["a14b"].tasks[0]
    costs = {s: cost_of(shapes["a14b"], replace(layout, teacher=s), task, 989) for s in ("replicate", "offload", "cpu")}
    assert costs["replicate"].seconds < costs["offload"].seconds < costs["cpu"].seconds
    sharded = cost_of(shapes["a14b"], replace(layout, teacher="shard"), task, 989)
    assert sharded.link_bytes - costs["replicate"].link_bytes == pytest.approx(16 * 28.64e9 * 7 / 8, rel=1e-3)
    assert costs["replicate"].link_bytes == pytest.approx(2 * 4 * 14.288e9 * 7 / 8, rel=1e-3)


def test_operations_of_a_step_by_hand(shapes):
    """dmd with 4 steps: 1.5 forwards up to the random one on average, for the fake's 5 updates and the student's; and
    every 20 steps a look at 4 steps of the student and 16 of the teacher."""
    whole, layout = shapes["a14b"], replace(LAYOUT, train_batch_size=2, gradient_accumulation_steps=3)
    forward = whole.student.forward_flops(whole.tokens, whole.text)
    teacher, student, own = flops_of(whole, layout, whole.tasks[1])
    assert teacher == pytest.approx(6 * (1 + 16 / 20) * 2 * forward)
    assert student == pytest.approx(6 * (1.5 + 5 * 2.5 + 3 + 4 / 20) * forward)
    assert own == pytest.approx(6 * (1 + 5 * 2) * forward)  # adapters: no gradients of the expert's weights


def test_full_fakes_are_copies_of_both_experts(shapes):
    own = own_parameters("dmd", task_of("dmd", fake_score="full").settings, 1, list(shapes["a14b"].experts))
    assert own.trained == 2 * shapes["a14b"].experts[0].parameters and not own.adapters


def test_what_is_suggested_fits_and_does_not_train_otherwise_without_need(shapes):
    whole = replace(shapes["a14b"], tasks=shapes["a14b"].tasks[:1])
    assert not memory_of(whole, LAYOUT).fits(80 * GB)
    fits = fitting(whole, LAYOUT, 80 * GB, 989)
    assert fits and all(memory_of(whole, fit.layout).peak <= 80 * GB * 0.97 for fit in fits)
    assert not fits[0].trains_otherwise and fits[0].seconds == min(fit.seconds for fit in fits)
    alone = fitting(whole, replace(LAYOUT, num_gpus=1), 141 * GB, 989)
    assert alone and all("--lora_rank 64" in fit.flags for fit in alone), "14 B parameters in training: 229 GB"
    assert fitting(whole, replace(LAYOUT, num_gpus=1), 8 * GB, 989) == []


def test_experts_that_are_trained_on_stay_on_the_gpu(shapes):
    assert not is_possible(shapes["a14b"], replace(LAYOUT, teacher="cpu"))  # dmd's fakes stand on them
    without = replace(shapes["a14b"], tasks=shapes["a14b"].tasks[:1])
    assert is_possible(without, replace(LAYOUT, teacher="cpu"))
    assert not is_possible(without, replace(LAYOUT, teacher="cpu", lora_rank=64))
