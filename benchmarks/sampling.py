"""What drawing on every rank, in true batches, gains, and what a round costs around its network calls.

    python benchmarks/sampling.py --pipeline models/tiny_wan

On the CPU, one thread a rank. Both sides of a comparison are drawn in turn, A B A B …; medians are compared.

(a) Two ranks: rank 0 draws all prompts while rank 1 waits, against both drawing.
(b) One rank's prompts: a loop of stock `WanPipeline` calls, one prompt each, against one batch. The text is encoded
    beforehand on both sides; both write PNGs.
(c) Two ranks: whole rounds, against the same rollouts and decodings without noise, files, exchange and barrier.

(a) and (c) depend on how long the networks run beside all else, so they draw pictures of 256×256, the smallest that
people may want. (b) asks what batches gain where one picture leaves a processor idle; for a single CPU thread that is
the embedded teacher's 64×64. --size draws all three in another size.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: this folder, where this file would hide the package, gives way to the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from PIL import Image

from benchmarks.arguments import at_least_one
from benchmarks.timing import alternate
from config.errors import UserError
from data.scenes import random_scenes
from distributed.process_group import Ranks, barrier, destroy, gather_objects, init_process_group
from models.flow import few_step_grid, few_step_scheduler
from models.folding import MAX_SEQUENCE_LENGTH, fold_texts
from models.teacher import (
    TeacherInfo,
    WanVelocity,
    download_weights,
    encode_text,
    inspect_teacher,
    load_text_pipeline,
    load_transformer,
)
from models.vae import decode, load_vae
from sampling.ddim import randn, rollout
from sampling.parallel import ParallelSampler, Round, share

WORLD_SIZE = 2
ROUND_SIZE, BATCH_PICTURE_SIZE = 256, 64  # pixels, either way
CPU = torch.device("cpu")
TIMEOUT = 600.0  # seconds, for a rank that never answers


@dataclass(frozen=True)
class Comparison:
    """Medians in seconds, what is made of them, and the bar."""

    what: str
    a: float
    b: float
    figure: str
    bar: str
    met: bool


def speed_up(what: str, a: list[float], b: list[float], bar: float) -> Comparison:
    ratio = median(a) / median(b)
    return Comparison(what, median(a), median(b), f"{ratio:.2f}×", f"≥ {bar:g}×", ratio >= bar)


def extra_cost(what: str, a: list[float], b: list[float], bar: float) -> Comparison:
    """What a takes beyond b, as a share of a."""
    cost = 1 - median(b) / median(a)
    return Comparison(what, median(a), median(b), f"{cost:.1%}", f"≤ {bar:.0%}", cost <= bar)


# ------------------------------------------------------------------------------------------------ what is drawn


@dataclass(frozen=True)
class Student:
    """A pipeline's low-noise transformer, drawn without guidance as a student is; weights do not matter for time."""

    info: TeacherInfo
    field: WanVelocity
    vae: AutoencoderKLWan
    text: list[torch.Tensor]  # (n, D) of each prompt
    prompts: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    def round_of(self, height: int, width: int, num_steps: int) -> Round:
        """All prompts, in pictures of so many pixels."""
        shift = self.info.flow_shift
        return Round(
            prompts=self.prompts,
            epoch=1,
            step=0,
            grid=few_step_grid(num_steps, shift),
            shift=shift,
            height=height,
            width=width,
            seed=0,
        )

    def sampler(self, round_: Round, folder: Path, ranks: Ranks, batch_size: int | None = None) -> ParallelSampler:
        """One that draws a rank's whole share at once, unless told otherwise."""
        shape = self.info.latent_shape(round_.height, round_.width)
        return ParallelSampler(self.vae, shape, folder, ranks, batch_size or len(round_.prompts))


def low_noise_part(info: TeacherInfo) -> str:
    return list(info.transformer_configs)[-1]


