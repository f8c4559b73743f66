"""Checkpoints that are whole or not there: written aside, synced, renamed; with a hash of every file beside them.

    checkpoints/step_00000500/
      student/*.safetensors, ema/…, …   tensors, a folder a part, by torch's distributed checkpoint
      state.json                        all that is no tensor
      index.json                        size and hash of each file above

Rank 0 alone writes, in a thread beside the training: tensors are alike on all ranks, and of those that are sharded the
slices are put together first. So it does not matter to a checkpoint how, or over how many ranks, networks are spread.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from config.errors import UserError
from distributed.process_group import Ranks, broadcast_object, gather_objects, on_main, together
from distributed.sharding import whole

log = logging.getLogger(__name__)
# What `no_dist` asks for is not worth a warning where there is no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

LATEST = "latest"
WRITER = "checkpoint"  # the name of the thread that writes one
TENSOR = "__tensor__"  # in state.json, in place of a tensor: [part, name]
HASHED_AT_ONCE = 2**24  # bytes


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written. Those before it are as they were."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        keep: how many; older ones are deleted once a new one is whole. None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None, ranks: Ranks) -> None:
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self._writer: threading.Thread | None = None
        self._error: CheckpointFailed | None = None
        if ranks.is_main:
            for left in folder.glob(".step_*.tmp"):  # by a writer that was killed
                shutil.rmtree(left)

    def save(self, step: int, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Copy the state, and begin to write it: training may go on. All ranks call it.

        Args:
            state: nested dicts and lists of tensors, numbers and text, alike on all ranks but for the slices of sharded
                tensors. Its top level names parts.
            own: what each rank has for itself; no tensors.

        Raises:
            CheckpointFailed: the one before could not be written; on all ranks.
        """
        self.finish()
        own_by_rank = gather_objects(own)
        parts, facts = split(state)
        copies = {part: {} for part in parts}
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                gathered = whole(tensor.detach())  # all ranks; one at a time, so that no rank holds more than that
                if self.ranks.is_main:
                    copies[part][name] = gathered.to("cpu", copy=True)
        if not self.ranks.is_main:
            return
        facts = {"step": step, "world_size": self.ranks.world_size, "state": facts, "ranks": own_by_rank}
        self._writer = threading.Thread(target=self._write, args=(step, copies, facts), name=WRITER)
        self._writer.start()

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. All ranks call it. Raises CheckpointFailed on all of them."""

        def wait() -> None:
            writer, self._writer = self._writer, None
            if writer:
                writer.join()
            self.check()

        on_main(self.ranks, wait)

    def check(self) -> None:
        """Raises CheckpointFailed, on rank 0 alone, where the last checkpoint has turned out not to be writable.

        Not a collective; whoever trains on without checkpoints works for nothing.
        """
        error, self._error = self._error, None
        if error:
            raise error

    def _write(self, step: int, parts: dict[str, dict[str, torch.Tensor]], facts: dict) -> None:
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            write_checkpoint(temporary, parts, facts)
            if final.exists():  # of a run that was resumed before it, or that found it broken
                shutil.rmtree(final)
            os.replace(temporary, final)
            _sync(self.folder)
            self._prune(final)
        except Exception as error:  # kept for `finish`, which tells all ranks
            shutil.rmtree(temporary, ignore_errors=True)
            failed = CheckpointFailed(f"{final} could not be written: {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._error = failed

    def _prune(self, newest: Path) -> None:
        """Only older ones go: a folder that is resumed from in the middle keeps what is ahead until it is replaced."""
        older = [folder for folder in list_checkpoints(self.folder) if folder.name < newest.name]
        for folder in older[: -self.keep + 1 or None] if self.keep else []:
            shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------ one checkpoint


def write_checkpoint(folder: Path, parts: dict[str, dict[str, torch.Tensor]], facts: dict[str, Any]) -> None:
    """Everything into `folder`, on the disk when it returns."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for part, tensors in parts.items():
        if tensors:
            with _its_own_error():
                dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / part)), no_dist=True)
    _write_json(folder / "state.json", facts)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    index = {str(path.relative_to(folder)): [path.stat().st_size, _hash(path)] for path in files}
    _write_json(folder / "index.json", index)
    for path in [*files, *{path.parent for path in files}, folder]:
        _sync(path)


