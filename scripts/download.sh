#!/usr/bin/env bash
# Fetch real weights into models/ and data sets into datas/: resumably, only the files that are needed, compared with the published checksums.
#
#   bash scripts/download.sh                            # stable-diffusion-3.5-medium
#   bash scripts/download.sh image-reward pickscore     # any number of names
#   bash scripts/download.sh --list                     # every name, with size, licence and what it is for
set -euo pipefail

list() {
  cat << 'END'
name                                          size     licence                          what for
stable-diffusion-3.5-medium                   16 GB    Stability AI Community, gated    the five SD3.5 trainers
stable-diffusion-v1-5                         5.5 GB   CreativeML Open RAIL-M           Diffusion-DPO, ReFL
stable-diffusion-xl-base-1.0                  14 GB    CreativeML Open RAIL++-M         Diffusion-DPO, ReFL
improved-aesthetic-predictor                  11 MB    Apache-2.0                       aesthetic: heads on clip-vit-large-patch14
aesthetics-predictor-v1-vit-large-patch14     1.2 GB   MIT                              aesthetic_v1
siglip-so400m-patch14-384                     3.5 GB   Apache-2.0                       aesthetic_v25, whose head you bring yourself
clip-vit-large-patch14                        1.7 GB   MIT                              clip; tower of aesthetic; colours of geneval
openclip-ViT-H-14-laion2b_s32b_b79k           3.9 GB   MIT                              openclip
pickscore                                     3.9 GB   none stated                      pickscore
hps                                           7.9 GB   Apache-2.0                       hps, v2.1 and v2
image-reward                                  1.8 GB   Apache-2.0                       image_reward, with BERT's vocabulary
mask2former-swin-small-coco-instance          0.3 GB   see its model card               geneval: the detector
dogs                                          6 MB     none stated                      datas/dogs: DreamBooth, five photographs of one dog
pokemon                                       0.1 GB   CC-BY-NC-SA-4.0                  datas/pokemon: 833 captioned pictures
open-image-preferences                        0.9 GB   Apache-2.0                       datas/open-image-preferences: Diffusion-DPO
pickapic                                      322 GB   none stated                      datas/pickapic: Diffusion-DPO, a copy of pickapic_v2
END
}

# hub TYPE FOLDER REPOSITORY OPTION...: files of a repository on the Hub. One pattern to each --include and --exclude: hf takes a second for a file's name
hub() {
  local type=$1 folder=$2 repository=$3; shift 3
  say "$repository -> $folder"
  hf download "$repository" --repo-type "$type" --local-dir "$folder" "$@" \
    || fail "the download did not finish (its message is above); run the same command again, it continues where it stopped."
  hf cache verify "$repository" --repo-type "$type" --local-dir "$folder" \
    || fail "a file in $folder is not the published one (named above); delete it and run the same command again."
}

# gated REPOSITORY COMMAND...: runs it, or says how to get in
gated() {
  local repository=$1; shift
  if ! hf auth token > /dev/null 2>&1; then
    fail "$repository wants a login, and its licence accepted once by the account:
       accept it at https://huggingface.co/$repository
       $(command -v hf) auth login && bash scripts/download.sh $name"
  fi
  ("$@") || fail "if the message above says 401, 403 or gated: accept the licence at https://huggingface.co/$repository with the account of your login."
}

# model NAME REPOSITORY: configuration, tokenizer, and the weights as safetensors, or in torch's format where there are no others
model() {
  hub model "models/$1" "$2" --include "*.json" --include "*.txt" --include model.safetensors
  [ -f "models/$1/model.safetensors" ] || hub model "models/$1" "$2" --include pytorch_model.bin
}

# pipeline NAME REPOSITORY: the folders of a diffusers pipeline. The single files at the top hold the same weights again, as do other variants and formats
pipeline() {
  hub model "models/$1" "$2" --include model_index.json --include "*/*" --exclude "text_encoders/*" --exclude "*.fp16.*" --exclude "*.fp16-*" \
    --exclude "*.non_ema.*" --exclude "*.bin" --exclude "*.msgpack" --exclude "*.onnx*" --exclude "*.ckpt" --exclude "*_1_0/*"
}

# file NAME URL SHA256: one file from elsewhere; SHA256 may be empty where the author publishes none
file() {
  local target="models/$1/$(basename "${2//%2B/+}")"
  say "$2 -> $target"
  mkdir -p "models/$1"
  if [ ! -f "$target" ]; then
    curl --fail --location --silent --show-error --continue-at - --output "$target.part" "$2" \
      || fail "the download did not finish; run the same command again, it continues where it stopped."
    mv "$target.part" "$target"
  fi
  [ -z "$3" ] || echo "$3  $target" | sha256sum --check --quiet || fail "$target is not the published file; delete it and run this again."
}

fetch() {
  local name=$1 heads=https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main
  case "$name" in
    stable-diffusion-3.5-medium) gated "stabilityai/$name" pipeline "$name" "stabilityai/$name" ;;
    stable-diffusion-xl-base-1.0) pipeline "$name" "stabilityai/$name" ;;
    stable-diffusion-v1-5) pipeline "$name" "stable-diffusion-v1-5/$name" ;;
    improved-aesthetic-predictor)
      file "$name" "$heads/sac%2Blogos%2Bava1-l14-linearMSE.pth" 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0
      file "$name" "$heads/ava%2Blogos-l14-linearMSE.pth" 390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff
      file "$name" "$heads/ava%2Blogos-l14-reluMSE.pth" "" ;;
    aesthetics-predictor-v1-vit-large-patch14) model "$name" "shunk031/$name" ;;
    siglip-so400m-patch14-384) model "$name" "google/$name" ;;
    clip-vit-large-patch14) model "$name" "openai/$name" ;;
    openclip-ViT-H-14-laion2b_s32b_b79k)
      hub model "models/$name" laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include open_clip_model.safetensors
      [ -f "models/$name/open_clip_model.safetensors" ] \
        || hub model "models/$name" laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include open_clip_pytorch_model.bin ;;
    pickscore) model "$name" yuvalkirstain/PickScore_v1 ;;
    hps) hub model "models/$name" xswu/HPSv2 --include HPS_v2.1_compressed.pt --include HPS_v2_compressed.pt ;;
    image-reward)
      hub model "models/$name" THUDM/ImageReward --include ImageReward.pt
      hub model "models/$name" google-bert/bert-base-uncased --include vocab.txt ;;
    mask2former-swin-small-coco-instance) model "$name" "facebook/$name" ;;
    dogs) hub dataset datas/dogs diffusers/dog-example --include "*.jpeg" ;;
    pokemon) hub dataset datas/pokemon reach-vb/pokemon-blip-captions --include "data/train-*" ;;
    open-image-preferences) hub dataset "datas/$name" data-is-better-together/open-image-preferences-v1-binarized --include "data/train-*" ;;
    pickapic) hub dataset datas/pickapic liuhuohuo2/pick-a-pic-v2 --include "data/train-*" ;; # yuvalkirstain/pickapic_v2 was withdrawn in 2025
  esac
}

for name in "$@"; do # all of them before anything is fetched, or even an environment made
  if [ "$name" = --list ]; then list; exit; fi
  [[ "$(list)" == *$'\n'"$name "* ]] \
    || { echo "error: unknown name '$name'; bash scripts/download.sh --list prints them" >&2; exit 1; }
done
source "$(dirname "$0")/env.sh"
[ $# -gt 0 ] || set -- stable-diffusion-3.5-medium
for name in "$@"; do fetch "$name"; done
say "complete: $*"
