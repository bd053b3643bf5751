"""The command lines: every flag explains itself, in every script, and bad input is one sentence that names its flag."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import soak

import benchmark
import compare
import report
import reproduce
import score
import train
from models import AnnealedSteps, CachePolicy, DetailedTokens, Method, find_method
from models.lazymar.methods import GTR, LAZYMAR, RECAP
from util.cli import Parser, check_ranges, flag, version
from util.errors import InputError
from util.runs.methods import with_steps
from util.runs.options import Options, check, parse_options
from util.weights import download

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "eval.py": lambda arguments: parse_options("", arguments),
    "train.py": train.parse_args,
    "benchmark.py": benchmark.parse_args,
    "score.py": score.parse_args,
    "compare.py": compare.parse_args,
    "reproduce.py": reproduce.parse_args,
    "report.py": report.parse_args,
    "util/weights/download.py": download.parse_args,
    "tests/soak.py": soak.parse_args,
}
HIDDEN = "--no_"  # the second spelling of a switch


class Found(Exception):
    """Carries a script's parser, in place of what it would have parsed."""


def parser_of(script: str) -> Parser:
    def catch(self, *_):
        raise Found(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        SCRIPTS[script]([])
    return found.value.args[0]


def with_subcommands(parser: argparse.ArgumentParser) -> Iterator[Parser]:
    assert isinstance(parser, Parser)
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from with_subcommands(sub)


def flags_of(parser: Parser) -> list[argparse.Action]:
    """The arguments that take part in a run, with and without dashes."""
    skipped = (argparse._HelpAction, argparse._VersionAction, argparse._SubParsersAction)
    return [action for action in parser._actions if not isinstance(action, skipped)]


@pytest.fixture(params=SCRIPTS)
def parser(request) -> Parser:
    return parser_of(request.param)


def test_every_script_is_here():
    assert {path.name for path in ROOT.glob("*.py")} <= SCRIPTS.keys()


def test_every_flag_has_help_a_default_and_a_format(parser):
    for one in with_subcommands(parser):
        for action in flags_of(one):
            name = action.option_strings[0] if action.option_strings else action.dest
            if name.startswith(HIDDEN):
                continue
            assert action.help not in (None, argparse.SUPPRESS) and len(action.help.split()) >= 3, name
            assert action.nargs == 0 or action.metavar or action.choices, f"the format of {name} is not shown"
            if action.default not in (None, argparse.SUPPRESS) and action.default is not False:
                assert "default: " in action.help, name
            if action.choices:
                shown = action.help if action.metavar else one.format_help()
                assert all(str(choice) in shown for choice in action.choices), name


def test_the_help_shows_every_form_but_the_second_spelling(parser):
    for one in with_subcommands(parser):
        text = one.format_help()
        for action in flags_of(one):
            for option in action.option_strings:
                assert (option in re.findall(r"--[a-z0-9_-]+", text)) != option.startswith(HIDDEN), option
            if action.nargs == 0 and action.default is True:
                assert f"--no-{action.dest}" in action.option_strings


def test_the_help_shows_the_defaults_of_the_policy(capsys):
    with pytest.raises(SystemExit) as end:
        parse_options("", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "(default: 0:1,20:0.6,21:0.5,25:0.4,30:0.15,35:0.12,40:0.05)" in text
    for name in ("token_cache", "condition_cache", "head_cache"):
        assert re.search(rf"--{name}, --no-{name} [^()]*\(default: on\)", text)
    assert "(2 to 1000; default: 100)" in text


def test_defaults_are_understood_as_they_are_written():
    policy = CachePolicy()
    written = ",".join(f"{step}:{fraction:g}" for step, fraction in policy.kept_fractions)
    more = ["--kept_fractions", written, "--head_skipped_blocks", "1,2,3,4", "--head_warmup", "0.9"]
    assert parse_options("", ["--lazy_mar", *more]).method.cache == policy


@pytest.mark.parametrize("spelling", ["--no-", "--no_"])
def test_a_switch_is_turned_off_in_two_spellings(spelling):
    options = parse_options("", [f"{spelling}score", f"{spelling}cuda_graphs", "--lazy_mar", f"{spelling}head_cache"])
    assert (options.score, options.cuda_graphs, options.save_images, options.overwrite) == (False, False, True, False)
    assert options.method.cache == CachePolicy(head_cache=False)
    assert parse_options("", [f"{spelling}score", "--score"]).score


def test_version_and_help_work_everywhere(parser, capsys):
    for one in with_subcommands(parser):
        for arguments, shown in [(["--version"], f"lazymar {version()}\n"), (["--help"], "usage: ")]:
            with pytest.raises(SystemExit) as end:
                one.parse_args(arguments)
            assert end.value.code == 0 and capsys.readouterr().out.startswith(shown)
    assert f'name = "lazymar"\nversion = "{version()}"\n' in (ROOT / "pyproject.toml").read_text()


def test_each_option_of_an_evaluation_is_a_flag_with_the_same_default():
    assert parse_options("", []) == Options()
    assert parse_options("", ["--lazy_mar"]) == Options(method=LAZYMAR) == parse_options("", ["--method", "lazymar"])


@pytest.mark.parametrize(
    ("arguments", "method", "folder"),
    [
        ("", "mar", "mar_huge-iter64-cfg3.25-50000"),
        ("--num_sampling_steps 50", Method(num_sampling_steps=50), "mar_huge-iter64-cfg3.25-50000"),
        ("--lazy_mar", "lazymar", "mar_huge-lazy-iter64-cfg3.25-50000"),
        ("--lazy_mar --method lazymar --num_iter 32", Method(num_iter=32, cache=CachePolicy()),
         "mar_huge-lazy-iter32-cfg3.25-50000"),
        ("--method LazyMAR+DiSA", "lazymar+disa", "mar_huge-lazymar+disa-iter64-cfg3.25-50000"),
        ("--num_sampling_steps 50:5", "disa", "mar_huge-disa-iter64-cfg3.25-50000"),
        ("--num_sampling_steps 50:5:cosine", Method(num_sampling_steps=AnnealedSteps(50, 5, "cosine")),
         "mar_huge-iter64-num_sampling_steps50-5-cosine-cfg3.25-50000"),
        ("--method gtr --num_iter 20,8,4 --detailed_tokens 0.2:40",
         GTR.replaced(num_iter=(20, 8, 4), detailed_tokens=DetailedTokens(0.2, 40)),
         "mar_huge-gtr-iter20-8-4-detailed_tokens0.2-40-cfg3.25-50000"),
        ("--lazy_mar --start_step 3 --unguided_below 1.2",
         Method(cache=CachePolicy(start_step=3), unguided_below=1.2),
         "mar_huge-lazy-iter64-unguided_below1.2-cfg3.25-50000"),
        ("--method fast", "fast", "mar_huge-fast-iter15-3-2-cfg3.25-50000"),
        ("--method gtr --detailed_tokens none --num_sampling_steps 50", GTR.replaced(
            detailed_tokens=None, num_sampling_steps=50),
         "mar_huge-gtr-iter24-6-2-num_sampling_steps50-detailed_tokensnone-cfg3.25-50000"),
        ("--model mar_base --lazy_mar --head_skipped_blocks 4,5", Method(
            cache=CachePolicy(head_skipped_blocks=(4, 5))), "mar_base-lazy-iter64-cfg2.9-50000"),
        ("--model mar_base --lazy_mar --no-token_cache --prune_layer 99 --no-head_cache --head_skipped_blocks 7",
         Method(cache=CachePolicy(token_cache=False, prune_layer=99, head_cache=False, head_skipped_blocks=(7,))),
         "mar_base-lazy-iter64-cfg2.9-50000"),
        ("--method recap --start_step 0.25", RECAP.replaced(cache=replace(RECAP.cache, start_step=0.25)),
         "mar_huge-recap-iter64-start_step0.25-cfg3.25-50000"),
        ("--method recap --start_step 3", RECAP.replaced(cache=replace(RECAP.cache, start_step=3)),
         "mar_huge-recap-iter64-start_step3-cfg3.25-50000"),
    ],
)  # fmt: skip
def test_a_method_and_its_settings_are_chosen_by_flags(arguments, method, folder):
    options = check(parse_options("", arguments.split()))
    assert options.method == (find_method(method) if isinstance(method, str) else method)
    assert options.output_dir.name == folder


def test_studies_keep_the_numbers_of_steps_that_a_method_has_of_its_own():
    assert with_steps(find_method("lazymar"), 32, 50) == Method(num_iter=32, num_sampling_steps=50, cache=CachePolicy())
    assert with_steps(find_method("disa"), 32, 50) == find_method("disa").replaced(num_iter=32)
    assert with_steps(find_method("fast"), 32, 50) == find_method("fast")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method foo", "--method 'foo' is unknown: choose from mar, lazymar, disa"),
        ("--method lazymar+", "--method '' is unknown"),
        ("--method lazymar+recap", "--method lazymar+recap cannot be: lazymar and recap both decide what is cached"),
        ("--lazy_mar --method disa", "--lazy_mar means --method lazymar, which --method disa is not: leave one"),
        ("--method disa --start_step 3", "--start_step is a setting of LazyMAR: give --lazy_mar too, or another"),
        ("--num_iter 24,6,2", "--num_iter must be one number for one stage, not 24,6,2: or give num_stages, too"),
        ("--num_iter 64,", "--num_iter: invalid N,... value: '64,'"),
        ("--num_stages 3", "--num_iter must have a number of steps for each of the 3 stages, not 64"),
        ("--num_stages 6 --num_iter 1,1,1,1,1,1", "--num_stages must be one for which"),
        ("--num_stages 0", "--num_stages must be 1 to 16, not 0"),
        ("--method gtr --num_iter 65,6,2", "--num_iter must be 1 to 64 for a stage of 64 tokens, not 65"),
        ("--num_sampling_steps a", "--num_sampling_steps: invalid N or UPPER:LOWER:SCHEDULE value: 'a'"),
        ("--num_sampling_steps 50:", "--num_sampling_steps: invalid"),
        ("--num_sampling_steps 50:5:foo", "--num_sampling_steps must be annealed by a schedule of linear, cosine"),
        ("--num_sampling_steps 5:50", "--num_sampling_steps must not rise: lower is 50, above upper, which is 5"),
        ("--num_sampling_steps 1:1", "--num_sampling_steps must be 2 to 1000, not 1"),
        ("--num_sampling_steps 50:20:generation", "--num_sampling_steps falls by the schedule generation up to"),
        ("--method gtr --detailed_tokens 0.1", "--detailed_tokens: invalid SHARE:N or none value: '0.1'"),
        ("--method gtr --detailed_tokens 1.1:50", "--detailed_tokens 1.1:50 cannot be: "),
        ("--detailed_tokens 0.1:50", "--detailed_tokens are of the last stage of several: give num_stages, too"),
        ("--method gtr --num_stages 1", "--detailed_tokens are of the last stage of several: give num_stages, too, or"),
        ("--unguided_below 0.9", "--unguided_below must be a finite number of at least 1, not 0.9"),
        ("--lazy_mar --lazy_sampling_steps 1", "--lazy_sampling_steps must be at least 2, not 1"),
        ("--lazy_mar --start_step 1.5", "--start_step must be at least 0, whole or a fraction below 1"),
        ("--lazy_mar --start_step half", "--start_step: invalid N or FRACTION value: 'half'"),
        ("--lazy_mar --prune_layer 20", "--prune_layer must be below 20, the decoder blocks of mar_huge"),
        ("--lazy_mar --head_skipped_blocks 3,12", "--head_skipped_blocks must be below 12, the residual blocks of"),
    ],
)
def test_methods_that_cannot_be_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(InputError) as refused:
        check(parse_options("", arguments.split()))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("eval.py", "--num_image 3", "unrecognized arguments: --num_image 3"),
        ("eval.py", "--num_images", "--num_images: expected one argument"),
        ("eval.py", "--cfg nan", "--cfg must be a finite number, not nan"),
        ("eval.py", "--temperature nan", "--temperature must be a finite number of at least 0, not nan"),
        ("eval.py", "--temperature=-1", "--temperature must be a finite number of at least 0, not -1.0"),
        ("eval.py", "--num_sampling_steps 1", "--num_sampling_steps must be 2 to 1000, not 1"),
        ("eval.py", "--class_labels cat", "--class_labels: invalid CLASS,... value: 'cat'"),
        ("eval.py", "--lazy_mar --kept_fractions 0:1,5", "--kept_fractions: invalid STEP:FRACTION,... value: '0:1,5'"),
        ("eval.py", "--lazy_mar --head_warmup inf", "--head_warmup must be a finite number, not inf"),
        ("train.py", "", "the following arguments are required: stage"),
        ("train.py", "gan", "invalid choice: 'gan'"),
        ("train.py", "vae --lr nan", "--lr must be a finite number above 0, not nan"),
        ("train.py", "vae --lr 0", "--lr must be a finite number above 0, not 0.0"),
        ("train.py", "vae --pixel_std inf", "--pixel_std must be a finite number above 0, not inf"),
        ("train.py", "mar --head_tokens 0", "--head_tokens must be at least 1, not 0"),
        ("train.py", "mar --finish_steps x", "--finish_steps: invalid int value: 'x'"),
        ("train.py", "classifier --seed -1", "--seed must be 0 to 4294967295, not -1"),
        ("train.py", "classifier --head_tokens 3", "--head_tokens"),
        ("train.py", "mar --data", "--data: expected one argument"),
        ("benchmark.py", "--models", "--models: expected at least one argument"),
        ("benchmark.py", "--models mar_base mar_giant", "--models: invalid choice: 'mar_giant'"),
        ("benchmark.py", "--batch_sizes 8 0", "--batch_sizes must be at least 1, not 0"),
        ("benchmark.py", "--repeats 0", "--repeats must be at least 1, not 0"),
        ("benchmark.py", "--num_iter 1.5", "--num_iter: invalid int value: '1.5'"),
        ("score.py", "", "the following arguments are required: command"),
        ("score.py", "evaluate folder", "the following arguments are required: --statistics"),
        ("score.py", "statistics folder --output x --batch_size 0", "--batch_size must be at least 1, not 0"),
        ("score.py", "statistics folder --output x --features vgg", "--features: invalid choice: 'vgg'"),
        ("compare.py", "one", "the following arguments are required: OTHER"),
        ("compare.py", "one other third", "unrecognized arguments: third"),
        ("compare.py", "one other --output", "--output: expected one argument"),
        ("reproduce.py", "--ablations", "--ablations: expected at least one argument"),
        ("benchmark.py", "--method lazymar foo", "--method 'foo' is unknown"),
        ("benchmark.py", "--method lazymar+recap", "--method lazymar+recap cannot be"),
        ("reproduce.py", "--eval_bsz 0", "--eval_bsz must be at least 1, not 0"),
        ("reproduce.py", "--num_sampling_steps 1001", "--num_sampling_steps must be 2 to 1000, not 1001"),
        ("reproduce.py", "--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("report.py", "--result folder", "unrecognized arguments: --result folder"),
        ("util/weights/download.py", "", "the following arguments are required: NAME"),
        ("util/weights/download.py", "mar_giant", "there is no download named mar_giant"),
        ("tests/soak.py", "--kills 0", "--kills must be at least 1, not 0"),
    ],
)
def test_bad_input_names_the_flag_in_one_line(script, arguments, message):
    with pytest.raises(InputError) as refused:
        SCRIPTS[script](arguments.split())
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_at_random_are_understood_or_refused(script, capsys):
    chance, parsers = random.Random(1), list(with_subcommands(parser_of(script)))
    values = ["0", "-1", "1", "64", "1e9", "nan", "-inf", "", " ", "mar_tiny", "a,b", "0:1,5", "💥", "9" * 40, "vae"]
    for _ in range(300):
        one = chance.choice(parsers)
        arguments = [] if one is parsers[0] else [one.prog.split()[-1]]
        options = sorted(one._option_string_actions)
        for _ in range(chance.randint(1, 3)):
            arguments += [chance.choice(options), *chance.choices(values, k=chance.randint(0, 2))]
        try:
            SCRIPTS[script](arguments)
        except InputError as error:
            assert str(error).strip() and "\n" not in str(error), arguments
        except SystemExit as end:  # --help and --version
            assert end.code == 0, arguments


def test_ranges_hold_for_options_that_no_command_line_made():
    @dataclass
    class Settings:
        steps: int = flag(3, "how many steps", minimum=1)
        rate: float = flag(0.5, "how fast", above=0)
        cases: int | None = flag(None, "how many cases", minimum=1, maximum=9)

    check_ranges(Settings())
    for wrong, message in [
        (Settings(steps=0), "--steps must be at least 1, not 0"),
        (Settings(rate=float("nan")), "--rate must be a finite number above 0, not nan"),
        (Settings(cases=10), "--cases must be 1 to 9, not 10"),
    ]:
        with pytest.raises(InputError, match=message):
            check_ranges(wrong)
