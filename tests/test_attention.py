"""Another kernel computes the same self-attention; one that is not here is refused before anything is loaded."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from config.errors import UserError
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
        calls, (name, kernel) = (
            [],
            next(
                (name, kernel) for name, kernel in _AttentionBackendRegistry._backends.items() if name == "_native_math"
            ),
        )
        monkeypatch.setitem(
            _AttentionBackendRegistry._backends, name, lambda *a, **k: calls.append(a) or kernel(*a, **k)
        )
        use_attention_backend("_native_math", transformer)
        torch.testing.assert_close(transformer(*given, return_dict=False)[0], expected)
        assert len(calls) == len(transformer.blocks)


def test_what_does_not_work_here_is_one_line():
    with pytest.raises(
        UserError, match=r"--attention_backend xformers: does not work here .*install `xformers"
    ) as told:
        check_attention_backend("xformers", CPU, torch.float32)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="_native_cudnn"):
        check_attention_backend("_native_cudnn", CPU, torch.float32)
    check_attention_backend("_native_math", CPU, torch.bfloat16)
    check_attention_backend("auto", CPU, torch.float32)
