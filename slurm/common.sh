# shellcheck shell=bash
# What all scripts of this folder share: where the checkout is, the site's settings, how processes start and jobs end.
#
#   train CONFIG [section.key=value ...]   train on all GPUs of the job, and requeue it until the run is done
#   on_all COMMAND...                      COMMAND as one process a GPU (or one a task, in a job without GPUs)
#   on_one COMMAND...                      COMMAND as one process on the first node, with all GPUs of that node
set -o pipefail

fail() {  # one line, what and where and what to do; exit code 2: the user's to mend
    echo "error: $1" >&2
    exit "${2:-2}"
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a Slurm batch script: submit it with sbatch"
RUN=() SRUN_OPTIONS=()
source slurm/site.sh

absent='import sys; from importlib.util import find_spec
sys.exit(", ".join("no " + name for name in ("torch", "deepspeed", "typer") if not find_spec(name)) or None)'
if [ ${#SRUN_OPTIONS[@]} = 0 ]; then  # else the software may be where only srun leads, in a container of pyxis
    trouble=$("${RUN[@]}" python -c "$absent" 2>&1) || fail "${SLURMD_NODENAME:-$HOSTNAME}: no Python with MegaGPT's \
packages (${trouble##*$'\n'}); mend slurm/site.sh or run make setup"
fi

nodes=$SLURM_JOB_NUM_NODES gpus=${SLURM_GPUS_ON_NODE:-0}
case ${CUDA_VISIBLE_DEVICES:-NoDevFiles} in  # with --exclusive the former counts those that were not asked for, too
    NoDevFiles) ;;
    *) gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | wc -l) ;;
esac
tasks=${SLURM_NTASKS_PER_NODE:-1}
if [ "$gpus" -gt 0 ] && [ "$tasks" = 1 ]; then tasks=$gpus; fi
cpus=$((SLURM_CPUS_ON_NODE / tasks))

export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Caches of compilers go to the node's own disk: HOME may be slow, full, or not there at all.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -un)}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-${TMPDIR:-/tmp}/cache-$(id -un)}
# What sbatch was told of GPUs and CPUs holds for the job; srun takes it for an order for each step, and refuses zeros.
if [ "$gpus" = 0 ]; then unset SLURM_GPUS_PER_NODE SLURM_GPUS SLURM_CPUS_PER_GPU SLURM_GPUS_PER_TASK; fi

on_all() {
    # Not --kill-on-bad-exit: its signals would hide the exit code of the rank that knows why the run ended.
    srun --wait=60 --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
        --cpus-per-task=$((cpus > 0 ? cpus : 1)) "${SRUN_OPTIONS[@]}" "${RUN[@]}" "$@"
}

on_one() {
    srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" "${SRUN_OPTIONS[@]}" "${RUN[@]}" "$@"
}

train() {
    local logs code=0
    logs=$(on_one python -m launch.job begin "$@") || { code=$?; [ $code != 87 ] || hold "its log"; exit $code; }
    ln -sfn "$(job_field StdOut)" "$logs/slurm.out"
    echo "job $SLURM_JOB_ID: $nodes x $tasks ranks on $SLURM_JOB_NODELIST; logs in $logs"
    on_all python -m launch.preflight "$@" --output "$logs/preflight.json" && on_all python -m launch.train "$@" || code=$?
    case $(on_one python -m launch.job end "$1" $code "${@:2}") in
        requeue) requeue requeue ;;
        hold) hold "$logs" ;;
    esac
    exit $code
}

hold() {
    scontrol update JobId="$SLURM_JOB_ID" Comment="held after 3 restarts without progress, see $1"
    requeue requeuehold
}

requeue() {  # requeue or requeuehold; not if the job is being cancelled, which would bring it back to life
    [[ $(job_field JobState) = RUNNING* ]] || return
    scontrol "$1" "$SLURM_JOB_ID" && sleep 60  # until Slurm ends this script
}

job_field() {  # what follows it on its line
    scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *$1=//p"
}

on_all_by_mpi() {  # as one rank a task of an MPI program
    local prefix
    prefix=$(on_one python -c 'import sys; print(sys.prefix)') || exit
    if [ "$MPI" = pmi2 ]; then  # the mpich of PyPI lies in the environment, where no loader looks
        export MPI4PY_MPIABI=${MPI4PY_MPIABI:-mpich} LD_LIBRARY_PATH=$prefix/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
    srun --mpi="$MPI" --kill-on-bad-exit=1 --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
        --cpus-per-task=$((cpus > 0 ? cpus : 1)) "${SRUN_OPTIONS[@]}" "${RUN[@]}" "$@"
}
