"""Sample pictures on every rank at once: prompts split, true batches, PNGs written while the next batch is drawn.

Nothing inside the drawing is a collective, so a slow or a failing rank keeps nobody from finishing its share. Then all
ranks, those without prompts too, take part in one exchange of rows and errors, and in one barrier. Scores, computed all
the while, are exchanged after it: no picture waits for them.

Only a network that is sharded is drawn from in step: each of its forwards is a collective, so every rank draws as many
batches of pictures as the others, where it has too few prompts pictures that nobody keeps, and one that fails ends the
job instead of leaving the others to wait for it.
"""

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data.files import whole_file
from distributed.process_group import Ranks, barrier, gather_objects, tally
from distributed.stop import Stopped, StopSignal
from models.flow import TimeGrid, VelocityField
from models.folding import fold_texts
from models.vae import decode, to_pil
from sampling.ddim import randn, rollout
from sampling.in_flight import Scoring
from sampling.review import add_to_manifest, write_review, write_thumbnail
from sampling.scoring import Shot, alarms, compare_prompts, failures, label_of, means, same_noise

log = logging.getLogger(__name__)

VERBOSE_LOGGING_THRESHOLD = 4  # a log line a picture up to so many prompts a rank, the bar alone beyond
PROGRESS_SECONDS = 0.5  # between two looks at how far the other ranks are
DEFAULT_BATCH_SIZE = 16  # enough to fill a GPU, few enough that writing overlaps with drawing


@dataclass(frozen=True)
class Round:
    """One round of pictures. Every rank holds the same one."""

    prompts: tuple[str, ...]
    epoch: int
    step: int
    grid: TimeGrid
    shift: float
    height: int
    width: int
    seed: int  # picture i is drawn from seed + i
    weights: str = "raw"  # "raw", "ema", or "teacher"
    sampler: str = "ddim"
    eta: float = 0.0
    phase: str = ""  # what the weights have just been trained with, such as "2 dmd"

    @property
    def prefix(self) -> str:
        return "teacher" if self.weights == "teacher" else f"epoch_{self.epoch:04d}"


@dataclass
class Row:
    """A line of the manifest: all that is needed to draw the picture again, or why it is missing."""

    file: str
    prompt: str
    prompt_index: int
    epoch: int
    step: int
    rank: int
    seed: int
    sampler: str
    num_inference_steps: int
    eta: float
    shift: float
    weights: str
    height: int
    width: int
    phase: str = ""
    seconds: float = 0.0
    ok: bool = False
    error: str | None = None
    scores: dict = dataclass_field(default_factory=dict)  # by scorer; a picture is scored after it is written


class RoundFailed(RuntimeError):
    """No picture of a round could be drawn, or a rank could not take part. Raised alike on every rank."""


