"""The student's config, and that its weights are the teacher's."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from config.errors import UserError
from models.folding import fold_text_attention
from models.student import build_student, describe_init, read_student_config

CONFIG_DIR = Path(__file__).parents[1] / "config"
SMALL = dict(
    num_attention_heads=4, attention_head_dim=12, ffn_dim=32, num_layers=6, freq_dim=16, text_dim=16, in_channels=4,
    out_channels=4,
)  # fmt: skip
BOTH = {"transformer": SMALL, "transformer_2": SMALL}


@pytest.fixture
def teacher() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**SMALL).eval()


@pytest.fixture
def read(tmp_path):
    """Reads settings, a dict or raw text, as a student config file for a small teacher of two experts."""

    def read(settings: dict | str, teacher_configs: dict = BOTH, **kwargs):
        path = tmp_path / "student.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return read_student_config(path, teacher_configs, 16, (64, 64), **kwargs)

    return read


@torch.no_grad()
def velocity(transformer: WanTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 1, 8, 8, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    return transformer(x, torch.tensor([900.0, 300.0]), text, return_dict=False)[0]


# ------------------------------------------------------------------------------------------------ config


def test_without_a_file_the_student_is_the_low_noise_expert():
    spec = read_student_config(None, BOTH, 16, (48, 80), height=32)
    assert (spec.height, spec.width, spec.init_from, spec.layers) == (32, 80, "transformer_2", tuple(range(6)))
    assert spec.transformer_config["ffn_dim"] == 32 and spec.transformer_config["cross_attn_norm"] is True
    assert read_student_config(None, {"transformer": SMALL}, 16, (64, 64)).init_from == "transformer"


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"num_layers": 3}, (0, 2, 5)),
        ({"num_layers": 1}, (0,)),
        ({"num_layers": 3, "layers": "contiguous"}, (0, 1, 2)),
        ({"layers": [1, 4]}, (1, 4)),
        ({}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_which_blocks_are_taken(read, settings, layers):
    spec = read(settings)
    assert spec.layers == layers and spec.transformer_config["num_layers"] == len(layers)


def test_what_equals_the_teacher_may_be_written_down(read):
    assert read({"patch_size": [1, 2, 2], "attention_head_dim": 12, "image_dim": None}).layers == tuple(range(6))


def test_shipped_configs():
    a14b = dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40, text_dim=4096)
    spec = read_student_config(
        CONFIG_DIR / "student_config.json", {"transformer": a14b, "transformer_2": a14b}, 16, (1, 1)
    )
    assert (spec.height, spec.width, len(spec.layers), spec.layers[0], spec.layers[-1]) == (480, 832, 20, 0, 39)
    assert read_student_config(CONFIG_DIR / "student_config_tiny.json", BOTH, 16, (1, 1)).layers == tuple(range(6))
    assert read_student_config(CONFIG_DIR / "student_config_tiny_half.json", BOTH, 16, (1, 1)).layers == (0, 2, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layer": 3}, "unknown key 'num_layer'; did you mean 'num_layers'?"),
        ({"num_layers": 7}, "num_layers is 7; accepted are whole numbers from 1 to 6"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 2.0}, "num_layers is 2.0"),
        ({"num_layers": 3, "layers": [0, 1]}, "num_layers is 3, but layers lists 2"),
        ({"layers": [0, 6]}, "blocks, 0 to 5"),
        ({"layers": [2, 1]}, "layers is [2, 1]; accepted are"),
        ({"layers": ["a", 1]}, "layers is ['a', 1]; accepted are"),
        ({"layers": []}, "layers is []"),
        ({"layers": "every"}, "layers is 'every'; accepted are 'spaced', 'contiguous'"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; accepted are whole numbers from 1 to the teacher's 4"),
        ({"ffn_dim": 64}, "the teacher's 32"),
        ({"ffn_dim": True}, "ffn_dim is True"),
        ({"attention_head_dim": 24}, "attention_head_dim is 24; it must be as in the teacher, 12"),
        ({"patch_size": [1, 1, 1]}, "patch_size is [1, 1, 1]; it must be as in the teacher, [1, 2, 2]"),
        (
            {"init_from": "transformer_3"},
            "init_from is 'transformer_3'; this teacher has 'transformer' or 'transformer_2'",
        ),
        ({"init_from": ["transformer"]}, "init_from is ['transformer']"),
        ({"height": 100}, "height is 100; accepted are multiples of 16 pixels"),
        ({"width": "64"}, "width is '64'"),
        ("[1]", "holds a list; a JSON object"),
        ('{"height": 64,\n "width" 64}', "line 2, column 10"),
    ],
)
def test_mistakes_are_named(read, settings, message):
    with pytest.raises(UserError) as error:
        read(settings)
    assert message in str(error.value) and "student.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_that_depend_on_teacher_flags_and_file(read, tmp_path):
    with pytest.raises(UserError, match="init_from is 'transformer_2'; this teacher has 'transformer'"):
        read({"init_from": "transformer_2"}, {"transformer": SMALL})
    with pytest.raises(UserError, match="^--height is 40; accepted are multiples of 16"):
        read({"height": 64}, height=40)
    with pytest.raises(UserError, match="multiples of 32 pixels"):
        read_student_config(None, BOTH, 32, (48, 64))
    with pytest.raises(UserError, match="nowhere.json: No such file"):
        read_student_config(tmp_path / "nowhere.json", BOTH, 16, (64, 64))
    (tmp_path / "latin.json").write_bytes('{"é": 1}'.encode("latin-1"))
    with pytest.raises(UserError, match="latin.json: not UTF-8"):
        read_student_config(tmp_path / "latin.json", BOTH, 16, (64, 64))


# ------------------------------------------------------------------------------------------------ weights


def test_full_size_is_an_exact_copy_that_shares_no_memory(teacher, read):
    expected = velocity(teacher)
    student, rows = build_student(read({"num_attention_heads": 4, "ffn_dim": 32}), teacher, torch.float32)
    assert torch.equal(velocity(student), expected)
    assert {row.how for row in rows} == {"copied"} and len(rows) == len(list(teacher.parameters()))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(velocity(teacher), expected)


def test_fewer_layers_are_the_named_blocks(teacher, read):
    student, rows = build_student(read({"layers": [0, 2, 5]}), teacher, torch.float32)
    teacher.blocks = torch.nn.ModuleList(teacher.blocks[i] for i in (0, 2, 5))
    assert torch.equal(velocity(student), velocity(teacher))
    table = describe_init(rows)
    assert "blocks 0, 2, 5" in table and "fresh: none" in table
    total = next(line for line in table.splitlines() if line.startswith("total")).split()
    assert total[1:3] == [f"{sum(p.numel() for p in student.parameters()):,}", "0"]


def test_a_folded_half_precision_teacher_gives_a_stock_float32_student(teacher, read):
    teacher = fold_text_attention(teacher.to(torch.bfloat16))
    student, _ = build_student(read({}), teacher, torch.float32)
    assert {p.dtype for p in student.parameters()} == {torch.float32} and student.rope.freqs_cos.dtype == torch.float32
    assert all(p.requires_grad for p in student.parameters())
    assert torch.equal(student.proj_out.weight, teacher.proj_out.weight.float())
    assert type(student.condition_embedder.text_embedder) is not type(teacher.condition_embedder.text_embedder)
    half, _ = build_student(read({}), teacher, torch.bfloat16)
    assert half.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert half.scale_shift_table.dtype == half.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


def test_cutting_feed_forward_channels_that_do_nothing_changes_nothing(teacher, read):
    idle = torch.randperm(32, generator=torch.Generator().manual_seed(2))[:20]
    with torch.no_grad():
        for i, block in enumerate(teacher.blocks):
            if i % 2:
                block.ffn.net[2].weight[:, idle] = 0
            else:
                block.ffn.net[0].proj.weight[idle] = 0
                block.ffn.net[0].proj.bias[idle] = 0
    student, rows = build_student(read({"ffn_dim": 12}), teacher, torch.float32)
    assert torch.allclose(velocity(student), velocity(teacher), atol=1e-6)
    cut = {row.name.split(".", 2)[2] for row in rows if row.how == "cut"}
    assert cut == {"ffn.net.0.proj.weight", "ffn.net.0.proj.bias", "ffn.net.2.weight"}
    assert student.config.ffn_dim == 12 and student.blocks[0].ffn.net[2].weight.shape == (48, 12)


def test_heads_are_kept_whole_by_what_writes_and_reads_them(teacher, read):
    with torch.no_grad():
        for i, block in enumerate(teacher.blocks):
            weak = torch.arange(48).unflatten(0, (4, 12))[[i % 4, (i + 1) % 4]].flatten()
            block.attn1.to_out[0].weight[:, weak] = 0
            block.attn2.to_v.weight[weak] *= 1e-3
            block.attn2.to_q.weight[weak] *= 1e-3
            block.attn2.to_k.weight[weak] *= 1e-3
            for attention in (block.attn1, block.attn2):  # a mark that says which head a channel belongs to
                attention.norm_q.weight.copy_(torch.arange(48) // 12)
    student, _ = build_student(read({"num_attention_heads": 2}), teacher, torch.float32)
    for i, block in enumerate(student.blocks):
        strong = sorted({(i + 2) % 4, (i + 3) % 4})
        for attention in (block.attn1, block.attn2):
            assert attention.norm_q.weight.unflatten(0, (2, 12)).tolist() == [[head] * 12 for head in strong]


def test_residual_channels_that_nothing_writes_or_reads_go(teacher, read):
    """With dead channels in the residual stream, the text and both embedders' hidden layers, the live ones stay."""
    live = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:24].sort().values
    dead = torch.tensor([c for c in range(48) if c not in live])
    with torch.no_grad():
        teacher.patch_embedding.weight[dead] = 0
        teacher.condition_embedder.time_embedder.linear_2.weight[dead] = 0
        teacher.condition_embedder.text_embedder.linear_2.weight[dead] = 0
        for block in teacher.blocks:
            for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                layer.weight[dead] = 0
    student, rows = build_student(read({"num_attention_heads": 2}), teacher, torch.float32)
    assert torch.equal(student.patch_embedding.weight, teacher.patch_embedding.weight[live])
    assert torch.equal(student.proj_out.weight, teacher.proj_out.weight[:, live])
    assert torch.equal(student.scale_shift_table, teacher.scale_shift_table[:, :, live])
    assert torch.equal(student.blocks[1].scale_shift_table, teacher.blocks[1].scale_shift_table[:, :, live])
    modulation, whole = student.condition_embedder.time_proj, teacher.condition_embedder.time_proj
    expected = whole.weight.unflatten(0, (6, 48))[:, live][:, :, live]
    assert torch.equal(modulation.weight.unflatten(0, (6, 24)), expected)
    # Text channels are a space of their own: keys are read from the text that is written.
    text = student.condition_embedder.text_embedder.linear_2.bias
    assert torch.equal(text, teacher.condition_embedder.text_embedder.linear_2.bias[live])
    assert torch.isfinite(velocity(student)).all()
    assert "proj_out" in {row.name.split(".")[0] for row in rows if row.how == "cut"}


@pytest.mark.parametrize(
    "settings", [{"num_attention_heads": 1, "ffn_dim": 1}, {"num_attention_heads": 3, "layers": [5]}]
)
def test_a_cut_student_runs_and_is_the_same_every_time(teacher, read, settings):
    first, second = (build_student(read(settings), teacher, torch.float32)[0] for _ in range(2))
    assert torch.isfinite(velocity(first)).all() and torch.equal(velocity(first), velocity(second))
