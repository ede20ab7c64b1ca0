#!/usr/bin/env bash
# One process on every GPU of several nodes: sbatch experiments/launch/slurm.sh --config=... --workdir=...
#
# srun starts the processes, and JAX reads from SLURM who they are; --config.mesh says what is split over what. The
# workdir must lie on a disk that all nodes see. Before its time is up SLURM sends SIGTERM: the run saves, ends with
# status 143 and goes on where it stopped when it is submitted again.
#SBATCH --job-name=tokjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -eu
exec srun --kill-on-bad-exit=1 python -m tokjax.main --mode=train "$@"
