#!/bin/bash
# Trains a Llama-style model of 1.2 billion parameters with ZeRO-1, 8 GPUs a node and any number of nodes.
#
#   sbatch slurm/train_1b.sh
#   sbatch --nodes=16 slurm/train_1b.sh train.micro_batch_size=2
#   sbatch --nodes=2-8 slurm/train_1b.sh     as many nodes as there are, at every restart: same samples, same batch
#
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh. Each node is
# taken whole; there is one process a GPU. Watch it: python -m launch.status runs/llama_1b
#SBATCH --job-name=train_1b
#SBATCH --nodes=4
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

train configs/llama_1b.yaml parallel.zero_stage=1 "$@"
