"""Started by torchrun in test_train.py: train_distillation.py, with one rank whose loss raises at its third step."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from distillation.objectives import trajectory  # noqa: E402

calls = 0
loss = trajectory.Objective.loss


def failing_loss(self, *args):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3:
        raise RuntimeError("a fault put here by the test")
    return loss(self, *args)


trajectory.Objective.loss = failing_loss
sys.argv[0] = str(ROOT / "train_distillation.py")
runpy.run_path(sys.argv[0], run_name="__main__")
