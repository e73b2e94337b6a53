#!/bin/bash
# Trains GPT-2 124M on one node of 8 GPUs or more nodes, until train.steps are done.
#
#   sbatch slurm/train_124m.sh
#   sbatch --nodes=4 slurm/train_124m.sh train.micro_batch_size=16
#   sbatch --gpus-per-node=4 slurm/train_124m.sh train.run_dir=runs/124m_b
#
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh. Each node is
# taken whole; there is one process a GPU. Watch it: python -m launch.status runs/gpt2_124m
#SBATCH --job-name=train_124m
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

cd "${MEGAGPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
until [ -e slurm/common.sh ]; do
    [ "$PWD" != / ] || { echo "error: submit from a folder of the checkout, or export MEGAGPT_ROOT" >&2; exit 2; }
    cd ..
done
source slurm/common.sh

train configs/gpt2_124m.yaml "$@"
