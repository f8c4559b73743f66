"""A teacher saved quantised, by torchao, is loaded as any other; its student is of ordinary numbers.

torchao talks at every start of a program that could use it, so that it is not among the requirements: `make test` puts
it where these tests alone find it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import TorchAoConfig, WanTransformer3DModel

from config.errors import UserError
from distillation.memory import expert_size
from models.folding import fold_text
from models.student import build_student, read_student_config
from models.teacher import inspect_teacher, load_transformer
from tests.test_sharding import ALONE, flags_of, go
from tests.test_train import PROGRAM, torchrun

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not here; make test runs these apart")
PARTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def quantised(random_pipeline_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "teacher"
    shutil.copytree(random_pipeline_dir, folder)
    for part in PARTS:
        shutil.rmtree(folder / part)
        settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        WanTransformer3DModel.from_pretrained(
            random_pipeline_dir, subfolder=part, quantization_config=settings, torch_dtype=torch.float32
        ).save_pretrained(folder / part)
    return folder


def test_it_says_what_the_teacher_that_it_was_made_of_says(quantised, random_pipeline_dir):
    text = fold_text(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    given = torch.randn(2, 16, 1, 4, 6), torch.full((2,), 500.0), text
    whole, packed = (
        load_transformer(folder, "transformer", torch.float32) for folder in (random_pipeline_dir, quantised)
    )
    assert type(packed.blocks[0].ffn.net[2].weight) is not type(whole.blocks[0].ffn.net[2].weight)
    with torch.no_grad():
        expected, got = (network(*given, return_dict=False)[0] for network in (whole, packed))
    assert 0 < (got - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("cut", [{}, {"num_layers": 2, "ffn_dim": 32, "num_attention_heads": 1}])
def test_a_student_of_it_is_of_ordinary_numbers(cut, quantised, tmp_path):
    info = inspect_teacher(str(quantised))
    assert info.quantised.keys() == set(PARTS)
    (tmp_path / "student.json").write_text(json.dumps({"height": 32, "width": 32} | cut))
    spec = read_student_config(tmp_path / "student.json", info.transformer_configs, info.pixels_per_patch, (32, 32))
    packed = load_transformer(quantised, "transformer_2", torch.float32)
    student, _ = build_student(spec, packed, torch.float32)
    assert all(type(p.detach()) is torch.Tensor and p.dtype == torch.float32 for p in student.parameters())
    if not cut:
        layer, own = packed.blocks[1].attn2.to_k, student.blocks[1].attn2.to_k
        assert torch.equal(own.weight, layer.weight.dequantize()) and torch.equal(own.bias, layer.bias)


def test_it_is_planned_with_what_its_files_hold(quantised, random_pipeline_dir):
    info, whole = inspect_teacher(str(quantised)), inspect_teacher(str(random_pipeline_dir))
    file = quantised / "transformer" / "diffusion_pytorch_model.safetensors"
    size = expert_size(info, "transformer")
    assert size.bytes(torch.bfloat16) == file.stat().st_size + size.buffer_bytes
    assert size.parameters == expert_size(whole, "transformer").parameters


def test_a_student_learns_from_it_and_both_draw(quantised, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
    go(ALONE, quantised, tmp_path, "out", "--objective", "trajectory", "--teacher_substeps", "1", "--sample_teacher")
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples" / "manifest.jsonl").read_text().splitlines()]
    assert {row["weights"] for row in rows} == {"teacher", "ema"} and all(row["ok"] for row in rows)
    assert "quantization_config" not in (tmp_path / "out" / "student" / "transformer" / "config.json").read_text()


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--objective", "dmd"], "--objective dmd: trains on the teacher's experts, .* quantised"),
        (["--objective", "velocity", "--lora_rank", "2"], "--lora_rank: trains on the teacher's experts, .* quantised"),
        (["--objective", "velocity", "--teacher_storage_dtype", "float8_e4m3fn"], "--teacher_storage_dtype .* already"),
    ],
)
def test_what_it_cannot_do_is_refused(flags, named, quantised, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=named):
        go(ALONE, quantised, tmp_path, "out", *flags)


def test_sharding_it_is_refused_on_all_ranks(quantised, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = flags_of(quantised, tmp_path, "out", "--objective", "velocity", "--teacher_device_strategy", "shard")
    done = torchrun(PROGRAM, *flags)
    assert done.returncode and "error: --teacher_device_strategy shard: moves weights" in done.stderr


def test_a_quantiser_that_is_not_here_is_one_line(quantised, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(quantised, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="transformer: quantised by bitsandbytes, which does not work here: .*") as told:
        go(ALONE, folder, tmp_path, "out", "--objective", "velocity")
    assert "\n" not in str(told.value)


def test_a_quantised_text_encoder_is_refused(quantised, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(quantised, folder)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="text_encoder is quantised"):
        go(ALONE, folder, tmp_path, "out", "--objective", "velocity")
