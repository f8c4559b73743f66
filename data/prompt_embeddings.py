"""Every prompt encoded once, the work split over the ranks, kept on disk; the text encoder can then leave memory.

On disk: `cache_dir/<key>/part-*.safetensors`, each a few hundred prompts, unpadded. `key` stands for the text encoder
(`encoder_key`), a tensor's name for its prompt (`prompt_name`), so runs with other prompts share what they have in
common. Parts are only ever added, under names of their own: runs at the same time do not disturb each other.
"""

import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from config.errors import UserError
from data.files import whole_file
from distributed.process_group import Ranks, broadcast_object, gather_objects, together

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 1  # part of every key: raise it when what is stored changes
PROMPTS_A_CALL = 32  # of the text encoder
PROMPTS_PER_PART = 256  # what an interruption loses at most, a rank; 84 MB of UMT5-XXL in bf16 at 40 tokens a prompt
SAMPLED_BYTES = 2**20  # read from either end of a weight file for its hash
ORIGIN_KEYS = ("transformers_version", "name_or_path")

Encode = Callable[[list[str]], list[torch.Tensor]]  # prompts → for each its (n, D) embedding, unpadded


@dataclass(frozen=True, eq=False)
class Batch:
    """What the data side hands to an objective."""

    prompt_indices: list[int]
    prompt_embeds: torch.Tensor  # (B, L, D), L the longest prompt's tokens; zero where the mask is False
    prompt_mask: torch.Tensor  # (B, L) bool, True for real tokens, which come first


class PromptEmbeddings:
    """The embeddings of a list of prompts, read from memory-mapped files as they are asked for."""

    def __init__(self, prompts: list[str], parts: dict[str, Path]):
        """`parts` holds for each prompt's name the file that it is in."""
        self._places = [(name, parts[name]) for name in map(prompt_name, prompts)]
        self._open_parts: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> torch.Tensor:
        """(n, D): prompt `index`, in the dtype that it was encoded in, on the CPU."""
        return self._mapped(index).clone()

    def count_at_least(self, tokens: int) -> int:
        """How many of the prompts have so many tokens, or more. Reads no embedding."""
        return sum(self._open(part).get_slice(name).get_shape()[0] >= tokens for name, part in self._places)

    def batch(self, indices: list[int]) -> Batch:
        """The prompts at `indices`, padded with zeros to the longest of them, on the CPU."""
        embeds = [self._mapped(index) for index in indices]
        lengths = torch.tensor([len(e) for e in embeds])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, L)
        return Batch(list(indices), pad_sequence(embeds, batch_first=True), mask)

    def _mapped(self, index: int) -> torch.Tensor:
        """A view of the mapping: whoever wrote to it would change what later reads see."""
        name, part = self._places[index]
        return self._open(part).get_tensor(name)

    def _open(self, part: Path) -> Any:
        if part not in self._open_parts:
            self._open_parts[part] = safe_open(part, framework="pt")
        return self._open_parts[part]


def encode_prompts(
    prompts: list[str],
    load_encoder: Callable[[], Encode],
    cache_dir: str | Path,
    key: str,
    ranks: Ranks,
    batch_size: int = PROMPTS_A_CALL,
    progress: bool = True,
    after_part: Callable[[], None] = lambda: None,
) -> PromptEmbeddings:
    """Embeddings of all prompts; those that the cache lacks are encoded first, each on one rank. Collective.

    Args:
        prompts: the same on all ranks.
        load_encoder: called once on each rank that has something to encode, else never: a second run needs no text
            encoder. Nothing here keeps what it returned.
        cache_dir: on a file system that all ranks see.
        key: from `encoder_key`.
        batch_size: prompts a call of the encoder.
        progress: whether rank 0 shows a bar of its share.
        after_part: called by all ranks together between parts; what it raises, on all of them alike, ends the encoding.

    Raises:
        What encoding or writing raised, on the rank where it was raised; RuntimeError with that rank's words on the
        others. What had been encoded before is kept.
    """
    folder = Path(cache_dir) / key
    parts, missing = _agree_on_missing(prompts, folder, ranks)
    if missing:
        written = _encode_missing(missing, load_encoder, folder, ranks, batch_size, progress, after_part)
        # All ranks: names are exchanged, not listed again. A network file system may list what it saw minutes ago.
        for names in gather_objects(written):
            parts.update(names)
    together(_check_visible, set(parts.values()))
    return PromptEmbeddings(prompts, parts)


