"""The one exception that means "the user can fix this"."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any


class InputError(Exception):
    """Bad input. The message is one sentence that names the file or flag and the way out."""


def why_unreadable(error: Exception) -> str:
    """Shorten a library's error about an unreadable file to one line, without its advice to read it unsafely."""
    text = str(error).strip()
    if "weights_only" in text or "pickle" in text:  # PyTorch's and NumPy's advice names their switches
        line = "it holds something else than plain tensors or arrays"
    else:
        line = text.partition("\n")[0][:120] or "it ends too early"
    return f"{type(error).__name__}: {line}"


def describe_differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe, for a message, the names that both mappings hold with different values."""
    changed = [name for name, value in now.items() if name in there and there[name] != value]
    return [f"{name} {there[name]} there, {now[name]} now" for name in changed]


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a script's `main`: an `InputError` or `OSError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        try:
            return main(*args, **kwargs) or 0
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return wrapped
