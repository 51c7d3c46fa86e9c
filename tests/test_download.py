"""scripts/download.sh against stand-ins for `hf` and `curl`: every name that a message tells the user to fetch is known and complete.

And with the real `hf` against a stand-in for the Hub.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import pytest

from src import scorers

ROOT = Path(__file__).parent.parent
HF = """#!/usr/bin/env bash
# hf download REPOSITORY --local-dir FOLDER [--include P | --exclude P]...: as the real one, any other word is a file's name
echo "hf $*" >> "$LOG"
case "$1 $2" in
  "auth token") exit "${NO_LOGIN:-0}" ;;
  "cache verify") exit "${DAMAGED:-0}" ;;
esac
shift; repository=$1; shift; folder=; includes=() excludes=()
while [ $# -gt 0 ]; do
  case "$1" in
    --local-dir) folder=$2 ;;
    --repo-type) ;;
    --include) includes+=("$2") ;;
    --exclude) excludes+=("$2") ;;
    *) echo "no such file: $1" >&2; exit 1 ;;
  esac
  shift 2
done
mkdir -p "$folder"
for name in $REPOSITORY_FILES; do
  for pattern in "${excludes[@]}"; do [[ $name == $pattern ]] && continue 2; done
  for pattern in "${includes[@]}"; do [[ $name == $pattern ]] && { mkdir -p "$(dirname "$folder/$name")"; echo x > "$folder/$name"; }; done
