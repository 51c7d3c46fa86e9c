"""The rehearsal: its command lines are those of the programs, and a program that fails is told."""

import json
import os

import pytest

import train_ddpo_sd3
import train_dpo_sd15
import train_dreambooth_lora_sd3
import train_full_finetuning_sd3
import train_grpo_sd3
import train_refl_sd15
import train_text_to_image_lora_sd3
from benchmarks import rehearsal
from src import cli

SCRIPTS = {
    f"{script.__name__}.py": script
    for script in (
        train_ddpo_sd3, train_dpo_sd15, train_dreambooth_lora_sd3, train_full_finetuning_sd3, train_grpo_sd3, train_refl_sd15,
        train_text_to_image_lora_sd3,
    )
}  # fmt: skip


def parsed(*argv):
    return cli.parse(rehearsal.build_parser(), [str(word) for word in argv], checks=(rehearsal.check,))


@pytest.fixture
def tiny(tmp_path):
    return parsed("--tiny", "--folder", tmp_path)


def test_all_seven_programs_are_rehearsed():
    assert {program.script for program in rehearsal.PROGRAMS.values()} == SCRIPTS.keys()


@pytest.mark.parametrize("name", rehearsal.PROGRAMS)
def test_a_program_takes_its_command_line_and_resumes_for_a_second_step(name, tiny, monkeypatch):
    monkeypatch.chdir(rehearsal.ROOT)
    program = rehearsal.PROGRAMS[name]
    folders = rehearsal.models(tiny, [name])
    for steps in (1, 2):
        script, *argv = rehearsal.command(name, tiny, folders[program.model], steps)
        args = SCRIPTS[script].parse_args(argv)
        assert getattr(args, program.steps.removeprefix("--")) == steps
        assert args.resume_from_checkpoint == (None if steps == 1 else "latest") and args.resolution == 64


def test_the_models_of_the_real_size_are_written_for_the_programs_that_need_them(tmp_path, monkeypatch):
    from src.pipelines import geometry

    written = []
    monkeypatch.setattr(geometry, "write_weights", lambda model, folder, tokenizers: written.append((folder.name, tokenizers.name)))
    args = parsed("--folder", tmp_path, "--programs", "lora,demo")
    assert args.resolution == 256
    rehearsal.models(args, ["lora", "demo"])
    assert written == [("sd3.5-medium", "tiny-sd3")]
    rehearsal.models(args, ["refl"])
    assert written[1:] == [("sd1.5", "tiny-sd15")]


def test_a_program_that_fails_is_told_by_its_last_line(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit code 3: the reason \(.*log\)"):
        rehearsal.run(["-c", "import sys; print('first'); print('the reason', file=sys.stderr); sys.exit(3)"], tmp_path / "log")
    assert rehearsal.run(["-c", "pass"], tmp_path / "log") < 10


@pytest.mark.parametrize("losses", [[], [0.5], [0.5, float("nan")]])
def test_a_step_without_a_finite_loss_is_a_failure_and_the_others_go_on(losses, tiny, tmp_path, monkeypatch, capsys):
    def wrote(words, log):
        folder = tmp_path / "runs" / log.name.partition("-")[0]
        folder.mkdir(parents=True, exist_ok=True)
        found = losses if folder.name == "lora" else [1.0, 2.0]
        lines = [json.dumps({"loss": loss, "memory_gb": 1.5, "grad_norm": 1.0}) for loss in found]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        return 1.0

    monkeypatch.setattr(rehearsal, "run", wrote)
    tiny.programs, tiny.output = "lora,dpo", tmp_path / "result.json"
    tiny.output.write_text('{"full": {"seconds": [1, 2]}}')  # of an earlier day
    results = rehearsal.main(tiny)
    assert json.loads(tiny.output.read_text()).keys() == {"full", "lora", "dpo"}
    assert "two finite losses were expected" in results["lora"]["failed"] and results["dpo"]["losses"] == [1.0, 2.0]
    assert "lora         FAILED: two" in (out := capsys.readouterr().out) and "dpo                1 + 1      1.5   1.0000, 2.0000" in out


def test_wrong_input_is_one_line(tmp_path, capsys):
    for argv, words in ((["--programs", "lora,nonsense"], "there is no nonsense"), (["--programs", "demo"], "add lora before it")):
        with pytest.raises(SystemExit):
            parsed("--folder", tmp_path, *argv)
        assert words in capsys.readouterr().err


@pytest.mark.long
def test_a_lora_is_trained_resumed_and_drawn_with(tmp_path):
    args = parsed(
        "--tiny", "--folder", tmp_path, "--programs", "lora,demo", "--mixed_precision", "no", "--output", tmp_path / "result.json"
    )
    results = rehearsal.main(args)
    assert "failed" not in results["lora"] | results["demo"]
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept.keys() == results.keys() and results["lora"].items() <= kept["lora"].items() and len(results["lora"]["losses"]) == 2
    assert {"checkpoint-1", "checkpoint-2"} <= set(os.listdir(tmp_path / "runs/lora"))
