#!/bin/bash
# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
#
# Run a stage of a recipe on several nodes of a SLURM cluster, under DeepSpeed ZeRO-2:
#
#   sbatch examples/slurm_several_nodes.sh recipes/stllava_med_7b.yaml sft
#   sbatch --nodes 4 examples/slurm_several_nodes.sh recipes/stllava_med_7b.yaml dpo --dpo.num_train_epochs 2
#
# Start one job per stage: `sbatch --dependency=afterok:JOB` makes the next job wait for the one before. Stages that use
# one process (prepare, judge, merge, report, push) do not need this script: medst run RECIPE --stage judge. The recipe,
# output_dir and the caches must be on a file system that all nodes share. With `effective_batch_size`, training uses the
# same batches on any number of nodes.
#
# If a job is requeued, or started again with the same command, it resumes from its newest complete checkpoint. DeepSpeed
# saves its optimizer in one part per process: resume with the same number of processes.

#SBATCH --job-name=medst
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

RECIPE=${1:?no recipe given: sbatch $0 RECIPE STAGE [--key value ...]}
STAGE=${2:?no stage given: sbatch $0 RECIPE STAGE [--key value ...]}
shift 2

# Models and datasets are downloaded once. If compute nodes have no internet, fill the cache on a login node first with
# `hf download llava-hf/llava-1.5-7b-hf`, and set HF_HUB_OFFLINE=1.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export TOKENIZERS_PARALLELISM=false
# export HF_HUB_OFFLINE=1
# export NCCL_SOCKET_IFNAME=ib0   # if nodes have several networks

GPUS=${MEDST_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
CONFIG=${MEDST_ACCELERATE_CONFIG:-$(python -c 'import medst_trl.pipeline.launch as l; print(l.find_config("zero2"))')}
# `head -n 1` would close the pipe early, which `pipefail` reports as a failure.
MAIN_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / GPUS))}

# Start one launcher per node. Its rank is SLURM_NODEID, which is only set on the node. `--num_processes` is the total
# over all nodes. --kill-on-bad-exit ends all nodes if one fails, because the others would otherwise wait for it.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch \
        --config_file "$0" \
        --num_machines "$SLURM_NNODES" \
        --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$1" \
        --main_process_port "$2" \
        --num_processes "$3" \
        -m medst_trl "${@:4}"
' "$CONFIG" "$MAIN_NODE" "$PORT" "$((SLURM_NNODES * GPUS))" "$RECIPE" --stage "$STAGE" "$@"
