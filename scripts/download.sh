#!/usr/bin/env bash
# Fetch the real weights into models/, resumably, only the files that are needed. Without a name: stable-diffusion-3.5-medium.
#
#   bash scripts/download.sh [stable-diffusion-3.5-medium]     about 20 GB; a gated model: accept its licence on its page first
set -euo pipefail
source "$(dirname "$0")/env.sh"

name=${1:-stable-diffusion-3.5-medium}
case "$name" in
  stable-diffusion-3.5-medium) repository=stabilityai/stable-diffusion-3.5-medium ;;
  *) fail "unknown name '$name'; known: stable-diffusion-3.5-medium" ;;
esac

say "$repository -> models/$name"
# Folders only: the single-file copies at the top level and the fp16 variants hold the same weights again.
hf download "$repository" --local-dir "models/$name" --include "model_index.json" "*/*" --exclude "text_encoders/*" "*.fp16.*" "*.fp16-*" \
  || fail "the download did not finish. If it says 401, 403 or gated: accept the licence at https://huggingface.co/$repository, then
       hf auth login
       bash scripts/download.sh $name
       Otherwise run the same command again; it continues where it stopped."
