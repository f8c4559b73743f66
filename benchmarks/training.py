"""What a training step costs around its network calls.

    python benchmarks/training.py             # config/tiny.toml with every objective
    python benchmarks/training.py --objectives dmd --config config/wan21_1x24gb.toml --data_path my_prompts.txt

The real training loop runs. Between two of its steps the calls that the last one made of teacher, student and fake
score are made once more, forwards and backwards and nothing else. Further flags are train_distillation.py's.
"""

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: this folder, where this file would hide the package `sampling`, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import train_distillation
from benchmarks.arguments import at_least_one
from benchmarks.timing import now
from config.config import Config, load_config
from config.errors import UserError
from data.batches import Batches
from distillation.objective import objective_names, settings_of
from distillation.trackers import Trackers
from distributed.process_group import init_process_group
from distributed.stop import StopSignal
from models.teacher import WanVelocity

BAR = 1.05
WARM_UP = 2  # steps that do not count


@dataclass
class Watch:
    """Seconds of each step, and of its network calls alone."""

    device: torch.device
    steps: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    calls: list[tuple] = field(default_factory=list)  # of networks, since the step began
    began: float = 0.0

    def between_steps(self) -> None:
        """Called as a step begins: the one before is over."""
        if self.calls:
            self.steps.append(now(self.device) - self.began)
            self.alone.append(self.call_again())
            self.calls.clear()
        self.began = now(self.device)

    def call_again(self) -> float:
        started = now(self.device)
        for velocity, given, with_gradient in self.calls:
            with torch.set_grad_enabled(with_gradient):
                v = ask(velocity, *given)
            if v.requires_grad:
                v.backward(torch.ones_like(v))
                for parameter in velocity.transformer.parameters():
                    parameter.grad = None
        return now(self.device) - started

    def medians(self) -> tuple[float, float, float]:
        """Seconds of a step, and of its network calls alone, when warm; and the ratio of the two, step by step: dmd's
        differ."""
        steps, alone = self.steps[WARM_UP:], self.alone[WARM_UP:]
        return median(steps), median(alone), median(a / b for a, b in zip(steps, alone, strict=True))


ask = WanVelocity.__call__  # the one door to every network


def configure(objective: str, steps: int, flags: list[str], folder: Path) -> Config:
    about = ["--objective", objective, "--num_steps", str(steps), "--output_dir", str(folder)]
    return load_config([*flags, *about, "--no_save_samples", "--checkpointing_steps", "1000000"], settings_of)


def train(config: Config) -> None:
    """The whole program, in this process; what it says goes where its progress bars go."""
    ranks = init_process_group(config.run.ddp_timeout)
    train_distillation.set_up_logging(ranks)
    with redirect_stdout(sys.stderr), Trackers(config.run, ranks.is_main) as trackers:
        train_distillation.train(config, ranks, trackers, StopSignal())


def measure(objective: str, count: int, flags: list[str], folder: Path) -> Watch:
    """`count` steps of one objective in the real loop."""
    config = configure(objective, count + WARM_UP + 1, flags, folder)
    watch = Watch(init_process_group(config.run.ddp_timeout).device)

    class Watched(Batches):
        def __next__(self):
            watch.between_steps()
            return super().__next__()

    def recorded(self, *given):
        watch.calls.append((self, given, torch.is_grad_enabled()))
        return ask(self, *given)

    train_distillation.Batches, WanVelocity.__call__ = Watched, recorded
    try:
        train(config)
    finally:
        train_distillation.Batches, WanVelocity.__call__ = Batches, ask
        watch.calls.clear()  # they hold the networks
    return watch


def row(objective: str, watch: Watch) -> str:
    step, calls, ratio = watch.medians()
    return f"| {objective} | {step:.3f} | {calls:.3f} | {ratio:.3f} | {'yes' if ratio <= BAR else 'NO'} |"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--objectives", nargs="+", choices=objective_names(), default=objective_names(), metavar="NAME")
    parser.add_argument("--count", type=at_least_one, default=12, help="steps of each (12)")
    args, flags = parser.parse_known_args(argv)
    flags = flags if "--config" in flags else ["--config", "config/tiny.toml", *flags]
    rows = []
    try:
        for objective in args.objectives:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row(objective, measure(objective, args.count, flags, Path(folder))))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"\n{where}, torch {torch.__version__}; medians of {args.count} steps, also of their ratios, bar ≤ {BAR:g}\n\n"
        "| objective | a step, s | its network calls alone, s | ratio | met |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
