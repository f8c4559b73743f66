"""Another kernel computes the same self-attention; one that is not here is refused before anything is loaded."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from config.config import load_config
from config.errors import UserError
from distillation import plan
from distillation.objective import settings_of
from models.attention import check_attention_backend, use_attention_backend
from models.folding import fold_text
from models.teacher import load_transformer

CPU = torch.device("cpu")


def test_the_kernel_asked_for_computes_all_self_attention_and_nothing_else(random_pipeline_dir, monkeypatch):
    transformer = load_transformer(random_pipeline_dir, "transformer", torch.float32)
    text = fold_text(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    given = torch.randn(2, 16, 1, 4, 6), torch.full((2,), 500.0), text
    with torch.no_grad():
        expected = transformer(*given, return_dict=False)[0]
        calls, backends, math = [], _AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH
        kernel = backends[math]
        monkeypatch.setitem(backends, math, lambda *args, **kwargs: calls.append(args) or kernel(*args, **kwargs))
        use_attention_backend("_native_math", transformer)
        torch.testing.assert_close(transformer(*given, return_dict=False)[0], expected)
        assert len(calls) == len(transformer.blocks)


def test_what_does_not_work_here_is_one_line():
    with pytest.raises(UserError, match="--attention_backend _native_cudnn: does not work here .*native") as told:
        check_attention_backend("_native_cudnn", CPU, torch.float32)
    assert "\n" not in str(told.value)
    check_attention_backend("_native_math", CPU, torch.bfloat16)
    check_attention_backend("auto", CPU, torch.float32)


def test_it_must_work_wherever_the_teacher_is():
    """Also where that is the CPU, beside a student on a GPU; here, beside one that is nowhere."""
    config = load_config(
        [
            "--teacher_path",
            "t",
            "--data_path",
            "data/scene_prompts.txt",
            "--num_steps",
            "1",
            "--attention_backend",
            "_native_cudnn",
        ],
        settings_of,
    )
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "check_attention_backend", lambda *given: asked.append(given))
        plan.check_attention(config, "cpu", torch.device("cuda", 0), torch.bfloat16)
    assert set(asked) == {
        ("_native_cudnn", torch.device("cuda", 0), torch.float32), ("_native_cudnn", CPU, torch.bfloat16)
    }  # fmt: skip
