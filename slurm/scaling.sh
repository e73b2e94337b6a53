#!/bin/bash
# Measures how training scales: submits one job a run of the study, and a last one that reports when all have ended.
#
#   sbatch slurm/scaling.sh strong configs/scaling/gpu.yaml --output runs/scaling/strong
#   sbatch slurm/scaling.sh weak configs/scaling/gpu.yaml --output runs/scaling/weak nodes=[1,2,4] -- --time=00:30:00
#   sbatch slurm/scaling.sh report runs/scaling/strong          draws what there is so far
#
# Arguments are those of python -m tools.scaling; after -- come options of sbatch for the runs' jobs. The same command
# again runs what is missing or failed. Where sbatch does not work inside jobs, run it on the login node:
# python -m tools.scaling strong ... --slurm
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh.
#SBATCH --job-name=scaling
#SBATCH --nodes=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00

cd "${MEGAGPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
until [ -e slurm/common.sh ]; do
    [ "$PWD" != / ] || { echo "error: submit from a folder of the checkout, or export MEGAGPT_ROOT" >&2; exit 2; }
    cd ..
done
source slurm/common.sh

case ${1:-} in strong | weak) set -- "$1" --slurm "${@:2}" ;; esac
"${RUN[@]}" python -m tools.scaling "$@"
