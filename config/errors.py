"""What a user can put right: said in one line, before anything heavy is loaded, with exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a flag or a file. The message names it, the value, and what is accepted."""


def nearest(name: str, accepted: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint "; did you mean 'x'?" for a name that is close to an accepted one (difflib's ratio), else nothing."""
    matches = difflib.get_close_matches(name, list(accepted), n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""
