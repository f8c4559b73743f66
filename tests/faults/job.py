"""The program under real torchrun, in the background, and what is left of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.test_train import PROGRAM, flags

FAULTY = str(Path(__file__).parent / "faulty.py")
START_SECONDS = 240.0  # until a run has got somewhere; on a starved machine imports alone were seen to take a minute
RUN_SECONDS = 400.0  # for a short run from beginning to end
END_SECONDS = 15.0  # from a fault to the end of the job
TOO_MANY = "100000"  # steps: more than any test waits for
MARK = "JOB_OF_A_TEST"


class Job:
    """The program on a teacher, two ranks unless told otherwise, writing into `folder`; standard output and error go to
    one file in `notes`.

    Args:
        fault: see faulty.py; "" runs the program itself.
        once: whether the fault comes in the first start only.
        launch: torchrun's flags.
    """

    def __init__(
        self,
        teacher: Path,
        folder: Path,
        notes: Path,
        *more: str,
        fault="",
        once=False,
        launch=(),
        ranks=2,
        steps=TOO_MANY,
    ) -> None:
        self.folder, self.mark = folder, notes / f"{folder.name}.mark"
        self._said, self.faulted = open(f"{self.mark}.said", "w+"), Path(f"{self.mark}.fault")  # noqa: SIM115
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launch]
        env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", MARK: str(self.mark)}
        env |= {"FAULT": fault, "FAULT_ONCE": "1" if once else "", "FAULTED": str(self.faulted)}
        given = flags(teacher, folder, "--score", "none", *more)
        given[given.index("--num_steps") + 1] = steps
        self.faulted.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, *command, FAULTY if fault else PROGRAM, *given],
            stdout=self._said,
            stderr=self._said,
            env=os.environ | env,
            # A shell has its background jobs ignore Ctrl-C, and their children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, ready) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.words()
            time.sleep(0.05)

    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def ranks(self) -> list[int]:
        """Their process ids."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def words(self) -> str:
        self._said.flush()
        return Path(self._said.name).read_text(errors="replace")

    def end(self, within: float = 30.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within:g} s: {self.words()}") from None
        finally:
            self.process.kill()

    def end_of_fault(self) -> int:
        """The exit code of a job that has a fault. It ends soon after, and leaves no process."""
        self.wait_for(lambda: self.process.poll() is not None or self.faulted.exists())
        code = self.end(START_SECONDS)
        assert self.faulted.exists(), f"ended before its fault: {self.words()}"
        seconds = time.time() - self.faulted.stat().st_mtime
        assert seconds < END_SECONDS, f"ended {seconds:.1f} s after the fault: {self.words()}"
        assert not self.processes(), "orphans are left"
        return code

    def processes(self) -> list[int]:
        """All processes that this job has started, whoever is their parent now."""
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # gone meanwhile
                continue
        return found

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._said.close()

    def named(self) -> list[str]:
        """Which rank failed, and of what, in the program's own words: all lines that say so."""
        return re.findall(r"^.*?(rank \d+ failed: .*)$", self.words(), re.MULTILINE)

    def root_cause(self) -> str:
        """The end of torchrun's summary, which is the last thing on the screen."""
        return self.words().partition("Root Cause")[2]
