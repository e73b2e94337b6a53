# shellcheck shell=bash
# What differs between sites, in one place. Every script of this folder reads it in the job, from its node.
#
# Account, partition and the like are read by sbatch before a job exists: set them here, and `source slurm/site.sh` once
# in the shell (or in ~/.bashrc) from which you submit. They count before the #SBATCH lines of a script; options of the
# command line count before them.
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=a100

# Sites without --gpus-per-node: submit with --gpus-per-node=0 --gres=gpu:8. Where Slurm does not manage GPUs:
# --gpus-per-node=0 --ntasks-per-node=8.

# Software: one of these. It must work on every node of a job; nothing here may need internet.
if [ -e .venv/bin/activate ]; then  # what `make setup` makes, in the checkout, on a file system that all nodes share
    source .venv/bin/activate
fi
# module load python/3.11 cuda/12.6                               # modules, before a venv that was made with them
# source /opt/conda/etc/profile.d/conda.sh; conda activate megagpt # conda
# RUN=(apptainer exec --nv --bind "$PWD" /images/megagpt.sif)      # apptainer: put before every command
# SRUN_OPTIONS=(--container-image=/images/megagpt.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")  # pyxis

# Where the checkout is, if you submit from elsewhere or if nodes see it under another path: like the account above, in
# the shell from which you submit.
# export MEGAGPT_ROOT=/shared/megagpt

# Network. torch's own choice is mostly right; the pre-flight's table shows what it gives.
# export MASTER_ADDR=10.0.0.1           # only if nodes do not find the first one by its name or its Slurm address
# export NCCL_SOCKET_IFNAME=ib0         # NCCL's interface; GLOO_SOCKET_IFNAME is found by the launcher
# export NCCL_IB_HCA=mlx5               # InfiniBand adapters
# export NCCL_DEBUG=INFO                # what NCCL chose, in the job's output

# MPI of preprocess.sh: pmi2 fits the mpich that `make setup` brings; pmix most Open MPIs (srun --mpi=list).
MPI=${MPI:-pmi2}
