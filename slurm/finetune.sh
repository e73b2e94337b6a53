#!/bin/bash
# Fine-tunes the small model, or with train.init_from another one, on conversations (docs/finetuning.md).
#
#   sbatch slurm/finetune.sh train.init_from=runs/small
#   sbatch --gpus-per-node=4 slurm/finetune.sh train.init_from=runs/small train.run_dir=runs/chat optimizer.lr=5e-5
#
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh. There is one process
# a GPU. Watch it: python -m launch.status runs/finetune
#SBATCH --job-name=finetune
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

train configs/finetune.yaml "$@"
