"""Prompt files → list of prompts. `.txt` holds a prompt a line, `.jsonl` an object with a "prompt" a line."""

import json
import logging
import re
from pathlib import Path

from config.errors import UserError

logger = logging.getLogger(__name__)

ACCEPTED = 'a UTF-8 file: .txt (a prompt a line) or .jsonl ({"prompt": "…"} a line)'


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file in its order, stripped, blank lines skipped, exact duplicates dropped with a warning.

    A line that starts with "#" is a prompt like any other. In `.jsonl` other keys than "prompt" are ignored.

    Raises:
        UserError: no such file, unknown ending, not UTF-8, a line that holds no prompt, no prompts at all.
    """
    path = Path(path)
    lines = _read_lines(path)
    if path.suffix.lower() == ".jsonl":
        prompts = [_json_prompt(line, f"{path}: line {number}") for number, line in lines]
    else:
        prompts = [line.strip() for _, line in lines]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; accepted is {ACCEPTED}")
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < len(prompts):
        logger.warning(
            "%s: %d exact duplicate(s) dropped, %d prompts left", path, len(prompts) - len(distinct), len(distinct)
        )
    return distinct


def holds_half_character(text: str) -> bool:
    """Whether half of a surrogate pair stands alone in `text`, as JSON and undecodable arguments bring: not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; accepted is {ACCEPTED}")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"{path}: unknown ending {path.suffix!r}; accepted is {ACCEPTED}")
    try:
        text = _decode(path.read_bytes(), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; accepted is {ACCEPTED}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    # Not splitlines(): it also splits at characters that a prompt may hold, such as U+2028, and line numbers go wrong.
    lines = re.split("\r\n|\r|\n", text)
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _decode(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        problem, offset = f"byte 0x{content[error.start]:02x}", error.start
    else:
        if (offset := content.find(b"\0")) < 0:
            return text.removeprefix("\ufeff")
        problem = (
            "a zero byte (UTF-16?)"  # valid UTF-8, but no prompt has one, and UTF-16 without a BOM is full of them
        )
    line = content.count(b"\n", 0, offset) + 1
    raise UserError(f"{path}: line {line}: not UTF-8: {problem} at byte offset {offset}; save the file as UTF-8")


def _json_prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f'{where}, column {error.colno}: not JSON: {error.msg}; accepted is {{"prompt": "…"}}'
        ) from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise UserError(f'{where}: no "prompt" key; accepted is {{"prompt": "…"}}')
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise UserError(f'{where}: "prompt" is {json.dumps(prompt)[:80]}; accepted is a string')
    if not prompt.strip():
        raise UserError(f'{where}: "prompt" is empty')
    if holds_half_character(prompt):
        raise UserError(f'{where}: "prompt" holds half of a surrogate pair, which is no character')
    return prompt.strip()