def load_student(
    info: TeacherInfo, count: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Student:
    """With the text of `count` prompts."""
    transformer = load_transformer(info.folder, low_noise_part(info), dtype).to(device)
    prompts = tuple(scene.caption for scene in random_scenes(count, seed=0, held_out=False))
    text = encode_text(load_text_pipeline(info, device, dtype), list(prompts))
    field = WanVelocity(transformer, info.expand_timesteps, dtype)
    return Student(info, field, load_vae(info.folder, device), text, prompts, device, dtype)


def draw_round(student: Student, round_: Round, sampler: ParallelSampler) -> float:
    """Seconds that a round keeps the ranks from training: from their common start to its barrier."""
    barrier()  # all ranks: nobody's clock runs while another still does something else
    started = time.perf_counter()
    with redirect_stderr(io.StringIO()):  # the progress bar
        rows = sampler.draw(round_, student.field, student.text)
    seconds = time.perf_counter() - started
    sampler.finish()  # contact sheet and page: rank 0 draws them while training goes on
    if failed := [row.error for row in rows if not row.ok]:
        raise RuntimeError(f"{len(failed)} pictures failed, the first one: {failed[0]}")
    return seconds


@torch.no_grad()
def draw_bare(student: Student, round_: Round, ranks: Ranks) -> float:
    """Seconds that the slowest rank's network calls take: transformer and VAE, and nothing else."""
    mine = share(len(round_.prompts), ranks.rank, ranks.world_size)
    shape = student.info.latent_shape(round_.height, round_.width)
    noise = randn(shape, [torch.Generator().manual_seed(round_.seed + i) for i in mine])
    embeds = fold_texts([student.text[i] for i in mine])
    barrier()  # all ranks: they share caches and memory, so they are timed together
    started = time.perf_counter()
    latents = rollout(student.field, noise, round_.grid, embeds).latents
    # In a thread of its own, as a round decodes: the C library gives large buffers back to the system after each use
    # in the main thread only, which made decoding there a third slower.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(torch.no_grad()(decode), student.vae, latents).result()
    return max(gather_objects(time.perf_counter() - started))


# ------------------------------------------------------------------------------------------------ the comparisons


def compare_ranks(student: Student, ranks: Ranks, args: argparse.Namespace, folder: Path) -> list[Comparison]:
    """(a) and (c), on all ranks together."""
    size = args.size or ROUND_SIZE
    round_ = student.round_of(size, size, args.steps)
    # With a world of one, rank 0's share is everything and rank 1's, being beyond it, nothing.
    alone = student.sampler(round_, folder / "alone", replace(ranks, world_size=1))
    together = student.sampler(round_, folder / "together", ranks)
    sides = [
        lambda: draw_round(student, round_, alone),
        lambda: draw_round(student, round_, together),
        lambda: draw_bare(student, round_, ranks),
    ]
    by_one, by_all, bare = alternate(sides, args.repeats)
    setting = f"{args.prompts} prompts, {size}×{size}"
    return [
        speed_up(f"(a) {setting}: rank 0 draws, rank 1 waits → both draw", by_one, by_all, bar=1.8),
        extra_cost(f"(c) {setting}: a round by both → its network calls alone", by_all, bare, bar=0.05),
    ]


def compare_batches(
    student: Student, round_: Round, repeats: int, folder: Path, bar: float = 3.0
) -> tuple[list[Comparison], int]:
    """(b), in this process alone; and by how many grey levels the two sides' pictures differ at most.

    What the batch alone gains is told apart from what folded text and time gain, by drawing folded singles as well.
    """
    ranks = alone_on(student.device)
    sampler = student.sampler(round_, folder / "batch", ranks)
    singles = student.sampler(round_, folder / "singles", ranks, batch_size=1)
    loop = folder / "loop"
    loop.mkdir(parents=True)
    pipeline = stock_pipeline(student)
    embeds = [
        pipeline.encode_prompt(p, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH)[0]
        for p in round_.prompts
    ]  # (1, 512, D) each

    def draw_one_by_one() -> float:
        started = time.perf_counter()
        for i in range(len(round_.prompts)):
            frames = pipeline(
                prompt_embeds=embeds[i],
                num_frames=1,
                height=round_.height,
                width=round_.width,
                num_inference_steps=len(round_.grid),
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(round_.seed + i),
                output_type="pil",
            ).frames
            frames[0][0].save(loop / f"{i:02d}.png")
        return time.perf_counter() - started

    sides = [draw_one_by_one, *(lambda s=s: draw_round(student, round_, s) for s in (singles, sampler))]
    one_by_one, folded, batch = alternate(sides, repeats)
    pairs = zip(sorted(loop.glob("*.png")), sorted(sampler.folder.glob("epoch_0001_rank_0_sample_*.png")), strict=True)
    difference = max(int(np.abs(pixels(one) - pixels(other)).max()) for one, other in pairs)
    what = f"{len(round_.prompts)} prompts, {round_.height}×{round_.width}"
    return [
        speed_up(f"(b) {what}: a loop of stock pipeline calls → one batch", one_by_one, batch, bar),
        speed_up(f"    {what}: the sampler one picture at a time → one batch", folded, batch, bar=1.0),
    ], difference


def alone_on(device: torch.device) -> Ranks:
    return Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=device, launched_by_torchrun=False)


