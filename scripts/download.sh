#!/usr/bin/env bash
# Fetch real weights into models/, resumably, only the files that are needed. Without a name: stable-diffusion-3.5-medium.
#
#   bash scripts/download.sh [NAME ...]
#
#   stable-diffusion-3.5-medium                     20 GB   a gated model: accept its licence on its page first
#   stable-diffusion-v1-5                            5 GB   Diffusion-DPO, ReFL
#   stable-diffusion-xl-base-1.0                    14 GB   Diffusion-DPO
#   scorers (python -m src.scorers says which of them are here):
#   improved-aesthetic-predictor                    11 MB   head of aesthetic; needs clip-vit-large-patch14 beside it
#   aesthetics-predictor-v1-vit-large-patch14      1.2 GB   aesthetic_v1
#   siglip-so400m-patch14-384                      3.5 GB   tower of aesthetic_v25, whose head you bring yourself
#   clip-vit-large-patch14                         1.7 GB   clip; tower of aesthetic; colours of geneval
#   openclip-ViT-H-14-laion2b_s32b_b79k            3.9 GB   openclip
#   pickscore                                      3.9 GB   pickscore
#   hps                                   up to    7.9 GB   hps, v2.1 and v2
#   image-reward                                   1.8 GB   image_reward, with BERT's vocabulary
#   mask2former-swin-small-coco-instance           0.3 GB   detector of geneval
set -euo pipefail
source "$(dirname "$0")/env.sh"

# hub NAME REPOSITORY OPTION...: files of a repository on the Hub. One pattern to each --include and --exclude: hf takes a second for a file's name
hub() {
  local name=$1 repository=$2; shift 2
  say "$repository -> models/$name"
  hf download "$repository" --local-dir "models/$name" "$@" \
    || fail "the download did not finish. If it says 401, 403 or gated: accept the licence at https://huggingface.co/$repository, then
       hf auth login
       bash scripts/download.sh $name
       Otherwise run the same command again; it continues where it stopped."
}

# model NAME REPOSITORY: configuration, tokenizer, and the weights as safetensors, or in torch's format where there are no others
model() {
  hub "$1" "$2" --include "*.json" --include "*.txt" --include model.safetensors
  [ -f "models/$1/model.safetensors" ] || hub "$1" "$2" --include pytorch_model.bin
}

# pipeline NAME REPOSITORY: the folders of a diffusers pipeline. The single files at the top hold the same weights again, as do other variants and formats
pipeline() {
  hub "$1" "$2" --include model_index.json --include "*/*" --exclude "text_encoders/*" --exclude "*.fp16.*" --exclude "*.fp16-*" --exclude "*.non_ema.*" \
    --exclude "*.bin" --exclude "*.msgpack" --exclude "*.onnx*" --exclude "*.ckpt" --exclude "*_1_0/*"
}

# file NAME URL SHA256: one file from elsewhere; SHA256 may be empty where the author publishes none
file() {
  local target="models/$1/$(basename "${2//%2B/+}")"
  say "$2 -> $target"
  mkdir -p "models/$1"
  curl --fail --location --silent --show-error --continue-at - --output "$target" "$2" \
    || fail "the download did not finish; run the same command again, it continues where it stopped."
  [ -z "$3" ] || echo "$3  $target" | sha256sum --check --quiet || fail "$target is not the published file; delete it and run this again."
}

fetch() {
  local heads=https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main
  case "$1" in
    stable-diffusion-3.5-medium | stable-diffusion-xl-base-1.0) pipeline "$1" "stabilityai/$1" ;;
    stable-diffusion-v1-5) pipeline "$1" "stable-diffusion-v1-5/$1" ;;
    improved-aesthetic-predictor)
      file "$1" "$heads/sac%2Blogos%2Bava1-l14-linearMSE.pth" 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0
      file "$1" "$heads/ava%2Blogos-l14-linearMSE.pth" 390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff
      file "$1" "$heads/ava%2Blogos-l14-reluMSE.pth" "" ;;
    aesthetics-predictor-v1-vit-large-patch14) model "$1" "shunk031/$1" ;;
    siglip-so400m-patch14-384) model "$1" "google/$1" ;;
    clip-vit-large-patch14) model "$1" "openai/$1" ;;
    openclip-ViT-H-14-laion2b_s32b_b79k)
      hub "$1" laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include open_clip_model.safetensors
      [ -f "models/$1/open_clip_model.safetensors" ] || hub "$1" laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include open_clip_pytorch_model.bin ;;
    pickscore) model "$1" yuvalkirstain/PickScore_v1 ;;
    hps) hub "$1" xswu/HPSv2 --include HPS_v2.1_compressed.pt --include HPS_v2_compressed.pt ;;
    image-reward)
      hub "$1" THUDM/ImageReward --include ImageReward.pt
      hub "$1" google-bert/bert-base-uncased --include vocab.txt ;;
    mask2former-swin-small-coco-instance) model "$1" "facebook/$1" ;;
    *) fail "unknown name '$1'; the first lines of scripts/download.sh list them" ;;
  esac
}

[ $# -gt 0 ] || set -- stable-diffusion-3.5-medium
for name in "$@"; do fetch "$name"; done
