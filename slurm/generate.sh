#!/bin/bash
# Samples from a trained model on one GPU.
#
#   sbatch slurm/generate.sh runs/small --prompt "Once upon a time" --samples 8
#   sbatch --gpus-per-node=0 slurm/generate.sh runs/small --prompt "Once upon a time"       on CPUs
#
# Arguments are those of python -m tools.generate. The text is in the job's output.
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh.
#SBATCH --job-name=generate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00

cd "${MEGAGPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
until [ -e slurm/common.sh ]; do
    [ "$PWD" != / ] || { echo "error: submit from a folder of the checkout, or export MEGAGPT_ROOT" >&2; exit 2; }
    cd ..
done
source slurm/common.sh

on_one python -m tools.generate "$@"