def stock_pipeline(student: Student) -> WanPipeline:
    """The student as it is exported: nothing folded."""
    info, load = student.info, dict(torch_dtype=student.dtype)
    text = load_text_pipeline(info, student.device, student.dtype)
    pipeline = WanPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.text_encoder,
        vae=AutoencoderKLWan.from_pretrained(info.folder, subfolder="vae", torch_dtype=torch.float32),
        scheduler=few_step_scheduler(info.flow_shift),
        transformer=WanTransformer3DModel.from_pretrained(info.folder, subfolder=low_noise_part(info), **load),
        expand_timesteps=info.expand_timesteps,
    ).to(student.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, dtype=int)


# -------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--pipeline", default="models/tiny_wan", help="a Wan text-to-video pipeline or student (models/tiny_wan)")
    add("--steps", type=at_least_one, default=4, help="a picture (4)")
    add("--prompts", type=at_least_one, default=8, help="a round (8)")
    add("--repeats", type=at_least_one, default=15, help="of each side; medians count (15)")
    add(
        "--size",
        type=at_least_one,
        help=f"of the pictures in pixels ({ROUND_SIZE} for (a), (c), {BATCH_PICTURE_SIZE} for (b))",
    )
    add("--rank_results", type=Path, help=argparse.SUPPRESS)  # how this program starts its own ranks
    return parser


def check(args: argparse.Namespace) -> TeacherInfo:
    info = inspect_teacher(args.pipeline, flag="--pipeline")
    if args.size and args.size % info.pixels_per_patch:
        raise UserError(f"--size {args.size}: accepted are multiples of {info.pixels_per_patch} pixels")
    return info


def run_ranks(argv: list[str], folder: Path) -> list[Comparison]:
    """(a) and (c): this program once more, on two ranks of torchrun."""
    results = folder / "results.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD_SIZE}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), *argv, "--rank_results", str(results)]
    subprocess.run(command, check=True, env=environment)
    return [Comparison(**row) for row in json.loads(results.read_text())]


def run_as_rank(args: argparse.Namespace) -> None:
    ranks = init_process_group(TIMEOUT)
    student = load_student(check(args), args.prompts)
    comparisons = compare_ranks(student, ranks, args, args.rank_results.parent)
    if ranks.is_main:
        args.rank_results.write_text(json.dumps([asdict(c) for c in comparisons]))
    destroy()


def table(comparisons: list[Comparison]) -> str:
    head = ["A → B", "A seconds", "B seconds", "figure", "bar", "met"]
    cells = [head] + [
        [c.what, f"{c.a:.4f}", f"{c.b:.4f}", c.figure, c.bar, "yes" if c.met else "NO"] for c in comparisons
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def run(args: argparse.Namespace, argv: list[str]) -> None:
    info = check(args)
    download_weights(info)
    with tempfile.TemporaryDirectory() as folder:
        by_ranks = run_ranks(argv, Path(folder))
        student, size = load_student(info, args.prompts), args.size or BATCH_PICTURE_SIZE
        round_ = student.round_of(size, size, args.steps)
        batches, difference = compare_batches(student, round_, args.repeats, Path(folder))
    print(
        f"{args.pipeline}: {args.steps} steps, one thread a rank, medians of {args.repeats}\n\n"
        f"{table([by_ranks[0], *batches, by_ranks[1]])}\n\n"
        f"(b): the two sides' pictures differ by at most {difference} of 255 grey levels\n"
        "(c): share of A beyond B; contact sheet and page, which rank 0 draws while training goes on, count for neither"
    )


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.rank_results:
        run_as_rank(args)
        return
    try:
        run(args, argv)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
