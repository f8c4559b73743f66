"""Distill a Wan text-to-video teacher into a few-step text-to-image student, from a file of prompts and nothing else.

    python train_distillation.py --config config/tiny.toml
    torchrun --nproc_per_node=4 train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config_10.json --data_path data/static_prompts.txt --output_dir outputs/wan_t2i
"""

import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import WanTransformer3DModel
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm.contrib.logging import logging_redirect_tqdm

from config.config import Config, Phase, load_config
from config.errors import UserError
from data.batches import Batches
from data.prompt_embeddings import Batch, PromptEmbeddings, encode_prompts, encoder_key
from data.sampler import PromptSampler
from distillation.dry_run import dry_run
from distillation.ema import EMA
from distillation.nonfinite import NonFinite, Outcome
from distillation.objective import Noise, Objective, Setup, build_objective, settings_of
from distillation.plan import Plan, describe, make_plan, read_sample_prompts
from distillation.progress import Progress
from distillation.resume import Position, Resumed, phase_ends, state_of
from distillation.run_folder import begin_run, export, find_resumed, how_to_go_on, results, versions
from distillation.trackers import Trackers, chosen_trackers
from distillation.trained import PRECISION, Trained, wrap_trained
from distributed.checkpoint import Checkpoints
from distributed.failure import fail, first_failure, stand_back, stop_watching, watch_the_others
from distributed.placement import place
from distributed.process_group import (
    Ranks,
    barrier,
    check_alike,
    check_launch,
    destroy,
    init_process_group,
    mean_over_ranks,
    on_main,
    say,
)
from distributed.sharding import gradients, is_sharded, whole_weights
from distributed.stop import Stopped, StopSignal
from models.adapters import Adapted
from models.attention import check_attention_backend, use_attention_backend
from models.compiling import compile_blocks
from models.export import inspect_student, load_student
from models.flow import VelocityField, few_step_grid
from models.folding import MAX_SEQUENCE_LENGTH, fold_text_attention
from models.student import build_student, check_pixels, describe_init
from models.teacher import (
    Teacher,
    TeacherInfo,
    WanVelocity,
    download_weights,
    encode_text,
    load_teacher,
    load_text_pipeline,
    resolve_dtype,
)
from models.vae import load_vae
from sampling.in_flight import Scoring
from sampling.parallel import ParallelSampler, Round
from sampling.review import read_manifest, redraw_review
from sampling.scoring import build_scorers, check_scorers, is_hanging, means

LOOKING = -1  # in place of an update's number, in the noise with which an objective only looks at the student
MISTAKE_SECONDS = 5.0  # in which rank 0 says a mistake that others made too
PLAIN_DDIM_STEPS = 10  # where a pipeline does not say how it draws


