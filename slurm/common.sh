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

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_PER_NODE##*:} visible=${CUDA_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}}
if [ "${gpus:-0}" = 0 ]; then  # not asked for by this option: as many as there are
    IFS=, read -ra visible <<< "${visible#NoDevFiles}"
    gpus=${#visible[@]}
fi
tasks=${SLURM_NTASKS_PER_NODE:-1}
if [ "$gpus" -gt 0 ] && [ "$tasks" = 1 ]; then tasks=$gpus; fi
cpus=$((SLURM_CPUS_ON_NODE / tasks)) step=()
if [ "$cpus" = 0 ]; then cpus=1 step+=(--overcommit); fi  # fewer CPUs than processes: slow, but not refused
# What sbatch was told of GPUs, srun would take for an order for each step, zeros and types included: ours is plain.
if [ -z "${SLURM_GPUS_PER_TASK:-}${SLURM_TRES_PER_TASK:-}" ] && [ "$gpus" -gt 0 ]; then step+=(--gres="gpu:$gpus"); fi
unset SLURM_GPUS_PER_NODE SLURM_GPUS SLURM_CPUS_PER_GPU

export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Caches of compilers go to the node's own disk: HOME may be slow, full, or not there at all.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -un)}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-${TMPDIR:-/tmp}/cache-$(id -un)}

on_all() {
    # Not --kill-on-bad-exit: its signals would hide the exit code of the rank that knows why the run ended.
    srun --wait=180 --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
        "${step[@]}" "${SRUN_OPTIONS[@]}" "${RUN[@]}" "$@"
}

on_one() {
    srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        "${step[@]}" "${SRUN_OPTIONS[@]}" "${RUN[@]}" "$@"
}

train() {
    local answer logs output code=0
    answer=$(on_one python -m launch.job begin --tasks "$tasks" "$@") || code=$?
    case $code in
        0) logs=${answer% *} nodes=${answer##* } ;;
        87) hold "its log"; exit $code ;;
        138 | 143) requeue requeue; exit $code ;;  # asked to stop (USR1, TERM) before it has begun
        *) exit $code ;;
    esac
    output=$(job_field StdOut)
    if [ -e "$output" ]; then ln -sfn "$output" "$logs/slurm.out"; fi
    echo "job $job: $nodes x $tasks ranks on $SLURM_JOB_NODELIST; logs in $logs"
    on_all python -m launch.preflight "$@" --output "$logs/preflight.json" && on_all python -m launch.train "$@" || code=$?
    answer=$(on_one python -m launch.job end "$1" $code "${@:2}")
    case ${answer:-$code} in
        requeue | 84 | 85 | 138 | 143) requeue requeue ;;
        hold) hold "$logs" ;;
    esac
    exit $code
}

hold() {
    scontrol update JobId="$job" Comment="held after 3 restarts without progress, see $1"
    requeue requeuehold
}

requeue() {  # requeue or requeuehold; not if the job is being cancelled, which would bring it back to life
    local state tries
    for tries in 1 2 3 4 5 6 7 8 9 10; do  # the controller may be away for minutes
        state=$(job_field JobState)
        case ${state%% *} in
            RUNNING) scontrol "$1" "$job" && sleep 60 ;;  # until Slurm ends this script
            "") echo "no word of job $job from Slurm; asking again ($tries of 10)" >&2; sleep 20 ;;
            *) break ;;
        esac
    done
    echo "error: job $job was not requeued: Slurm says it is ${state:-unknown}" >&2
}

job_field() {
    scontrol show job "$job" | sed -n "s/^ *$1=//p"
}

on_all_by_mpi() {  # as one rank a task of an MPI program
    local prefix
    prefix=$(on_one python -c 'import sys; print(sys.prefix)') || exit
    if [ "$MPI" = pmi2 ]; then  # the mpich of PyPI lies in the environment, where no loader looks
        export MPI4PY_MPIABI=${MPI4PY_MPIABI:-mpich} LD_LIBRARY_PATH=$prefix/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
    srun --mpi="$MPI" --kill-on-bad-exit=1 --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
        --cpus-per-task="$cpus" "${step[@]}" "${SRUN_OPTIONS[@]}" "${RUN[@]}" "$@"
}
