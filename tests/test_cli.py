"""The command lines: every flag explains itself, in every script, and bad input is one sentence that names its flag."""

import argparse
import importlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from models import AnnealedSteps, CachePolicy, DetailedTokens, Method, find_method
from models.methods import GTR, LAZYMAR
from util.cli import Parser
from util.errors import InputError
from util.options import parse_options
from util.processes import Job

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(path.stem for path in ROOT.glob("*.py")), "util.download", "soak"]


class Found(BaseException):
    """Carries a script's parser, in place of what it would have parsed."""


def parser_of(script: str) -> Parser:
    def catch(self, *_):
        raise Found(self)

    main = importlib.import_module(script).main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        main(Job() if script in ("eval", "reproduce") else [])
    return found.value.args[0]


def with_subcommands(parser: argparse.ArgumentParser) -> Iterator[Parser]:
    assert isinstance(parser, Parser)
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from with_subcommands(sub)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_and_arguments_at_random_are_understood_or_refused(script, capsys):
    chance, parsers = random.Random(1), list(with_subcommands(parser_of(script)))
    values = ["0", "-1", "64", "1e9", "nan", "-inf", "", " ", "mar_tiny", "a,b", "0:1,5", "1,2", "💥", "9" * 400, "vae"]
    for one in parsers:
        for action in one._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help not in (None, argparse.SUPPRESS) and len(action.help.split()) >= 2, action
            assert all(option in one.format_help() for option in action.option_strings)
    for _ in range(800 if script == "eval" else 200):
        one, arguments = chance.choice(parsers), []
        for _ in range(chance.randint(1, 3)):
            option = chance.choice(sorted(one._option_string_actions))
            arguments += [option, *chance.choices(values, k=chance.randint(0, 2))]
        try:
            parse_options(arguments) if script == "eval" else one.parse_args(arguments)
        except InputError as error:
            assert str(error).strip() and "\n" not in str(error), arguments
        except SystemExit as end:  # --help
            assert end.code == 0, arguments


def test_a_switch_is_turned_off_in_two_spellings():
    options = parse_options(["--no-score", "--no_cuda_graphs", "--lazy_mar", "--no_head_cache"])
    assert (options.score, options.cuda_graphs, options.save_images, options.overwrite) == (False, False, True, False)
    assert options.method.cache == CachePolicy(head_cache=False)


def test_the_help_shows_defaults_that_are_understood_as_they_are_written():
    text = " ".join(parser_of("eval").format_help().split())
    names = "start_step refresh_interval prune_layer recomputed_fractions min_margin selection head_refresh_interval"
    given = []
    for name in [*names.split(), "head_skipped_blocks", "head_warmup"]:
        given += [f"--{name}", re.search(rf" --{name} .*?\(default: ([^)]*)\)", text).group(1)]
    assert parse_options(["--lazy_mar", *given]).method.cache == CachePolicy()


@pytest.mark.parametrize(
    ("arguments", "method", "folder"),
    [
        ("", "mar", "mar_huge-iter64-cfg3.25-50000"),
        ("--lazy_mar --method lazymar --num_iter 32", replace(LAZYMAR, num_iter=32),
         "mar_huge-lazy-iter32-cfg3.25-50000"),
        ("--method LazyMAR+DiSA --cfg 3 --num_images 1000", "lazymar+disa", "mar_huge-lazymar-disa-iter64-cfg3-1000"),
        ("--method gtr --num_iter 20,8,4 --detailed_tokens 0.2:40 --num_sampling_steps 50:5:cosine", replace(
            GTR, num_iter=(20, 8, 4), detailed_tokens=DetailedTokens(0.2, 40),
            num_sampling_steps=AnnealedSteps(50, 5, "cosine")), "mar_huge-gtr-iter32-cfg3.25-50000"),
        ("--model mar_base --lazy_mar --unguided_below 1.2 --no-token_cache --prune_layer 99 --refresh_steps 0,9",
         Method(unguided_below=1.2, cache=CachePolicy(token_cache=False, prune_layer=99, refresh_steps=(0, 9))),
         "mar_base-lazy-iter64-cfg2.9-50000"),
        ("--model mar_tiny --class_labels 7 --num_images 5", "mar", "mar_tiny-iter64-cfg5-5-classes-7"),
        ("--cfg 2.5,2.5000001 --seed 0,1", "mar", "mar_huge-iter64-cfg2.5-2.5000001-50000-seeds"),
    ],
)  # fmt: skip
def test_a_method_and_its_settings_are_chosen_by_flags(arguments, method, folder):
    options = parse_options(arguments.split())
    assert options.method == (find_method(method) if isinstance(method, str) else method)
    assert options.output_dir == Path("output", folder)


def test_classes_take_turns_and_images_are_counted():
    assert parse_options(["--class_labels", "207,360"]).labels() == [207, 360]
    assert parse_options(["--class_labels", "7,3", "--num_images", "5"]).labels() == [7, 3, 7, 3, 7]
    assert parse_options(["--num_images", "5", "--class_num", "3"]).labels() == [0, 1, 2, 0, 1]
    assert set(Counter(parse_options([]).labels()).values()) == {50}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_image 3", "unrecognized arguments: --num_image 3"),
        ("--num_images 0", "--num_images: must be from 1 to 10000000, not 0"),
        ("--model mar_giant", "--model: invalid choice: 'mar_giant'"),
        ("--cfg nan", "--cfg: must be at least 1, not nan"),
        ("--cfg 3,3.0", "--cfg takes one value, or several different ones"),
        ("--class_labels 3,1000", "--class_labels must be classes of mar_huge, from 0 to 999"),
        ("--kid --no-score", "--kid has no use with --no-score"),
        ("--num_iter 24,6,2", "--num_iter must be one number for one stage, not 24,6,2"),
        ("--method foo", "--method 'foo' is unknown: choose from mar, lazymar,"),
        ("--lazy_mar --method disa", "--lazy_mar means --method lazymar, not --method disa: leave one of them out"),
        ("--method disa --start_step 3", "--start_step needs caches: give --lazy_mar too"),
        ("--lazy_sampling_steps 40", "--lazy_sampling_steps needs a method that caches"),
        ("--tokens_per_step 256 --num_iter 3", "--tokens_per_step takes the place of --num_iter"),
        ("--method gtr --detailed_tokens 0.1", "--detailed_tokens: invalid SHARE:N or none value: '0.1'"),
        ("--detailed_tokens 0.1:50", "--detailed_tokens needs several stages"),
        ("--lazy_mar --start_step 1.5", "--start_step must be a whole number, or a fraction between 0 and 1, not 1.5"),
        ("--lazy_mar --prune_layer 20", "--prune_layer must be below 20, the decoder blocks of mar_huge"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_flag(arguments, message):
    with pytest.raises(InputError) as refused:
        parse_options(arguments.split())
    assert message in str(refused.value) and "\n" not in str(refused.value)