def prompt_name(prompt: str) -> str:
    """The name under which a prompt's embedding is stored."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def encoder_key(text_encoder_dir: Path, tokenizer_dir: Path, dtype: torch.dtype, max_sequence_length: int) -> str:
    """What tells one text encoder's embeddings from another's, wherever its folders lie.

    Weight files, which may hold gigabytes, count by size, safetensors header and first and last MiB.

    Raises:
        UserError: a folder without the files that it should hold.
    """
    weights = [f for f in _files(text_encoder_dir) if f.suffix in (".safetensors", ".bin")]
    if not weights:
        raise UserError(f"{text_encoder_dir}: no text encoder weights (.safetensors or .bin)")
    digest = hashlib.sha256(f"{LAYOUT_VERSION} {dtype} {max_sequence_length}".encode())
    for file in [*_files(text_encoder_dir), *_files(tokenizer_dir)]:
        if file in weights:
            content = _weights_sample(file)
        elif file.suffix == ".json":
            content = _without_origin(file)
        else:
            content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def _files(folder: Path) -> list[Path]:
    files = sorted(f for f in Path(folder).glob("*") if f.is_file() and not f.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: no such folder, or nothing in it")
    return files


def _weights_sample(file: Path) -> bytes:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        header = b""
        if file.suffix == ".safetensors":
            header = stream.read(min(size, 8 + int.from_bytes(stream.read(8), "little")))
        stream.seek(0)
        first = stream.read(SAMPLED_BYTES)
        stream.seek(max(0, size - SAMPLED_BYTES))
        return b"%d " % size + header + first + stream.read(SAMPLED_BYTES)


def _without_origin(file: Path) -> bytes:
    """A JSON file without what says where it came from and who wrote it, which change nothing of what is encoded."""
    try:
        config = json.loads(file.read_bytes())
    except ValueError:
        raise UserError(f"{file}: not JSON") from None
    if isinstance(config, dict):
        config = {k: v for k, v in config.items() if not k.startswith("_") and k not in ORIGIN_KEYS}
    return json.dumps(config, sort_keys=True).encode()


# ---------------------------------------------------------------------------------------------- encoding


def _agree_on_missing(prompts: list[str], folder: Path, ranks: Ranks) -> tuple[dict[str, Path], list[str]]:
    """What the cache holds, as name → file, and the prompts that it lacks. Collective."""
    # Rank 0 looks, for all: ranks that look for themselves may see different files, split differently, and miss some.
    found = together(lambda: _stored_names(folder) if ranks.is_main else {})
    parts = broadcast_object(found)
    return parts, [prompt for prompt in dict.fromkeys(prompts) if prompt_name(prompt) not in parts]


def _stored_names(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, Path] = {}
    for part in sorted(folder.glob("part-*.safetensors")):
        try:
            with safe_open(part, framework="pt") as tensors:  # reads the header; checks it against the file's size
                names.update(dict.fromkeys(tensors.keys(), part))
        except (SafetensorError, OSError) as error:
            logger.warning("%s: ignored, cannot be read (%s); its prompts are encoded again", part, error)
    return names


def _encode_missing(
    missing: list[str],
    load_encoder: Callable[[], Encode],
    folder: Path,
    ranks: Ranks,
    batch_size: int,
    progress: bool,
    after_part: Callable[[], None],
) -> dict[str, Path]:
    """Encode and write this rank's share of `missing`; the names that it wrote. Collective."""
    first, end = (len(missing) * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
    share = missing[first:end]
    encode = together(lambda: load_encoder() if share else None)
    # All ranks go through as many rounds as the longest share has parts, so that each hears of the others' errors.
    rounds = math.ceil(math.ceil(len(missing) / ranks.world_size) / PROMPTS_PER_PART)
    written: dict[str, Path] = {}
    show = progress and ranks.is_main
    with tqdm(total=len(share), desc="Encoding prompts", unit="prompt", disable=not show) as bar:
        for i in range(rounds):
            part = share[i * PROMPTS_PER_PART : (i + 1) * PROMPTS_PER_PART]
            written |= together(_write_part, part, encode, folder, batch_size, bar)
            after_part()
    return written


def _write_part(prompts: list[str], encode: Encode, folder: Path, batch_size: int, bar: tqdm) -> dict[str, Path]:
    if not prompts:
        return {}
    tensors: dict[str, torch.Tensor] = {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for prompt, embeds in zip(batch, encode(batch), strict=True):
            tensors[prompt_name(prompt)] = _checked(embeds, prompt)
        bar.update(len(batch))
    part = folder / f"part-{uuid.uuid4().hex}.safetensors"
    _write_atomically(part, save(tensors))
    return dict.fromkeys(tensors, part)


def _checked(embeds: torch.Tensor, prompt: str) -> torch.Tensor:
    """A copy that stands alone: a slice would be stored, and kept in memory, with all of its padding."""
    if embeds.ndim != 2 or not len(embeds):
        raise ValueError(
            f"the encoder returned shape {tuple(embeds.shape)} for {prompt!r}; expected (tokens, channels)"
        )
    if not embeds.isfinite().all():  # would be kept for good
        raise ValueError(f"the encoder returned values that are not finite for {prompt!r}")
    return embeds.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _write_atomically(path: Path, content: bytes) -> None:
    """The file appears whole or not at all, also when this process is killed or the machine goes down."""
    with whole_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _check_visible(parts: set[Path]) -> None:
    for part in parts:
        if not part.is_file():
            raise UserError(f"{part}: written by another rank, not seen by this one; the cache folder must be shared")
