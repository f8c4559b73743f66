import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from config.errors import UserError
from data import prompt_embeddings
from data.prompt_embeddings import encode_prompts, encoder_key, prompt_name
from distributed.process_group import Ranks
from tests.ranks import run_ranks

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), launched_by_torchrun=False)
PROMPTS = ["a cat", "a dog on a mat", "", "ein Bär", "a cat", "one two three four five"]


def embed(prompt: str) -> torch.Tensor:
    """(n, 8) bf16, one row a word and one for the end, different for each prompt."""
    words = [*prompt.split(), "</s>"]
    generator = torch.Generator().manual_seed(len(prompt) + sum(prompt.encode()))
    return torch.randn(len(words), 8, generator=generator).to(torch.bfloat16)


class Encoder:
    def __init__(self):
        self.loads, self.batches = 0, []

    def load(self):
        self.loads += 1
        return self

    def __call__(self, prompts):
        self.batches.append(list(prompts))
        padded = torch.full((len(prompts), 512, 8), 7.0, dtype=torch.bfloat16)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(embed(prompt))] = embed(prompt)
        return [row[: len(embed(prompt))] for row, prompt in zip(padded, prompts, strict=True)]


def test_prompts_that_fill_the_text_are_counted(tmp_path):
    embeddings = encode(PROMPTS, Encoder().load, tmp_path)
    assert [embeddings.count_at_least(tokens) for tokens in (1, 3, 6, 7)] == [6, 5, 2, 0]


def no_encoder():
    raise AssertionError("the text encoder was loaded")


def encode(prompts, load, folder, **kwargs):
    return encode_prompts(prompts, load, folder, "key", ALONE, progress=False, **kwargs)


def test_encoded_once_and_read_back(tmp_path):
    encoder = Encoder()
    embeddings = encode(PROMPTS, encoder.load, tmp_path, batch_size=2)
    assert encoder.loads == 1
    assert encoder.batches == [["a cat", "a dog on a mat"], ["", "ein Bär"], ["one two three four five"]]
    again = encode(PROMPTS, no_encoder, tmp_path)
    for store in (embeddings, again):
        assert len(store) == len(PROMPTS)
        assert all(store[i].dtype == torch.bfloat16 and store[i].equal(embed(p)) for i, p in enumerate(PROMPTS))
    # What is stored is unpadded.
    assert sum(f.stat().st_size for f in tmp_path.rglob("*")) < 10_000


def test_batch_is_padded_with_zeros(tmp_path):
    store = encode(PROMPTS, Encoder().load, tmp_path)
    batch = store.batch([1, 2, 0])
    assert batch.prompt_indices == [1, 2, 0]
    assert batch.prompt_embeds.shape == (3, 6, 8) and batch.prompt_embeds.dtype == torch.bfloat16
    assert batch.prompt_mask.dtype == torch.bool and batch.prompt_mask.sum(1).tolist() == [6, 1, 3]
    for row, mask, index in zip(batch.prompt_embeds, batch.prompt_mask, [1, 2, 0], strict=True):
        assert row[mask].equal(embed(PROMPTS[index]))
        assert not row[~mask].any()


def test_what_is_read_may_be_written_to(tmp_path):
    store = encode(PROMPTS, Encoder().load, tmp_path)
    store[0].zero_()
    store.batch([0]).prompt_embeds.zero_()
    assert store[0].equal(embed(PROMPTS[0]))


def test_only_new_prompts_are_encoded(tmp_path):
    encode(["a", "b"], Encoder().load, tmp_path)
    encoder = Encoder()
    store = encode(["c", "b", "a", "d"], encoder.load, tmp_path)
    assert encoder.batches == [["c", "d"]]
    assert [store[i].equal(embed(p)) for i, p in enumerate("cbad")] == [True] * 4


def test_an_interruption_keeps_the_parts_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_embeddings, "PROMPTS_PER_PART", 3)
    prompts = [f"prompt {i}" for i in range(8)]

    class Breaks(Encoder):
        def __call__(self, batch):
            if "prompt 7" in batch:
                raise RuntimeError("power cut")
            return super().__call__(batch)

    with pytest.raises(RuntimeError, match="^power cut$"):
        encode(prompts, Breaks().load, tmp_path, batch_size=2)
    assert sorted(p.suffix for p in (tmp_path / "key").iterdir()) == [".safetensors"] * 2
    encoder = Encoder()
    store = encode(prompts, encoder.load, tmp_path)
    assert encoder.batches == [["prompt 6", "prompt 7"]]
    assert all(store[i].equal(embed(p)) for i, p in enumerate(prompts))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        encode(PROMPTS, Encoder().load, tmp_path)
    assert list((tmp_path / "key").iterdir()) == []


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_torn_part_is_encoded_again(tmp_path, monkeypatch, caplog, keep):
    monkeypatch.setattr(prompt_embeddings, "PROMPTS_PER_PART", 2)
    encode(["a", "b", "c"], Encoder().load, tmp_path)
    torn = next(p for p in (tmp_path / "key").iterdir() if prompt_name("a") in names(p))
    torn.write_bytes(torn.read_bytes()[:keep])
    encoder = Encoder()
    with caplog.at_level(logging.WARNING):
        store = encode(["a", "b", "c"], encoder.load, tmp_path)
    assert encoder.batches == [["a", "b"]]
    assert torn.name in caplog.text and "ignored" in caplog.text
    assert all(store[i].equal(embed(p)) for i, p in enumerate("abc"))


