#!/usr/bin/env bash
# Start one training on two hosts with addresses of their own: network namespaces joined by a veth.
#   sudo bash tests/two_hosts.sh ACCELERATE train.py [flags]
# ACCELERATE is the accelerate program to use. With CUT_WHEN=metrics.jsonl the link goes down when that
# file reports step 4; PROCESSES (2) is how many there are on both. Needs root and iproute2; leaves
# nothing behind.
set -euo pipefail
accelerate=$1
shift
cd "$(dirname "$0")/.."
tag=$$
hosts=("dml-a-$tag" "dml-b-$tag")
links=("va$tag" "vb$tag")
cleanup() {
  local host
  kill $(jobs -p) 2>/dev/null || true
  ip link del "${links[0]}" 2>/dev/null || true
  for host in "${hosts[@]}"; do
    ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip netns del "$host" 2>/dev/null || true
  done
}
trap cleanup EXIT

for host in 0 1; do
  ip netns add "${hosts[$host]}"
done
ip link add "${links[0]}" type veth peer name "${links[1]}"
for host in 0 1; do
  ip link set "${links[$host]}" netns "${hosts[$host]}"
  ip -n "${hosts[$host]}" addr add "10.77.0.$((host + 1))/24" dev "${links[$host]}"
  ip -n "${hosts[$host]}" link set "${links[$host]}" up
  ip -n "${hosts[$host]}" link set lo up
done

launch() { # host, then the program and its flags
  local host=$1
  shift
  ip netns exec "${hosts[$host]}" env GLOO_SOCKET_IFNAME="${links[$host]}" \
    "$accelerate" launch --config_file launch/multi_node.yaml --machine_rank "$host" \
    --num_processes "${PROCESSES:-2}" --main_process_ip 10.77.0.1 --mixed_precision no "$@"
}

if [ -n "${CUT_WHEN:-}" ]; then
  (
    until grep -qs '"step": 4' "$CUT_WHEN"; do sleep 0.1; done
    ip -n "${hosts[1]}" link set "${links[1]}" down
    echo "link cut: $(date -Iseconds)"
  ) &
fi
launch 1 "$@" &
other=$!
first=0 second=0
launch 0 "$@" || first=$?
wait "$other" || second=$?
for host in 0 1; do
  echo "host $host: $(ip -n "${hosts[$host]}" -br -4 addr show dev "${links[$host]}" | tr -s ' ')" \
    "sent $(ip netns exec "${hosts[$host]}" cat "/sys/class/net/${links[$host]}/statistics/tx_bytes") bytes"
done
echo "exit codes: $first $second"
exit $((first || second))
