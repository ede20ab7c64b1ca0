#!/usr/bin/env bash
# One process on every host of a TPU VM slice, over ssh: experiments/launch/tpu_pod.sh NAME ZONE FLAGS...
#
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
#   experiments/launch/tpu_pod.sh NAME ZONE --config=configs/imagenet.py --config.mesh=fsdp --workdir=SHARED/imagenet
#
# With --pod the hosts find each other. The repository must lie on each of them in ~/tokjax (install it with
# pip install -e "tokjax[tpu]"), the workdir on a disk (SHARED) that all of them have mounted.
set -eu
name=$1 zone=$2
shift 2
printf -v flags ' %q' "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/tokjax && python3 -m tokjax.main --pod --mode=train$flags"
