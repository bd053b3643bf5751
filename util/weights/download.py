"""Fetch the public weights and reference statistics: `python -m util.weights.download mar_base vae statistics`.

A download that was cut off goes on where it stopped, and a file appears under its own name only when it is whole.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import file_digest


@dataclass(frozen=True)
class RemoteFile:
    """A public file and where it belongs."""

    url: str
    path: str  # below the folder of pretrained models
    size: float  # bytes, roughly: a file of less than half of it is something else


_DROPBOX = "https://www.dropbox.com/scl/fi"  # dl=1 serves the file, dl=0 a web page
FILES = {
    "mar_base": RemoteFile(
        f"{_DROPBOX}/f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1",
        "mar/mar_base/checkpoint-last.pth",
        1.6e9,
    ),
    "mar_large": RemoteFile(
        f"{_DROPBOX}/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1",
        "mar/mar_large/checkpoint-last.pth",
        3.7e9,
    ),
    "mar_huge": RemoteFile(
        f"{_DROPBOX}/1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1",
        "mar/mar_huge/checkpoint-last.pth",
        7.2e9,
    ),
    "vae": RemoteFile(
        f"{_DROPBOX}/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1",
        "vae/kl16.ckpt",
        0.25e9,
    ),
    "statistics": RemoteFile(  # mu [2048] and sigma [2048, 2048]: 16.8 MB in float32, twice that in float64
        "https://raw.githubusercontent.com/LTH14/mar/main/fid_stats/adm_in256_stats.npz",
        "fid_stats/adm_in256_stats.npz",
        16.8e6,
    ),
}

OUTPUT_DIR = "pretrained_models"  # where the presets look
CHUNK = 1 << 18  # bytes read at a time
TIMEOUT = 30.0  # seconds without a byte before a connection counts as dropped
RETRY_WAITS = (1.0, 2.0, 4.0)  # seconds before each new try; starts again whenever a try brought the file further
DISK_MARGIN = 64e6  # bytes to leave free on the disk


class _Dropped(Exception):
    """The connection failed in a way that may pass."""


def looks_like_web_page(head: bytes) -> bool:
    """Whether a file that starts with `head` is HTML, which links made for browsers serve in place of the file."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))