def share(count: int, rank: int, world_size: int) -> range:
    """The prompts of a rank: ceil(count / world_size) neighbours each, so 5 on 4 ranks are 2, 2, 1, 0."""
    each = -(-count // world_size)
    return range(min(rank * each, count), min((rank + 1) * each, count))


class ParallelSampler:
    """Draws rounds of pictures into `folder`; remembers the batch size that fits.

    Args:
        latent_shape: (C, 1, H, W) of one picture.
        batch_size: pictures drawn together; by default up to DEFAULT_BATCH_SIZE. Halved when memory runs out.
        scoring: scores this rank's pictures, by scorers that are alike on all ranks.
        stop: looked at between batches.
        metrics: metrics.jsonl, for the review page's curves.
        teacher_rows: of the manifest, where this run's teacher has drawn before the sampler was made.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        latent_shape: tuple[int, ...],
        folder: Path,
        ranks: Ranks,
        batch_size: int | None = None,
        scoring: Scoring | None = None,
        stop: StopSignal | None = None,
        metrics: Path | None = None,
        teacher_rows: Iterable[dict] = (),
    ) -> None:
        self.vae, self.latent_shape, self.folder, self.ranks = vae, latent_shape, folder, ranks
        self.batch_size = self.decode_batch_size = self._common_batch_size = batch_size or DEFAULT_BATCH_SIZE
        # Decoding runs beside the next batch's drawing, not in its queue.
        self._stream = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
        # Contact sheet and page are drawn on rank 0 while training goes on.
        self._reviewer, self._review = ThreadPoolExecutor(max_workers=1, thread_name_prefix="review"), None
        self._scoring, self._stop, self._rounds, self._tells_each = scoring, stop, 0, False
        self._metrics, self._teacher = metrics, {same_noise(row): row for row in teacher_rows}

    def draw(self, round_: Round, field: VelocityField, text: list[torch.Tensor], in_step: bool = False) -> list[Row]:
        """Draw a round. All ranks call it, each with the same round and the text (n, D) of all its prompts.

        Args:
            in_step: the field is a sharded network's, see above.

        Pictures and manifest are written when it returns; contact sheet and page follow, see `finish`.
        Returns every rank's rows, in the order of the prompts. Raises on all ranks together: RoundFailed, or Stopped,
        which leaves the pictures that are drawn and nothing else.
        """
        self.finish()
        rows, error = [], None
        with self._progress(round_):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                rows = self._draw_share(round_, field, text, in_step)
            except Exception as failure:  # shared with the other ranks below, which would otherwise wait for this one
                if in_step:  # in vain: they may be waiting inside a forward
                    raise
                log.exception("rank %d could not draw its share of %s", self.ranks.rank, round_.prefix)
                error = f"{type(failure).__name__}: {failure}"
            shares = gather_objects((rows, error))
        if self._stop and self._stop.agreed():
            if self._scoring:
                self._scoring.drop()
            raise Stopped
        rows = [row for share_rows, _ in shares for row in share_rows]
        if self.ranks.is_main:
            self._write(add_to_manifest, round_, rows, "manifest")
        barrier()  # all ranks: whoever goes on finds every rank's pictures, and the manifest
        problems = [f"rank {rank}: {e}" for rank, (_, e) in enumerate(shares) if e]
        if not problems and rows and not any(row.ok for row in rows):
            problems = [f"every picture failed, the first one on rank {rows[0].rank}: {rows[0].error}"]
        if self._scoring and not problems:
            self._add_scores(round_, rows)
        if self.ranks.is_main:
            writing = partial(write_review, metrics=self._metrics)
            self._review = self._reviewer.submit(self._write, writing, round_, rows, "contact sheet and review page")
        if problems:
            self.finish()
            raise RoundFailed(f"sampling round {round_.prefix}: {'; '.join(problems)}")
        return rows

    def finish(self) -> None:
        """Wait until contact sheet and page of the last round are written, which rank 0 does. No collective."""
        review, self._review = self._review, None
        if review:
            review.result()

    def _write(self, writing: Callable[[Path, list[dict]], None], round_: Round, rows: list[Row], what: str) -> None:
        try:
            writing(self.folder, [asdict(row) for row in rows])
        except Exception:  # the other ranks wait for this one, and the pictures are there all the same
            log.exception("%s of %s could not be written", what, round_.prefix)

    def _add_scores(self, round_: Round, rows: list[Row]) -> None:
        """Every rank's scores into the rows. All ranks take part, also one that has drawn nothing."""
        own = {}
        try:
            own = self._scoring.collect(show_progress=self.ranks.is_main)
        except Exception:  # the other ranks wait for this one's scores
            log.exception("rank %d: the scores of %s could not be collected", self.ranks.rank, round_.prefix)
        gathered = gather_objects(own)
        scores = {file: by_scorer for share_scores in gathered for file, by_scorer in share_scores.items()}
        compare_prompts(scores, {row.file: row.prompt for row in rows})
        for row in rows:
            row.scores = scores.get(row.file, {})
        dicts = [asdict(row) for row in rows]
        if round_.weights == "teacher":
            self._teacher = {same_noise(row): row for row in dicts}
        if self.ranks.is_main:
            self._write(add_to_manifest, round_, rows, "scores")
            self._report(round_, dicts)

    def _report(self, round_: Round, rows: list[dict]) -> None:
        missing = failures(rows)
        shown = []
        for name, mean in means(rows).items():
            failed, asked = missing[name]
            shown.append(f"{label_of(name)} {mean:.3g}" + (f" ({failed} of {asked} failed)" if failed else ""))
        if shown:
            log.info("%s: %s", round_.prefix, ", ".join(shown))
        for alarm in alarms(rows, [] if round_.weights == "teacher" else list(self._teacher.values())):
            log.warning("%s: %s", round_.prefix, alarm)

    @contextmanager
    def _progress(self, round_: Round) -> Iterator[None]:
        """On rank 0, a bar over all ranks' pictures."""
        self._rounds += 1
        self._tells_each = len(share(len(round_.prompts), 0, self.ranks.world_size)) <= VERBOSE_LOGGING_THRESHOLD
        if not self.ranks.is_main:
            yield
            return
        over = threading.Event()

        def watch(bar: tqdm) -> None:
            with suppress(RuntimeError):  # a lost connection; a bar is worth no round
                while not over.is_set():
                    over.wait(PROGRESS_SECONDS)
                    bar.n = tally(self._count_name)
                    bar.refresh()

        with tqdm(total=len(round_.prompts), desc=round_.prefix, unit="picture") as bar:
            # A daemon that is not waited for long: where other ranks are gone, what they count in may be too.
            watcher = threading.Thread(target=watch, args=(bar,), daemon=True, name="progress")
            watcher.start()
            try:
                yield
            finally:
                over.set()
                watcher.join(2 * PROGRESS_SECONDS)

    def _count(self, rows: list[Row]) -> None:
        """Pictures dealt with: told of, where they are few, and counted for rank 0's bar."""
        for row in rows:
            if not row.ok:
                log.warning("rank %d: %s failed: %s | prompt: %s", row.rank, row.file, row.error, row.prompt)
            elif self._tells_each:
                log.info("rank %d: %s (%.2f s) %s", row.rank, row.file, row.seconds, row.prompt)
        with suppress(RuntimeError):  # as above
            tally(self._count_name, len(rows))

    @property
    def _count_name(self) -> str:
        return f"drawn in round {self._rounds} of {self.folder}"

    @torch.no_grad()
    def _draw_share(self, round_: Round, field: VelocityField, text: list[torch.Tensor], in_step: bool) -> list[Row]:
        mine = share(len(round_.prompts), self.ranks.rank, self.ranks.world_size)
        rows = {index: self._row(round_, index, number) for number, index in enumerate(mine)}
        with ThreadPoolExecutor(max_workers=1) as writer:
            pending: list[Future] = []
            draw_batches = self._draw_batches_in_step if in_step else self._draw_batches
            for batch, latents, seconds in draw_batches(round_, field, text, list(mine), rows):
                pending.append(writer.submit(self._finish_batch, latents, [rows[i] for i in batch], seconds))
                # At most one batch waits to be written: memory stays bounded when the disk is slower than the GPU.
                while len(pending) > 1:
                    pending.pop(0).result()
            for future in pending:
                future.result()
        return list(rows.values())

    def _draw_batches(
        self, round_: Round, field: VelocityField, text: list[torch.Tensor], indices: list[int], rows: dict[int, Row]
    ) -> Iterator[tuple[list[int], torch.Tensor, float]]:
        """(prompt indices, latents, seconds a picture), batch by batch. A picture that cannot be drawn gets its error
        into its row, and the others of its batch are drawn without it."""
        queue = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        while queue and not (self._stop and self._stop.seen()):
            batch = queue.pop(0)
            started = time.perf_counter()
            try:
                latents = self._draw_batch(round_, field, [text[i] for i in batch], batch)
            except Exception as failure:  # recorded with its picture; the round reports it
                if len(batch) == 1:
                    rows[batch[0]].error = f"{type(failure).__name__}: {failure}"
                    self._count([rows[batch[0]]])
                    continue
                if isinstance(failure, torch.OutOfMemoryError):
                    self.batch_size = -(-len(batch) // 2)
                    traceback.clear_frames(failure.__traceback__)  # they hold the tensors that did not fit
                    torch.cuda.empty_cache()
                    log.warning("rank %d: out of memory; drawing %d at a time", self.ranks.rank, self.batch_size)
                    rest = [i for waiting in [batch, *queue] for i in waiting]
                    queue = [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]
                else:
                    queue[:0] = [[i] for i in batch]
                continue
            yield batch, latents, (time.perf_counter() - started) / len(batch)

    def _draw_batches_in_step(
        self, round_: Round, field: VelocityField, text: list[torch.Tensor], indices: list[int], rows: dict[int, Row]
    ) -> Iterator[tuple[list[int], torch.Tensor, float]]:
        """The same with equally many batches on every rank. Raises what goes wrong: alone, no rank can try again."""
        most, size = len(share(len(round_.prompts), 0, self.ranks.world_size)), self._common_batch_size
        for start in range(0, most, size):
            if self._stop and self._stop.agreed():
                return
            batch = indices[start : start + size]
            drawn = batch or [0]  # a picture that nobody keeps
            started = time.perf_counter()
            try:
                latents = self._draw_batch(round_, field, [text[i] for i in drawn], drawn)
            except torch.OutOfMemoryError as failure:
                raise RuntimeError(
                    f"out of memory drawing {len(drawn)} pictures at a time, which one rank alone cannot halve where "
                    "networks are sharded: pass a smaller --sample_batch_size"
                ) from failure
            if batch:
                yield batch, latents, (time.perf_counter() - started) / len(batch)

    def _draw_batch(
        self, round_: Round, field: VelocityField, text: list[torch.Tensor], indices: list[int]
    ) -> torch.Tensor:
        """Latents (B, C, 1, H, W) of some prompts, each from its own generator."""
        generators = [torch.Generator().manual_seed(round_.seed + i) for i in indices]
        noise = randn(self.latent_shape, generators).to(self.ranks.device)
        embeds = fold_texts(text).to(self.ranks.device)
        latents = rollout(field, noise, round_.grid, embeds, round_.sampler, round_.eta, generators).latents
        if latents.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # an error of this batch shall show here, and its time be true
        return latents

    @torch.no_grad()
    def _finish_batch(self, latents: torch.Tensor, rows: list[Row], seconds: float) -> None:
        """Decode and write one batch and have it scored (in the writer's thread).

        What cannot be decoded is tried again in halves: memory may do for those, and one bad picture spoils no other.
        """
        size, error = self.decode_batch_size, None
        if len(rows) > size:
            parts = [slice(i, i + size) for i in range(0, len(rows), size)]
            for part in parts:
                self._finish_batch(latents[part], rows[part], seconds)
            return
        started = time.perf_counter()
        try:
            with torch.cuda.stream(self._stream):
                pictures, finite = self._decode(latents)
        except Exception as failure:  # recorded with its picture
            error = f"{type(failure).__name__}: {failure}"
            traceback.clear_frames(failure.__traceback__)  # they hold the tensors that did not fit
            if isinstance(failure, torch.OutOfMemoryError):
                self.decode_batch_size = -(-len(rows) // 2)
        if error:
            if len(rows) == 1:
                rows[0].error = error
                self._count(rows)
                return
            torch.cuda.empty_cache()
            half = -(-len(rows) // 2)
            for part in (slice(half), slice(half, None)):
                self._finish_batch(latents[part], rows[part], seconds)
            return
        seconds += (time.perf_counter() - started) / len(rows)
        for row, picture, good in zip(rows, pictures, finite, strict=True):
            row.seconds = round(seconds, 4)
            if not good:
                row.error = "the latents or the decoded pixels are not finite (NaN or infinity)"
                continue
            try:
                write_png(self.folder / row.file, picture, _facts(row) | {"ok": True})
                row.ok = True
            except Exception as failure:  # recorded with its picture; the others are written
                row.error = f"{type(failure).__name__}: {failure}"
            try:
                write_thumbnail(self.folder, row.file, picture)
            except OSError as failure:  # the page does without
                log.debug("no thumbnail of %s: %s", row.file, failure)
        self._count(rows)
        if self._scoring:
            for row in rows:
                if row.ok:
                    self._scoring.submit(Shot(self.folder / row.file, row.prompt, self._reference(row)))

    def _reference(self, row: Row) -> Path | None:
        """The teacher's picture of the same prompt, size and noise, where it is on this machine's disk."""
        teachers = self._teacher.get(same_noise(asdict(row))) if row.weights != "teacher" else None
        path = self.folder / teachers["file"] if teachers and teachers["ok"] else None
        return path if path and path.exists() else None

    def _decode(self, latents: torch.Tensor) -> tuple[list[Image.Image], list[bool]]:
        """The pictures of latents (B, C, 1, H, W), and which of them are finite."""
        if self._stream is not None:
            latents.record_stream(self._stream)
        decoded = decode(self.vae, latents)  # (B, 3, height, width)
        finite = latents.isfinite().flatten(1).all(1) & decoded.isfinite().flatten(1).all(1)
        return to_pil(decoded), finite.tolist()

    def _row(self, round_: Round, index: int, number: int) -> Row:
        rank = self.ranks.rank
        return Row(
            file=f"{round_.prefix}_rank_{rank}_sample_{number:02d}.png",
            prompt=round_.prompts[index],
            prompt_index=index,
            epoch=round_.epoch,
            step=round_.step,
            rank=rank,
            seed=round_.seed + index,
            sampler=round_.sampler,
            num_inference_steps=len(round_.grid),
            eta=round_.eta,
            shift=round_.shift,
            weights=round_.weights,
            phase=round_.phase,
            height=round_.height,
            width=round_.width,
        )


def _facts(row: Row) -> dict:
    """What a picture says of itself: its row but for the scores, which come later."""
    return {name: value for name, value in asdict(row).items() if name != "scores"}


def parameters(facts: dict) -> str:
    """The facts in the form that viewers for A1111's and ComfyUI's pictures read."""
    shown = {
        "Steps": facts["num_inference_steps"],
        "Sampler": facts["sampler"],
        "Schedule shift": f"{facts['shift']:g}",
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Eta": f"{facts['eta']:g}",
        "Weights": facts["weights"],
        "Training step": facts["step"],
        "Epoch": facts["epoch"],
    }
    return f"{facts['prompt']}\n" + ", ".join(f"{name}: {value}" for name, value in shown.items())


def write_png(path: Path, picture: Image.Image, facts: dict) -> None:
    """A PNG that carries its manifest row as text. It appears under its name only when it is whole."""
    info = PngInfo()
    info.add_text("parameters", parameters(facts))
    for key, value in facts.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info, compress_level=1)  # half the time, little larger
