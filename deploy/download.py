"""Gets one pinned wheel onto the disk, whole and checked, going on where an earlier try stopped.

Where the wheel lies comes from pip, so pip's index, proxy and certificates are honoured and no host is named here. When
pip cannot name an address that this module can read (an index with a password, say), pip downloads the wheel itself.
Which wheels there are, and what happens to them, is decided in `fetch.py`.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

ATTEMPTS_MAX = 5  # tries in a row that bring no new byte
PAUSE_S = 1.0  # before the second try; doubles
READ_TIMEOUT_S = 60
PIECE_BYTES = 1 << 20
SMALL_BYTES = 20_000_000  # below it one line says that a file has come
PYTHON_TAG = "311"  # the wheels are chosen for this Python, whichever one runs


class FetchError(Exception):
    """Told to the user as it is."""


class Refused(FetchError):
    """The server answered, and will not give the file to us this way."""


@dataclass(frozen=True)
class Wheel:
    """One exact file."""

    name: str
    version: str
    file: str
    size: int
    sha256: str
    platform: str

    def pip_arguments(self, command: str) -> list[str]:
        """What makes pip choose this file on any machine."""
        tags = ["--python-version", PYTHON_TAG, "--implementation", "cp", "--platform", self.platform]
        return [command, "--no-deps", "--only-binary=:all:", *tags, f"{self.name}=={self.version}"]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


class PipIndex:
    """What pip knows: the address of a wheel, and how to reach it."""

    def __init__(self) -> None:
        self.settings: dict[str, str] | None = None

    def pip(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]

    def address(self, wheel: Wheel) -> str:
        """The wheel's URL: pip is asked to download it, tells in its log which file it found, and is stopped there."""
        with tempfile.TemporaryDirectory() as folder:
            command = self.pip(*wheel.pip_arguments("download"), "-vv", "--retries", "1", "--dest", folder)
            found = re.compile(r"Found link (\S+/" + re.escape(wheel.file) + r")(?:[#\s]|$)")
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            said: list[str] = []
            try:
                for line in child.stdout or ():
                    if match := found.search(line):
                        return match.group(1)
                    said.append(line.strip())
            finally:
                child.kill()
                child.wait()
                if child.stdout:
                    child.stdout.close()
        raise FetchError(f"pip finds no {wheel.file}: {pip_reason(said)}")

    def download(self, wheel: Wheel, folder: Path) -> None:
        """pip's own download, without resumption."""
        command = self.pip(*wheel.pip_arguments("download"), "--no-cache-dir", "--dest", str(folder))
        if subprocess.run(command).returncode != 0:
            raise FetchError(f"pip could not download {wheel.name} {wheel.version}")

    def option(self, name: str) -> str | None:
        """A setting such as `cert` or `proxy`, from pip's files and environment."""
        if self.settings is None:
            done = subprocess.run(self.pip("config", "list"), capture_output=True, text=True)
            pairs = re.findall(r"^(?:global|install|download|:env:)\.([\w-]+)=(.+)$", done.stdout, re.MULTILINE)
            self.settings = {key: str(ast.literal_eval(value)) for key, value in pairs}
        return self.settings.get(name)

    def opener(self) -> urllib.request.OpenerDirector:
        """Opens addresses with pip's certificates and proxy; the environment's proxies apply when pip names none."""
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=self.tls())]
        if proxy := self.option("proxy"):
            handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
        return urllib.request.build_opener(*handlers)

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        bundle = self.option("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or bundle_of_pip()
        if bundle and Path(bundle).exists():
            folder = Path(bundle).is_dir()
            context.load_verify_locations(capath=bundle if folder else None, cafile=None if folder else bundle)
        return context


def bundle_of_pip() -> str | None:
    """The certificates that pip brings along: a Python built by hand may have none of its own."""
    try:
        from pip._vendor import certifi

        return certifi.where()
    except ImportError:
        return None


def pip_reason(said: list[str]) -> str:
    """The line of pip's log that a person needs."""
    marked = [line for line in said if "No module named pip" in line or "rror" in line or "refused" in line]
    network = [line for line in marked if "onnection" in line or "No module" in line or "resol" in line.lower()]
    line = (network or marked or said or ["pip said nothing"])[-1]
    if "No module named pip" in line:
        return f"pip is missing for {sys.executable}; install it (Debian and Ubuntu: python3-pip)"
    return re.sub(r"<[^>]*>[:,]? ?", "", line.rsplit("(Caused by ", 1)[-1])[:300]


def get_wheel(wheel: Wheel, folder: Path, index: PipIndex, say: Callable[[str], None]) -> None:
    """Returns when `folder` holds the wheel with the pinned size and sha256."""
    final = folder / wheel.file
    if final.exists():
        if reason := mismatch(wheel, final):
            say(f"{final} {reason}; it is fetched again")
            final.unlink()
        else:
            say(f"{wheel.file} is there")
            return
    url = index.address(wheel)
    part = folder / (wheel.file + ".part")
    try:
        fetch(wheel, url, part, index.opener(), say)
    except Refused as error:
        say(f"{error}; pip tries by itself")
        part.unlink(missing_ok=True)
        index.download(wheel, folder)
        part = final
    if reason := mismatch(wheel, part):
        part.unlink(missing_ok=True)
        raise FetchError(f"{wheel.file} {reason}; it was thrown away")
    os.replace(part, final)


def mismatch(wheel: Wheel, path: Path) -> str | None:
    """How the file differs from the pinned one, or None."""
    if not path.exists():
        return "did not come"
    if (size := path.stat().st_size) != wheel.size:
        return f"has {size} bytes, not {wheel.size}"
    if (found := sha256_of(path)) != wheel.sha256:
        return f"has sha256 {found}, not {wheel.sha256}"
    return None


def fetch(
    wheel: Wheel, url: str, part: Path, opener: urllib.request.OpenerDirector, say: Callable[[str], None]
) -> None:
    """Fills `part` to the pinned size. A resumed file that proves damaged is thrown away and fetched whole, once."""
    resumed = size_of(part) > 0
    if resumed:
        say(f"going on with {wheel.file} at {size_of(part) // 10**6} of {wheel.size // 10**6} MB")
    fill(wheel, url, part, opener)
    if resumed and (reason := mismatch(wheel, part)):
        say(f"{part.name} {reason}; its beginning was damaged, so it is fetched from the start")
        part.unlink()
        fill(wheel, url, part, opener)


def fill(wheel: Wheel, url: str, part: Path, opener: urllib.request.OpenerDirector) -> None:
    failures = 0
    while size_of(part) < wheel.size:
        before, reason = size_of(part), "the connection ended early"
        try:
            fetch_once(wheel, url, part, opener)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise Refused(f"{wheel.file}: the server answers {error.code} {error.reason}") from error
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
                raise Refused(f"{wheel.file}: {error}") from error
            reason = str(error)
        failures = 0 if size_of(part) > before else failures + 1
        if failures >= ATTEMPTS_MAX:
            raise FetchError(f"{wheel.file} cannot be fetched: {reason}")
        if failures and size_of(part) < wheel.size:
            time.sleep(PAUSE_S * 2 ** (failures - 1))


def fetch_once(wheel: Wheel, url: str, part: Path, opener: urllib.request.OpenerDirector) -> None:
    """One request. Appends when the server continues at our offset, begins again when it sends the whole file."""
    have = size_of(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with opener.open(request, timeout=READ_TIMEOUT_S) as reply:
        continues = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if reply.status == 206 and not continues:
            part.unlink(missing_ok=True)
            return
        progress = Progress(wheel.file, wheel.size, have if continues else 0)
        with part.open("ab" if continues else "wb") as out:
            while piece := reply.read(PIECE_BYTES):
                if out.tell() + len(piece) > wheel.size:
                    raise Refused(f"{wheel.file}: the server sends more than {wheel.size} bytes")
                out.write(piece)
                progress.add(len(piece))
        progress.end()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Progress:
    """Percent and speed: one moving line on a terminal, one line for every tenth of a large file elsewhere."""

    def __init__(self, name: str, total: int, have: int) -> None:
        self.name, self.total, self.start, self.have = name, total, have, have
        self.began, self.live = time.monotonic(), sys.stdout.isatty()
        self.steps = 10 if total >= SMALL_BYTES else 1
        self.shown, self.said_at = have * self.steps // total, self.began

    def add(self, count: int) -> None:
        self.have += count
        now, step = time.monotonic(), self.have * self.steps // self.total
        if self.live and (now - self.said_at > 0.2 or self.have == self.total):
            self.said_at = now
            print(f"\r{self.line(now)}", end="", flush=True)
        elif not self.live and step > self.shown:
            self.shown = step
            print(self.line(now), flush=True)

    def line(self, now: float) -> str:
        speed = (self.have - self.start) / max(now - self.began, 1e-3) / 1e6
        done, total = self.have / 1e6, self.total / 1e6
        return f"  {self.name[:40]:40} {100 * self.have // self.total:3} %  {done:.0f} of {total:.0f} MB  {speed:.1f} MB/s"

    def end(self) -> None:
        if self.live:
            print(flush=True)
