"""Command lines: one parser for every script, in which a flag is declared once.

A script declares a flag with `Parser.add`: its name, kind, help, default and range. A dataclass declares its fields
with `flag`, and `Parser.add_fields` makes a flag of each. The help shows default, range and choices by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, NoReturn

from util.errors import InputError


@functools.lru_cache
def version() -> str:
    """The project's version, from `pyproject.toml`."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^version = "(.+)"$', text, flags=re.MULTILINE)[0]  # Python 3.9 has no reader for TOML


def numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers with commas between them."""
    return tuple(int(item) for item in text.split(",") if item.strip())


def step_fractions(text: str) -> tuple[tuple[int, float], ...]:
    """Read pairs STEP:FRACTION with commas between them."""
    pairs = (item.split(":") for item in text.split(","))
    return tuple((int(step), float(fraction)) for step, fraction in pairs)


def steps_or_fraction(text: str) -> int | float:
    """Read a whole number of steps, or a fraction of all."""
    return float(text) if "." in text else int(text)


# How the value of a field is read, by its annotation without "| None", and what the help calls it.
READERS: dict[str, Callable[[str], Any]] = {
    "bool": bool,
    "int": int,
    "int | float": steps_or_fraction,
    "float": float,
    "str": str,
    "Path": Path,
    "tuple[int, ...]": numbers,
    "tuple[tuple[int, float], ...]": step_fractions,
}
METAVARS = {
    int: "N",
    float: "X",
    str: "NAME",
    Path: "PATH",
    numbers: "N,...",
    step_fractions: "STEP:FRACTION,...",
    steps_or_fraction: "N or FRACTION",
}


def flag(default: Any, help: str, **settings: Any) -> Any:
    """Declare a dataclass field that is a flag, too; `settings` are keyword arguments of `Parser.add`."""
    return dataclasses.field(default=default, metadata={"help": help, **settings})


def check_ranges(options: Any) -> None:
    """Raise InputError, naming the flag, if a field that was declared with `flag` is out of its range."""
    for field in dataclasses.fields(options):
        _check_range(f"--{field.name}", getattr(options, field.name), **field.metadata)


class Parser(argparse.ArgumentParser):
    """An argument parser with `--version` that takes no abbreviations.

    It raises `InputError` for what it cannot read, so that bad input is printed once however many processes there are.
    """

    def __init__(self, description: str | None = None, **settings: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter, **settings)
        self.add_argument("--version", action="version", version=f"lazymar {version()}", help="print the version")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")

    def add(
        self,
        name: str,
        kind: Callable[[str], Any],
        help: str,
        *,
        default: Any = None,
        default_text: str | None = None,
        only_if_given: bool = False,
        metavar: str | None = None,
        choices: Iterable[str] | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        above: float | None = None,
        alias: str | None = None,
        group: argparse._ArgumentGroup | None = None,
        **settings: Any,
    ) -> None:
        """Add a flag, or a positional argument if `name` has no dashes.

        Args:
            name:          such as --num_iter. A switch that is on by default gets --no-NAME, too.
            kind:          reads the value, and raises ValueError if it cannot; bool makes a switch.
            help:          whole phrases for a reader who is new. Range, choices and default are added to them.
            default:       the value if the flag is not given.
            default_text:  the default in words, where it depends on other flags.
            only_if_given: leaves the flag out of the result unless it is given.
            metavar:       what the help calls the value, such as FILE or FOLDER, if its kind does not say enough.
            choices:       the values allowed.
            minimum:       the least number allowed.
            maximum:       the greatest number allowed; it needs a minimum.
            above:         a number that is too small by itself, in place of a minimum.
            alias:         a second name of the flag.
            group:         the group that the help lists the flag in.
            settings:      goes to `argparse.ArgumentParser.add_argument`: `nargs`, `required`, `dest`.
        """
        if default_text is None and default is not None and default is not False:
            default_text = _written(default)
        choices = choices and list(choices)
        limits = {"minimum": minimum, "maximum": maximum, "above": above}
        notes = [
            f"of {', '.join(choices)}" if choices and metavar else "",
            _range(**limits),
            "required" if settings.get("required") else "",
            f"default: {default_text}" if default_text else "",
        ]
        note = "; ".join(filter(None, notes))
        settings["help"] = (f"{help} ({note})" if note else help).replace("%", "%%")
        settings["default"] = argparse.SUPPRESS if only_if_given else default
        to = group or self
        if kind is bool and default:
            bare = name.lstrip("-")
            to.add_argument(name, f"--no-{bare}", action=_Switch, nargs=0, **settings)
            # The spelling with a second underscore is understood, and left out of the help.
            hidden = argparse.SUPPRESS
            to.add_argument(f"--no_{bare}", dest=bare, action="store_false", default=hidden, help=hidden)
        elif kind is bool:
            to.add_argument(name, action="store_true", **settings)
        else:
            if not metavar and not choices:
                metavar = METAVARS[kind] if name.startswith("-") else name.upper()

            def read(text: str) -> Any:
                value = kind(text)
                _check_range(name, value, **limits)
                return value

            read.__name__ = kind.__name__ if kind in (int, float) else str(metavar)  # for "invalid ... value"
            names = filter(None, (name, alias))
            to.add_argument(*names, type=read, metavar=metavar, choices=choices, **settings)

    def add_fields(
        self,
        cls: type,
        *names: str,
        only_if_given: bool = False,
        group: argparse._ArgumentGroup | None = None,
    ) -> None:
        """Add flags for the fields of a dataclass that have a help text, or for those of these names."""
        for field in dataclasses.fields(cls):
            if field.name in names or (not names and "help" in field.metadata):
                kind = READERS[str(field.type).removesuffix(" | None")]
                settings = {"default": field.default, "only_if_given": only_if_given, "group": group, **field.metadata}
                self.add(f"--{field.name}", kind, **settings)


class _Switch(argparse.Action):
    """Sets whether a switch was given as --NAME rather than as --no-NAME."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def _written(value: Any, separator: str = ",") -> str:
    """Write a value as it is given on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):  # of arguments
        return " ".join(map(_written, value))
    if isinstance(value, tuple):  # of numbers, or of pairs
        return separator.join(_written(item, ":") for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(minimum: float | None = None, maximum: float | None = None, above: float | None = None) -> str:
    """Say in words which numbers are allowed; nothing without limits."""
    if above is not None:
        return f"above {above}"
    if minimum is None:
        return ""
    return f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"


def _check_range(
    name: str,
    value: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    **_: Any,
) -> None:
    """Raise InputError if a value is a number, or several, and not finite or outside the limits."""
    if isinstance(value, tuple):
        for item in value:
            _check_range(name, item, minimum, maximum, above)
    if not isinstance(value, (int, float)):
        return
    if (
        -math.inf < value < math.inf
        and (minimum is None or minimum <= value)
        and (maximum is None or value <= maximum)
        and (above is None or above < value)
    ):
        return
    allowed = _range(minimum, maximum, above)
    if isinstance(value, float) and maximum is None:
        allowed = f"a finite number {'of ' if minimum is not None else ''}{allowed}".strip()
    raise InputError(f"{name} must be {allowed}, not {value}")
