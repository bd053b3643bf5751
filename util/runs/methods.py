"""The method of a run on the command line, in `run.json`, in the names of folders, and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations
from typing import Any

from models import METHODS, AnnealedSteps, CachePolicy, DetailedTokens, Method, find_method
from models.lazymar.methods import LAZYMAR
from util.cli import Parser
from util.errors import InputError

# Settings that `run.json` holds only where they are others: runs that began before there were any have none of them.
IMPLIED = {
    "num_stages": 1,
    "detailed_tokens": None,
    "unguided_below": 1.0,
    "cache.lazy_sampling_steps": None,
}
NEW_SETTINGS = [name.removeprefix("cache.") for name in IMPLIED]
POLICY_FIELDS = [field.name for field in dataclasses.fields(CachePolicy)]


# The command line


def steps_of_stages(text: str) -> int | tuple[int, ...]:
    """Read a number of autoregressive steps, or one for each stage, with commas between them."""
    steps = tuple(map(int, text.split(",")))
    return steps[0] if len(steps) == 1 else steps


def denoising_steps(text: str) -> int | AnnealedSteps:
    """Read a number of denoising steps, or UPPER:LOWER or UPPER:LOWER:SCHEDULE. Raises InputError if they cannot be."""
    if ":" not in text:
        return int(text)
    upper, lower, *schedule = text.split(":", 2)
    steps = int(upper), int(lower)
    try:
        return AnnealedSteps(*steps, *schedule)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def detailed_tokens(text: str) -> DetailedTokens | None:
    """Read SHARE:STEPS, or none. Raises InputError if they are out of range."""
    if text.lower() == "none":
        return None
    share, steps = text.split(":")
    values = float(share), int(steps)
    try:
        return DetailedTokens(*values)
    except ValueError as error:
        raise InputError(f"--detailed_tokens {text} cannot be: {error}") from None


READERS: dict[str, dict[str, Any]] = {
    "num_stages": {"kind": int, "minimum": 1, "maximum": 16},
    "num_iter": {"kind": steps_of_stages, "metavar": "N,..."},
    "num_sampling_steps": {
        "kind": denoising_steps,
        "metavar": "N or UPPER:LOWER:SCHEDULE",
        "minimum": 2,
        "maximum": 1000,
    },
    "detailed_tokens": {"kind": detailed_tokens, "metavar": "SHARE:N or none"},
    "unguided_below": {"kind": float, "metavar": "SCALE", "minimum": 1},
}


def add_method(parser: Parser) -> None:
    """Add --method, --lazy_mar, and a flag for each setting of a method and of its cache."""
    group = parser.add_argument_group(
        "method",
        "what decides the time of sampling: a method sets all of it, and each flag replaces one of its settings",
    )
    parser.add(
        "--method",
        str,
        f"how to sample: {', '.join(METHODS)}, or several of them joined by +, such as lazymar+disa",
        default_text="mar",
        group=group,
    )
    parser.add("--lazy_mar", bool, "sample with LazyMAR's caches: --method lazymar", group=group)
    add_settings(parser, *READERS, group=group)
    group = parser.add_argument_group(
        "caches", "settings of a --method that caches; the defaults are LazyMAR's, as in its paper"
    )
    parser.add_fields(CachePolicy, only_if_given=True, group=group)


def add_settings(parser: Parser, *names: str, **more: Any) -> None:
    """Add flags for settings of a method, which are left out of the result unless they are given."""
    fields = {field.name: field for field in dataclasses.fields(Method)}
    for name in names:
        settings = {"default": fields[name].default, "only_if_given": True, **READERS[name], **more}
        parser.add(f"--{name}", help=fields[name].metadata["help"], **settings)


def take_method(given: dict[str, Any]) -> Method:
    """Take the flags of `add_method` out of those that were given, and return the method that they ask for.

    Raises InputError for an unknown method, for flags that contradict each other, and for values out of range.
    """
    name, lazy_mar = given.pop("method"), given.pop("lazy_mar")
    settings = {name: given.pop(name) for name in READERS if name in given}
    policy = {name: given.pop(name) for name in POLICY_FIELDS if name in given}
    try:
        method = find_method(("lazymar" if lazy_mar else "mar") if name is None else name)
        if lazy_mar and method.cache != LAZYMAR.cache:
            raise InputError(f"--lazy_mar means --method lazymar, which --method {name} is not: leave one of them out")
        if policy:
            if method.cache is None:
                raise InputError(
                    f"--{next(iter(policy))} is a setting of LazyMAR: give --lazy_mar too, or another --method that "
                    f"caches"
                )
            settings["cache"] = dataclasses.replace(method.cache, **policy)
        return method.replaced(**settings)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def add_steps(parser: Parser, **more: Any) -> None:
    """Add the flags --num_iter, with `more` settings of `Parser.add`, and --num_sampling_steps: plain numbers each."""
    default = Method()
    parser.add(
        "--num_iter",
        int,
        "autoregressive steps; methods with a number of their own keep it",
        minimum=1,
        **{"default": default.num_iter, **more},
    )
    parser.add(
        "--num_sampling_steps",
        int,
        "denoising steps of the diffusion head; methods with a number of their own keep it",
        default=default.num_sampling_steps,
        minimum=2,
        maximum=1000,
    )


def find_methods(names: Iterable[str]) -> dict[str, Method]:
    """Return the methods of names on a command line, each once. Raises InputError for one that cannot be."""
    try:
        return {name: find_method(name) for name in names}
    except ValueError as error:
        raise InputError(f"--{error}") from None


def with_steps(method: Method, num_iter: int, num_sampling_steps: int) -> Method:
    """Return a method with other numbers of steps, unless it has numbers of its own."""
    settings = {"num_iter": num_iter, "num_sampling_steps": num_sampling_steps}
    return method.replaced(**{name: steps for name, steps in settings.items() if name not in method.changes})


# Records and words


def record_settings(method: Method) -> dict[str, Any]:
    """Return the settings of a method as `run.json` holds them."""
    cache = dataclasses.asdict(method.cache) if method.cache else {}
    settings = {**_flat(method), "lazy_mar": method.cache is not None}
    settings = {name: value for name, value in settings.items() if name not in cache}
    settings["cache"] = {name: value for name, value in cache.items() if value != IMPLIED.get(f"cache.{name}", ...)}
    return {name: value for name, value in settings.items() if value != IMPLIED.get(name, ...)}


def in_words(method: Method) -> str:
    """Return the name of a method and those of its settings that are others: "lazymar+disa, num_iter 32"."""
    name, others = _closest(method)
    return ", ".join([name, *(f"{setting} {_text(value)}" for setting, value in others.items())])


def in_a_path(method: Method) -> str:
    """Return the part of a folder's name that tells one method from another.

    For MAR and LazyMAR it tells the number of autoregressive steps alone, as long as nothing of other methods is used.
    """
    name, others = _closest(method)
    told = dict(others)
    if name in ("mar", "lazymar"):
        told = {setting: value for setting, value in others.items() if setting in NEW_SETTINGS}
        if isinstance(method.num_sampling_steps, AnnealedSteps):
            told["num_sampling_steps"] = others["num_sampling_steps"]
    told.pop("num_iter", None)
    short = {"mar": "", "lazymar": "-lazy"}.get(name, f"-{name}")
    settings = "".join(f"-{setting}{_text(value)}" for setting, value in told.items())
    return f"{short}-iter{_text(method.num_iter)}{settings}".replace(",", "-").replace(":", "-")


def _text(value: Any) -> str:
    """Write a setting as it is given on the command line."""
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return "none" if value is None else str(value)


def _flat(method: Method) -> dict[str, Any]:
    """Return the settings of a method and of its cache, by name, on one level and as JSON can hold them."""
    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    policy = settings.pop("cache")
    for name, value in settings.items():
        if isinstance(value, (AnnealedSteps, DetailedTokens)):
            settings[name] = ":".join(map(str, dataclasses.astuple(value)))
    return {**settings, **(dataclasses.asdict(policy) if policy else {})}


@lru_cache
def _closest(method: Method) -> tuple[str, dict[str, Any]]:
    """Return the name of the method, or composition, that has most settings in common, and the others of these."""
    own = _flat(method)

    def others(name: str) -> dict[str, Any]:
        theirs = _flat(find_method(name))
        return {setting: own.get(setting) for setting in {**own, **theirs} if own.get(setting) != theirs.get(setting)}

    return min(((name, others(name)) for name in _compositions()), key=lambda found: len(found[1]))


@lru_cache
def _compositions() -> list[str]:
    """Return the names of all methods and compositions, those of fewer methods first."""
    parts, names = [name for name in METHODS if name != "mar"], ["mar"]
    for count in range(1, len(parts) + 1):
        for chosen in combinations(parts, count):
            try:
                find_method("+".join(chosen))
            except ValueError:  # they contradict each other
                continue
            names.append("+".join(chosen))
    return names
