"""Every program at full size, from its command to the files it leaves, with random weights: no licence, no download.

  python benchmarks/rehearsal.py                                        # all eight, at 256 px
  python benchmarks/rehearsal.py --programs lora,demo --resolution 1024 --folder /scratch/rehearsal
  python benchmarks/rehearsal.py --tiny                                 # the same with the shipped tiny models, in two minutes

`real_geometry.py` measures steps; this shows that a machine can do all the rest: load shards of the real size, fill the text cache
with T5-XXL, draw for validation and evaluation, write a checkpoint, resume from it, save, and draw with the result. Each program makes one
optimizer step and ends; a second process resumes it for another. SD3.5-medium and SD1.5 have their published geometry; their random weights
(18 GB) are written to --folder once and stay there, so delete it in the end. Pictures are noise, of course.
"""

import argparse
import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from src import cli

ROOT = Path(__file__).parent.parent
SD3, SD15 = "sd3.5-medium", "sd1.5"
SUPERVISED = "--train_batch_size 1 --logging_steps 1 --checkpointing_steps 1 --dataloader_num_workers 0"
VALIDATED = "--num_validation_images 1 --validation_inference_steps 2 --validation_guidance_scale 1"
ALIGNED = (
    "--prompts shapes --scorer jpeg_compressibility --sample_batch_size 2 --sample_num_batches_per_epoch 1 --num_inference_steps 3 "
    "--window_size 1 --window_range 0 2 --checkpointing_epochs 1 --eval_epochs 1 --num_eval_prompts 1 --num_eval_images 1 "
    "--eval_num_inference_steps 2 --gradient_checkpointing"
)


@dataclass(frozen=True)
class Program:
    """A script, the model that it trains, its flags but for the steps, and the flag that says how many steps."""

    script: str
    model: str
    flags: str
    steps: str = "--max_train_steps"


PROGRAMS = {
    "lora": Program("train_text_to_image_lora_sd3.py", SD3,
                    f"--dataset_name datas/photos {SUPERVISED} {VALIDATED} --validation_prompt 'a fox' --gradient_checkpointing"),
    "dreambooth": Program("train_dreambooth_lora_sd3.py", SD3,
                          f"--instance_data_dir datas/subject --with_prior_preservation --class_prompt 'a star' --num_class_images 1 "
                          f"--class_inference_steps 2 --class_guidance_scale 1 {SUPERVISED} --gradient_checkpointing"),
    "full": Program("train_full_finetuning_sd3.py", SD3,
                    "--dataset_name datas/photos --weights_dtype bf16 --optimizer adafactor --fused_backward --max_grad_norm 0 "
                    f"{SUPERVISED} --gradient_checkpointing"),
    "grpo": Program("train_grpo_sd3.py", SD3, f"--group_size 2 --updates_per_epoch 1 {ALIGNED}", "--num_epochs"),
    "ddpo": Program("train_ddpo_sd3.py", SD3, ALIGNED, "--num_epochs"),
    "dpo": Program("train_dpo_sd15.py", SD15, f"--dataset_name datas/pairs --max_train_samples 8 --use_lora {SUPERVISED} {VALIDATED} "
                   "--validation_prompt 'a fox'"),
    "refl": Program("train_refl_sd15.py", SD15,
                    "--prompts shapes --scorer tiny_clip --use_lora --num_inference_steps 3 --guidance_scale 1 --train_batch_size 1 "
                    "--logging_steps 1 --checkpointing_steps 1 --num_eval_prompts 1 --num_eval_images 1 --eval_num_inference_steps 2"),
}  # fmt: skip


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("rehearsal")
    g.add_argument("--programs", default=",".join((*PROGRAMS, "demo")), help="comma-separated; demo draws with what lora left")
    g.add_argument("--resolution", type=cli.multiple_of_16, help="side of the pictures in pixels (unset: 256; 64 with --tiny)")
    g.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16", help="as the programs take it")
    g.add_argument("--folder", type=cli.path, default=Path("outputs/rehearsal"), help="models, runs with their caches, logs")
    g.add_argument("--tiny", action="store_true", help="the shipped tiny models instead of random ones of the real size")
    g.add_argument("--output", type=cli.path, help="result file, whose other programs stay (unset: none)")
    parser.when_unset["resolution"] = lambda args: 64 if args.tiny else 256
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a program that does not exist, and a demo without a LoRA to draw with."""
    names = args.programs.split(",")
    unknown = set(names) - PROGRAMS.keys() - {"demo"}
    if unknown:
        raise ValueError(f"--programs: there is no {', '.join(sorted(unknown))}; choose from {', '.join(PROGRAMS)}, demo")
    if "demo" in names and "lora" not in names and not (args.folder / "runs/lora").is_dir():
        raise ValueError("--programs demo draws with what lora left; add lora before it")


def models(args: argparse.Namespace, names: list[str]) -> dict[str, Path]:
    """Folders of the models that these programs need, written if they are not there."""
    if args.tiny:
        return {SD3: ROOT / "models/tiny-sd3", SD15: ROOT / "models/tiny-sd15"}
    from src.pipelines import geometry

    found = {}
    for model, tiny in ((SD3, "tiny-sd3"), (SD15, "tiny-sd15")):
        if any(model == (PROGRAMS[name].model if name in PROGRAMS else SD3) for name in names):
            found[model] = args.folder.absolute() / "models" / model
            begun = time.time()
            geometry.write_weights(geometry.MODELS[model], found[model], ROOT / "models" / tiny)
            print(f"{model}: random weights in {found[model]}, {time.time() - begun:.0f} s", flush=True)
    return found


def command(name: str, args: argparse.Namespace, model: Path, steps: int) -> list[str]:
    """The program's command line for a run of `steps` steps; all but the first resume."""
    program, folder = PROGRAMS[name], args.folder.absolute()
    words = [program.script, "--pretrained_model_name_or_path", str(model), *shlex.split(program.flags), program.steps, str(steps),
             "--resolution", str(args.resolution), "--mixed_precision", args.mixed_precision, "--seed", "0", "--report_to", "none",
             "--cache_dir", str(folder / "runs" / name / "cache"), "--output_dir", str(folder / "runs" / name)]  # fmt: skip
    return words + (["--resume_from_checkpoint", "latest"] if steps > 1 else [])