def download(remote: RemoteFile, path: Path) -> bool:
    """Bring `remote` to `path`; False if it is there already.

    Bytes go to `path` + ".part", which a later call continues if it was cut off and the remote file is still the same.

    Raises:
        InputError: No connection, refused by the server, not the expected file, disk full, or no right to write.
    """
    try:
        if path.exists():
            _check_size(str(path), path.stat().st_size, remote, "delete it and run the same command again")
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        _fetch_with_retries(remote, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _record_path(part).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; make room or choose another --output_dir") from error
    except KeyboardInterrupt:
        raise InputError(f"stopped before {path} was complete; the same command goes on from there") from None
    return True


def _fetch_with_retries(remote: RemoteFile, part: Path) -> None:
    furthest, failures = _size(part), 0
    while True:
        try:
            return _fetch(remote, part)
        except _Dropped as error:
            if _size(part) > furthest:
                furthest, failures = _size(part), 0
            if failures == len(RETRY_WAITS):
                raise InputError(
                    f"cannot fetch {part.stem} from {_host(remote)} ({error}); check the network and run the same "
                    "command again, which goes on from there"
                ) from error
            time.sleep(RETRY_WAITS[failures])
            failures += 1


def _fetch(remote: RemoteFile, part: Path) -> None:
    """One connection: bring `part` to its full length, or raise _Dropped with as much of it as came."""
    record = _read_record(part)
    start = _size(part) if record else 0
    if record and start == record["size"]:
        return
    with _connect(remote, part, start, record) as response:
        etag = response.headers.get("ETag")
        length = response.headers.get("Content-Length", "")
        if response.headers.get_content_type() == "text/html":
            raise InputError(f"{_host(remote)} sent a web page in place of {part.stem}; open {remote.url} in a browser")
        if start and response.status == 206:
            total = record["size"]
            served = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not served or (int(served[1]), int(served[2])) != (start, total) or etag not in (None, record["etag"]):
                part.unlink()
                raise _Dropped("the remote file has changed since the download began")
        elif length.isdigit():
            start, total = 0, int(length)
            _check_size(f"the file at {remote.url}", total, remote, "the link may have changed")
        elif response.headers.get("Transfer-Encoding", "").lower() == "chunked":
            start, total = 0, None  # ends with a mark of its own, so a cut is noticed all the same
        else:
            raise InputError(f"{_host(remote)} does not say how large {part.stem} is; open {remote.url} in a browser")
        if not start:
            part.unlink(missing_ok=True)
            _record_path(part).unlink(missing_ok=True)
        remaining = (total or remote.size) - start
        free = shutil.disk_usage(part.parent).free
        if free < remaining + DISK_MARGIN:
            raise InputError(
                f"{part.stem} needs {_amount(remaining)} more and {part.parent} has {_amount(free)} left; "
                "make room or choose another --output_dir"
            )
        if not start and total is not None:
            _record_path(part).write_text(json.dumps({"size": total, "etag": etag}), encoding="utf-8")
        _receive(response, part, start, total)
    if total is None:
        _check_size(f"the file at {remote.url}", _size(part), remote, "the link may have changed")


def _connect(remote: RemoteFile, part: Path, start: int, record: dict) -> http.client.HTTPResponse:
    headers = {"User-Agent": "python-urllib", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if record["etag"] and not record["etag"].startswith("W/"):  # a weak tag is not allowed there
            headers["If-Range"] = record["etag"]
    try:
        return urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # the file has become shorter than what we have of it
            part.unlink()
            raise _Dropped("the remote file has changed since the download began") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Dropped(f"HTTP {error.code} {error.reason}") from error
        raise InputError(
            f"{_host(remote)} refused {part.stem} (HTTP {error.code} {error.reason}); open {remote.url} in a browser"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(str(getattr(error, "reason", None) or error) or type(error).__name__) from error


def _receive(response: http.client.HTTPResponse, part: Path, start: int, total: int | None) -> None:
    """Write the body of `response` to `part`, from byte `start` on."""
    bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, dynamic_ncols=True)
    with part.open("r+b" if start else "wb") as file, bar:
        file.seek(start)
        while True:
            try:
                block = response.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Dropped(str(error) or type(error).__name__) from error
            if not block:
                break
            if bar.n == 0 and looks_like_web_page(block):
                raise InputError(f"{response.url} is a web page, not {part.stem}; the link may have changed")
            file.write(block)
            bar.update(len(block))
    if total is not None and bar.n != total:
        raise _Dropped(f"the connection closed after {_amount(bar.n)} of {_amount(total)}")


def _record_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_record(part: Path) -> dict:
    """`size` (bytes) and `etag` that the server gave when `part` was begun; empty if there is nothing to continue."""
    try:
        record = json.loads(_record_path(part).read_text(encoding="utf-8"))
        return {"size": int(record["size"]), "etag": record["etag"]} if _size(part) <= record["size"] else {}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


def _check_size(subject: str, size: int, remote: RemoteFile, way_out: str) -> None:
    if size < remote.size / 2:
        raise InputError(f"{subject} has {_amount(size)} where about {_amount(remote.size)} is expected; {way_out}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _amount(size: float) -> str:
    return tqdm.format_sizeof(size, suffix="B")


def _host(remote: RemoteFile) -> str:
    return urllib.parse.urlsplit(remote.url).hostname or remote.url


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raises InputError for what cannot be fetched."""
    parser = Parser(__doc__, prog="python -m util.weights.download")
    parser.add("names", str, f"what to fetch: {', '.join(FILES)}", nargs="+", metavar="NAME")
    parser.add("--output_dir", Path, "folder to write to", default=Path(OUTPUT_DIR), metavar="FOLDER")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in FILES]
    if unknown:
        raise InputError(f"there is no download named {unknown[0]}; the names are {', '.join(FILES)}")
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse_args(arguments)
    for name in dict.fromkeys(options.names):
        path = options.output_dir / FILES[name].path
        if download(FILES[name], path):
            print(f"{path}: {_amount(path.stat().st_size)}, sha256 {file_digest(path)}")
        else:
            print(f"{path}: there already")


if __name__ == "__main__":
    sys.exit(main())
