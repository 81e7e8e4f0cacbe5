#!/bin/bash
#SBATCH --job-name=frpo
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=runs/slurm-%j.log
# One node. The same script goes on from the newest checkpoint. Arguments are values over the recipe's.

frpo train "${RECIPE:-smoke}" "$@" &
run=$!
trap 'kill -TERM $run' TERM
while kill -0 $run 2>/dev/null; do wait $run; code=$?; done
exit $code