@contextmanager
def _its_own_error() -> Iterator[None]:
    """What torch packs into a CheckpointException, which is no Exception and would pass by whoever looks for one."""
    try:
        yield
    except CheckpointException as packed:
        error, _ = next(iter(packed.failures.values()))
        raise error from None


def what_is_broken(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, in words, or None."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        for name, (size, digest) in index.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _hash(path) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"index.json: {type(error).__name__}: {error}"
    return None if "state.json" in index else "index.json does not name state.json"


def read_facts(folder: Path) -> dict[str, Any]:
    """{"step", "world_size", "state", "ranks"} as `Checkpoints.save` was given them; tensors are left out of "state",
    see `read_part`."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def read_part(folder: Path, facts: dict[str, Any], part: str) -> Any:
    """One part of the state, its tensors on the CPU."""
    tensors = {}
    if (folder / part).is_dir():
        reader = HuggingFaceStorageReader(str(folder / part))
        known = reader.read_metadata().state_dict_metadata
        tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in known.items()}
        with _its_own_error():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    return join(facts["state"][part], {part: tensors})


# ------------------------------------------------------------------------------------------------ which one


def list_checkpoints(folder: Path) -> list[Path]:
    """The oldest first; also broken ones."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def find_checkpoint(asked: str, folder: Path, ranks: Ranks) -> Path | None:
    """The checkpoint to resume from, the same on all ranks; None where the latest is asked for and there is none.

    Args:
        asked: "latest", or a checkpoint's folder, or its name in `folder`.

    Raises:
        UserError: the one that is asked for is missing or broken, or all are broken.
    """

    def find() -> Path | None:
        if asked == LATEST:
            return _latest(folder)
        path = next((p for p in (Path(asked), folder / asked) if p.is_dir()), None)
        if path is None:
            raise UserError(
                f"--resume_from_checkpoint {asked}: no such folder; accepted are latest, or a folder such as "
                f"{folder / 'step_00000500'}"
            )
        if why := what_is_broken(path):
            raise UserError(f"--resume_from_checkpoint {asked}: cannot be used: {why}; accepted is another, or latest")
        return path

    # Rank 0 chooses, for all: the folder may change between two looks at it.
    return broadcast_object(together(lambda: find() if ranks.is_main else None))


def _latest(folder: Path) -> Path | None:
    candidates = list_checkpoints(folder)
    for path in reversed(candidates):
        why = what_is_broken(path)
        if why is None:
            return path
        log.warning("checkpoint %s cannot be used: %s; trying the one before", path, why)
    if candidates:
        raise UserError(
            f"--resume_from_checkpoint latest: all {len(candidates)} checkpoints in {folder} are broken; delete them "
            "to start from the beginning"
        )
    return None


# ------------------------------------------------------------------------------------------------ tensors and the rest


def split(state: dict[str, Any]) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Part → name → tensor, and the state with markers in place of tensors, as JSON can hold it."""
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in state}

    def walk(value: Any, part: str, path: tuple[str, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            name = ".".join(path) or part
            parts[part][name] = value
            return {TENSOR: [part, name]}
        if isinstance(value, dict):
            return {str(key): walk(each, part, (*path, str(key))) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(each, part, (*path, str(i))) for i, each in enumerate(value)]
        return value

    return parts, {part: walk(value, part, ()) for part, value in state.items()}


def join(facts: Any, parts: dict[str, dict[str, torch.Tensor]]) -> Any:
    """What `split` has taken apart. Keys are text now, and tuples lists."""
    if isinstance(facts, dict):
        if TENSOR in facts:
            part, name = facts[TENSOR]
            return parts[part][name]
        return {key: join(value, parts) for key, value in facts.items()}
    return [join(value, parts) for value in facts] if isinstance(facts, list) else facts


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _sync(path: Path) -> None:
    """Onto the disk, file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
