#!/usr/bin/env bash
# Several processes on this machine, to try what a pod will run: experiments/launch/local.sh PROCESSES FLAGS...
#
#   XLA_FLAGS=--xla_force_host_platform_device_count=4 experiments/launch/local.sh 2 \
#     --config=configs/digits.py --mode=train --config.mesh='{"data": -1, "fsdp": 4}' --workdir=runs/two
#
# Every process has the devices that JAX gives it (here four of the CPU). The first that fails ends the others, and its
# exit code is that of the script.
set -u
count=$1
shift
address=localhost:$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
pids=()
for ((i = 0; i < count; i++)); do
  python -m tokjax.main --coordinator="$address" --num_processes="$count" --process_id="$i" "$@" &
  pids+=($!)
done
stop() { kill "$@" "${pids[@]}" 2>/dev/null; }
trap 'stop -TERM' TERM INT
code=0
for ((i = 0; i < count; i++)); do
  wait -n || { code=$?; stop -KILL; break; }
done
wait
exit "$code"
