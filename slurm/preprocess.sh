#!/bin/bash
# Makes a token dataset from text, on the CPUs of several nodes: the bytes are those of a single process.
#
#   sbatch slurm/preprocess.sh --input 'corpus/*.jsonl' --output data/corpus --tokenizer gpt2
#   sbatch --nodes=8 --ntasks-per-node=64 slurm/preprocess.sh --config configs/data/web.yaml --input @LIST --output data/web
#
# Arguments are those of python -m tools.preprocess. Rank 0 gives out the work, all others do it. Inputs, output and work
# folder must lie on a file system that all nodes share. What a failed node or the time limit interrupts goes on where it
# was: Slurm starts it again after a node's failure; after the time limit submit the same command again.
# What your site needs (account, partition, modules, containers, network) goes into slurm/site.sh.
#SBATCH --job-name=preprocess
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

cd "${MEGAGPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
until [ -e slurm/common.sh ]; do
    [ "$PWD" != / ] || { echo "error: submit from a folder of the checkout, or export MEGAGPT_ROOT" >&2; exit 2; }
    cd ..
done
source slurm/common.sh

on_all_by_mpi python -m tools.preprocess --executor mpi "$@"
