"""What the scripts' command lines share: a parser whose errors are `InputError`, and readers for common values."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from util.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises `InputError` and adds each default to the help."""

    def __init__(self, description: str | None = None, **settings: Any) -> None:
        if sys.platform == "win32":
            raise InputError("LazyMAR runs on Linux and macOS: on Windows, run it in WSL")
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([re.sub("^--no_", "--no-", arg) for arg in args], namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')} (--help lists the flags)")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.help is None or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def number(
    kind: type[int] | type[float], minimum: float = -math.inf, maximum: float = math.inf
) -> Callable[[str], float]:
    """Return a reader of one finite number from `minimum` to `maximum`, for the `type` of an argument."""

    def read(text: str) -> float:
        value = kind(text)
        if not (minimum <= value <= maximum and abs(value) < math.inf):
            limits = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {limits if minimum > -math.inf else 'finite'}, not {text}")
        return value

    read.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return read


def numbers(kind: type[int] | type[float] = int, minimum: float = -math.inf) -> Callable[[str], tuple]:
    """Return a reader of numbers that are separated by commas, such as 0,1,2."""
    read_one = number(kind, minimum)

    def read(text: str) -> tuple:
        return tuple(read_one(item) for item in text.split(",") if item.strip())

    read.__name__ = f"{kind.__name__},..."
    return read
