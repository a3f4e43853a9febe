#!/usr/bin/env bash
# One task per GPU:  sbatch launchers/slurm.sh pretrain ds_configs/moe_l2.json [--field value ...]
# Set the resources for your cluster below or on sbatch's command line; see docs/cluster.md.
#SBATCH --job-name=dpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail

stage=$1
recipe=$2
shift 2
cd "${SLURM_SUBMIT_DIR:-.}"
python=${DPT_PYTHON:-.venv/bin/python}

# Every task finds its rank in SLURM's own variables; they only have to agree on where to meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # which srun no longer takes from sbatch (since SLURM 22.05)

# USR1, sent some minutes before the time is up (and SIGTERM at preemption), makes training save and leave with code 0. It ends an
# evaluation, and training that has not begun yet; srun then returns 128 + the signal's number.
code=0
srun --kill-on-bad-exit=1 "$python" "launchers/$stage.py" --ds_config "$recipe" "$@" || code=$?

state=finished
if ((code == 128 + 10 || code == 128 + 15)); then
    state=stopped
elif ((code)); then
    exit "$code"
elif [[ $stage != evaluate ]]; then
    # Training that was stopped has not exported the weights of its last step yet.
    state=$("$python" -c '
import sys
from pathlib import Path
from dpt.config.command import parse_command
from dpt.training.outputs import has_finished
training = parse_command(sys.argv[1], "", "training", sys.argv[2:]).dpt.training
print("finished" if has_finished(Path(training.output_dir), training.steps) else "stopped")
' "$stage" --ds_config "$recipe" "$@")
fi

# A requeued training resumes from its checkpoint, an evaluation with the samples that are left.
[[ $state == finished ]] || scontrol requeue "$SLURM_JOB_ID"
