"""Numbers and names in the words of the report."""

from __future__ import annotations

import math

from markupsafe import Markup, escape

from util.reproduction.paper import TABLE
from util.reproduction.results import Comparison
from util.scoring.jackknife import Spread, difference

MODEL_NAMES = {"mar_base": "B", "mar_large": "L", "mar_huge": "H", "mar_tiny": "tiny"}


def network_name(method: str) -> str:
    """The paper's name for a network that is sampled with a method: MAR or LazyMAR."""
    return "MAR" if method == "baseline" else method


def row_title(model: str, method: str) -> str:
    """A row's title: "LazyMAR-B" as in the paper, or "tiny, LazyMAR" for a model that the paper does not have."""
    size = MODEL_NAMES.get(model, model)
    return f"{network_name(method)}-{size}" if (model, method) in TABLE else f"{size}, {method}"


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number, or a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def percent(value: float, digits: int = 0) -> str:
    """A share in per cent."""
    return f"{value:.{digits}%}"


def spread(measured: Spread, digits: int, sign: str = "") -> str:
    """A number with its standard error, if that is known."""
    value, error = measured
    return number(value, digits, sign) + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def distance(setting: Comparison, base: Comparison | None, digits: int) -> str:
    """The distance of a setting's images to the baseline's and, in brackets, how much more that is than `base`'s."""
    text = spread(setting.pixel_distance, digits)
    if base in (None, setting):
        return text
    more = difference(setting.pixel_distance_by_group, base.pixel_distance_by_group)
    return f"{text} ({spread(more, 2, sign='+')})"


def mark_up(mark: str) -> Markup:
    """A remark on a row; its words in capitals before the colon stand out."""
    head, colon, rest = mark.partition(":")
    if colon and head[:4].isupper():
        return Markup('<span class="mark">{}:</span>{}').format(head, rest)
    return escape(mark)


def cite(source: str) -> Markup:
    """A source, such as "arXiv 2503.12450", with its number as a link."""
    name, _, identifier = source.rpartition("arXiv ")
    return Markup('{}<a href="https://arxiv.org/abs/{}">arXiv {}</a>').format(name, identifier, identifier)