@record  # leaves the failing rank's traceback where torchrun looks for it
def main(argv: list[str]) -> None:
    try:
        run(argv)
    except UserError as mistake:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not rank_0_says_it():
            print(f"{'' if rank == '0' else f'rank {rank}: '}error: {mistake}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):  # no store to say it in
            first_failure(f"error: {mistake}")
        os._exit(2)
    except KeyboardInterrupt:  # before StopSignal looks after it
        print("stopped before anything was begun", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    except Exception as failure:
        stand_back(failure)  # ends this process where another rank failed first
        raise


def rank_0_says_it() -> bool:
    """Whether a mistake is one that rank 0 made too, soon enough: it is said once."""
    deadline = time.monotonic() + MISTAKE_SECONDS
    with suppress(RuntimeError):  # the store has gone with rank 0
        while time.monotonic() < deadline:
            if first_failure():
                return True
            time.sleep(0.1)
    return False


def run(argv: list[str]) -> None:
    config = load_config(argv, settings_of)
    if config.run.review:
        make_review(Path(config.run.review))
        return
    if config.run.dry_run:
        sys.exit(dry_run(config))
    if config.run.multi_gpu and "RANK" not in os.environ:
        start_one_process_a_gpu(argv)
    check_launch(config.run.distributed)
    ranks = init_process_group(config.run.ddp_timeout)
    watch_the_others(ranks)
    set_up_logging(ranks)
    check_alike(config.by_flag() | versions())
    for note in config.notes:
        say(ranks, note)
    on_main(ranks, lambda: chosen_trackers(config.run.report_to))  # a missing package ends all ranks
    stop = StopSignal()
    # Lines of the log stand above progress bars, not in them.
    with logging_redirect_tqdm(), Trackers(config.run, ranks.is_main) as trackers:
        try:
            if config.sampling.sample_only:
                draw_from_student(config, ranks, trackers, stop)
            else:
                train(config, ranks, trackers, stop)
        except Stopped:
            say(ranks, how_to_go_on(config, ranks))
    stop_watching()
    destroy()


def train(config: Config, ranks: Ranks, trackers: Trackers, stop: StopSignal) -> None:
    # What a user can get wrong is looked at first: configs and prompts are read, no weight is loaded.
    plan = make_plan(config, ranks)
    check_alike(plan.read_from_files())
    if plan.sample_prompts:
        check_scorers(config.scoring)
    resumed = find_resumed(config, plan, ranks)
    on_main(ranks, lambda: begin_run(config, plan, resumed))
    say(ranks, f"train_distillation.py\n{describe(plan, config, ranks)}")
    trackers.start(config.to_dict() | {"resolved": plan.resolved()})

    # The prompts to train on, those to draw, and the negative one: encoded once, split over the ranks, kept on disk.
    all_prompts = [*plan.prompts, *plan.sample_prompts, config.teacher.negative_prompt]
    text = encode_all(config, plan.info, all_prompts, plan.dtype, ranks, stop)
    sample_text = [text[len(plan.prompts) + i] for i in range(len(plan.sample_prompts))]

    # Teacher and student. One seed for weights: what is fresh in the student is alike on every rank.
    torch.manual_seed(config.run.seed)
    teacher = load_teacher(plan.info, torch.device("cpu"), plan.dtype, text[len(all_prompts) - 1], *plan.guidance)
    if config.student.lora_rank:  # goes on an expert where that is to stay
        place_teacher(teacher, config, plan, ranks)
        student = make_lora(config, plan, teacher, ranks)
    else:  # is made from one that is whole
        student = make_student(config, plan, teacher, ranks)
        place_teacher(teacher, config, plan, ranks)
    wrapped = wrap_trained(student, config.optimization, ranks)
    barrier()  # all ranks: the first all-reduce is not started while a slower rank still reads weights
    stop.check()

    expand, autocast = plan.info.expand_timesteps, PRECISION[config.optimization.mixed_precision]

    student_dtype = plan.dtype if config.student.lora_rank else torch.float32  # a LoRA's inputs are its teacher's

    # Training goes through the wrapper, pictures through the bare module: a wrapper's forward may be a collective,
    # and the ranks draw unequal shares.
    def as_field(network: torch.nn.Module, dtype: torch.dtype) -> WanVelocity:
        return WanVelocity(network, expand, dtype, autocast, ranks.device)

    sampler = None
    if plan.sample_prompts:
        earlier = read_manifest(Path(config.sampling.sample_dir)) if resumed else []
        teacher_rows = [row for row in earlier if row["weights"] == "teacher"]
        sampler = make_sampler(config, plan.info, plan.spec.height, plan.spec.width, ranks, stop, teacher_rows)
    if sampler and config.sampling.sample_teacher and not resumed:
        draw(sampler, teacher_round(config, plan), teacher, sample_text, trackers, teacher.in_step)  # all ranks

    settings = config.optimization
    prompts = PromptSampler(len(plan.prompts), settings.train_batch_size, ranks.rank, ranks.world_size, config.run.seed)
    progress = Progress(
        Path(config.run.output_dir) / "metrics.jsonl",
        plan.total_steps,
        config.run.logging_steps,
        settings.train_batch_size * settings.gradient_accumulation_steps * ranks.world_size,
        ranks,
        trackers,
    )
    run = Run(
        config=config,
        plan=plan,
        ranks=ranks,
        setup=Setup(teacher, as_field(wrapped, student_dtype), plan.grid, plan.shift, student, as_field, student_dtype),
        wrapped=wrapped,
        ema=EMA(student, settings.ema_decay) if settings.use_ema else None,
        batches=Batches(text, prompts, ahead=settings.gradient_accumulation_steps),
        sampler=sampler,
        sample_text=sample_text,
        trackers=trackers,
        progress=progress,
        nonfinite=NonFinite(plan.prompts, settings.max_nonfinite_steps, progress),
        checkpoints=Checkpoints(Path(config.run.output_dir) / "checkpoints", config.run.checkpoints_total_limit, ranks),
        stop=stop,
    )
    if resumed:
        resumed.restore_run(student, run.ema, prompts, progress)
        run.step, run.done = resumed.position.step, resumed.position.done
    for number, phase in enumerate(plan.phases, 1):
        if resumed and number < resumed.position.phase:
            continue
        train_phase(run, number, phase, resumed if resumed and number == resumed.position.phase else None)
        gc.collect()  # a phase's optimizers and networks hang in cycles, and the next phase needs their memory
        # All ranks gather what is sharded; rank 0 writes, and tells the others whether it worked.
        with run.shipped_weights():
            weights = whole_weights(student)
            on_main(ranks, lambda weights=weights: export(config, plan, student, weights, run.step, run.done, ranks))
            del weights
    run.progress.close()
    run.checkpoints.finish()
    if sampler:
        sampler.finish()  # people look at the folder when the program says that it is done
    say(ranks, results(config, plan))


@dataclass
class Run:
    """What all phases share."""

    config: Config
    plan: Plan
    ranks: Ranks
    setup: Setup
    wrapped: torch.nn.Module  # the student, as training calls it
    ema: EMA | None
    batches: Batches
    sampler: ParallelSampler | None
    sample_text: list[torch.Tensor]
    trackers: Trackers
    progress: Progress
    nonfinite: NonFinite
    checkpoints: Checkpoints
    stop: StopSignal
    step: int = 0  # optimizer steps done
    done: list[str] = field(default_factory=list)  # phases, in words

    def shipped_weights(self) -> AbstractContextManager:
        """Within, the student holds the weights that are drawn with and exported."""
        return self.ema.applied() if self.ema else nullcontext()


def train_phase(run: Run, number: int, phase: Phase, resumed: Resumed | None) -> None:
    """One objective for its steps, or until it ends itself. What it alone trains is gone afterwards.

    Args:
        resumed: the checkpoint, where the phase was in progress when it was written.
    """
    plan, settings, ranks = run.plan, run.config.optimization, run.ranks
    began, ends, ended_itself = run.step, run.step + phase.steps, False
    if resumed:
        began, ended_itself = resumed.position.began, resumed.position.ended
        ends = phase_ends(resumed.position, phase)
    objective = build_objective(phase.objective, replace(run.setup, first_step=began), phase.settings)
    student_steps = phase.steps - objective.steps_without_student()
    trained = {"student": Trained(run.setup.network, settings, phase, ranks, run.wrapped, steps=student_steps)}
    for name, network in objective.networks().items():
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if settings.compile:
            compile_blocks(network)
        rate = objective.learning_rate(name, phase.learning_rate)
        trained[name] = Trained(network, settings, phase, ranks, learning_rate=rate)
    objective.use({name: network.wrapped for name, network in trained.items() if name != "student"})

    def save() -> None:
        """All ranks."""
        run.nonfinite.look()
        position = Position(run.step, number, began, ended_itself, run.done)
        prompts = run.batches.prompts.state_dict()
        state = state_of(position, run.config, plan, run.setup.network, run.ema, prompts, objective, trained)
        run.checkpoints.save(run.step, state, run.progress.state_dict())

    def sample() -> None:
        """All ranks: each draws its share of the pictures."""
        if not run.sampler or not (plan.is_sampling_step(run.step) or run.step == run.progress.total_steps):
            return
        run.nonfinite.look()  # so that what is queued still counts as training
        with run.progress.paused(), run.shipped_weights():
            round_ = student_round(run.config, plan, run.step, number)
            student = run.setup.as_field(run.setup.network, run.setup.dtype)
            draw(run.sampler, round_, student, run.sample_text, run.trackers, is_sharded(run.setup.network))

    if resumed:
        resumed.restore_phase(objective, trained)
        sample()  # the checkpoint is older than the round of its step, which may be missing
    while run.step < ends:
        batches = list(islice(run.batches, settings.gradient_accumulation_steps))
        figures, outcome = optimization_step(
            objective, trained, batches, run.config.run.seed, run.step, plan.latent_shape, ranks
        )
        objective.after_step(run.step)
        if run.ema:
            run.ema.update()
        run.step += 1
        run.checkpoints.check()
        run.nonfinite.add(run.step, outcome)
        # All ranks look, and see the same.
        looked_at = (
            (batch, Noise(run.config.run.seed, ranks.rank, run.step, LOOKING, i, plan.latent_shape, ranks.device))
            for i, batch in enumerate(batches)
        )
        remark = objective.look(run.step, looked_at, mean_over_ranks)
        if remark:
            run.progress.say(remark.words)
        if remark and remark.ends_phase:
            run.progress.skip(ends - run.step)
            ends, ended_itself = run.step, True
        # All ranks: a logged row is the mean over them.
        if run.progress.is_due(run.step, run.step == ends):
            run.nonfinite.look()
        epoch = plan.epoch_of(run.step)
        run.progress.advance(run.step, epoch, number, phase.objective, figures, trained, run.step == ends)
        # All ranks: they find out together whether one of them was asked to stop.
        stops = run.stop.agreed()
        if stops or run.step % run.config.run.checkpointing_steps == 0 or run.step == run.progress.total_steps:
            save()
        if stops:
            raise Stopped
        try:
            sample()
        except Stopped:
            save()
            raise
    objective.close()
    run.done.append(f"{phase.objective} ({run.step - began} steps)")


def optimization_step(
    objective: Objective,
    trained: dict[str, Trained],
    batches: list[Batch],
    seed: int,
    step: int,
    latent_shape: tuple[int, ...],
    ranks: Ranks,
) -> tuple[dict[str, torch.Tensor], Outcome]:
    """One step's updates, over all its micro-batches.

    Returns its figures, on the device: means over a network's updates without those that were skipped, NaN where all
    were; and what became of the updates. Both are the same on all ranks.
    """
    schedule, sums, counts, outcome = objective.schedule(step), {}, Counter(), Outcome()
    for update, name in enumerate(schedule):
        network, losses, figures = trained[name], [], {}
        for micro_step, batch in enumerate(batches):
            noise = Noise(seed, ranks.rank, step, update, micro_step, latent_shape, ranks.device)
            # Gradients travel once an update: with the last micro-batch.
            with gradients(network.wrapped, travel=micro_step == len(batches) - 1):
                loss, extra = objective.loss(name, batch, noise)
                network.scaler.scale(loss / len(batches)).backward()
            losses.append((batch.prompt_indices, loss.detach()))
            for key, value in {"loss": loss.detach(), **extra}.items():
                figures[key] = figures.get(key, 0.0) + value / len(batches)
        figures["grad_norm"], updated = network.step()
        outcome.add(name, updated, losses)
        counts[name] += updated
        for key, value in figures.items():
            kept = torch.where(updated, value, 0.0)
            sums[name, key] = sums[name, key] + kept if (name, key) in sums else kept
    for name, network in trained.items():
        if name != "student" or name in schedule:  # the others keep pace with the phase, trained in this step or not
            network.lr_scheduler.step()
    prefixes = {name: "" if name == "student" else f"{name}_" for name in schedule}
    return {prefixes[name] + key: total / counts[name] for (name, key), total in sums.items()}, outcome


# ------------------------------------------------------------------------------------------------------- parts


def encode_all(
    config: Config, info: TeacherInfo, prompts: list[str], dtype: torch.dtype, ranks: Ranks, stop: StopSignal
) -> PromptEmbeddings:
    """Every prompt's text embedding, from disk where an earlier run left it. The text encoder is freed at the end."""
    download_weights(info)  # every rank asks: the hub's file locks let one of a machine's ranks fetch each file
    cache = Path(config.data.prompt_cache_dir or Path(config.run.output_dir) / "prompt_embeddings")
    key = encoder_key(info.folder / "text_encoder", info.folder / "tokenizer", dtype, MAX_SEQUENCE_LENGTH)

    def load_encoder():
        pipeline = load_text_pipeline(info, ranks.device, dtype)
        return lambda batch: encode_text(pipeline, batch)

    text = encode_prompts(prompts, load_encoder, cache, key, ranks, after_part=stop.check)
    if too_long := text.count_at_least(MAX_SEQUENCE_LENGTH) if ranks.is_main else 0:
        say(ranks, f"{too_long} of {len(text)} prompts fill the {MAX_SEQUENCE_LENGTH} tokens of text; more is not read")
    return text


def make_student(config: Config, plan: Plan, teacher: Teacher, ranks: Ranks) -> WanTransformer3DModel:
    """A student of its own in float32 on the CPU, made from the teacher's weights; says what came from where."""
    student, rows = build_student(plan.spec, init_expert(plan, teacher), torch.float32)
    say(ranks, describe_init(rows))
    if config.optimization.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    student = fold_text_attention(student).train()
    use_attention_backend(config.optimization.attention_backend, student)
    if config.optimization.compile:
        compile_blocks(student)
    return student


def make_lora(config: Config, plan: Plan, teacher: Teacher, ranks: Ranks) -> Adapted:
    """A student of adapters, in float32, on the teacher's own expert."""
    expert = init_expert(plan, teacher)
    student = Adapted(expert, "student", config.student.lora_rank, config.student.lora_alpha)
    trained, frozen = (sum(p.numel() for p in network.parameters()) for network in (student, expert))
    say(ranks, f"{trained:,} parameters of adapters on the {frozen - trained:,} of {plan.spec.init_from}, shared")
    if config.optimization.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student


def init_expert(plan: Plan, teacher: Teacher) -> WanTransformer3DModel:
    """The expert that the student is made from, or of."""
    return teacher.experts[list(plan.info.transformer_configs).index(plan.spec.init_from)].field.transformer


def place_teacher(teacher: Teacher, config: Config, plan: Plan, ranks: Ranks) -> None:
    """The experts, loaded on the CPU, to where --teacher_device_strategy wants them. All ranks."""
    experts, strategy = [expert.field.transformer for expert in teacher.experts], plan.placement.strategy
    use_attention_backend(config.optimization.attention_backend, *experts)
    if config.optimization.compile:  # before they are sharded
        compile_blocks(*experts)
    if plan.layout.teacher_storage_dtype:
        for expert in experts:
            expert.enable_layerwise_casting(storage_dtype=plan.layout.teacher_storage_dtype, compute_dtype=plan.dtype)
    place(experts, strategy, ranks)
    teacher.in_step = strategy == "shard"
    for expert in teacher.experts:
        expert.field.device = torch.device("cpu") if strategy == "cpu" else ranks.device


def make_sampler(
    config: Config,
    info: TeacherInfo,
    height: int,
    width: int,
    ranks: Ranks,
    stop: StopSignal,
    teacher_rows: Iterable[dict] = (),
) -> ParallelSampler:
    scorers = build_scorers(config.scoring, ranks.device)
    scoring = Scoring(scorers, config.scoring.max_concurrent_evals, config.scoring.score_deadline) if scorers else None
    return ParallelSampler(
        load_vae(info.folder, ranks.device),
        info.latent_shape(height, width),
        Path(config.sampling.sample_dir),
        ranks,
        config.sampling.sample_batch_size,
        scoring,
        stop,
        Path(config.run.output_dir) / "metrics.jsonl",
        teacher_rows,
    )


def student_round(config: Config, plan: Plan, step: int, phase: int) -> Round:
    """The pictures after `step` steps, in the phase-th phase: on the grid that ships, unless --sample_steps asks for
    another."""
    sampling = config.sampling
    return Round(
        prompts=tuple(plan.sample_prompts),
        epoch=plan.epoch_of(step),
        step=step,
        grid=few_step_grid(sampling.sample_steps, plan.shift) if sampling.sample_steps else plan.grid,
        shift=plan.shift,
        height=plan.spec.height,
        width=plan.spec.width,
        seed=sampling.sample_seed,
        weights="ema" if config.optimization.use_ema else "raw",
        sampler=sampling.sampler,
        eta=sampling.sample_eta,
        phase=f"{phase} {plan.phases[phase - 1].objective}",
    )


def teacher_round(config: Config, plan: Plan) -> Round:
    """The teacher's pictures of the same prompts and noise, guided, in many steps."""
    return Round(
        prompts=tuple(plan.sample_prompts),
        epoch=0,
        step=0,
        grid=few_step_grid(config.sampling.sample_teacher_steps, plan.info.flow_shift),
        shift=plan.info.flow_shift,
        height=plan.spec.height,
        width=plan.spec.width,
        seed=config.sampling.sample_seed,
        weights="teacher",
    )


def draw(
    sampler: ParallelSampler,
    round_: Round,
    velocity: VelocityField,
    text: list[torch.Tensor],
    trackers: Trackers,
    in_step: bool = False,
) -> None:
    """A round of pictures, also for the trackers. All ranks. `in_step`: the velocity is a sharded network's."""
    rows = [asdict(row) for row in sampler.draw(round_, velocity, text, in_step)]
    trackers.log_round(round_.step, rows, sampler.folder, means(rows))


def draw_from_student(config: Config, ranks: Ranks, trackers: Trackers, stop: StopSignal) -> None:
    """--sample_only: pictures from a finished student's pipeline, on any number of ranks."""
    path, teacher = config.student.student_path, config.teacher
    info, drawing = inspect_student(path, config.student.student_shift, teacher.teacher_path, teacher.teacher_revision)
    prompts, dtype = read_sample_prompts(config), resolve_dtype(config.teacher.teacher_dtype, ranks.device)
    check_attention_backend(config.optimization.attention_backend, ranks.device, dtype)
    check_scorers(config.scoring)
    height, width = config.student.height or drawing.get("height"), config.student.width or drawing.get("width")
    if not height or not width:
        raise UserError(f"--student_path {path}: has no distillation.json; give --height and --width in pixels")
    for flag, pixels in {"--height": height, "--width": width}.items():
        check_pixels(flag, pixels, info.pixels_per_patch)
    num_steps = config.sampling.sample_steps or drawing.get("num_inference_steps") or PLAIN_DDIM_STEPS
    trackers.start(config.to_dict())
    text = encode_all(config, info, prompts, dtype, ranks, stop)
    student = load_student(path, info, drawing, dtype).to(ranks.device)
    use_attention_backend(config.optimization.attention_backend, student)
    field = WanVelocity(student, info.expand_timesteps, dtype)
    round_ = Round(
        prompts=tuple(prompts),
        epoch=0,
        step=drawing.get("training_steps", 0),
        grid=few_step_grid(num_steps, info.flow_shift),
        shift=info.flow_shift,
        height=height,
        width=width,
        seed=config.sampling.sample_seed,
        weights=drawing.get("weights", "raw"),
        sampler=config.sampling.sampler,
        eta=config.sampling.sample_eta,
    )
    sampler = make_sampler(config, info, height, width, ranks, stop)
    draw(sampler, round_, field, [text[i] for i in range(len(prompts))], trackers)
    sampler.finish()
    say(ranks, f"pictures: {sampler.folder}/*.png\nreview page: {sampler.folder}/index.html")


def make_review(folder: Path) -> None:
    """--review: contact sheets and page of pictures that are there."""
    if not (folder / "manifest.jsonl").is_file():
        missing = "holds no manifest.jsonl" if folder.is_dir() else "no such folder"
        raise UserError(f"--review {folder}: {missing}; give a folder of samples, e.g. outputs/tiny/samples")
    if os.environ.get("RANK", "0") == "0":  # one writer, should torchrun have started several
        print(f"review page: {redraw_review(folder)}", flush=True)


# ------------------------------------------------------------------------------------------------- before and after


def set_up_logging(ranks: Ranks) -> None:
    """Warnings and errors from every rank, notes from the program's own modules; libraries stay quiet."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for package in ("config", "data", "models", "sampling", "distillation", "distributed"):
        logging.getLogger(package).setLevel(logging.INFO)
    # A network that its objective does not update in a phase's first step.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def start_one_process_a_gpu(argv: list[str]) -> None:
    """--multi_gpu: become torch's own launcher, which starts this program once a GPU."""
    count = torch.cuda.device_count()
    if not count:
        raise UserError("--multi_gpu: no GPU found; leave it out, or use torchrun --nproc_per_node=2 to run on CPU")
    rest = [a for a in argv if a != "--multi_gpu"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    os.execv(sys.executable, [sys.executable, *launcher, __file__, *rest])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        if is_hanging():  # a scorer that was given up, inside a library that would abort the program as it ends
            sys.stdout.flush()
            os._exit(0)
    except Exception as failure:
        fail(failure)
