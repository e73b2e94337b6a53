#!/bin/bash
# Samples from a trained model: one prompt on one GPU, or a file of prompts (--prompts) on all GPUs of the job.
#
#   sbatch slurm/generate.sh runs/small --prompt "Once upon a time" --samples 8
#   sbatch --nodes 2 --gpus-per-node=8 slurm/generate.sh runs/small --prompts prompts.jsonl --output samples.jsonl
#   sbatch --gpus-per-node=0 slurm/generate.sh runs/small --prompt "Once upon a time"       on CPUs
#
# Arguments are those of python -m tools.generate. The text is in the job's output. A job with --prompts that was
# stopped goes on when it is submitted again.
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

launch=on_one
for word in "$@"; do
    case $word in --prompts | --prompts=*) launch=on_all ;; esac
done
$launch python -m tools.generate "$@"