@pytest.mark.parametrize(
    ("encoded", "said"),
    [
        (torch.full((2, 8), torch.nan), "not finite for 'a'"),
        (torch.ones(1, 2, 8), r"shape \(1, 2, 8\) for 'a'"),
        (torch.ones(0, 8), r"shape \(0, 8\) for 'a'"),
    ],
)
def test_bad_embeddings_are_not_kept(tmp_path, encoded, said):
    with pytest.raises(ValueError, match=said):
        encode(["a"], lambda: lambda prompts: [encoded], tmp_path)
    assert list((tmp_path / "key").iterdir()) == []


def test_an_encoder_that_drops_a_prompt_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        encode(["a", "b"], lambda: lambda prompts: [embed("a")], tmp_path)


def names(part: Path) -> list[str]:
    with safe_open(part, framework="pt") as tensors:
        return list(tensors.keys())


# ---------------------------------------------------------------------------------------------- several ranks


def encode_on_ranks(ranks, folder):
    prompts = [f"prompt {i}" for i in range(7)]
    prompt_embeddings.PROMPTS_PER_PART = 2
    seen = {}
    for name, batch_size in (("all", 3), ("again", 3)):
        encoder = Encoder()
        store = encode_prompts(prompts, encoder.load, folder, "key", ranks, batch_size, progress=False)
        seen[name] = [prompt for batch in encoder.batches for prompt in batch]
        assert all(store[i].equal(embed(p)) for i, p in enumerate(prompts))
    encoder = Encoder()
    encode_prompts([*prompts, "one more"], encoder.load, folder, "key", ranks, progress=False)
    seen["one more"] = encoder.loads

    def broken():
        if ranks.rank == 1:
            raise OSError("no weights")
        return Encoder()

    try:
        encode_prompts(["new", "newer"], broken, folder, "key", ranks, progress=False)
    except Exception as error:
        seen["raised"] = f"{type(error).__name__}: {error}"
    return seen


def test_two_ranks_share_the_work_and_the_errors(tmp_path):
    first, second = run_ranks(encode_on_ranks, 2, tmp_path)
    assert first["all"] == ["prompt 0", "prompt 1", "prompt 2"]
    assert second["all"] == ["prompt 3", "prompt 4", "prompt 5", "prompt 6"]
    assert first["again"] == second["again"] == []
    assert first["one more"] + second["one more"] == 1  # a rank without work loads no encoder
    assert first["raised"] == "PeerFailed: rank 1: OSError: no weights"
    assert second["raised"] == "OSError: no weights"


# ---------------------------------------------------------------------------------------------- the key


def make_encoder(folder: Path, value: float = 0.0, **config) -> tuple[Path, Path]:
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    encoder.mkdir(parents=True)
    tokenizer.mkdir()
    weights = torch.zeros(1_000_000)  # 4 MB: the middle is not read
    weights[-1] = value
    save_file({"weight": weights}, encoder / "model.safetensors")
    config = {"d_model": 8, "_name_or_path": str(folder), "transformers_version": str(folder)} | config
    (encoder / "config.json").write_text(json.dumps(config))
    (tokenizer / "tokenizer.json").write_text('{"vocab": ["a"]}')
    (tokenizer / "spiece.model").write_bytes(b"pieces")
    return encoder, tokenizer


def test_key_follows_what_is_encoded_not_where_it_lies(tmp_path):
    encoder, tokenizer = make_encoder(tmp_path / "one")
    key = encoder_key(encoder, tokenizer, torch.float32, 512)
    assert key == encoder_key(*make_encoder(tmp_path / "elsewhere"), torch.float32, 512)
    others = {
        encoder_key(encoder, tokenizer, torch.bfloat16, 512),
        encoder_key(encoder, tokenizer, torch.float32, 256),
        encoder_key(*make_encoder(tmp_path / "weights", value=1.0), torch.float32, 512),
        encoder_key(*make_encoder(tmp_path / "config", d_model=9), torch.float32, 512),
    }
    (tokenizer / "spiece.model").write_bytes(b"others")
    others.add(encoder_key(encoder, tokenizer, torch.float32, 512))
    (tokenizer / "tokenizer.json").write_text('{"vocab": ["b"]}')
    others.add(encoder_key(encoder, tokenizer, torch.float32, 512))
    assert len(others - {key}) == 6


def test_key_names_the_folder_that_lacks_something(tmp_path):
    encoder, tokenizer = make_encoder(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        encoder_key(tmp_path / "nowhere", tokenizer, torch.float32, 512)
    (encoder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="text_encoder: no text encoder weights"):
        encoder_key(encoder, tokenizer, torch.float32, 512)
