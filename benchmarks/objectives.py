"""Every objective alone, and some in a row, on the embedded teacher: what each costs and how good its students are.

    python benchmarks/objectives.py                             # trains what is not there yet, then measures all
    python benchmarks/objectives.py --seeds 0 --only velocity dmd --count 128
    python benchmarks/objectives.py --seeds 0 --search           # the demo's and dmd's, one thing changed each

No training asks the teacher much more often than the demo's does. One takes 2 to 7 minutes on two cores, measuring it
one or two. In brackets stand the smallest and the largest of the seeds.
"""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

if not __package__:  # run as a file: this folder, where this file would hide other packages, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import quality
from benchmarks.arguments import at_least_one
from distillation.objective import settings_of, work

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "config" / "tiny.toml"
RANKS = 2
GUIDANCE_2 = "2"  # of the recipe's low-noise expert


def phase(objective: str, steps: int, learning_rate: float = 5e-4, lr_warmup_steps: int = 5, **settings) -> dict:
    about = {"objective": objective, "steps": steps, "learning_rate": learning_rate, "lr_scheduler": "cosine"}
    return about | {"lr_warmup_steps": lr_warmup_steps} | settings


TRAJECTORY = phase("trajectory", 120, lr_warmup_steps=10, teacher_substeps=4, updates_per_rollout=2)
COPY = {"teach": "student", "teacher_substeps": 2, "updates_per_rollout": 2}
FAKES = {"fake_score": "full"}
RECIPES = {  # name: steps of the student, phases
    "velocity": (4, [phase("velocity", 120, lr_warmup_steps=10, teacher_substeps=4, updates_per_rollout=2)]),
    "trajectory": (4, [TRAJECTORY]),
    "trajectory, own states": (4, [TRAJECTORY | {"states": "student"}]),
    "trajectory, halving": (
        4,
        [
            phase("trajectory", 60, lr_warmup_steps=10, jumps=16, teacher_substeps=1, updates_per_rollout=2),
            phase("trajectory", 30, jumps=8, **COPY),
            phase("trajectory", 60, jumps=4, **COPY),
        ],
    ),
    "consistency": (4, [phase("consistency", 40, teacher_substeps=12, updates_per_rollout=6)]),
    "dmd": (4, [phase("dmd", 60, 1e-4, 10, fake_learning_rate=4e-4, **FAKES)]),
    "trajectory, then dmd": (
        4,
        [TRAJECTORY, phase("dmd", 60, 2e-5, fake_learning_rate=1e-4, fake_warmup_steps=10, **FAKES)],
    ),
    "trajectory in one step": (1, [phase("trajectory", 120, lr_warmup_steps=10, teacher_substeps=16)]),
}
ALONE, AFTER = RECIPES["dmd"][1][0], RECIPES["trajectory, then dmd"][1][1]
SEARCH = {  # the same
    "learning_rate 1e-3": (4, [TRAJECTORY | {"learning_rate": 1e-3}]),
    "learning_rate 2.5e-4": (4, [TRAJECTORY | {"learning_rate": 2.5e-4}]),
    "updates_per_rollout 1": (4, [TRAJECTORY | {"updates_per_rollout": 1}]),
    "updates_per_rollout 4": (4, [TRAJECTORY | {"updates_per_rollout": 4}]),
    "teacher_substeps 2": (4, [TRAJECTORY | {"teacher_substeps": 2}]),
    "huber_c 0.03": (4, [TRAJECTORY | {"huber_c": 0.03}]),
    "velocity, then trajectory": (
        4,
        [
            TRAJECTORY | {"objective": "velocity", "steps": 40},
            TRAJECTORY | {"steps": 80, "lr_warmup_steps": 5},
        ],
    ),
    "trajectory, then own states": (
        4,
        [
            TRAJECTORY | {"steps": 80},
            TRAJECTORY | {"steps": 40, "learning_rate": 2e-4, "lr_warmup_steps": 5, "states": "student"},
        ],
    ),
    "dmd, pictures": (4, [ALONE | {"match": "picture"}]),
    "dmd, lora": (4, [ALONE | {"fake_score": "lora"}]),
    "dmd, anchored": (4, [ALONE | {"anchor_weight": 1.0}]),
    "trajectory, then dmd, lora": (4, [TRAJECTORY, AFTER | {"fake_score": "lora"}]),
}


def recipe_of(name: str) -> tuple[int, list[dict]]:
    return (RECIPES | SEARCH)[name]