def run(words: list[str], log: Path) -> float:
    """Seconds of `python WORDS`, whose output goes to `log`.

    Raises:
        RuntimeError: it did not exit with 0; with its last line.
    """
    begun = time.time()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        code = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        ).returncode
    if code:
        lines = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines() or ["no output"]
        raise RuntimeError(f"exit code {code}: {lines[-1][:200]} ({log})")
    return time.time() - begun


def rehearse(name: str, args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Run a program twice, one step each, and read what it logged.

    Raises:
        RuntimeError: it failed, logged no loss for a step, or one that is not finite.
    """
    log = args.folder / "logs"
    shutil.rmtree(args.folder / "runs" / name, ignore_errors=True)  # of an earlier rehearsal
    seconds = [run(command(name, args, model, steps), log / f"{name}-{steps}.log") for steps in (1, 2)]
    lines = [json.loads(line) for line in (args.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    losses = [line["loss"] for line in steps]
    if len(losses) != 2 or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"two finite losses were expected, got {losses}")
    found = {"seconds": seconds, "memory_gb": max(line["memory_gb"] for line in steps), "losses": losses}
    found["gradient_norms"] = [line["grad_norm"] for line in steps]
    return found | ({"log_ratio": steps[0]["log_ratio"]} if "log_ratio" in steps[0] else {})


def draw(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Draw with the LoRA that `lora` left, beside the base model."""
    out = args.folder.absolute() / "runs/demo"
    dtype = "bf16" if args.mixed_precision == "bf16" else "fp32"
    words = ["demo.py", "--pretrained_model_name_or_path", str(model), "--lora_weights_path", str(args.folder.absolute() / "runs/lora"),
             "--compare", "--prompt", "a fox", "--resolution", str(args.resolution), "--num_inference_steps", "2", "--guidance_scale", "1",
             "--dtype", dtype, "--output_dir", str(out)]  # fmt: skip
    seconds = run(words, args.folder / "logs/demo.log")
    if len(list(out.glob("*.png"))) != 3:
        raise RuntimeError(f"two pictures and a grid were expected in {out}")
    return {"seconds": [seconds]}


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "failed" in found:
        return f"{name:<12} FAILED: {found['failed']}"
    seconds = " + ".join(f"{one:.0f}" for one in found["seconds"])
    memory = f"{found['memory_gb']:.1f}" if "memory_gb" in found else ""
    losses = ", ".join(f"{loss:.4f}" for loss in found.get("losses", ()))
    ratio = f"log-ratio {found['log_ratio']:.2g}" if "log_ratio" in found else ""
    return f"{name:<12} {seconds:>11} {memory:>8}   {losses:<18} {ratio}".rstrip()


def main(args: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by diffusers; it reports on kernels that are not used here
    names = args.programs.split(",")
    folders = models(args, names)
    kept = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    results: dict[str, Any] = {}
    print(f"{'program':<12} {'seconds':>11} {'GB':>8}   losses")
    for name in names:
        try:
            model = folders[PROGRAMS[name].model if name in PROGRAMS else SD3]
            results[name] = rehearse(name, args, model) if name in PROGRAMS else draw(args, model)
        except RuntimeError as error:
            results[name] = {"failed": str(error)}
        print(line(name, results[name]), flush=True)
        if args.output:
            from benchmarks.real_geometry import about

            kept[name] = results[name] | {"resolution": args.resolution, "mixed_precision": args.mixed_precision, "about": about()}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(kept, indent=1) + "\n")
    return results


if __name__ == "__main__":
    results = main(cli.parse(build_parser(), checks=(check,)))
    sys.exit(1 if any("failed" in found for found in results.values()) else 0)
