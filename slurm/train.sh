#!/bin/bash
# Trains any configuration, through pre-emptions, time limits and failing nodes, until train.steps are done.
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh configs/llama_1b.yaml optimizer.lr=2e-4
#   sbatch --nodes=4 --gpus-per-node=0 --ntasks-per-node=2 slurm/train.sh configs/small.yaml train.device=cpu
#
# Paths are relative to the checkout; --cpus-per-task are those of a node, for all its processes, one a GPU.
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh.
# Watch it: python -m launch.status RUN
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

cd "${MEGAGPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
until [ -e slurm/common.sh ]; do
    [ "$PWD" != / ] || { echo "error: submit from a folder of the checkout, or export MEGAGPT_ROOT" >&2; exit 2; }
    cd ..
done
source slurm/common.sh

[ $# -gt 0 ] || fail "usage: sbatch [options] slurm/train.sh CONFIG.yaml [section.key=value ...]"
train "$@"
