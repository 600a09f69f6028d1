#!/bin/sh
# Prints the mpirun line that starts N ranks on this machine, or nothing where there is no mpirun.
#   $(sh dev/mpirun.sh 2) ./train_moe --ep 2 ...
# Open MPI needs, depending on the machine:
#   --allow-run-as-root                 it refuses root otherwise (containers)
#   --oversubscribe                     more ranks than the slots it counts (it counts physical
#                                       cores, or what a scheduler gave)
#   --bind-to none                      two ranks are bound to one core each otherwise, together
#                                       with all of their threads
#   mpi_yield_when_idle                 a rank that waits gives its core away: spinning takes from
#                                       the other ranks where cores share units or somebody else
#                                       computes (two ranks on two virtual cores: 0.81-0.83 of one
#                                       rank's speed without, 0.86-0.95 with; dev/results)
#   odls_base_sigkill_timeout           seconds t (here GRACE, default 5): when mpirun gets SIGTERM,
#                                       or a rank dies or aborts, the other ranks get SIGTERM after
#                                       t and SIGKILL after 2t,
#                                       and mpirun itself ends after 2t even where nobody is left.
#                                       Large enough to save (else signal the ranks themselves),
#                                       small enough to notice
#   btl_vader_single_copy_mechanism     containers often forbid process_vm_readv: copy through
#                                       shared memory instead
# To stop a run at once and keep its state, signal a rank, not mpirun:  pkill -o -TERM train_moe
N=${1:-2}
command -v mpirun > /dev/null 2>&1 || exit 0
case $(mpirun --version 2> /dev/null | head -1) in
*"Open MPI"* | *OpenRTE*)
    line="mpirun"
    [ "$(id -u)" = 0 ] && line="$line --allow-run-as-root"
    slots=$(lscpu -p=core,socket 2> /dev/null | grep -v '^#' | sort -u | wc -l)
    allowed=$(nproc 2> /dev/null || echo 1)
    [ "$allowed" -lt "$slots" ] && slots=$allowed
    [ "$slots" -ge "$N" ] || line="$line --oversubscribe"
    if [ -e /.dockerenv ] || [ -e /run/.containerenv ]; then
        line="$line --mca btl_vader_single_copy_mechanism none"
    fi
    echo "$line --bind-to none --mca mpi_yield_when_idle 1" \
        "--mca odls_base_sigkill_timeout ${GRACE:-5} -np $N"
    ;;
*) echo "mpirun -bind-to none -np $N" ;; # Hydra (MPICH, Intel): counts no slots, takes root
esac
