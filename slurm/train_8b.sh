#!/bin/bash
# Trains a Llama-style model of 8 billion parameters with ZeRO-3: weights, gradients and optimizer state are cut over all
# GPUs.
#
#   sbatch slurm/train_8b.sh
#   sbatch --nodes=32 slurm/train_8b.sh
#   sbatch --nodes=4 slurm/train_8b.sh parallel.offload_optimizer=true     where GPU memory is short
#
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh. Each node is
# taken whole; there is one process a GPU. Watch it: python -m launch.status runs/llama_8b
#SBATCH --job-name=train_8b
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

cd "${MEGAGPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
until [ -e slurm/common.sh ]; do
    [ "$PWD" != / ] || { echo "error: submit from a folder of the checkout, or export MEGAGPT_ROOT" >&2; exit 2; }
    cd ..
done
source slurm/common.sh

train configs/llama_8b.yaml parallel.zero_stage=3 "$@"
