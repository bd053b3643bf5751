"""Downloads against a local server with every bad habit that public ones have."""

from __future__ import annotations

import random
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import util.download
from models.presets import PRESETS, ROOT
from util.download import FILES, OUTPUT_DIR, RemoteFile, download, main
from util.errors import InputError
from util.files import file_digest

CONTENT = random.Random(0).randbytes(50_000)
WEB_PAGE = b"\n<!DOCTYPE html><html>" + bytes(50_000)


class Server(ThreadingHTTPServer):
    """Serves `content` at every path, in the way that its attributes say; `ranges` lists what clients asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.honours_range = self.declares_length = True
        self.shift = 0  # bytes by which partial answers begin elsewhere than they should
        self.cuts: list[int] = []  # body bytes after which successive answers are cut off
        self.statuses: list[int] = []  # of successive answers, before normal ones
        self.ranges: list[str] = []

    def remote(self, size: float = len(CONTENT)) -> RemoteFile:
        return RemoteFile(f"http://127.0.0.1:{self.server_port}/file?dl=1", "folder/weights.pth", size)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, total = self.server, len(self.server.content)
        server.ranges.append(self.headers["Range"].removeprefix("bytes="))
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        start = int(server.ranges[-1][:-1]) if server.honours_range else 0
        if start >= total:
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if server.honours_range else 200)
        if server.honours_range:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{total - 1}/{total}")
        if server.declares_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(util.download, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(util.download, "CHUNK", 1000)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "folder" / "weights.pth"
    path.parent.mkdir()
    return path


def assert_complete(path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_a_dropped_connection_is_continued_where_it_broke_however_often_that_happens(server, path):
    server.cuts = [20_000, 7_501, 1, 1, *[2_001] * 8]
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges[:5] == ["0-", "19999-", "27499-", "27499-", "27499-"]
    assert len(server.ranges) == 13


def test_a_later_call_continues_what_an_earlier_one_began(server, path):
    server.cuts = [20_000, 1, 1, 1]
    with pytest.raises(InputError, match=r"cannot fetch .*weights\.pth .*20\.0kB of 50\.0kB.* continues from there"):
        download(server.remote(), path)
    assert not path.exists()
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges[-1] == "19999-"


@pytest.mark.parametrize(("more", "ranges"), [(b"", ["49999-"]), (b"more", ["50003-", "0-"])])
def test_a_partial_file_that_is_whole_or_too_long_is_no_obstacle(server, path, more, ranges):
    path.with_name("weights.pth.part").write_bytes(CONTENT + more)
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges == ranges


def test_a_server_without_ranges_starts_over(server, path):
    server.honours_range, server.cuts = False, [20_000, 30_000]
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges == ["0-", "19999-", "29999-"]


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("shift", 5, "another part of the file"),
        ("declares_length", False, "does not say how large"),
        ("content", WEB_PAGE, r"is a web page; delete it, and open http://127\.0\.0\.1"),
        ("content", CONTENT[:24_000], r"has 24\.0kB where about 50\.0kB is expected; delete it"),
    ],
)
def test_what_may_be_another_file_is_not_taken(server, path, attribute, value, reason):
    setattr(server, attribute, value)
    with pytest.raises(InputError, match=reason):
        download(server.remote(), path)
    assert not path.exists()
    path.write_bytes(WEB_PAGE)  # saved by hand
    with pytest.raises(InputError, match="web page; delete it"):
        download(server.remote(), path)


def test_refusals_end_at_once_and_overload_is_waited_out(server, path):
    server.statuses = [404]
    with pytest.raises(InputError, match="HTTP Error 404"):
        download(server.remote(), path)
    assert len(server.ranges) == 1
    server.statuses = [503, 429, 500]
    download(server.remote(), path)
    assert_complete(path)


def test_no_network_no_room_and_no_folder_are_told(server, path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        remote = RemoteFile(f"http://127.0.0.1:{unused.getsockname()[1]}/file", "weights.pth", 10)
        with pytest.raises(InputError, match=r"cannot fetch .* from http://127\.0\.0\.1.*refused.*check the network"):
            download(remote, path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"disk has no room for 50\.0kB"):
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=49_999))
        download(server.remote(), path)
    path.write_bytes(b"a file where a folder should be")
    with pytest.raises(InputError, match=r"cannot fetch .*weights\.pth/weights\.pth"):
        download(server.remote(), path / path.name)


def test_the_command_fetches_what_is_named_and_prints_digests(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(util.download, "FILES", {"vae": server.remote()})
    monkeypatch.chdir(tmp_path)
    path = OUTPUT_DIR / "folder" / "weights.pth"
    assert main(["vae"]) == 0
    assert_complete(path)
    assert capsys.readouterr().out == f"{path}: 50.0kB, sha256 {file_digest(path)}\n"
    assert main(["vae", "vae", "--output_dir", str(OUTPUT_DIR)]) == 0
    assert "there already" in capsys.readouterr().out and server.ranges == ["0-"]
    assert main(["vae", "mar_giant", "--output_dir", "elsewhere"]) == 2
    assert "invalid choice: 'mar_giant' (choose from" in capsys.readouterr().err
    assert not Path("elsewhere").exists()


def test_interruption_keeps_what_is_there(server, tmp_path, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(util.download, "FILES", {"vae": server.remote()})
    monkeypatch.setattr(util.download.time, "sleep", interrupt)
    server.cuts = [20_000]
    assert main(["vae", "--output_dir", str(tmp_path)]) == 2
    assert "the same command continues from there" in capsys.readouterr().err
    assert (tmp_path / "folder" / "weights.pth.part").read_bytes() == CONTENT[:20_000]


def test_downloads_go_where_the_presets_look_for_them():
    for name in ("mar_base", "mar_large", "mar_huge"):
        preset = PRESETS[name]
        wanted = (preset.checkpoint, preset.vae_path, preset.statistics_path)
        assert tuple(ROOT / FILES[file].path for file in (name, "vae", "statistics")) == wanted
    assert ROOT.name == str(OUTPUT_DIR)
    assert all(remote.url.endswith("&dl=1") for remote in FILES.values() if "dropbox" in remote.url)
