#!/usr/bin/env bash
# A cohort under SLURM: stopped before the time limit or by pre-emption, queued again, resumed.
#
#   sbatch launch/slurm.sh RUN_FOLDER --cohort 4 [further flags of train.py]
#   sbatch --nodes 4 --gpus-per-node 8 launch/slurm.sh RUN_FOLDER --cohort 4 --mixed-precision bf16
#
# RUN_FOLDER must be on a file system that all nodes share. Submit from the project's folder, in an
# active environment where dml_accel is installed, or name its folder: DML_ENVIRONMENT=.venv sbatch
# ... DML_PROCESSES sets the processes on each node where they are not to be one per GPU.
#SBATCH --job-name=dml
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes ahead of the limit, to the steps of the job and not to this script.
#SBATCH --signal=USR1@180
set -u

refuse() {
  echo "error: $*" >&2
  exit 2
}

[ "$#" -ge 1 ] || refuse "name the run folder: sbatch launch/slurm.sh RUN_FOLDER --cohort 4"
folder=$1
shift
for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES; do
  [ -n "${!name:-}" ] || refuse "$name is not set: run this with sbatch"
done
processes=${DML_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
[[ $processes =~ ^[1-9][0-9]*$ ]] ||
  refuse "DML_PROCESSES (SLURM_GPUS_ON_NODE) is '$processes'; it must be a whole number above 0"
if [ -n "${DML_ENVIRONMENT:-}" ]; then
  [ -r "$DML_ENVIRONMENT/bin/activate" ] ||
    refuse "DML_ENVIRONMENT is '$DML_ENVIRONMENT', but there is no bin/activate in it"
  set +u # which scripts of environments need not allow
  . "$DML_ENVIRONMENT/bin/activate"
  set -u
fi
command -v torchrun >/dev/null ||
  refuse "there is no torchrun: submit from an active environment, or set DML_ENVIRONMENT to one"
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[ -n "$address" ] || refuse "scontrol names no host of SLURM_JOB_NODELIST, '$SLURM_JOB_NODELIST'"
threads=$((${SLURM_CPUS_PER_TASK:-1} / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# Without --signals-to-handle the launcher itself would die of SIGUSR1 and leave its workers behind.
torchrun --help | grep -q -e --signals ||
  refuse "torchrun of this torch does not pass SIGUSR1 on, so a job could not stop in time:" \
    "use a newer torch"

begun=$(mktemp)
# Pre-emption and scancel send SIGTERM, here too: let the run end by itself.
trap : TERM
srun --kill-on-bad-exit=1 bash -c '
  exec torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node "$1" --master_addr "$2" --master_port "$3" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 "${@:4}"' \
  bash "$processes" "$address" "$((20000 + SLURM_JOB_ID % 20000))" \
  train.py "$@" --output-dir "$folder" --resume auto &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended the first wait, not the step
  wait "$step"
  code=$?
done

# Launchers turn every exit code into 1; what happened is in status.json. After SIGTERM nothing is
# queued here: SLURM does that itself where it pre-empts, and scancel means the end.
state() { sed -n "s/^ *\"$1\": \"\([^\"]*\)\".*/\1/p" "$folder/status.json" 2>/dev/null; }
status=$(state status)
reason=$(state reason)
echo "the run in $folder is ${status:-not begun}${reason:+ ($reason)}; exit code $code"
# What an earlier job has written counts for nothing.
if [ "$status" = stopped ] && [ "$reason" != "stopped by SIGTERM" ] &&
  [ "$folder/status.json" -nt "$begun" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
