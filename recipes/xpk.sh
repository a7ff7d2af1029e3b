#!/bin/bash
# The same with xpk, which writes the JobSet itself: bash recipes/xpk.sh CLUSTER IMAGE
set -euo pipefail

if [ "$#" -ne 2 ]; then
  echo "usage: $0 CLUSTER IMAGE" >&2
  exit 2
fi

xpk workload create --cluster "$1" --workload people --tpu-type v5litepod-16 --num-slices 1 \
  --docker-image "$2" \
  --command "idea-train --config /app/configs/paper.yaml \
    --pretrained_model_name_or_path /data/model --train_data_dir /data/people \
    --output_dir /data/out --mixed_precision bf16 --mesh auto --distributed \
    --checkpointing_steps 80 --checkpoints_total_limit 2"
