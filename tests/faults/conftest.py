from pathlib import Path

import pytest

from tests.faults.job import Job


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="finds processes in /proc, which is Linux's")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.torchrun)
            if not Path("/proc/self/task").exists():
                item.add_marker(skip)


@pytest.fixture
def start(random_pipeline_dir, tmp_path):
    """Starts jobs on a small random teacher, and ends what is left of them."""
    started = []

    def start(*more: str, folder="out", **options) -> Job:
        started.append(Job(random_pipeline_dir, tmp_path / folder, tmp_path, *more, **options))
        return started[-1]

    yield start
    for job in started:
        job.kill()
