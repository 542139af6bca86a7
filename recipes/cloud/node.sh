#!/usr/bin/env bash
# One of two nodes: one serves the policy, the other one trains it. What slurm/ and the files beside this one run; by
# hand, in a checkout with `make setup` done, with the same VLLM_API_KEY on both:
#
#   bash recipes/cloud/node.sh serve                                                   # there
#   TRL_GYM_SERVER_HOST=that-host bash recipes/cloud/node.sh train [options of grpo.py]  # here
#
# Training goes on from the newest checkpoint of its output_dir, if there is one. Settings, as environment variables:
#
#   VLLM_API_KEY             demanded by the server, sent by the trainer; whoever has it can replace the weights
#   TRL_GYM_SERVER_HOST      name or address of the node that serves; for `train`
#   TRL_GYM_SERVER_PORT      8000
#   TRL_GYM_RECIPE           recipes/remote_server.yaml; model and context of the server are read from it
#   TRL_GYM_ACCELERATE       recipes/accelerate/fsdp2.yaml
#   TRL_GYM_GPUS             GPUs of this node; default: as many as nvidia-smi lists
#   TRL_GYM_TENSOR_PARALLEL  1; GPUs per replica of the server, the rest is data parallel
#   TRL_GYM_TRANSPORT        nccl; `file` needs a folder that both nodes see (--gym_weight_dir of the trainer)
#   TRL_GYM_LOGS             folder of the server's log; default: <output_dir of the recipe>/logs
#   TRL_GYM_START_TIMEOUT    1800 seconds until the server must answer
#   TRL_GYM_LEASE_PORT       for `train`: answer on this port as long as training runs
#   TRL_GYM_LEASE_URL        for `serve`: end when this URL, once it has answered, does not for a minute. For places
#                            where nobody else ends the server after training
#   TRL_GYM_LEASE_POLL       10 seconds between two looks at it; six that fail make the minute
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

recipe=${TRL_GYM_RECIPE:-recipes/remote_server.yaml}
port=${TRL_GYM_SERVER_PORT:-8000}
timeout_s=${TRL_GYM_START_TIMEOUT:-1800}
lease_poll_s=${TRL_GYM_LEASE_POLL:-10}

fail() { echo "node.sh: $*" >&2; exit 2; }

# A plain `key: value` at the left margin of the recipe.
setting() {
  local value
  value=$(sed -n "s/^$1:[[:space:]]*\([^#[:space:]]*\).*/\1/p" "$recipe")
  [[ -n "$value" ]] || fail "$recipe sets no $1"
  echo "$value"
}

num_gpus() {
  if [[ -n "${TRL_GYM_GPUS:-}" ]]; then echo "$TRL_GYM_GPUS"; else nvidia-smi -L | wc -l; fi
}

serve() {
  local model length logs gpus tensor_parallel
  model=$(setting model_name_or_path)
  length=$(setting vllm_max_model_length)
  logs=${TRL_GYM_LOGS:-$(setting output_dir)/logs}
  gpus=$(num_gpus)
  tensor_parallel=${TRL_GYM_TENSOR_PARALLEL:-1}
  ((gpus >= 1 && gpus % tensor_parallel == 0)) || fail "$gpus GPUs do not divide into replicas of $tensor_parallel"
  mkdir -p "$logs"
  local command=(
    .venv/bin/trl-gym serve "$model" --host 0.0.0.0 --port "$port" --log-dir "$logs" --start-timeout "$timeout_s"
    --dtype bfloat16 --max-model-len "$length" --tool-call-parser hermes
    --tensor-parallel-size "$tensor_parallel" --data-parallel-size $((gpus / tensor_parallel))
    --weight-transfer-config "{\"backend\": \"${TRL_GYM_TRANSPORT:-nccl}\"}" "$@"
  )
  if [[ -z "${TRL_GYM_LEASE_URL:-}" ]]; then exec "${command[@]}"; fi
  "${command[@]}" &
  server=$! # not local: traps are run after functions have been left
  trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
  trap 'exit 143' TERM
  until_lease_ends "$server"
}

# Returns when the trainer is gone; fails when the server is.
until_lease_ends() {
  local missed=0 seen=""
  while ((missed < 6)); do
    kill -0 "$1" 2>/dev/null || fail "the policy server has ended; see its log"
    if curl --silent --fail --max-time 5 --output /dev/null "$TRL_GYM_LEASE_URL"; then
      seen=yes missed=0
    elif [[ -n "$seen" ]]; then
      missed=$((missed + 1))
    fi
    sleep "$lease_poll_s"
  done
  echo "node.sh: training has ended; stopping the policy server"
}

wait_for_server() {
  local url=http://$TRL_GYM_SERVER_HOST:$port/health
  echo "node.sh: waiting for $url"
  SECONDS=0
  until curl --silent --fail --max-time 5 --output /dev/null "$url"; do
    ((SECONDS < timeout_s)) || fail "$url did not answer within $timeout_s s; see the server's log"
    sleep 2
  done
}

train() {
  [[ -n "${TRL_GYM_SERVER_HOST:-}" ]] || fail "TRL_GYM_SERVER_HOST is not set: name the node that serves"
  trainer="" lease=""
  # shellcheck disable=SC2086  # unset ones are no arguments
  trap 'kill $trainer $lease 2>/dev/null || true; wait $trainer $lease 2>/dev/null || true' EXIT
  trap 'exit 143' TERM
  if [[ -n "${TRL_GYM_LEASE_PORT:-}" ]]; then
    .venv/bin/python -m http.server "$TRL_GYM_LEASE_PORT" --directory "$(mktemp -d)" >/dev/null 2>&1 &
    lease=$!
  fi
  wait_for_server
  .venv/bin/accelerate launch --config_file "${TRL_GYM_ACCELERATE:-recipes/accelerate/fsdp2.yaml}" \
    --num_processes "$(num_gpus)" recipes/grpo.py --config "$recipe" --resume true \
    --vllm_server_base_url "http://$TRL_GYM_SERVER_HOST:$port/v1" \
    --gym_weight_transport "${TRL_GYM_TRANSPORT:-nccl}" "$@" &
  trainer=$!
  local status=0
  wait "$trainer" || status=$?
  trainer=""
  exit "$status"
}

role=${1:-}
shift || true
[[ "$role" == serve || "$role" == train ]] || fail "the first argument is \`serve\` or \`train\`, got '$role'"
[[ -n "${VLLM_API_KEY:-}" ]] || fail "VLLM_API_KEY is not set: give both nodes the same secret"
[[ -f "$recipe" ]] || fail "TRL_GYM_RECIPE: $recipe does not exist"
"$role" "$@"
