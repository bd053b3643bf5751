"""Fetch the public weights and reference statistics: `python -m util.download mar_base vae statistics`, or emigm_base.

A download that was cut off continues where it stopped, and a file appears under its own name only when it is whole.
"""

import http.client
import shutil
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download
from tqdm import tqdm

from util.cli import Parser
from util.errors import InputError, exits_cleanly, why_unreadable
from util.files import file_digest

OUTPUT_DIR = Path(__file__).resolve().parents[1] / "pretrained_models"  # where the presets look
TIMEOUT = 30.0  # seconds without a byte before a connection counts as dropped
RETRY_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new attempt
HUB = "https://huggingface.co/"  # whose library downloads from there
PLACEHOLDERS = (b"<!doctype", b"<html", b"<head", b"<?xml", b"version https://git-lfs")


class RemoteFile(NamedTuple):
    """A public file and where it belongs."""

    url: str
    path: str  # below the folder of pretrained models


def _hub(folder: str, repository: str, name: str) -> RemoteFile:
    return RemoteFile(f"{HUB}{repository}/resolve/main/{name}", f"{folder}/{name}")


def _emigm(size: str, pixels: int) -> RemoteFile:
    return _hub("emigm", "GSAI-ML/eMIGM", f"{pixels}_model/eMIGM_{size}_{pixels}_checkpoint.pth")


def _dropbox(folder: str, link: str, key: str, name: str = "checkpoint-last.pth") -> RemoteFile:
    url = f"https://www.dropbox.com/scl/fi/{link}/{name}?rlkey={key}&dl=1"  # dl=0 serves a web page
    return RemoteFile(url, f"{folder}/{name}")


FILES = {
    "mar_base": _dropbox("mar/mar_base", "f6dpuyjb7fudzxcyhvrhk", "a6i4bo71vhfo4anp33n9ukujb"),
    "mar_large": _dropbox("mar/mar_large", "pxacc5b2mrt3ifw4cah6k", "m48ovo6g7ivcbosrbdaz0ehqt"),
    "mar_huge": _dropbox("mar/mar_huge", "1qmfx6fpy3k7j9vcjjs3s", "4lae281yzxb406atp32vzc83o"),
    "vae": _dropbox("vae", "hhmuvaiacrarfg28qxhwz", "l44xipsezc8atcffdp4q7mwmh", name="kl16.ckpt"),
    "statistics": RemoteFile(  # mu [2048] and sigma [2048, 2048] in float32 or float64
        "https://raw.githubusercontent.com/LTH14/mar/main/fid_stats/adm_in256_stats.npz",
        "fid_stats/adm_in256_stats.npz",
    ),
    **{f"emigm_{size}": _emigm(size, 256) for size in ("xsmall", "small", "base", "large", "huge")},
    **{f"emigm_{size}_512": _emigm(size, 512) for size in ("xsmall", "small", "base", "large")},
    "dc_ae": _hub("vae/dc_ae", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", "diffusion_pytorch_model.safetensors"),
}


def is_placeholder(head: bytes) -> bool:
    """Return True if a file that starts with `head` is a web page or a Git LFS pointer in place of a file."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PLACEHOLDERS)


def download_command(file: Path) -> str | None:
    """Say how to fetch `file`, if it is where a public download goes; None if it is not."""
    names = [name for name, remote in FILES.items() if file.absolute() == OUTPUT_DIR / remote.path]
    return f"fetch it with `python -m util.download {names[0]}`" if names else None


def download(url: str, path: Path) -> None:
    """Bring a public file to `path`, unless it is there already.

    Raises InputError if the file cannot be fetched or written, or if the server sends a web page.
    """
    if path.exists():
        return
    try:
        if url.startswith(HUB):
            repository, name = url.removeprefix(HUB).split("/resolve/main/")
            hf_hub_download(repository, name, local_dir=path.parents[name.count("/")])
        else:
            _fetch(url, path)
    except Exception as error:  # of a library, the network or the disk
        raise InputError(
            f"cannot fetch {path} from {url} ({why_unreadable(error)}); check the network, the disk and the link, and "
            "run the same command again, which continues from there"
        ) from error


def _fetch(url: str, path: Path) -> None:
    """Bring a file to `path` by way of `path` + ".part", which a later attempt or call continues."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for wait in (*RETRY_WAITS, None):
        try:
            _continue(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "code", None) == 416:  # of HTTP: there is nothing after what `part` holds
                part.unlink()
            if wait is None:
                raise
            time.sleep(wait)
    with part.open("rb") as file:
        is_wrong = is_placeholder(file.read(512))
    if is_wrong:
        part.unlink()
        raise ValueError("the server sent a web page")
    part.replace(path)


def _continue(url: str, part: Path) -> None:
    """Append to `part` what it lacks, over one connection; raise OSError or HTTPException if that fails."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "python-urllib", "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        start = start if response.status == 206 else 0  # a server without ranges sends the whole file
        settings = {"total": start + (response.length or 0), "initial": start, "desc": part.stem}
        with part.open("ab" if start else "wb") as file, tqdm.wrapattr(file, "write", **settings) as writer:
            shutil.copyfileobj(response, writer, 1 << 18)
        if response.length:  # what has not come
            raise OSError("the connection closed too early")


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m util.download")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=FILES, help=f"what to fetch: {', '.join(FILES)}")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, metavar="FOLDER", help="folder to write to")
    options = parser.parse_args(arguments)
    for name in options.names:
        path = options.output_dir / FILES[name].path
        download(FILES[name].url, path)
        print(f"{path}: sha256 {file_digest(path)}")


if __name__ == "__main__":
    sys.exit(main())
