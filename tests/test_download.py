"""Downloads against a local server with every bad habit that public ones have."""

import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import util.download
from models.presets import PRESETS
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
        self.honours_range = True
        self.cuts: list[int] = []  # body bytes after which successive answers are cut off
        self.statuses: list[int] = []  # of successive answers, before normal ones
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file?dl=1"


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
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(util.download, "RETRY_WAITS", (0.0, 0.0, 0.0))
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


def test_a_dropped_connection_and_a_later_call_continue_where_it_broke(server, path):
    server.cuts = [20_000, 7_500, 0, 1]
    with pytest.raises(InputError, match=r"cannot fetch .*weights\.pth .*closed too early.* continues from there"):
        download(server.url, path)
    assert not path.exists()
    server.statuses = [503, 429]
    download(server.url, path)
    assert_complete(path)
    assert server.ranges == ["0-", "20000-", "27500-", "27500-", *["27501-"] * 3]


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_partial_file_that_is_whole_or_too_long_is_no_obstacle(server, path, more):
    path.with_name("weights.pth.part").write_bytes(CONTENT + more)
    download(server.url, path)
    assert_complete(path)


def test_a_server_without_ranges_starts_over(server, path):
    server.honours_range, server.cuts = False, [20_000, 30_000]
    download(server.url, path)
    assert_complete(path)


def test_what_is_another_file_is_not_taken(server, path):
    server.content = WEB_PAGE
    with pytest.raises(InputError, match=r"from http://127\.0\.0\.1.* sent a web page"):
        download(server.url, path)
    server.statuses = [404] * 4
    with pytest.raises(InputError, match="HTTP Error 404"):
        download(server.url, path)
    assert not [*path.parent.iterdir()]


def test_the_command_fetches_once_what_is_named_and_prints_digests(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(util.download, "FILES", {"vae": RemoteFile(server.url, "folder/weights.pth")})
    path = tmp_path / "folder" / "weights.pth"
    assert main(["vae", "vae", "--output_dir", str(tmp_path)]) == 0
    assert_complete(path)
    assert capsys.readouterr().out == f"{path}: sha256 {file_digest(path)}\n" * 2 and server.ranges == ["0-"]
    assert main(["vae", "mar_giant", "--output_dir", str(tmp_path / "other")]) == 2
    assert "invalid choice: 'mar_giant' (choose from" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_downloads_go_where_the_presets_look_for_them():
    for name in ("mar_base", "mar_large", "mar_huge"):
        preset = PRESETS[name]
        wanted = (preset.checkpoint, preset.vae_path, preset.statistics_path)
        assert tuple(OUTPUT_DIR / FILES[file].path for file in (name, "vae", "statistics")) == wanted
    assert all(remote.url.endswith("&dl=1") for remote in FILES.values() if "dropbox" in remote.url)