done
exit 0
"""
CURL = """#!/usr/bin/env bash
echo "curl $*" >> "$LOG"
while [ $# -gt 0 ]; do case "$1" in --output) echo "${CURL_CONTENT:-x}" > "$2"; shift 2 ;; *) shift ;; esac; done
"""
EMPTY = "e3b0c44298fc1c14"  # how the stamp of an environment calls an empty requirements.txt
FILES = ("data/train-0.parquet data/test-0.parquet dog.jpeg model_index.json transformer/config.json config.json preprocessor_config.json "
         "tokenizer.json vocab.txt merges.txt README.md "
         "ImageReward.pt HPS_v2.1_compressed.pt HPS_v2_compressed.pt tf_model.h5")  # fmt: skip


def copy_scripts(folder):
    """The script in a folder whose environment counts as complete; returns that of its programs."""
    (folder / "scripts").mkdir()
    for name in ("download.sh", "env.sh"):
        (folder / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (folder / "requirements.txt").write_text("")
    binaries = folder / ".venv/bin"
    binaries.mkdir(parents=True)
    (folder / ".venv/requirements.sha256").write_text(f"{EMPTY}\n")
    return binaries


@pytest.fixture
def download(tmp_path):
    """Run the script in a copy with stand-ins; returns (exit code, standard error, log of commands)."""
    binaries = copy_scripts(tmp_path)
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


def fetched(log):
    """The repositories in a log of commands."""
    return [line.split()[2] for line in log if line.startswith("hf download")]


def listed():
    """name -> (size, licence) as --list prints them."""
    text = subprocess.run(["bash", ROOT / "scripts/download.sh", "--list"], capture_output=True, text=True, check=True).stdout
    return {row[0]: (row[1], row[2]) for row in (re.split(r" {2,}", line) for line in text.splitlines()[1:])}


def told_to_fetch():
    """Folders whose missing weights send the user to scripts/download.sh, with the declarations."""
    wanted = {}
    for name in scorers.names():
        scorer = scorers.get(name)
        if any(option.required for option in scorer.options):  # perhaps the place of a checkpoint
            continue
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
        repositories = fetched(log)
        assert weights.hub_id is None or weights.hub_id in repositories
    assert not list(tmp_path.glob("models/*/tf_model.h5")) and not list(tmp_path.glob("models/*/README.md"))


def test_weights_in_torchs_format_are_fetched_only_where_there_are_no_others(download, tmp_path):
    assert download("pickscore", files=FILES + " model.safetensors pytorch_model.bin")[0] == 0
    assert not (tmp_path / "models/pickscore/pytorch_model.bin").exists()
    assert download("clip-vit-large-patch14", files=FILES + " pytorch_model.bin")[0] == 0
    assert (tmp_path / "models/clip-vit-large-patch14/pytorch_model.bin").exists()


TWICE = ("model.safetensors text_encoders/t5.safetensors unet/a.bin unet/a.fp16.safetensors unet/model.fp16-00001-of-00002.safetensors "
         "unet/a.non_ema.safetensors unet/a.msgpack vae/a.onnx vae/a.onnx_data unet/a.ckpt vae_1_0/a.safetensors")  # fmt: skip


def test_without_a_name_the_base_model_is_fetched_in_folders(download, tmp_path):
    """Its weights once: no single files at the top, and no other variants and formats, of which SD1.5 and SDXL have several."""
    code, error, log = download(files=f"{FILES} transformer/a.safetensors {TWICE}")
    assert code == 0, error
    name = "stable-diffusion-3.5-medium"
    assert log[0] == "hf auth token"
    assert log[1].startswith(f"hf download stabilityai/{name} --repo-type model --local-dir models/{name} --include")
    assert log[2:] == [f"hf cache verify stabilityai/{name} --repo-type model --local-dir models/{name}"]
    assert (tmp_path / "models/stable-diffusion-3.5-medium/transformer/config.json").exists()
    kept = {path.name for path in (tmp_path / "models/stable-diffusion-3.5-medium").rglob("*") if path.is_file()}
    assert kept == {"config.json", "a.safetensors", "model_index.json", "train-0.parquet", "test-0.parquet"}
    assert not any((tmp_path / "models/stable-diffusion-3.5-medium" / name).exists() for name in TWICE.split())


def test_several_names_at_once_and_an_unknown_one(download, tmp_path):
    code, _, log = download("hps", "image-reward")
    assert sorted(path.name for path in (tmp_path / "models/hps").iterdir()) == ["HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt"]
    assert code == 0 and fetched(log) == ["xswu/HPSv2", "THUDM/ImageReward", "google-bert/bert-base-uncased"]
    code, error, again = download("hps", "hpz")
    assert code == 1 and "unknown name 'hpz'" in error and again == log  # nothing was fetched before it was seen


def test_the_list_names_everything_with_size_and_licence():
    names = listed()
    wanted = {"stable-diffusion-3.5-medium", "stable-diffusion-v1-5", "dogs", "pokemon", "pickapic", "open-image-preferences"}
    assert wanted | told_to_fetch().keys() <= names.keys()
    for size, licence in names.values():
        assert re.fullmatch(r"[\d.]+ [GM]B", size) and licence


@pytest.mark.parametrize("name", sorted(listed()))
def test_every_name_on_the_list_is_fetched_and_verified(name, download, tmp_path):
    code, error, log = download(name)
    assert code == 0, error
    verified = [line.split()[3] for line in log if line.startswith("hf cache verify")]
    assert verified == fetched(log)
    assert fetched(log) or any(line.startswith("curl") for line in log)
    assert len(list(tmp_path.glob(f"*/{name}"))) == 1


def test_data_sets_bring_their_training_split_alone(download, tmp_path):
    assert download("pokemon", "pickapic", "dogs")[0] == 0
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("datas/*/**/*") if path.is_file())
    assert found == ["datas/dogs/dog.jpeg", "datas/pickapic/data/train-0.parquet", "datas/pokemon/data/train-0.parquet"]


def test_a_gated_model_without_a_login_gets_the_two_lines_that_tell_how(download, tmp_path):
    code, error, log = download(NO_LOGIN="1")
    assert code == 1 and log == ["hf auth token"]
    first, accept, login = error.splitlines()
    assert first.startswith("error: stabilityai/stable-diffusion-3.5-medium wants a login")
    assert accept.strip() == "accept it at https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
    assert login.strip() == f"{tmp_path}/.venv/bin/hf auth login && bash scripts/download.sh stable-diffusion-3.5-medium"
    assert download("pickscore", NO_LOGIN="1")[0] == 0  # not gated


def test_a_file_that_is_not_the_published_one_is_refused(download):
    code, error, _ = download("improved-aesthetic-predictor", DAMAGED="1")
    assert code == 1 and "is not the published file; delete it" in error
    code, error, _ = download("pickscore", DAMAGED="1")
    assert code == 1 and "a file in models/pickscore is not the published one" in error


def test_a_file_from_elsewhere_that_is_complete_is_not_fetched_again(download):
    """A server answers a request for what comes after the end of a file with an error."""
    assert download("improved-aesthetic-predictor")[0] == 0
    code, _, log = download("improved-aesthetic-predictor")
    assert code == 0 and len([line for line in log if line.startswith("curl")]) == 3


@pytest.mark.slow
def test_the_real_client_goes_on_where_a_connection_broke_and_finds_a_damaged_file(tmp_path):
    """12 MiB break off after 11: the client keeps pieces of 10, and asks for the rest alone. One changed byte fails the comparison."""
    noise = os.urandom(2**20) * 12
    hub = hub_stand_in.Hub({"datasets/reach-vb/pokemon-blip-captions": {"data/train-0.parquet": noise, "data/test-0.parquet": b"no"}},
                           broken={"data/train-0.parquet": 11 * 2**20})  # fmt: skip
    (copy_scripts(tmp_path) / "hf").symlink_to(Path(sys.executable).parent / "hf")
    (tmp_path / ".venv/bin/python").symlink_to("/bin/true")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    command = ["bash", "scripts/download.sh", "pokemon"]
    with hub_stand_in.serving(hub):
        run = subprocess.run(command, cwd=tmp_path, env=env | {"HF_ENDPOINT": hub.address}, capture_output=True, text=True)
        file = tmp_path / "datas/pokemon/data/train-0.parquet"
        assert run.returncode == 0 and file.read_bytes() == noise, run.stderr
        (_, first), (_, second) = hub.asked
        assert first is None and second == f"bytes={10 * 2**20}-"
        times = file.stat()
        file.write_bytes(bytes([noise[0] ^ 1]) + noise[1:])
        os.utime(file, (times.st_atime, times.st_mtime))  # a disk's fault; a file that is newer than its download is fetched again
        run = subprocess.run(command, cwd=tmp_path, env=env | {"HF_ENDPOINT": hub.address}, capture_output=True, text=True)
    assert run.returncode == 1 and "a file in datas/pokemon is not the published one" in run.stderr


def test_the_checksums_are_those_of_the_published_heads():
    import hashlib

    heads = ROOT.parent / "shared/data/aesthetic"
    if not heads.is_dir():
        pytest.skip("no published heads beside the repository")
    listed = dict(re.findall(r"heads/(\S+?)\" ([0-9a-f]{64})", (ROOT / "scripts/download.sh").read_text()))
    assert len(listed) == 2
    for name, digest in listed.items():
        assert hashlib.sha256((heads / name.replace("%2B", "+")).read_bytes()).hexdigest() == digest
