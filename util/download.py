"""Fetch the public weights and reference statistics: `python -m util.download mar_base vae statistics`, or emigm_base.

A download that was cut off continues where it stopped, and a file appears under its own name only when it is whole.
"""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from tqdm import tqdm

from util.cli import Parser
from util.errors import InputError, exits_cleanly, why_unreadable
from util.files import file_digest

OUTPUT_DIR = Path("pretrained_models")  # where the presets look
CHUNK = 1 << 18  # bytes read at a time
TIMEOUT = 30.0  # seconds without a byte before a connection counts as dropped
RETRY_WAITS = (1.0, 2.0, 4.0)  # seconds before each new attempt; they start over when an attempt brought bytes


@dataclass(frozen=True)
class RemoteFile:
    """A public file and where it belongs."""

    url: str
    path: str  # below the folder of pretrained models
    size: float  # bytes, roughly: a file of less than half of it is something else
    repository: str = ""  # at Hugging Face, whose library downloads it
    name: str = ""  # in the repository


def _hub(folder: str, repository: str, name: str) -> RemoteFile:
    url = f"https://huggingface.co/{repository}/resolve/main/{name}"
    return RemoteFile(url, f"{folder}/{name}", size=0, repository=repository, name=name)


def _emigm(size: str, pixels: int) -> RemoteFile:
    return _hub("emigm", "GSAI-ML/eMIGM", f"{pixels}_model/eMIGM_{size}_{pixels}_checkpoint.pth")


def _dropbox(folder: str, size: float, link: str, key: str, name: str = "checkpoint-last.pth") -> RemoteFile:
    url = f"https://www.dropbox.com/scl/fi/{link}/{name}?rlkey={key}&dl=1"  # dl=0 serves a web page
    return RemoteFile(url, f"{folder}/{name}", size)


FILES = {
    "mar_base": _dropbox("mar/mar_base", 1.6e9, "f6dpuyjb7fudzxcyhvrhk", "a6i4bo71vhfo4anp33n9ukujb"),
    "mar_large": _dropbox("mar/mar_large", 3.7e9, "pxacc5b2mrt3ifw4cah6k", "m48ovo6g7ivcbosrbdaz0ehqt"),
    "mar_huge": _dropbox("mar/mar_huge", 7.2e9, "1qmfx6fpy3k7j9vcjjs3s", "4lae281yzxb406atp32vzc83o"),
    "vae": _dropbox("vae", 0.25e9, "hhmuvaiacrarfg28qxhwz", "l44xipsezc8atcffdp4q7mwmh", name="kl16.ckpt"),
    "statistics": RemoteFile(  # mu [2048] and sigma [2048, 2048] in float32 or float64
        "https://raw.githubusercontent.com/LTH14/mar/main/fid_stats/adm_in256_stats.npz",
        "fid_stats/adm_in256_stats.npz",
        16.8e6,
    ),
    **{f"emigm_{size}": _emigm(size, 256) for size in ("xsmall", "small", "base", "large", "huge")},
    **{f"emigm_{size}_512": _emigm(size, 512) for size in ("xsmall", "small", "base", "large")},
    "dc_ae": _hub("vae/dc_ae", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", "diffusion_pytorch_model.safetensors"),
}


def looks_like_web_page(head: bytes) -> bool:
    """Return True if a file that starts with `head` is HTML, which browsers' links serve in place of the file."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))


def download_command(file: Path) -> str | None:
    """Say how to fetch `file`, if it is where a public download goes; None if it is not."""
    for name, remote in FILES.items():
        if file.match(remote.path):
            root = file.absolute().parents[remote.path.count("/")]
            option = "" if root == OUTPUT_DIR.absolute() else f" --output_dir {root}"
            return f"fetch it with `python -m util.download {name}{option}`"
    return None


def download(remote: RemoteFile, path: Path) -> bool:
    """Bring `remote` to `path`; return False if it is there already.

    Bytes go to `path` + ".part", which a later call continues; `path` appears when the file is whole.

    Raises InputError if the file cannot be fetched or written, or if the server sends something else.
    """
    if remote.repository and not path.exists():
        _fetch_from_hub(remote, path)
        return True
    part, waits = path.with_name(path.name + ".part"), list(RETRY_WAITS)
    while not path.exists():
        size = _size(part)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(remote.url, part)
            _check_content(remote, part)
            part.replace(path)
            return True
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)  # of HTTP
            if code == 416:  # `part` is longer than the remote file
                part.unlink(missing_ok=True)
            waits = list(RETRY_WAITS) if _size(part) > size else waits
            if not waits or code in (401, 403, 404, 410):
                raise InputError(
                    f"cannot fetch {path} from {remote.url} ({error}); check the network, the disk and the link, and "
                    "run the same command again, which continues from there"
                ) from error
            time.sleep(waits.pop(0))
    _check_content(remote, path)
    return False


def _fetch(url: str, part: Path) -> None:
    """Bring `part` to its full length over one connection; raise OSError or HTTPException if that fails."""
    start = max(0, _size(part) - 1)  # the last byte again, since servers have no answer to a request for nothing
    headers = {"User-Agent": "python-urllib", "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status == 200:  # the whole file
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError("the server sent another part of the file than was asked for")
        if response.length is None:
            raise OSError("the server does not say how large the file is")
        if shutil.disk_usage(part.parent).free < response.length:
            raise OSError(f"the disk has no room for {_amount(response.length)} more")
        total = start + response.length
        bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, dynamic_ncols=True)
        with part.open("r+b" if start else "wb") as file, bar:
            file.seek(start)
            while block := response.read(CHUNK):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if bar.n < total:
        raise OSError(f"the connection closed after {_amount(bar.n)} of {_amount(total)}")


def _check_content(remote: RemoteFile, path: Path) -> None:
    """Raise InputError if a file is a web page, or far smaller than it should be."""
    fault = f"has {_amount(_size(path))} where about {_amount(remote.size)} is expected"
    with path.open("rb") as file:
        is_web_page = looks_like_web_page(file.read(512))
    if is_web_page or _size(path) < remote.size / 2:
        fault = "is a web page" if is_web_page else fault
        raise InputError(f"{path} {fault}; delete it, and open {remote.url} in a browser if that happens again")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _amount(size: float) -> str:
    return tqdm.format_sizeof(size, suffix="B")


def _fetch_from_hub(remote: RemoteFile, path: Path) -> None:
    """Fetch a file of Hugging Face; its library continues and checks it. Raises InputError if that fails."""
    try:
        hf_hub_download(remote.repository, remote.name, local_dir=path.parents[remote.name.count("/")])
    except Exception as error:  # of the library, its HTTP client or the disk
        raise InputError(
            f"cannot fetch {path} from {remote.url} ({why_unreadable(error)}); check the network and the disk, and run "
            "the same command again, which continues from there"
        ) from error


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m util.download")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=FILES, help=f"what to fetch: {', '.join(FILES)}")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, metavar="FOLDER", help="folder to write to")
    options = parser.parse_args(arguments)
    for name in dict.fromkeys(options.names):
        path = options.output_dir / FILES[name].path
        try:
            note = "" if download(FILES[name], path) else "there already, "
        except KeyboardInterrupt:
            raise InputError(f"stopped before {path} was complete; the same command continues from there") from None
        print(f"{path}: {note}{_amount(path.stat().st_size)}, sha256 {file_digest(path)}")


if __name__ == "__main__":
    sys.exit(main())
