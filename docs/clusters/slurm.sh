#!/bin/bash
# Slurm: `sbatch slurm.sh`. The run folder and the shards lie on a disk that all nodes see. Ten minutes before the time
# limit Slurm signals this script; the run then saves, and the job goes back into the queue and goes on from there.
#SBATCH --job-name=khanhllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export host TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# --signals-to-handle and --shutdown-timeout: torchrun passes the signal on, and lets the run save
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$host:29500" \
    --rdzv-conf "is_host=$((SLURM_NODEID == 0))" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout 600 --max-restarts 3 \
    -m -- khanhllm train modern-692m --data /shared/texts --run /shared/run --data.cache /shared/shards --resume-or-new' &
step=$!

again() {
    kill -USR1 $step
    wait $step
    scontrol requeue "$SLURM_JOB_ID"
    exit
}
trap again USR1
wait $step
