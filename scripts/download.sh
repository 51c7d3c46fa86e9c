#!/usr/bin/env bash
# Fetch the real weights into models/, resumably, only the files that are needed. Without a name: stable-diffusion-3.5-medium.
#
#   bash scripts/download.sh [stable-diffusion-3.5-medium]     about 20 GB; a gated model: accept its licence on its page first
#   bash scripts/download.sh stable-diffusion-v1-5             about 5 GB
#   bash scripts/download.sh stable-diffusion-xl-base-1.0      about 14 GB
set -euo pipefail
source "$(dirname "$0")/env.sh"

name=${1:-stable-diffusion-3.5-medium}
case "$name" in
  stable-diffusion-3.5-medium) repository=stabilityai/stable-diffusion-3.5-medium ;;
  stable-diffusion-v1-5) repository=stable-diffusion-v1-5/stable-diffusion-v1-5 ;;
  stable-diffusion-xl-base-1.0) repository=stabilityai/stable-diffusion-xl-base-1.0 ;;
  *) fail "unknown name '$name'; known: stable-diffusion-3.5-medium, stable-diffusion-v1-5, stable-diffusion-xl-base-1.0" ;;
esac

say "$repository -> models/$name"
# Folders only: the single-file copies at the top level and the fp16 variants hold the same weights again.
hf download "$repository" --local-dir "models/$name" --include "model_index.json" "*/*" --exclude "text_encoders/*" "*.fp16.*" "*.fp16-*" "*.non_ema.*" \
  "*.bin" "*.msgpack" "*.onnx*" "*.ckpt" "*_1_0/*" \
  || fail "the download did not finish. If it says 401, 403 or gated: accept the licence at https://huggingface.co/$repository, then
       hf auth login
       bash scripts/download.sh $name
       Otherwise run the same command again; it continues where it stopped."
