#!/usr/bin/env bash
# Train on two "hosts" of this machine, kill a process on the second one, and compare with a run of one process that
# nobody disturbed. The hosts are network namespaces with a cable between them, so this needs Linux, iproute2 and root:
#
#     sudo PATH="$PATH" scripts/two_hosts.sh
set -euo pipefail
place=$(mktemp -d)
cd "$place"
a=khanhllm-a b=khanhllm-b

away() {
    for host in $a $b; do
        ip netns pids $host | xargs --no-run-if-empty kill -9
        ip netns delete $host
    done
    rm -rf "$place"
}
trap away EXIT
ip netns add $a
ip netns add $b
ip link add eth0 netns $a type veth peer name eth0 netns $b
ip -n $a address add 10.77.0.1/24 dev eth0
ip -n $b address add 10.77.0.2/24 dev eth0
for host in $a $b; do
    ip -n $host link set lo up
    ip -n $host link set eth0 up
done

mkdir text
python -c "import json, pathlib, shutil; [shutil.copy(p, f'text/{p.stem}.txt') for p in pathlib.Path(json.__file__).parent.glob('*.py')]"
run="khanhllm train nano --data text --data.cache shards --model.context 128 --train.steps 40 --train.accumulation 2
    --train.micro_batch 2 --train.save_every 5 --train.eval_every 20 --machine.device cpu --machine.threads 1"
$run --run alone

# as in docs/many.md, with the address and the device of each, as both hosts have one name
begin() {
    GLOO_SOCKET_IFNAME=eth0 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 exec ip netns exec "$1" \
        torchrun --nnodes 2 --nproc-per-node 1 --local-addr "$2" \
        --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint 10.77.0.1:29500 --rdzv-conf "is_host=$3" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout 600 --max-restarts 3 \
        -m -- $run --machine.patience 120 --run together --resume-or-new
}
begin $a 10.77.0.1 1 &
first=$!
begin $b 10.77.0.2 0 &
second=$!
until [ "$(cat together/training_log.csv 2>/dev/null | wc -l)" -gt 12 ]; do sleep 0.05; done
echo "two_hosts: kill -9 of the process on the second host"
kill -9 $(pgrep --parent $second)
wait $first
wait $second

python - <<'END'
from pathlib import Path
from khanhllm.chaos.arena import difference, outcome
raise SystemExit(difference(outcome(Path("together")), outcome(Path("alone"))) or 0)
END
grep "resumed after" together/messages.txt
echo "two_hosts: the run equals that of one process, bit for bit"
