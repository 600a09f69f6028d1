# Everything about your cluster, in one place: edit this file, not the scripts. Read by the three
# .sbatch files, and by your shell before submitting:
#   . dev/slurm/site.sh && sbatch --nodes 2 dev/slurm/doctor.sbatch

# ---- read by sbatch from the environment --------------------------------------------------------
# See `man sbatch`, INPUT ENVIRONMENT VARIABLES. Leave out what your site does not want.
# export SBATCH_ACCOUNT=project
# export SBATCH_PARTITION=gpu
# export SBATCH_GPUS_PER_NODE=8
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-04:00:00}

# ---- read by the scripts ------------------------------------------------------------------------
RANKS_PER_NODE=${RANKS_PER_NODE:-2} # one per GPU; on CPUs one per socket or memory domain
# Hardware threads of a rank; with a GPU 8: launches, the watchdog and NCCL's own threads each want
# one.
CPUS_PER_RANK=${CPUS_PER_RANK:-1}
# How ranks are started. An MPI build wants the interface that your MPI was built for (`srun
# --mpi=list`: pmix, pmi2); a CUDA build with NCCL needs none, its ranks meet over TCP through
# Slurm's own variables. No srun integration at all: LAUNCH=mpirun uses mpirun inside the
# allocation.
LAUNCH=${LAUNCH:-srun --mpi=pmix}
# What a job needs before ./train_moe starts, on every node, for example
# module load gcc openmpi (or cuda nccl).
site_setup() { :; }
# The network between nodes: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# OMPI_MCA_btl_tcp_if_include=ib0

# sbatch of the shell that read this file: asks for the ranks and threads above on every node. What
# the command line says again counts.
sbatch() {
    command sbatch --ntasks-per-node "$RANKS_PER_NODE" --cpus-per-task "$CPUS_PER_RANK" "$@"
}

# Ends a job that was given less than that, which srun would refuse with "More processors requested
# than permitted".
site_check() {
    have=$(echo "${SLURM_JOB_CPUS_PER_NODE:-0}" | sed 's/[^0-9].*//')
    want=$((RANKS_PER_NODE * CPUS_PER_RANK))
    [ "$have" -ge "$want" ] && return
    echo "error: the job has $have CPUs on a node, dev/slurm/site.sh asks for $want " \
        "hint: submit it in a shell that did '. dev/slurm/site.sh'," \
        "or with --ntasks-per-node $RANKS_PER_NODE --cpus-per-task $CPUS_PER_RANK"
    exit 1
}

# launch RANKS COMMAND...: starts the ranks over all nodes of the job
launch() {
    ranks=$1
    shift
    case $LAUNCH in
    mpirun*)
        $LAUNCH $([ "$(id -u)" = 0 ] && echo --allow-run-as-root) --oversubscribe --bind-to none \
            --mca odls_base_sigkill_timeout ${GRACE:-20} -np "$ranks" "$@"
        ;;
    *)
        $LAUNCH --ntasks "$ranks" --ntasks-per-node "$RANKS_PER_NODE" \
            --cpus-per-task "$CPUS_PER_RANK" --kill-on-bad-exit=1 "$@"
        ;;
    esac
}
