"""Downloads against a local server with every bad habit that public ones have."""

from __future__ import annotations

import random
import shutil
import socket
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import util.weights.download
from models import PRESETS
from util.errors import InputError
from util.files import file_digest
from util.weights.download import FILES, OUTPUT_DIR, RemoteFile, download, main

CONTENT = random.Random(0).randbytes(50_000)
OTHER = bytes(reversed(CONTENT))


class Server(ThreadingHTTPServer):
    """Serves `content` at every path, in the way that its attributes say; `ranges` lists what clients asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag = '"one"'
        self.honours_range = self.honours_if_range = self.declares_length = True
        self.chunked = False
        self.content_type = "application/octet-stream"
        self.cuts: list[int] = []  # body bytes after which successive answers are cut off
        self.statuses: list[int] = []  # of successive answers, before normal ones
        self.missing = 0  # bytes that are declared and never sent
        self.ranges: list[str | None] = []

    def remote(self, size: float = len(CONTENT)) -> RemoteFile:
        return RemoteFile(f"http://127.0.0.1:{self.server_port}/file?dl=1", "folder/weights.pth", size)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, total = self.server, len(self.server.content) + self.server.missing
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        start, status = 0, 200
        unchanged = self.headers.get("If-Range") in (None, server.etag) or not server.honours_if_range
        if wanted and server.honours_range and unchanged:
            start, status = int(wanted[len("bytes=") : -1]), 206
            if start >= total:
                return self.send_error(416)
        body = server.content[start:]
        self.send_response(status)
        self.send_header("Content-Type", server.content_type)
        self.send_header("Connection", "close")
        if server.etag:
            self.send_header("ETag", server.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        elif server.declares_length:
            self.send_header("Content-Length", str(len(body) + server.missing))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(util.weights.download, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(util.weights.download, "CHUNK", 1000)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "weights.pth"


def assert_complete(path: Path, content: bytes = CONTENT) -> None:
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_arrives_once_and_is_then_left_alone(server, path):
    assert download(server.remote(), path) is True
    assert_complete(path)
    assert download(server.remote(), path) is False
    assert server.ranges == [None]


def test_a_dropped_connection_is_taken_up_where_it_broke(server, path):
    server.cuts = [20_000, 7_500, 0, 0]
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges == [None, "bytes=20000-", "bytes=27500-", "bytes=27500-", "bytes=27500-"]


def test_progress_makes_up_for_any_number_of_drops(server, path):
    server.cuts = [4_000] * 12
    download(server.remote(), path)
    assert_complete(path)
    assert len(server.ranges) == 13


def test_a_later_call_continues_what_an_earlier_one_began(server, path):
    server.cuts = [20_000, 0, 0, 0]
    with pytest.raises(InputError, match=r"cannot fetch weights\.pth .*20\.0kB of 50\.0kB.* goes on from there"):
        download(server.remote(), path)
    assert not path.exists()
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges[-1] == "bytes=20000-"


def test_a_whole_partial_file_needs_no_connection(server, path):
    server.cuts = [20_000, 0, 0, 0]
    with pytest.raises(InputError):
        download(server.remote(), path)
    path.with_name("weights.pth.part").write_bytes(CONTENT)
    asked = len(server.ranges)
    download(server.remote(), path)
    assert_complete(path)
    assert len(server.ranges) == asked


def test_a_server_without_ranges_starts_over(server, path):
    server.honours_range = False
    server.cuts = [20_000, 30_000]
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges == [None, "bytes=20000-", "bytes=30000-"]


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("etags", [('"one"', '"two"'), ('W/"one"', 'W/"two"')])
def test_a_file_that_changed_in_between_is_not_patched_together(server, path, honours_if_range, etags):
    server.etag, server.honours_if_range = etags[0], honours_if_range
    server.cuts = [20_000, 0, 0, 0]
    with pytest.raises(InputError):
        download(server.remote(), path)
    server.content, server.etag = OTHER, etags[1]
    server.ranges.clear()
    download(server.remote(), path)
    assert_complete(path, OTHER)
    if honours_if_range and not etags[0].startswith("W/"):  # a weak tag may not be sent, so it takes a second request
        assert server.ranges == ["bytes=20000-"]
    else:
        assert server.ranges == ["bytes=20000-", None]


@pytest.mark.parametrize("length", [len(CONTENT) - 10_000, 2 * len(CONTENT), 15_000])
def test_without_etags_the_size_tells_that_a_file_changed(server, path, length):
    server.etag = None
    server.cuts = [20_000, 0, 0, 0]
    with pytest.raises(InputError):
        download(server.remote(), path)
    server.content = (OTHER * 2)[:length]  # the shortest is shorter than what is there: HTTP 416
    server.ranges.clear()
    download(server.remote(size=length), path)
    assert_complete(path, server.content)
    assert server.ranges == ["bytes=20000-", None]


@pytest.mark.parametrize(
    "record", [None, "", "{}", "[]", '{"size": "many", "etag": null}', '{"size": 3, "etag": null}']
)
def test_a_partial_file_of_unknown_origin_is_not_continued(server, path, record):
    path.parent.mkdir()
    path.with_name("weights.pth.part").write_bytes(b"something else")
    if record is not None:
        path.with_name("weights.pth.part.json").write_text(record)
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges == [None]


def test_a_length_that_is_never_reached_is_an_error(server, path):
    server.missing = 100
    with pytest.raises(InputError, match="connection closed after"):
        download(server.remote(), path)
    assert not path.exists()
    assert len(server.ranges) == 4  # the first, which brought bytes, and three that brought none


def test_a_chunked_answer_without_length_is_taken_whole_or_not_at_all(server, path):
    server.chunked = True
    server.cuts = [20_000]
    download(server.remote(), path)
    assert_complete(path)
    assert server.ranges == [None, None]  # no size was promised, so there was nothing to continue by


def test_an_answer_of_unknown_length_is_refused(server, path):
    server.declares_length = False
    with pytest.raises(InputError, match="does not say how large"):
        download(server.remote(), path)
    assert not path.exists()


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_refused(server, path, content_type):
    server.content, server.content_type = b"\n<!DOCTYPE html><html>" + bytes(50_000), content_type
    with pytest.raises(InputError, match="web page"):
        download(server.remote(), path)
    assert not path.exists()
    assert len(server.ranges) == 1


def test_a_file_far_smaller_than_the_known_one_is_refused(server, path):
    with pytest.raises(InputError, match=r"50\.0kB where about 150kB is expected"):
        download(server.remote(size=150_000), path)
    assert list(path.parent.iterdir()) == []
    server.chunked = True
    with pytest.raises(InputError, match="expected"):
        download(server.remote(size=150_000), path)
    path.write_bytes(b"<html>saved by hand")
    with pytest.raises(InputError, match="delete it"):
        download(server.remote(), path)


def test_refusals_end_at_once_and_overload_is_waited_out(server, path):
    server.statuses = [404]
    with pytest.raises(InputError, match="HTTP 404"):
        download(server.remote(), path)
    assert len(server.ranges) == 1
    server.statuses = [503, 429, 500]
    download(server.remote(), path)
    assert_complete(path)


def test_no_network_is_told(server, path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        remote = RemoteFile(f"http://127.0.0.1:{unused.getsockname()[1]}/file", "weights.pth", 10)
        with pytest.raises(InputError, match=r"cannot fetch .* from 127\.0\.0\.1 .*refused.*check the network"):
            download(remote, path)


def test_room_on_the_disk_is_asked_for_before(server, path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1e9, 1e9, 64e6 + 49_999))
    with pytest.raises(InputError, match=r"needs 50\.0kB more and .* has 64\.0MB left"):
        download(server.remote(), path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1e9, 1e9, 64e6 + 50_000))
    download(server.remote(), path)
    assert_complete(path)


def test_a_folder_that_cannot_be_made_is_told(server, path):
    path.parent.write_text("a file where a folder should be")
    with pytest.raises(InputError, match="cannot write"):
        download(server.remote(), path)
    assert server.ranges == []


def test_interruption_keeps_what_is_there(server, path, monkeypatch):
    server.cuts = [20_000]
    monkeypatch.setattr(util.weights.download, "RETRY_WAITS", ("ctrl-c",))

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(util.weights.download.time, "sleep", interrupt)
    with pytest.raises(InputError, match=r"stopped before .* goes on from there"):
        download(server.remote(), path)
    assert path.with_name("weights.pth.part").read_bytes() == CONTENT[:20_000]


def test_the_command_fetches_what_is_named_and_prints_digests(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(util.weights.download, "FILES", {"vae": server.remote()})
    monkeypatch.chdir(tmp_path)
    assert main(["vae"]) == 0
    assert (tmp_path / OUTPUT_DIR / "folder" / "weights.pth").read_bytes() == CONTENT
    capsys.readouterr()
    arguments = ["vae", "vae", "--output_dir", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "folder" / "weights.pth"
    assert capsys.readouterr().out == f"{path}: 50.0kB, sha256 {file_digest(path)}\n"
    assert main(arguments) == 0
    assert "there already" in capsys.readouterr().out


def test_an_unknown_name_is_refused_before_anything_is_fetched(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(util.weights.download, "FILES", {"vae": server.remote()})
    assert main(["vae", "mar_giant", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: there is no download named mar_giant; the names are vae\n"
    assert server.ranges == []


def test_downloads_go_where_the_presets_look_for_them():
    for name in ("mar_base", "mar_large", "mar_huge"):
        preset = PRESETS[name]
        assert f"{OUTPUT_DIR}/{FILES[name].path}" == preset.checkpoint
        assert f"{OUTPUT_DIR}/{FILES['vae'].path}" == preset.vae_path
        assert f"{OUTPUT_DIR}/{FILES['statistics'].path}" == preset.statistics_path
    assert all(remote.url.endswith("&dl=1") for remote in FILES.values() if "dropbox" in remote.url)