def teacher_forwards(name: str) -> int:
    """Of an expert, one latent each, in the whole training; a guided one is two. dmd's looks at contrast are counted as
    many as come to its steps on average."""
    steps, phases = recipe_of(name)
    prompts = RANKS * tomllib.loads(BASE.read_text())["train_batch_size"]
    total = 0.0
    for one in phases:
        kind = settings_of(one["objective"])
        settings = vars(kind()) | {key: value for key, value in one.items() if key in kind.__dataclass_fields__}
        asking = one["steps"] - settings.get("fake_warmup_steps", 0)
        total += asking * prompts * 2 * work(one["objective"], settings, steps).guided
    return round(total)


def in_paths(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def flags_of(name: str, folder: Path) -> list[str]:
    """Writes the recipe into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    steps, phases = recipe_of(name)
    recipe = folder.resolve() / f"{in_paths(name)}.toml"
    recipe.write_text(BASE.read_text().partition("[[phase]]")[0] + "\n".join(map(as_toml, phases)))
    return ["--config", str(recipe), "--student_steps", str(steps), "--no_save_samples"]


def train(name: str, seed: int, folder: Path) -> Path:
    """The student's folder; trained now unless this very recipe's is there."""
    home = folder / f"{in_paths(name)}_{seed}"
    flags = flags_of(name, folder)
    # Written when all is done: what the student was trained by.
    recipe, trained = f"# {' '.join(flags[2:])}\n{Path(flags[1]).read_text()}", home / "recipe.toml"
    if (home / "student" / "model_index.json").is_file() and trained.is_file() and trained.read_text() == recipe:
        return home / "student"
    trained.unlink(missing_ok=True)
    threads = max(1, (os.cpu_count() or 1) // RANKS)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"),
        *(str(ROOT / "train_distillation.py"), *flags, "--output_dir", str(home.resolve())),
        *("--seed", str(seed), "--overwrite_output_dir"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    trained.write_text(recipe)
    return home / "student"


def as_toml(settings: dict) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(["[[phase]]", *lines, ""])


def measure(students: Iterable[Path], count: int, folder: Path) -> list[dict]:
    """quality.py's figures: of the teacher, then of each student."""
    figures = folder / "figures.json"
    flags = ["--guidance_scale_2", GUIDANCE_2, "--count", str(count), "--json", str(figures)]
    quality.main(["--features", *flags, "--student", *map(str, students)])
    return json.loads(figures.read_text())["rows"]


def table(names: list[str], seeds: int, rows: list[dict]) -> str:
    """The teacher, then a line an objective: means over the seeds, and in brackets the smallest and the largest.

    Args:
        rows: the teacher's, and of each objective one a seed.
    """
    teacher, students = ([row for row in rows if row["role"] == role] for role in ("teacher", "student"))
    floor = teacher[0]["frechet"]
    lines = [
        f"{teacher[0]['captions']} captions; floor {floor:.2f}\n",
        "| objective | steps | teacher forwards | right, % | Fréchet / floor | diversity | contrast | saturation |",
        "|---|---|---|---|---|---|---|---|",
        *(line("teacher, guided", "-", [row], floor) for row in teacher),
    ]
    for i, name in enumerate(names):
        lines.append(line(name, f"{teacher_forwards(name):,}", students[i * seeds : (i + 1) * seeds], floor))
    return "\n".join(lines)


def line(name: str, forwards: str, rows: list[dict], floor: float) -> str:
    cells = [spread([100 * row["right"] for row in rows], ".1f"), spread([row["frechet"] / floor for row in rows])]
    cells += [spread([row[share] for row in rows]) for share in ("diversity", "contrast", "saturation")]
    return f"| {' | '.join([name, str(rows[0]['steps']), forwards, *cells])} |"


def spread(values: list[float], form: str = ".2f") -> str:
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=[*RECIPES, *SEARCH], metavar="NAME", help="some of them")
    parser.add_argument("--search", action="store_true", help="what was tried of the demo's recipe and dmd's, instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--count", type=at_least_one, default=512, help="held-out captions (512)")
    parser.add_argument("--output", type=Path, default=Path("outputs/objectives"), help="the students' folder")
    args = parser.parse_args(argv)
    names = args.only or list(SEARCH if args.search else RECIPES)
    students = [train(name, seed, args.output) for name in names for seed in args.seeds]
    print(table(names, len(args.seeds), measure(students, args.count, args.output)))


if __name__ == "__main__":
    main(sys.argv[1:])
