#!/bin/bash
# Runs the batch scripts under a real Slurm: a slurmctld and a slurmd of its own on this machine,
# one node with select/cons_tres, for as long as the test takes.
#   dev/slurm/test.sh      doctor, selftest, a training that is put back into the queue at its time
#                          limit and resumes, a job that asks for too little
# Needs slurmctld, slurmd and munge (Debian: slurmctld slurmd slurm-client munge), root, and a built
# train_moe. Prints 'N passed, N failed'; where they are missing, 0 and 0.
cd "$(dirname "$0")/../.." || exit 1
for tool in slurmctld slurmd sbatch munged; do
    command -v $tool > /dev/null || PATH=$PATH:/usr/sbin:/sbin
    command -v $tool > /dev/null || {
        echo "skipped: $tool is not installed"
        echo "0 passed, 0 failed"
        exit 0
    }
done
[ "$(id -u)" = 0 ] || {
    echo "skipped: slurmd wants root"
    echo "0 passed, 0 failed"
    exit 0
}
[ -x ./train_moe ] || {
    echo "error: no train_moe, hint: make train_moe"
    exit 1
}

top=$PWD work=$(mktemp -d) passed=0 failed=0 daemons=
chmod 755 "$work"
cleanup() {
    # shellcheck disable=SC2086   a list of process ids
    [ -z "$daemons" ] || kill $daemons 2> /dev/null
    sleep 1
    rm -rf "$work"
}
trap cleanup EXIT
check() {
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
        echo "ok $((passed + failed)) $2"
    else
        failed=$((failed + 1))
        echo "FAILED $((passed + failed)) $2"
    fi
}

# ---- a cluster of one node ----------------------------------------------------------------------
host=$(hostname -s)
head -c 1024 /dev/urandom > "$work/munge.key"
chmod 400 "$work/munge.key"
munged --force --foreground --key-file "$work/munge.key" --socket "$work/munge.socket" \
    --pid-file "$work/munged.pid" --log-file "$work/munged.log" \
    --seed-file "$work/munge.seed" > "$work/munged.out" 2>&1 &
daemons="$daemons $!"
cat > "$work/slurm.conf" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=20
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 CoresPerSocket=4 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
mkdir -p "$work/state" "$work/spool"
export SLURM_CONF=$work/slurm.conf
sleep 1
slurmctld -D -i > "$work/slurmctld.out" 2>&1 &
daemons="$daemons $!"
slurmd -D -N "$host" > "$work/slurmd.out" 2>&1 &
daemons="$daemons $!"
for _ in $(seq 30); do
    [ "$(sinfo -h -o %T 2> /dev/null)" = idle ] && break
    sleep 1
done
[ "$(sinfo -h -o %T 2> /dev/null)" = idle ]
status=$?
selects=$(scontrol show config | sed -n 's/^SelectType *= //p')
check $status "a cluster of one node, $(sbatch --version), $selects"
[ $failed = 0 ] || {
    tail -5 "$work"/*.log "$work"/*.out
    echo "$passed passed, $failed failed"
    exit 1
}

# ---- as dev/slurm/site.sh of a small site -------------------------------------------------------
export RANKS_PER_NODE=${RANKS_PER_NODE:-2} CPUS_PER_RANK=1 LAUNCH=${LAUNCH:-mpirun}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
submit() { # submit FILE ARGUMENTS...: FILE gets the job's output; the arguments are sbatch's
    bash -c '. dev/slurm/site.sh && sbatch --parsable --chdir "$0" --output "$1" "${@:2}"' \
        "$top" "$@"
}
state() { scontrol show job "$1" 2> /dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
wait_for() {
    for _ in $(seq "$3"); do
        case $(state "$1") in $2) return 0 ;; esac
        sleep 1
    done
    return 1
}

job=$(submit "$work/doctor.txt" --nodes 1 dev/slurm/doctor.sbatch)
wait_for "$job" 'COMPLETED|FAILED' 60
grep -q "1 node(s) alike" "$work/doctor.txt" && [ "$(state "$job")" = COMPLETED ]
check $? "doctor.sbatch: $(tail -1 "$work/doctor.txt")"
rm -f "slurm-doctor-$job.nodes"

job=$(submit "$work/selftest.txt" --nodes 1 dev/slurm/selftest.sbatch --ep 2)
wait_for "$job" 'COMPLETED|FAILED' 90
[ "$(state "$job")" = COMPLETED ]
check $? "selftest.sbatch on $RANKS_PER_NODE ranks: $(tail -1 "$work/selftest.txt")"

# 60 seconds are the shortest limit; the signal comes 40 s before its end, an update waits for
# nothing
head -c 20000 README.md > "$work/text.txt"
job=$(submit "$work/train.txt" --nodes 1 --time 1 --signal B:USR1@40 dev/slurm/train.sbatch \
    --init model/configs/tiny.json --train "$work/text.txt" --ep 2 \
    --seq-len 64 --batch 4 --steps "${STEPS:-400000}" --out "$work/run")
wait_for "$job" RUNNING 30
tasks=$(scontrol show job "$job" |
    sed -n 's/.*NumCPUs=\([0-9]*\) NumTasks=\([0-9]*\).*/\1 CPUs, \2 tasks/p')
[ "$tasks" = "$RANKS_PER_NODE CPUs, $RANKS_PER_NODE tasks" ]
check $? "train.sbatch asks for what site.sh says: $tasks"
for _ in $(seq 150); do
    [ "$(grep -c '^== job' "$work/train.txt")" -ge 2 ] && break
    sleep 1
done
grep -q "saving, then back into the queue" "$work/train.txt" &&
    grep -q "^== job $job, start 1," "$work/train.txt"
check $? "at its time limit the job saves and goes back into the queue: start 1"
for _ in $(seq 60); do
    grep -q "^resumed from" "$work/train.txt" && break
    sleep 1
done
saved=$(sed -n 's/^stopped by a signal after update \([0-9]*\).*/\1/p' "$work/train.txt" |
    head -1)
grep -q "^resumed from .*/step_$saved\$" "$work/train.txt"
check $? "it resumes from update $saved"
sleep 3
scancel --batch --signal=INT "$job"
wait_for "$job" 'COMPLETED|FAILED|CANCELLED' 60
[ "$(state "$job")" = COMPLETED ] && grep -q "saving, then the end" "$work/train.txt"
check $? "scancel --batch --signal=INT ends it for good, saved: $(state "$job")"
steps=$(sed -n 's/.*"step":\([0-9]*\),"loss".*/\1/p' "$work/run/log.jsonl" | sort -n | uniq | wc -l)
last=$(tail -1 "$work/run/log.jsonl" | sed -n 's/.*"step":\([0-9]*\),.*/\1/p')
[ "$steps" = "$last" ] && [ "$last" -gt "$saved" ]
check $? "the log has every update once: $steps of $last"

job=$(sbatch --parsable --chdir "$top" --output "$work/small.txt" --nodes 1 --ntasks 1 \
    --ntasks-per-node 1 dev/slurm/train.sbatch --init x)
wait_for "$job" 'COMPLETED|FAILED' 60
grep -q "^error: .*hint: " "$work/small.txt" && [ "$(state "$job")" = FAILED ]
status=$?
said=$(grep '^error' "$work/small.txt")
check $status "a job that asks for less than site.sh says is told so: $said"
[ $failed = 0 ] || tail -20 "$work"/*.txt
echo "$passed passed, $failed failed"
[ $failed = 0 ]
