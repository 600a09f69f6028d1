#!/bin/sh
# Several machines on one: four network namespaces, each with its own address, host name and no
# shared memory with the others, joined by a switch; one rank in each, over TCP.
#   sudo dev/netns.sh [TRAIN_MOE] [REPORT.md]          needs root, iproute2 and Open MPI; touches
#                                                      only namespaces of its own, which it removes
# 1. healthy: the losses are those of one process to 1e-5.
# 2. one link slowed (netem: 20 ms and 20 Mbit/s; kernels without it: 5 Mbit/s by tbf): the same
#    bits as before, only later.
# 3. one link cut in mid-run: the watchdog's report names the rank that does not answer and the
#    call; the run ends, with a status that is not 0, and its last checkpoint loads.
set -u
cd "$(dirname "$0")/.." || exit 1
train=${1:-./train_moe} report=${2:-}
case $train in /*) ;; *) train=$PWD/$train ;; esac
N=4 net=10.77.0 timeout=10 tag=moe$$
[ "$(id -u)" = 0 ] || {
    echo "dev/netns.sh: skipped, it needs root"
    exit 0
}
for tool in ip tc mpirun unshare; do
    command -v $tool > /dev/null 2>&1 || {
        echo "dev/netns.sh: skipped, there is no $tool here"
        exit 0
    }
done
T=$(mktemp -d)
remove() {
    for i in $(seq 0 $N); do
        for p in $(ip netns pids $tag-"$i" 2> /dev/null); do
            kill -9 "$p" 2> /dev/null
        done
        ip netns del $tag-"$i" 2> /dev/null
    done
    rm -rf "$T"
}
trap remove EXIT
trap 'exit 1' INT TERM
passed=0 failed=0
say() {
    echo "$*"
    echo "$*" >> "$T/report"
}
check() {
    status=$?
    if [ $status -eq 0 ]; then
        passed=$((passed + 1))
        say "- ok: $*"
    else
        failed=$((failed + 1))
        say "- **FAIL**: $*"
    fi
}

# ---- the machines: namespace 0 is the switch, 1 .. N are m1 .. mN with addresses net.1 .. net.N -
ip netns add $tag-0 && ip -n $tag-0 link add sw type bridge && ip -n $tag-0 link set sw up || {
    echo "dev/netns.sh: skipped, namespaces or bridges are not allowed here"
    exit 0
}
for i in $(seq 1 $N); do
    ip netns add $tag-"$i"
    ip -n $tag-0 link add p"$i" type veth peer name eth0 netns $tag-"$i"
    ip -n $tag-0 link set p"$i" master sw up
    ip -n $tag-"$i" addr add $net."$i"/24 dev eth0
    ip -n $tag-"$i" link set lo up
    ip -n $tag-"$i" link set eth0 up
    # mpirun learns of a dead machine from TCP alone: 15 retransmissions take a quarter of an hour,
    # 5 some seconds
    ip netns exec $tag-"$i" sh -c 'echo 5 > /proc/sys/net/ipv4/tcp_retries2'
    echo "$net.$i slots=1" >> "$T/hosts"
done
# What mpirun calls instead of ssh: AGENT ADDRESS COMMAND...
cat > "$T/agent" << AGENT
#!/bin/sh
i=\${1##*.}; shift
exec ip netns exec $tag-\$i unshare -u sh -c "hostname m\$i; \$*"
AGENT
chmod +x "$T/agent"
slow() { # slow I on|off: everything that machine I sends and receives
    for where in "$tag-$1 eth0" "$tag-0 p$1"; do
        # shellcheck disable=SC2086
        set -- "$1" "$2" $where
        ip netns exec "$3" tc qdisc del dev "$4" root 2> /dev/null
        [ "$2" = off ] && continue
        ip netns exec "$3" tc qdisc add dev "$4" root netem delay 20ms rate 20mbit 2> /dev/null &&
            how="20 ms and 20 Mbit/s (netem)" && continue
        ip netns exec "$3" tc qdisc add dev "$4" root tbf rate 5mbit burst 16kbit latency 500ms &&
            how="5 Mbit/s (tbf)"
    done
}
options="--model dev/fixtures/parallel --train dev/fixtures/parallel/tokens.bin --seq-len 16"
options="$options --batch 8 --ignore-target 2 --lr 1e-3 --z-coef 0.001 --threads 1"
options="$options --timeout $timeout"
machines() { # machines LIMIT ARGUMENTS...: one rank on each, started from m1
    limit=$1
    shift
    timeout -k 5 "$limit" ip netns exec $tag-1 unshare -u sh -c 'hostname m1; exec "$@"' sh \
        mpirun --allow-run-as-root --bind-to none --hostfile "$T/hosts" \
        --mca plm_rsh_agent "$T/agent" --mca orte_keep_fqdn_hostnames 1 \
        --mca btl self,tcp --mca btl_tcp_if_include $net.0/24 \
        --mca oob tcp --mca oob_tcp_if_include $net.0/24 --mca oob_tcp_keepalive_time 15 \
        --mca oob_tcp_keepalive_intvl 3 --mca oob_tcp_keepalive_probes 2 -x TMPDIR="$T" \
        -np $N "$train" $options --ep 2 --fsdp 2 "$@" > "$T/out" 2>&1
}
. dev/tests/shell.sh
ms() {
    sed -n 's/.*"ms":\([^,]*\),.*/\1/p' "$1/log.jsonl" | sort -g |
        awk '{ v[NR] = $1 } END { printf "%.0f", v[int((NR + 1) / 2)] }'
}

