"""Make a page of what `reproduce.py` has measured: tables, figures and images in one file that needs no network.

python report.py                                  # output/reproduce/report.html, and its pictures in report/ beside it
python report.py --results output/reproduce --output report.html

Among the pictures is rows_by_step.png, which the README shows: assets/rows_by_step.png is a copy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write
from util.report.findings import Findings
from util.report.page import render


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add("--results", Path, "folder that reproduce.py wrote to, its --output_dir", metavar="FOLDER",
               default=Path("output/reproduce"))  # fmt: skip
    parser.add("--output", Path, "the page to write", metavar="FILE", default_text="report.html in --results")
    return parser.parse_args(arguments)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output = args.output or args.results / "report.html"
    findings = Findings.read(args.results)
    page, pictures = render(findings)
    folder = output.with_suffix("")
    try:
        for picture in pictures:
            with atomic_write(folder / f"{picture.name}.png") as partial:
                partial.write_bytes(picture.png)
        with atomic_write(output) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or output}: {error.strerror}") from error
    for problem in findings.damaged:
        print(f"note: {problem}", file=sys.stderr)
    print(f"{output} ({len(page) / 1e6:.1f} MB), and its {len(pictures)} pictures in {folder}")


if __name__ == "__main__":
    sys.exit(main())
