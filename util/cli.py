"""Command lines: a parser that reports as the rest of the project does, and flags for a cache policy."""

from __future__ import annotations

import argparse
import dataclasses
from typing import NoReturn

from models.lazymar.policy import CachePolicy
from util.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `InputError`, so that only one of many processes prints it."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")

    def add_switch(self, name: str, default: bool, help_text: str) -> None:
        """Add --name and --no-name; the latter also with an underscore."""
        self.add_argument(f"--{name}", action="store_true", default=default, help=help_text)
        self.add_argument(f"--no-{name}", f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(int(item) for item in text.split(",") if item.strip())


def fractions(text: str) -> tuple[tuple[int, float], ...]:
    """Pairs step:fraction with commas between them."""
    pairs = (item.split(":") for item in text.split(","))
    return tuple((int(step), float(fraction)) for step, fraction in pairs)


def add_policy_flags(parser: Parser) -> None:
    """Add --lazy_mar and a flag for each field of `CachePolicy`."""
    group = parser.add_argument_group("LazyMAR", "caching; the defaults are the paper's")
    group.add_argument("--lazy_mar", action="store_true", help="sample with LazyMAR's caches")
    for field in dataclasses.fields(CachePolicy):
        if isinstance(field.default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        else:
            kinds = {"kept_fractions": fractions, "head_skipped_blocks": numbers}
            options = {"type": kinds.get(field.name, type(field.default)), "metavar": "VALUE"}
        shown = field.metadata["help"] + f" ({field.default})" * isinstance(field.default, (int, float, str))
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=shown, **options)


def read_policy(given: dict) -> CachePolicy | None:
    """The policy of parsed flags by name; None without --lazy_mar.

    Raises InputError for values out of range, and for a policy's flag without --lazy_mar.
    """
    fields = {field.name: given[field.name] for field in dataclasses.fields(CachePolicy) if field.name in given}
    if not given["lazy_mar"]:
        if fields:
            raise InputError(f"--{next(iter(fields))} is a setting of LazyMAR: give --lazy_mar too")
        return None
    try:
        return CachePolicy(**fields)
    except ValueError as error:
        raise InputError(f"--{error}") from None
