"""Files that appear whole or not at all, and files of JSON lines, which may be torn."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path that this gives; it takes the name `path` at the end. After an error nothing is left of it."""
    # Named by the process: two may write the same file, as --review does beside a run.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_writable_folder(flag: str, folder: Path) -> None:
    """Make the folder where it is missing. Raises UserError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"anything")
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be written to ({error.strerror}); give a folder where there is leave and room"
        ) from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict | None]]:
    """(line, its object) for all lines of a file but blank ones, none where there is no file. The object is None where
    a line is torn, as one that is being written, or holds no object."""
    # Not splitlines: JSON leaves some characters as they are that it takes for line ends, such as U+2028.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield line, value if isinstance(value, dict) else None
