"""What a run finds in its output folder, and what it leaves there."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import WanTransformer3DModel

from config.config import PHASE_SETTINGS, Config
from config.errors import UserError
from data.files import make_writable_folder
from distillation.plan import Plan
from distillation.resume import Resumed, keep_rows_until
from distillation.trained import PRECISION
from distributed.checkpoint import LATEST, find_checkpoint
from distributed.process_group import Ranks, say
from models.adapters import Adapted
from models.export import StudentCard, check_export_target, export_lora, export_student
from models.flow import few_step_scheduler
from sampling.review import remove_rounds


def find_resumed(config: Config, plan: Plan, ranks: Ranks) -> Resumed | None:
    """The checkpoint to go on from, if any; says what is different now. All ranks."""
    asked = config.run.resume_from_checkpoint
    if not asked:
        return None
    if config.run.overwrite_output_dir:
        say(ranks, f"--overwrite_output_dir: not resumed from {asked}, but begun anew")
        return None
    folder = find_checkpoint(asked, Path(config.run.output_dir) / "checkpoints", ranks)
    if folder is None:
        say(ranks, f"--resume_from_checkpoint latest: no checkpoint in {config.run.output_dir} yet; begun anew")
        return None
    resumed = Resumed(folder, ranks)
    for difference in resumed.check(config, plan):
        say(ranks, f"not as in the checkpoint: {difference}")
    if resumed.world_size != ranks.world_size:
        say(ranks, f"written by {resumed.world_size} ranks, now {ranks.world_size}: goes on, but not bit for bit")
    say(ranks, f"resumed from {folder}, after step {resumed.position.step}")
    return resumed


def how_to_go_on(config: Config, ranks: Ranks) -> str:
    rest = [a for a in sys.argv if a != "--overwrite_output_dir"]
    if "--resume_from_checkpoint" not in rest and not config.run.resume_from_checkpoint:
        rest += ["--resume_from_checkpoint", LATEST]
    return f"stopped; to go on: {shlex.join([*launcher(ranks), *rest])}"


def begin_run(config: Config, plan: Plan, resumed: Resumed | None) -> None:
    """Make the output folder and write the resolved settings into it; one that holds another run is refused, unless it
    is the one to go on with.

    Rank 0 only; no collective.
    """
    folder, samples = Path(config.run.output_dir), Path(config.sampling.sample_dir)
    check_export_target(folder / "student", plan.info.folder)
    make_writable_folder("--output_dir", folder)
    # A --sample_dir elsewhere may hold other runs' pictures too.
    own_samples = samples.resolve().is_relative_to(folder.resolve())
    left = [folder / name for name in ("metrics.jsonl", "student", "checkpoints")]
    left += [samples / "manifest.jsonl"] if own_samples else []
    if resumed:
        keep_rows_until(folder / "metrics.jsonl", resumed.position.step)
    elif any(path.exists() for path in left):
        # A run that was to be resumed, and ended before it had a checkpoint, has left nothing worth keeping.
        nothing_yet = config.run.resume_from_checkpoint and not (folder / "student").exists()
        if not config.run.overwrite_output_dir and not nothing_yet:
            raise UserError(
                f"--output_dir {folder}: holds another run; choose another folder, pass --resume_from_checkpoint "
                "latest to go on with it, or --overwrite_output_dir to replace it"
            )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for path in (folder / "metrics.jsonl", *(folder / "tensorboard").glob("events.out.tfevents.*")):
            path.unlink(missing_ok=True)
        if own_samples:
            remove_rounds(samples)
        # The old student stays until the first export takes its place.
    write_run_facts(config, plan, folder)


def write_run_facts(config: Config, plan: Plan, folder: Path) -> None:
    git = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    facts = {
        "settings": config.to_dict(),
        "resolved": plan.resolved(),
        "versions": versions(),
        "commit": commit or None,
    }
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}


def export(
    config: Config,
    plan: Plan,
    student: WanTransformer3DModel | Adapted,
    weights: dict[str, torch.Tensor],
    step: int,
    phases: list[str],
    ranks: Ranks,
) -> None:
    """The student as a Diffusers pipeline, or as a LoRA, in output_dir/student. Rank 0 only; no collective.

    Args:
        weights: the student's, whole.
        phases: those behind it, in words.
    """
    sections = [section for section in config.to_dict().values() if isinstance(section, dict)]
    settings = {name: value for section in sections for name, value in section.items()} | plan.resolved()
    for name in ("num_steps", *(setting.name for setting in PHASE_SETTINGS)):  # each phase has its own
        settings.pop(name, None)
    as_lora = config.student.lora_rank and not config.student.merge_lora
    card = StudentCard(
        teacher=plan.info.name,
        command=[*launcher(ranks), *sys.argv],
        objective=", then ".join(phases),
        training_steps=step,
        num_inference_steps=len(plan.grid),
        height=plan.spec.height,
        width=plan.spec.width,
        weights="ema" if config.optimization.use_ema else "raw",
        settings=settings,
        lora_on=plan.spec.init_from if as_lora else None,
    )
    dtype = PRECISION[config.optimization.mixed_precision] or torch.float32
    folder = Path(config.run.output_dir) / "student"
    scheduler = few_step_scheduler(plan.shift)
    if as_lora:
        export_lora(student, scheduler, plan.info.folder, folder, card)
    else:
        export_student(student, scheduler, plan.info.folder, folder, card, dtype, weights)


def launcher(ranks: Ranks) -> list[str]:
    """What stands before the program's name on the command line that starts as many ranks."""
    if not ranks.launched_by_torchrun:
        return ["python"]
    nodes = ranks.world_size // ranks.local_world_size
    return ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc_per_node={ranks.local_world_size}"]


def results(config: Config, plan: Plan) -> str:
    lines = [f"student: {config.run.output_dir}/student"]
    if plan.sample_prompts:
        lines += [
            f"pictures: {config.sampling.sample_dir}/*.png",
            f"review page: {config.sampling.sample_dir}/index.html",
        ]
    return "\n".join(lines)