say "# Four machines on one: ranks in network namespaces over TCP"
say ""
say "\`dev/netns.sh\`: dp 1, fsdp 2, ep 2, one rank a namespace, Open MPI's tcp transport," \
    "no shared memory; the fixture \`parallel\`."
say ""
"$train" $options --steps 8 --out "$T/one" > "$T/out" 2>&1
check "one process, 8 updates"
machines 120 --steps 8 --save-every 8 --out "$T/healthy"
status=$?
grep -q '^error' "$T/out" && grep '^error' "$T/out" | head -2
[ $status -eq 0 ] || tail -8 "$T/out"
d=$(apart "$T/healthy" "$T/one")
[ $status -eq 0 ] && least "$d" 1e-5
check "healthy: losses of 8 updates as of one process to $d"

how=
slow 3 on
machines 240 --steps 8 --save-every 8 --out "$T/slow"
status=$?
slow 3 off
times=$(awk -v a="$(ms "$T/slow")" -v b="$(ms "$T/healthy")" \
    'BEGIN { printf "%.1f", a / (b > 0 ? b : 1) }')
saved=checkpoints/step_8/model.safetensors
[ $status -eq 0 ] && cmp -s "$T/healthy/$saved" "$T/slow/$saved"
check "the link of machine 3 (rank 2) slowed to $how: the same bits after 8 updates," \
    "each taking $times times as long"

machines 120 --steps 1000000 --save-every 5 --keep 2 --out "$T/cut" &
launcher=$!
k=0
while [ $k -lt 600 ] && [ "$(cat "$T"/cut/log.jsonl 2> /dev/null | wc -l)" -lt 12 ]; do
    sleep 0.1
    k=$((k + 1))
done
ip -n $tag-0 link set p3 down
start=$(date +%s)
wait $launcher
status=$?
took=$(($(date +%s) - start))
named=$(grep -a '^error: rank' "$T/out" | grep -a 'no answer from rank' | head -1)
[ $status -ne 0 ] && [ $status -ne 124 ] && [ $took -le $((timeout + 30)) ]
check "the link of machine 3 (rank 2) cut in mid-run: the run ended after $took s" \
    "(--timeout $timeout) with status $status"
echo "$named" | grep -qE 'rank[s]* .*\b2\b|rank 2 waited'
check "the report names the rank and the call"
say ""
grep -a '^error: rank' "$T/out" | head -4 | while read -r line; do
    say "      $line"
done
say ""
latest=$(readlink "$T/cut/checkpoints/latest")
"$train" --model "$T/cut/checkpoints/latest" --steps 0 > "$T/out" 2>&1
check "its last checkpoint loads ($latest)"
echo "dev/netns.sh: $passed passed, $failed failed"
[ -n "$report" ] && cp "$T/report" "$report"
[ $failed -eq 0 ]
