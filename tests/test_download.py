"""scripts/download.sh against a stand-in for `hf` and `curl`: every name that a message tells the user to fetch is known and complete."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from src import scorers

ROOT = Path(__file__).parent.parent
HF = """#!/usr/bin/env bash
# hf download REPOSITORY --local-dir FOLDER [--include P | --exclude P]...: as the real one, any other word is a file's name
echo "hf $*" >> "$LOG"
shift; repository=$1; shift; folder=; includes=()
while [ $# -gt 0 ]; do
  case "$1" in
    --local-dir) folder=$2 ;;
    --include) includes+=("$2") ;;
    --exclude) ;;
    *) echo "no such file: $1" >&2; exit 1 ;;
  esac
  shift 2
done
mkdir -p "$folder"
for name in $REPOSITORY_FILES; do
  for pattern in "${includes[@]}"; do [[ $name == $pattern ]] && { mkdir -p "$(dirname "$folder/$name")"; echo x > "$folder/$name"; }; done
done
exit 0
"""
CURL = """#!/usr/bin/env bash
echo "curl $*" >> "$LOG"
while [ $# -gt 0 ]; do case "$1" in --output) echo "${CURL_CONTENT:-x}" > "$2"; shift 2 ;; *) shift ;; esac; done
"""
FILES = ("model_index.json transformer/config.json config.json preprocessor_config.json tokenizer.json vocab.txt merges.txt README.md "
         "ImageReward.pt HPS_v2.1_compressed.pt HPS_v2_compressed.pt tf_model.h5")  # fmt: skip


@pytest.fixture
def download(tmp_path):
    """Run the script in a copy, with an environment that counts as complete; returns (exit code, standard error, log of commands)."""
    (tmp_path / "scripts").mkdir()
    for name in ("download.sh", "env.sh"):
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (tmp_path / "requirements.txt").write_text("")
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    (tmp_path / ".venv/requirements.sha256").write_text("e3b0c44298fc1c14\n")  # of the empty file
    for name, text in (("python", "#!/bin/sh\nexit 0\n"), ("hf", HF), ("curl", CURL), ("sha256sum", SHA256SUM)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)

    def run(*names, files=FILES + " model.safetensors open_clip_model.safetensors", **environment):
        given = {"PATH": os.environ["PATH"], "LOG": str(tmp_path / "log"), "REPOSITORY_FILES": files, **environment}
        result = subprocess.run(["bash", "scripts/download.sh", *names], cwd=tmp_path, env=given, capture_output=True, text=True)
        log = tmp_path / "log"
        return result.returncode, result.stderr, log.read_text().splitlines() if log.exists() else []

    return run


# Counts every published file as intact, unless told otherwise; what env.sh asks goes to the real one.
SHA256SUM = """#!/usr/bin/env bash
case "$*" in *--check*) cat >/dev/null; exit "${DAMAGED:-0}" ;; *) exec /usr/bin/sha256sum "$@" ;; esac
"""


def told_to_fetch():
    """Folders whose missing weights send the user to scripts/download.sh, with the declarations."""
    wanted = {}
    for name in scorers.names():
        scorer = scorers.get(name)
        for weights in scorer.weights(scorer.settings({})):
            if not weights.by_hand:
                wanted[weights.folder] = [*wanted.get(weights.folder, []), weights]
    return wanted


@pytest.mark.parametrize("folder", sorted(told_to_fetch()))
def test_every_folder_that_a_scorer_asks_for_comes_complete(folder, download, tmp_path, monkeypatch):
    code, error, log = download(folder)
    assert code == 0, error
    monkeypatch.chdir(tmp_path)
    for weights in told_to_fetch()[folder]:
        assert weights.local, f"{weights.files} of {folder}: {log}"
        repositories = [line.split()[2] for line in log if line.startswith("hf")]
        assert weights.hub_id is None or weights.hub_id in repositories
    assert not list(tmp_path.glob("models/*/tf_model.h5")) and not list(tmp_path.glob("models/*/README.md"))


def test_weights_in_torchs_format_are_fetched_only_where_there_are_no_others(download, tmp_path):
    assert download("pickscore", files=FILES + " model.safetensors pytorch_model.bin")[0] == 0
    assert not (tmp_path / "models/pickscore/pytorch_model.bin").exists()
    assert download("clip-vit-large-patch14", files=FILES + " pytorch_model.bin")[0] == 0
    assert (tmp_path / "models/clip-vit-large-patch14/pytorch_model.bin").exists()


def test_without_a_name_the_base_model_is_fetched_in_folders(download, tmp_path):
    code, error, log = download()
    assert code == 0, error
    name = "stable-diffusion-3.5-medium"
    assert len(log) == 1 and log[0].startswith(f"hf download stabilityai/{name} --local-dir models/{name} --include")
    assert (tmp_path / "models/stable-diffusion-3.5-medium/transformer/config.json").exists()
    assert not (tmp_path / "models/stable-diffusion-3.5-medium/model.safetensors").exists()  # a single-file copy


def test_several_names_at_once_and_an_unknown_one(download):
    code, _, log = download("hps", "image-reward")
    assert code == 0 and [line.split()[2] for line in log] == ["xswu/HPSv2", "THUDM/ImageReward", "google-bert/bert-base-uncased"]
    code, error, _ = download("hpz")
    assert code == 1 and "unknown name 'hpz'" in error


def test_a_file_that_is_not_the_published_one_is_refused(download):
    code, error, _ = download("improved-aesthetic-predictor", DAMAGED="1")
    assert code == 1 and "is not the published file; delete it" in error


def test_the_checksums_are_those_of_the_published_heads():
    import hashlib

    heads = ROOT.parent / "shared/data/aesthetic"
    if not heads.is_dir():
        pytest.skip("no published heads beside the repository")
    listed = dict(re.findall(r"heads/(\S+?)\" ([0-9a-f]{64})", (ROOT / "scripts/download.sh").read_text()))
    assert len(listed) == 2
    for name, digest in listed.items():
        assert hashlib.sha256((heads / name.replace("%2B", "+")).read_bytes()).hexdigest() == digest
