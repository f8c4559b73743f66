"""What a checkpoint holds of a run, and how a run goes on from one.

All randomness of training is a function of (seed, rank, step), see `Noise`: nothing of it needs to be kept. What has
weights or counters does.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from config.config import Config, Phase
from config.errors import UserError
from data.files import read_json_lines, whole_file
from distillation.ema import EMA
from distillation.objective import Objective, state_settings
from distillation.plan import Plan
from distillation.progress import Progress
from distillation.trained import Trained
from distributed.checkpoint import read_facts, read_part
from distributed.process_group import Ranks
from distributed.sharding import cut_state_like

# Settings that say where a run is and what is seen of it, not what is learnt.
FREE = {
    "config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "checkpointing_steps",
    "checkpoints_total_limit", "distributed", "multi_gpu", "ddp_timeout", "logging_steps", "report_to", "run_name",
    "tracker_project_name", "review", "dry_run", "gpu_memory", "gpu_tflops", "num_gpus", "num_nodes",
    "prompt_cache_dir", "dataloader_num_workers", "num_steps", "num_epochs", "merge_lora",
}  # fmt: skip


class Position(NamedTuple):
    """Where a run is.

    phase: number of the phase in progress, from 1; `began`: the step before its first one.
    ended: whether the phase has ended itself, before its steps were done.
    done: the phases before it, in words.
    """

    step: int
    phase: int
    began: int
    ended: bool
    done: list[str]


def state_of(
    position: Position,
    config: Config,
    plan: Plan,
    student: nn.Module,
    ema: EMA | None,
    prompts: dict[str, int],
    objective: Objective,
    trained: dict[str, Trained],
) -> dict[str, Any]:
    """For `Checkpoints.save`: what all ranks have alike, or hold slices of."""
    return {
        "position": position._asdict(),
        "settings": comparable(config, plan),
        "student": student.state_dict(),
        "ema": ema.state_dict() if ema else {},
        "prompts": prompts,
        "objective": objective.state_dict(),
        **{f"trained_{name}": network.state_dict(with_weights=name != "student") for name, network in trained.items()},
    }


class Resumed:
    """A checkpoint that a run goes on from, part by part: what is restored need not be held twice."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks, self._facts = folder, ranks, read_facts(folder)
        self.position = Position(**self._facts["state"]["position"])
        self.world_size: int = self._facts["world_size"]

    def part(self, name: str) -> Any:
        return read_part(self.folder, self._facts, name)

    def check(self, config: Config, plan: Plan) -> list[str]:
        """What differs from the checkpoint's settings, a line each. Raises UserError for what cannot be changed."""
        old, new = self._facts["state"]["settings"], json.loads(json.dumps(comparable(config, plan)))
        where = f"--resume_from_checkpoint {self.folder}"
        if old["student"] != new["student"]:
            raise UserError(
                f"{where}: its student has another shape; resume with the --student_config and --lora_rank of the "
                "first run"
            )
        if old["settings"]["use_ema"] != new["settings"]["use_ema"]:
            first = "with" if old["settings"]["use_ema"] else "without"
            raise UserError(f"{where}: was trained {first} --use_ema; resume {first} it")
        began, phases = self.position.phase, new["phases"]
        for number, (before, now) in enumerate(zip(old["phases"][:began], phases, strict=False), 1):
            if before["objective"] != now["objective"]:
                raise UserError(
                    f"{where}: its phase {number} is {before['objective']}, not {now['objective']}; phases that have "
                    "begun stay as they are"
                )
        if len(phases) < began:
            raise UserError(f"{where}: is in phase {began}, and there are {len(phases)} phases now; give them all")
        was, now = (
            state_settings(each["objective"], each["settings"])
            for each in (old["phases"][began - 1], phases[began - 1])
        )
        for name, first, wanted in _differences(was, now):
            raise UserError(
                f"{where}: its phase {began} has {name} {first}, not {wanted}; a phase that has begun keeps that"
            )
        return [f"{k}: {was} → {now}" for k, was, now in _differences(old, new)]

    def restore_run(self, student: nn.Module, ema: EMA | None, prompts: Any, progress: Progress) -> None:
        # Every rank reads the whole, and keeps of what is sharded its slice.
        student.load_state_dict(cut_state_like(self.part("student"), student.state_dict()))
        if ema:
            ema.load_state_dict(cut_state_like(self.part("ema"), ema.state_dict()))
        prompts.load_state_dict(self.part("prompts"))
        own = self._facts["ranks"]
        # Figures since the last logged row are each rank's own; another number of ranks begins a new row.
        if self.world_size == self.ranks.world_size:
            progress.load_state_dict(own[self.ranks.rank], self.position.step)
        else:
            progress.load_state_dict(own[0] | {"steps": 0, "sums": {}, "counts": {}}, self.position.step)

    def restore_phase(self, objective: Objective, trained: dict[str, Trained]) -> None:
        objective.load_state_dict(cut_state_like(self.part("objective"), objective.state_dict()))
        for name, network in trained.items():
            network.load_state_dict(self.part(f"trained_{name}"))


def comparable(config: Config, plan: Plan) -> dict[str, Any]:
    """The settings that a run may be compared by, those of the sampling rounds left out."""
    sections = config.to_dict()
    settings = {
        name: value
        for section in ("teacher", "student", "data", "optimization", "run")
        for name, value in sections[section].items()
        if name not in FREE
    }
    student = dict(plan.spec.transformer_config)
    if config.student.lora_rank:  # its checkpoints are of use on the expert that they were trained on, and no other
        student |= {"lora_rank": config.student.lora_rank, "init_from": plan.spec.init_from}
    return {"settings": settings, "phases": [asdict(phase) for phase in plan.phases], "student": student}


def _differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in {**old, **new}:
        was, now, name = old.get(key), new.get(key), f"{prefix}{key}".removeprefix("settings.")
        if key == "phases":
            was, now = ({str(i): phase for i, phase in enumerate(phases, 1)} for phases in (was, now))
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, f"{name}." if key != "settings" else "settings.")
        elif was != now:
            found.append((name, was, now))
    return found


def keep_rows_until(path: Path, step: int) -> None:
    """Cut from metrics.jsonl what a run had logged after the checkpoint that it is resumed from. Rank 0 only."""
    if not path.exists():
        return
    kept = [line for line, row in read_json_lines(path) if row and row["step"] <= step]
    with whole_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def phase_ends(position: Position, phase: Phase) -> int:
    """The step after which the phase in progress is over."""
    return position.step if position.ended else max(position.step, position.began + phase.steps)
