"""Do other load generators see what millload sees? All of them ask one scripted server, whose delays are known, at one rate.

usage: agree.py --millload PROGRAM --model MODEL.gguf --cache FOLDER [--ttft-ms 200 --itl-ms 10 --requests 240 --rate 12]

AIPerf is installed into FOLDER once (PyPI, some hundred packages). vLLM's own client is used where `make bench-engines` has installed
vLLM there, hey where it is installed (Debian: apt install hey).
Only figures that count from the sending are compared: nobody else has the others. Exit code 1: one is off by more than 5 %.
"""

import argparse
import csv
import io
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv

AIPERF = ["aiperf==0.13.0", "gguf==0.19.0"]
PROMPT_TOKENS, ANSWER_TOKENS = 200, 32
OFF_MAX = 0.05


def millload(args, url, scratch):
    plan, out = scratch / "plan", scratch / "millload"
    made = ["plan", "-o", plan, "random", "--requests", args.requests, "--prompt", PROMPT_TOKENS]
    run([args.millload, *made, "--output", ANSWER_TOKENS, "--arrivals", "constant", "--rate", args.rate])
    run([args.millload, "run", plan, "--url", url, "--quiet", "--allow-lag", "-o", out])
    times = json.loads((out / "result.json").read_text())["times"]
    names = [("TTFT", "ttft_sent"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2e_sent")]
    return {name: times[key]["percentiles"][0] for name, key in names}


def aiperf(args, url, scratch):
    home, hub = args.cache / "aiperf", args.cache / "hub-home"
    if not (home / "bin" / "aiperf").exists():
        venv.create(home, with_pip=True, clear=True)
        run([home / "bin" / "pip", "install", "--quiet", *AIPERF])
    run([home / "bin" / "python", pathlib.Path(__file__).with_name("tokenizer.py"), args.model, hub])
    out = scratch / "aiperf"
    env = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    ask = ["-m", "scripted", "--url", url, "--endpoint-type", "completions", "--streaming", "--tokenizer", "local/peers"]
    size = ["--isl", PROMPT_TOKENS, "--isl-stddev", 0, "--osl", ANSWER_TOKENS]
    rate = ["--request-rate", args.rate, "--arrival-pattern", "constant", "--request-count", args.requests]
    quiet = ["--warmup-request-count", 8, "--random-seed", 1, "--ui", "none", "--artifact-dir", out]
    run([home / "bin" / "aiperf", "profile", *ask, *size, *rate, *quiet], env=env)
    result = json.loads((out / "profile_export_aiperf.json").read_text())
    # What it calls inter token latency is the mean of each answer.
    names = [("TTFT", "time_to_first_token"), ("TPOT", "inter_token_latency"), ("ITL", "inter_chunk_latency")]
    names += [("E2E", "request_latency")]
    return {name: result[key]["p50"] for name, key in names}


def vllm(args, url, scratch):
    """vLLM's client for any server, `vllm bench serve`."""
    program, tokenizer = args.cache / "vllm" / "bin" / "vllm", args.cache / "model-bf16"
    if not (program.exists() and tokenizer.exists()):
        return None
    ask = ["--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--model", "scripted", "--ignore-eos"]
    size = ["--dataset-name", "random", "--random-input-len", PROMPT_TOKENS, "--random-output-len", ANSWER_TOKENS]
    # Its intervals are a gamma distribution's: with such a shape they are alike.
    rate = ["--num-prompts", args.requests, "--request-rate", args.rate, "--burstiness", 1_000_000]
    said = ["--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result", "--result-dir", scratch, "--result-filename", "vllm.json"]
    run([program, "bench", "serve", *ask, "--tokenizer", tokenizer, *size, *rate, *said])
    result = json.loads((scratch / "vllm.json").read_text())
    return {name: result[f"median_{key}_ms"] for name, key in [("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2el")]}


def hey(args, url, scratch):
    """Reads whole answers: it knows no first token. Its workers together have the rate."""
    if not shutil.which("hey"):
        return None
    body = {"model": "scripted", "prompt": list(range(1000, 1000 + PROMPT_TOKENS)), "max_tokens": ANSWER_TOKENS, "stream": True}
    (scratch / "body").write_text(json.dumps(body))
    size = ["-n", args.requests, "-c", args.rate, "-q", 1, "-m", "POST", "-T", "application/json", "-D", scratch / "body"]
    rows = csv.DictReader(io.StringIO(run(["hey", *size, "-o", "csv", f"{url}/v1/completions"])))
    return {"E2E": statistics.median(float(row["response-time"]) for row in rows) * 1e3}


def run(command, **more):
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millload", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--ttft-ms", type=float, default=200)
    parser.add_argument("--itl-ms", type=float, default=10)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--rate", type=int, default=12)
    return parser.parse_args()


def main():
    args = arguments()
    script = ["--listen", "127.0.0.1:0", "--ttft-ms", str(args.ttft_ms), "--itl-ms", str(args.itl_ms), "--exit-with-parent"]
    server = subprocess.Popen([args.millload, "serve", *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    url = server.stdout.readline().removeprefix("ready ").strip()
    truth = {"TTFT": args.ttft_ms, "TPOT": args.itl_ms, "ITL": args.itl_ms, "E2E": args.ttft_ms + (ANSWER_TOKENS - 1) * args.itl_ms}
    found = {"the truth": truth}
    with tempfile.TemporaryDirectory() as scratch:
        for client in (millload, aiperf, vllm, hey):
            figures = client(args, url, pathlib.Path(scratch))
            if figures:
                found[client.__name__] = figures
    server.stdin.close()
    server.wait()
    ours, agree = found["millload"], True
    print("| medians from sending, ms | TTFT | TPOT | ITL | E2E | furthest from millload |\n|---|---:|---:|---:|---:|---:|")
    for name, figures in found.items():
        off = {figure: value / ours[figure] - 1 for figure, value in figures.items()}
        figure, worst = max(off.items(), key=lambda item: abs(item[1]))
        agree &= abs(worst) <= OFF_MAX
        cells = " | ".join(f"{figures[f]:.2f}" if f in figures else "–" for f in truth)
        print(f"| {name} | {cells} | {figure} {worst:+.2%} |")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
