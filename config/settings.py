"""How settings are declared and read. A setting is a field of a frozen dataclass, made with `setting`:

    learning_rate: float = setting(1e-5, "peak learning rate", aliases=("lr",), bound=POSITIVE)

Its flags (--learning_rate, --lr), its recipe keys, its help and its checks all come from that line.
"""

import argparse
import json
import math
import re
import tomllib
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import UserError, nearest


class Bound(NamedTuple):
    """What a number must satisfy, in words and in code."""

    words: str
    holds: Callable[[float], bool]


AT_LEAST_ONE = Bound(">= 1", lambda x: x >= 1)
POSITIVE = Bound("> 0", lambda x: x > 0)
NOT_NEGATIVE = Bound(">= 0", lambda x: x >= 0)
BELOW_ONE = Bound(">= 0 and < 1", lambda x: 0 <= x < 1)
SCHEDULE = Bound("from 1 to 1000, the steps of the schedule", lambda x: 1 <= x <= 1000)
SCHEDULE_OR_NONE = Bound("from 0 to 1000, the steps of the schedule", lambda x: 0 <= x <= 1000)
UNIT = Bound("from 0 to 1", lambda x: 0 <= x <= 1)
SEED = Bound("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)


def setting(default: Any, help: str, *, bound: Bound | None = None, aliases=(), choices=(), bare=None, shorthand=None):
    """A field of a frozen settings dataclass. Its type: bool, int, float or str, that or None, or a tuple[that, ...].

    Args:
        bare: the value when the flag stands alone, without one.
        shorthand: (name, value), a flag without value that stands for this one with `value`.
    """
    about = {"help": help, "bound": bound, "aliases": aliases, "choices": choices, "bare": bare, "shorthand": shorthand}
    return field(default=default, metadata=about)


# ---------------------------------------------------------------------------------------------- one setting


@dataclass(frozen=True)
class Setting:
    """A field as flags and recipes see it. `kind`: bool, int, float or str; `many`: a tuple of them."""

    name: str
    kind: type
    many: bool
    default: Any
    help: str = ""
    bound: Bound | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    bare: Any = None
    shorthand: tuple[str, Any] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that a recipe may use."""
        return (self.name, *self.aliases, *(self.shorthand or ())[:1])

    @property
    def flags(self) -> dict[str, Any]:
        """Flag → the value that it stands for, None where the user gives one."""
        names = (self.name, *self.aliases)
        if self.kind is bool:
            return {f"--{name}": True for name in names} | {f"--no_{name}": False for name in names}
        flags = {f"--{name}": None for name in names}
        return flags | ({f"--{self.shorthand[0]}": self.shorthand[1]} if self.shorthand else {})

    def parse(self, text: str | list[str], source: str) -> Any:
        """The value that a flag's text stands for. Raises UserError, which begins with `source`."""
        if self.many and self.choices:  # names hold no commas, and people write a,b as well as a b
            text = [part for word in text for part in word.split(",") if part]
        try:
            value = [self.kind(part) for part in text] if self.many else self.kind(text)
        except ValueError:
            raise self._refusal(text, source) from None
        return self.check(value, source)

    def check(self, value: Any, source: str) -> Any:
        """The value, if it is what this setting accepts. Raises UserError, which begins with `source`."""
        parts = value if self.many and isinstance(value, list) else [value]
        if self.kind is float:  # a recipe may say 1 for 1.0
            parts = [float(part) if type(part) is int else part for part in parts]
        for part in parts:
            if not self._accepts(part):
                raise self._refusal(part, source)
        return tuple(parts) if self.many else parts[0]

    def _accepts(self, part: Any) -> bool:
        if type(part) is not self.kind:  # not isinstance: True is no whole number
            return False
        if self.kind is float and not math.isfinite(part):
            return False
        return (not self.choices or part in self.choices) and (self.bound is None or self.bound.holds(part))

    def _refusal(self, value: Any, source: str) -> UserError:
        if self.choices:
            close = nearest(value, self.choices) if isinstance(value, str) else ""
            return UserError(f"{source}: expected one of {', '.join(map(str, self.choices))}{close}")
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[self.kind]
        words += f" {self.bound.words}" if self.bound else ""
        return UserError(f"{source}: expected {words}{', or a list of it' if self.many else ''}")


def settings_in(section: type) -> list[Setting]:
    """The settings of a dataclass, in its order. Fields need a default; what `setting` adds is optional."""
    types, settings = typing.get_type_hints(section), []
    for f in fields(section):
        kind = next((arg for arg in typing.get_args(types[f.name]) if arg is not type(None)), types[f.name])
        many = typing.get_origin(types[f.name]) is tuple
        settings.append(Setting(f.name, kind, many, f.default, **f.metadata))
    return settings


# ---------------------------------------------------------------------------------------------- values, by name


class Given(NamedTuple):
    """A value, and what the user wrote where: '--lr "0.1"', 'tiny.toml: lr = 0.1'."""

    value: Any
    source: str


def read_flags(texts: dict[str, Any], settings: Iterable[Setting]) -> dict[str, Given]:
    """The values of those settings that have a flag in `texts`, by the setting's own name. Raises UserError."""
    found = []
    for s in settings:
        for flag, stands_for in s.flags.items():
            if flag in texts and stands_for is not None:
                found.append((s.name, Given(stands_for, flag)))
            elif flag in texts:
                source = f"{flag} {_shown(texts[flag])}"
                found.append((s.name, Given(s.parse(texts[flag], source), source)))
    return _unique(found)


def read_table(table: dict[str, Any], settings: Iterable[Setting], where: str) -> dict[str, Given]:
    """As `read_flags`, from a recipe's table, which holds typed values."""
    found = []
    for s in settings:
        for key in s.keys:
            if key not in table:
                continue
            value, source = table[key], f"{where}: {key} = {_shown(table[key])}"
            if not s.shorthand or key != s.shorthand[0]:
                found.append((s.name, Given(s.check(value, source), source)))
            elif not isinstance(value, bool):
                raise UserError(f"{source}: expected true or false")
            elif value:
                found.append((s.name, Given(s.shorthand[1], source)))
    return _unique(found)


def _unique(found: Iterable[tuple[str, Given]]) -> dict[str, Given]:
    """Each setting once. Raises UserError where two of its names disagree."""
    values = {}
    for name, given in found:
        first = values.setdefault(name, given)
        if first.value != given.value:
            both = f"{first.source} and {given.source}"
            raise UserError(f"{both}: both set {name}, to different values; give one of them")
    return values


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# ---------------------------------------------------------------------------------------------- flags


def build_parser(groups: dict[str, list[Setting]], add_help: bool = True) -> argparse.ArgumentParser:
    """All flags under their group's title. A flag that several groups have stands in the first."""
    parser = _Parser(
        usage="%(prog)s [--config RECIPE] [--flag [value]] ...",
        description="Distill a Wan text-to-video pipeline into a few-step picture generator, from prompts alone.",
        allow_abbrev=False,
        add_help=add_help,
    )
    seen = set()
    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for s in settings:
            if s.name not in seen:
                _add_flags(group, s)
        seen |= {s.name for s in settings}
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Flag → its text, and what the parser does not know."""
    namespace, unknown = parser.parse_known_args(argv, argparse.Namespace(texts={}))
    return namespace.texts, unknown


def refuse_unknown_flags(unknown: list[str], parser: argparse.ArgumentParser) -> None:
    """Raises UserError for the first word that argparse could not place."""
    if not unknown:
        return
    flag = unknown[0].split("=")[0]
    if flag.startswith("-"):
        raise UserError(f"unknown flag {flag}{_hint(flag, parser._option_string_actions, '--help lists all')}")
    raise UserError(f"unexpected argument {_shown(unknown[0])}: no flag takes it; quote text that holds spaces")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        # Older Pythons know -1 and -0.5 as values, but take the -1e-5 of `--lr -1e-5` for a flag.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


class _Remember(argparse.Action):
    """Keeps the text of each flag under the flag's own name; the last one counts."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.texts[option_string] = values


def _add_flags(group, s: Setting) -> None:
    with_value = [flag for flag, stands_for in s.flags.items() if stands_for is None]
    alone = [flag for flag, stands_for in s.flags.items() if stands_for is not None]
    common = {"action": _Remember, "default": argparse.SUPPRESS, "dest": s.name}
    if with_value:
        nargs = "+" if s.many else "?" if s.bare is not None else None
        kind = "{" + ",".join(map(str, s.choices)) + "}" if s.choices else s.kind.__name__.upper()
        shown = ",".join(map(str, s.default)) if s.many else s.default
        default = "" if shown in (None, "") else f" (default: {shown})"
        text = (s.help + default).replace("%", "%%")
        group.add_argument(*with_value, nargs=nargs, const=s.bare, metavar=kind, help=text, **common)
    if alone:
        text = f"short for --{s.name} {s.shorthand[1]}" if s.shorthand else s.help
        group.add_argument(*alone, nargs=0, help=text.replace("%", "%%"), **common)


# ---------------------------------------------------------------------------------------------- recipes


class Recipe(NamedTuple):
    """A recipe as written: its file, its flat keys, its `[[phase]]` tables."""

    path: str = ""
    table: dict[str, Any] = {}
    phases: list[dict[str, Any]] = []


def read_recipe(path: str) -> Recipe:
    """Raises UserError for a file that cannot be read or is not TOML, with its line and column."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); give a TOML recipe") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: byte {error.start} is not UTF-8; recipes are UTF-8 text") from None
    try:
        table = tomllib.loads(text)
    except ValueError as error:
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
        reason = str(error).replace("at end of document", f"at line {line}, column {column}, the end of the file")
        raise UserError(f"--config {path}: not valid TOML: {reason}") from None
    phases = table.pop("phase", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise UserError(f"{path}: phase = {_shown(phases)}: expected tables, each headed [[phase]]")
    return Recipe(path, table, phases)


def refuse_unknown_keys(table: dict[str, Any], settings: Iterable[Setting], where: str, otherwise: str) -> None:
    """Raises UserError for a key that no setting has. `otherwise` ends the message where no accepted key is close."""
    accepted = [key for s in settings for key in s.keys]
    for key in table:
        if key not in accepted:
            raise UserError(f"{where}: unknown key {key!r}{_hint(key, accepted, otherwise)}")


def _hint(name: str, accepted: Iterable[str], otherwise: str) -> str:
    """The name that was probably meant, else `otherwise`."""
    # Settings' names share many words: at difflib's usual 0.6, another setting would often pass for a slip of the keys.
    return nearest(name, accepted, cutoff=0.8) or f"; {otherwise}"
