"""Our engines and other systems', each behind its own server, asked by the same client with the same plans, in turn and in one run.

usage: engines.py --bin target/release --model MODEL.gguf --cache FOLDER [--rounds 3] [--servers A,B] [--cases C,D]

Servers are installed by `install.py` into FOLDER; those that are not there are left out, and that is said. Every round starts each
server once, asks it everything, and stops it; the figure is the median over rounds, beside the least and the most. All run
on all processors of this machine; ours is one prefill and one decode node, or (`whole`) one decode node that does all. `file`: weights
as quantised in the file.

prefill   one request at a time with one token of answer: tokens of the prompt over the mean time to the first token
decode    N users at once, 128 tokens in and 96 out: N over the median time between two tokens
serving   N users at once, 256 tokens in and 64 out: all tokens of answers over the time of the run, and the time to the first token
warm      1,500 tokens that were asked before and 32 that were not: the median time to the first token
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

# The first start of some compiles for many minutes.
READY_S = 1800
STOP_S = 30


def random_plan(prompt, output, users, requests):
    lengths = ["random", "--prompt", prompt, "--output", output, "--requests", requests]
    return [*lengths, "--arrivals", "closed", "--users", users]


def prefill_case(tokens):
    rows = lambda result: {f"prefill, {tokens} tokens, tokens/s": tokens * 1e3 / mean(result, "ttft_sent")}
    return random_plan(tokens, 1, 1, 6), rows


def decode_case(users):
    rows = lambda result: {f"decode, {users} at once, tokens/s": users * 1e3 / p50(result, "itl")}
    return random_plan(128, 96, users, max(2, users)), rows


def serving_case(users):
    name = f"serving, {users} at once"
    rows = lambda result: {
        f"{name}, tokens/s": result["output_tokens_per_s"],
        f"{name}, TTFT p50 ms": p50(result, "ttft_sent"),
    }
    return random_plan(256, 64, users, 4 * users), rows


def warm_case():
    shared = ["prefix", "--groups", 1, "--prefix", 1500, "--prompt", 32, "--output", 1, "--requests", 24]
    rows = lambda result: {"warm, 1500 tokens shared, TTFT p50 ms": p50(result, "ttft_sent")}
    return [*shared, "--arrivals", "closed", "--users", 1], rows


CASES = {
    "prefill-512": prefill_case(512),
    "prefill-2048": prefill_case(2048),
    "decode-1": decode_case(1),
    "decode-8": decode_case(8),
    "decode-32": decode_case(32),
    "serving-8": serving_case(8),
    "serving-32": serving_case(32),
    "warm": warm_case(),
}


def mean(result, name):
    return result["times"][name]["mean"]


def p50(result, name):
    value = result["times"][name]["percentiles"][0]
    if not value:
        raise ValueError(f"no median of {name}")
    return value


def ours(weights, *nodes):
    def command(args, port):
        up = [args.bin / "millctl", "local", "up", "--model", args.model, "--coordinators", 1, *nodes]
        threads = ["--threads", os.cpu_count(), "--http", f"127.0.0.1:{port}", "--kv-blocks", 8192]
        # the others take the memory of their caches before they listen, too
        threads.append("--kv-populate")
        return [*up, *threads], {"MILLRACE_WEIGHTS": weights}

    return command


PAIR = ("--prefill", 1, "--decode", 1)


def vllm(args, port):
    home = args.cache / "vllm"
    serve = [home / "bin" / "vllm", "serve", args.cache / "model-bf16", "--dtype", "bfloat16", "--max-model-len", 4096]
    # left alone it keeps one processor for itself
    threads = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}", "VLLM_CPU_KVCACHE_SPACE": "2"}
    env = threads | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return [*serve, "--host", "127.0.0.1", "--port", port], env


def llama(model):
    def command(args, port):
        # 32 slots share the context; `--repack 0`: the repacked Q4_1 path dies at an AMX instruction on some virtual machines
        size = ["-c", 32 * 2304, "-np", 32, "-t", os.cpu_count(), "-tb", os.cpu_count(), "--no-repack"]
        path = args.cache / model if model else args.model
        return [args.cache / "llama" / "llama-server", "-m", path, *size, "--port", port], {}

    return command


SERVERS = {
    "ours-bf16": ours("bf16", *PAIR),
    "ours-file": ours("file", *PAIR),
    "ours-bf16-whole": ours("bf16", "--prefill", 0, "--decode", 1),
    "vllm-bf16": vllm,
    "llama.cpp-bf16": llama("model-bf16.gguf"),
    "llama.cpp-file": llama(None),
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server that runs, in a process group of its own."""

    def __init__(self, args, name, scratch):
        port = free_port()
        command, env = SERVERS[name](args, port)
        self.url, self.log = f"http://127.0.0.1:{port}", scratch / "server.log"
        with open(self.log, "wb") as log:
            words = [str(word) for word in command]
            self.process = subprocess.Popen(words, env=os.environ | env, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self):
        deadline = time.monotonic() + READY_S
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"does not serve:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.25)
        return self

    def ready(self):
        """Whether it answers a prompt: some listen long before they can."""
        try:
            models = json.load(urllib.request.urlopen(self.url + "/v1/models", timeout=5))["data"]
            body = json.dumps({"model": models[0]["id"], "prompt": [1000, 1001], "max_tokens": 1}).encode()
            ask = urllib.request.Request(self.url + "/v1/completions", body, {"content-type": "application/json"})
            return urllib.request.urlopen(ask, timeout=60).status == 200
        except (urllib.error.URLError, OSError, LookupError):
            return False

    def __exit__(self, *_):
        for signal in (2, 9):
            try:
                os.killpg(self.process.pid, signal)
                self.process.wait(STOP_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        # whatever is left of its group
        subprocess.run(["pkill", "-9", "-g", str(self.process.pid)], check=False)


def ask(args, server, case, seed, scratch):
    plan, out = scratch / "plan", scratch / "result"
    words, rows = CASES[case]
    run([args.bin / "millload", "plan", "-o", plan, *words, "--seed", seed])
    # one of them closes connections without a word
    run([args.bin / "millload", "run", plan, "--url", server.url, "--quiet", "--allow-lag", "--fresh-connections", "-o", out])
    result = json.loads((out / "result.json").read_text())
    if result["ok"] != result["counted"]:
        raise RuntimeError(f"{result['counted'] - result['ok']} of {result['counted']} failed: {result['errors']}")
    return rows(result)


def run(words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} {words[1]}: {done.stdout[-500:]}{done.stderr[-1500:]}")


def one_round(args, name, number, figures):
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        with Server(args, name, scratch) as server:
            ask(args, server, "decode-1", 10_000 + number, scratch)  # whatever is done at the first request
            for index, case in enumerate(args.cases):
                for what, value in ask(args, server, case, 100 * number + index + 1, scratch).items():
                    figures.setdefault(what, {}).setdefault(name, []).append(value)
                    print(f"  {what}: {value:.4g}", file=sys.stderr, flush=True)


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--cases", default=",".join(CASES))
    args = parser.parse_args()
    args.cases, args.servers = args.cases.split(","), args.servers.split(",")
    return args


def main():
    args = arguments()
    figures, left_out = {}, {}
    for number in range(args.rounds):
        for name in [name for name in args.servers if name not in left_out]:
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                one_round(args, name, number, figures)
            except (RuntimeError, ValueError, FileNotFoundError) as error:
                left_out[name] = str(error)
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    print("| what | whose | median | min..max | rounds |\n|---|---|---:|---:|---:|")
    for what, by_server in figures.items():
        for name, values in by_server.items():
            print(f"| {what} | {name} | {statistics.median(values):.4g} | {min(values):.4g}..{max(values):.4g} | {len(values)} |")
    for name, why in left_out.items():
        print(f"\n{name} was left out: {why.splitlines()[0]}")


if __name__ == "__main__":
    main()
