#!/bin/bash
# Converts a run, a checkpoint or a foreign model to another format, and checks the result against the source.
#
#   sbatch slurm/convert.sh runs/small exports/small --to hf
#   sbatch --mem=64G slurm/convert.sh runs/llama_8b exports/llama_8b --to hf --dtype bf16
#
# Arguments are those of python -m tools.convert. No GPU is needed.
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00

cd "${MEGAGPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
until [ -e slurm/common.sh ]; do
    [ "$PWD" != / ] || { echo "error: submit from a folder of the checkout, or export MEGAGPT_ROOT" >&2; exit 2; }
    cd ..
done
source slurm/common.sh

on_one python -m tools.convert "$@"
