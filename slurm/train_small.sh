#!/bin/bash
# Trains the small model, through pre-emptions, time limits and failing nodes, until train.steps are done.
#
#   sbatch slurm/train_small.sh                                     2 nodes, 1 GPU each
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 slurm/train_small.sh optimizer.lr=6e-4     64 CPUs a node
#   sbatch --nodes=1-4 slurm/train_small.sh                         as many nodes as there are, at every restart
#   sbatch --gpus-per-node=0 slurm/train_small.sh train.device=cpu  on CPUs, --ntasks-per-node processes a node
#
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh. There is one process
# a GPU. Watch it: python -m launch.status runs/small
#SBATCH --job-name=train_small
#SBATCH --nodes=2
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

train configs/small.yaml "$@"
