"""What the benchmarks' command lines have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


at_least_one.__name__ = "whole number from 1 on"  # argparse's errors name the type


def print_or_write(page: Callable[[], str], path: Path, about: str, argv: list[str]) -> None:
    """The command line of a script that makes a page of docs/: prints it, or with --write puts it at `path`."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help=f"into docs/{path.name}")
    if parser.parse_args(argv).write:
        path.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
