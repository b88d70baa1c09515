#!/bin/bash
# Ways of placing requests against each other on each trace of a folder, with a real model: plans at 16 tokens a block, their sharing proved,
# then `millload experiment`. usage: routing.sh BIN MODEL TRACES OUT [arguments of millload experiment]
# REQUESTS=n takes the first n rows of each trace, 100 when absent. Exit code 1: `auto` is worse than another rule, beyond 2 % and beyond doubt.
set -eu -o pipefail
bin=$1 model=$2 traces=$3 out=$4
shift 4
mkdir -p "$out"
plans=()
# How many times faster than recorded: what keeps two cores and the demo's model busy, but not overrun.
while read -r trace speed; do
  [ -f "$traces/$trace.jsonl" ] || { echo "no $traces/$trace.jsonl" >&2; continue; }
  plan=$out/$trace.plan
  "$bin/millload" plan -o "$plan" trace "$traces/$trace.jsonl" --block-tokens 16 --spread --requests "${REQUESTS:-100}" --speed "$speed"
  "$bin/millload" plan verify "$plan" --against "$traces/$trace.jsonl" --cache-blocks 4096
  plans+=("$plan")
done <<'TRACES'
generated_agent_sessions 1
generated_toolagent 1
mooncake_conversation_head 0.5
mooncake_synthetic_head 0.5
TRACES
[ ${#plans[@]} -gt 0 ] || exit 2
# The first requests of a fresh cluster find nodes that have not measured their speed, whatever the rule: they are not compared.
exec "$bin/millload" experiment "${plans[@]}" --weights "$model" --slo ttft=2s,tpot=200ms --warm-up 3 -o "$out" "$@"
