"""The learning curves of the pages: what is kept of a run, when it reached a goal, and that pages and pictures belong to what was kept."""

import json

import pytest

from benchmarks import learning_curves
from benchmarks.learning_curves import Panel, Table

SCORE = "eval/shapes_strict"


def run(*points, passes=10.0, pictures=64.0):
    """points: (step, seconds, score)."""
    evaluations = [{"step": step, "seconds": seconds, SCORE: score} for step, seconds, score in points]
    return {"evaluations": evaluations, "training": {"reward": []}, "passes_per_picture": passes, "pictures_per_step": pictures}


def test_a_goal_is_reached_between_two_evaluations():
    """From 0.5 at step 10 (100 s) to 0.9 at step 20 (300 s): 0.6 after a quarter of the way, 150 s and step 12.5."""
    curve = run((0, 0, 0.4), (10, 100, 0.5), (20, 300, 0.9), (30, 400, 0.3))
    assert learning_curves.reached(curve, SCORE, 0.6) == pytest.approx((150, 12.5))
    assert learning_curves.reached(curve, SCORE, 0.4) == (0, 0)
    assert learning_curves.reached(curve, SCORE, 0.95) is None


def test_a_row_by_hand():
    """Two seeds. 0.6 is reached in half of 120 s and 20 steps: 1 minute, 10 steps of 64 pictures of 10 passes, 6.4 thousand."""
    runs = [run((0, 0, 0.5), (20, 120, 0.7)), run((0, 0, 0.5), (20, 180, 0.55))]
    assert learning_curves.row("nft", runs, SCORE, [0.6]) == "| nft | 10.0 | 70.0, 55.0 | 2, 3 | 1.0 / 6, - |"


def test_seeds_of_a_setting_belong_together(monkeypatch):
    results = {"nft / 1": 1, "nft / 0": 0, "nft guided / 0": 2}
    assert learning_curves.runs_of(results, "nft") == [0, 1]
    with pytest.raises(ValueError, match="ppo"):
        learning_curves.runs_of(results, "ppo")


@pytest.mark.parametrize("trainer, flags, passes", [
    ("grpo", {}, 10 + 3 * 2.5),  # 10 steps drawn, 3 trained at 2.5 passes
    ("grpo", {"kl_weight": 0.1}, 10 + 3 * 3.5),  # the reference beside each
    ("grpo", {"guidance_scale": 4.0, "window_size": 0}, 20 + 2 * 5 * 2.5),  # two passes everywhere, all of the range
    ("grpo", {"loss": "nft", "guidance_scale": 4.0}, 20 + 3 * 3.5),  # trained without guidance, the old policy beside
    ("ddpo", {"num_inner_epochs": 2}, 10 + 6 * 2.5),
])  # fmt: skip
def test_what_a_picture_costs(monkeypatch, trainer, flags, passes):
    monkeypatch.setattr(learning_curves.rl_epoch, "step_cost", lambda args: 2.5)
    args = learning_curves.rl_epoch.trainer_of(trainer).build_parser().parse_args([])
    vars(args).update(flags)
    assert learning_curves.passes_per_picture(args) == pytest.approx(passes)


@pytest.fixture
def folder(tmp_path):
    """A run of GRPO: two evaluations and two epochs of two updates."""
    args = learning_curves.rl_epoch.trainer_of("grpo").build_parser().parse_args([])
    vars(args).update(sample_batch_size=4, sample_num_batches_per_epoch=8, learning_rate=0.5)
    (tmp_path / "args.json").write_text(json.dumps(vars(args), default=str))
    lines = [{"step": 0, "eval_reward": 0.1, SCORE: 0.25}, {"step": 2, "reward": 0.3, "seconds": 7.0},
             {"step": 4, "reward": 0.4, "seconds": 9.0}, {"step": 4, "eval_reward": 0.2, SCORE: 0.5}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_what_is_kept_of_a_run(folder, monkeypatch):
    """32 pictures an epoch, in two updates; of the flags only what is not the default."""
    monkeypatch.setattr(learning_curves.rl_epoch, "step_cost", lambda args: 2.0)
    kept = learning_curves.record(folder, "a machine")
    assert kept["evaluations"] == [{"step": 0, "seconds": 0.0, "eval_reward": 0.1, SCORE: 0.25},
                                   {"step": 4, "seconds": 9.0, "eval_reward": 0.2, SCORE: 0.5}]  # fmt: skip
    assert kept["training"] == {"step": [2, 4], "seconds": [7.0, 9.0], "reward": [0.3, 0.4]}
    assert kept["flags"] == {"sample_batch_size": 4, "sample_num_batches_per_epoch": 8, "learning_rate": 0.5}
    assert (kept["passes_per_picture"], kept["pictures_per_step"], kept["machine"]) == (16.0, 16.0, "a machine")
    two = learning_curves.record(folder, "a machine", processes=2)  # each process draws so many
    assert two["pictures_per_step"] == 32.0 and two["processes"] == 2


def test_the_seconds_of_a_resumed_run_are_added(folder, monkeypatch):
    """9 s until it was stopped; the next epochs end 3 and 5 s after the new start."""
    monkeypatch.setattr(learning_curves.rl_epoch, "step_cost", lambda args: 2.0)
    lines = [{"step": 6, "reward": 0.5, "seconds": 3.0}, {"step": 8, "reward": 0.6, "seconds": 5.0},
             {"step": 8, "eval_reward": 0.3, SCORE: 0.6}]  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    kept = learning_curves.record(folder, "a machine")
    assert kept["training"]["seconds"] == [7.0, 9.0, 12.0, 14.0] and kept["evaluations"][-1]["seconds"] == 14.0


def test_what_cannot_be_kept(folder, monkeypatch, tmp_path_factory):
    with pytest.raises(ValueError, match="output_dir of a run"):
        learning_curves.record(tmp_path_factory.mktemp("empty"), "")
    (folder / "metrics.jsonl").write_text('{"step": 2, "reward": 0.3, "seconds": 7.0}\n')
    with pytest.raises(ValueError, match="never evaluated"):
        learning_curves.record(folder, "")
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        learning_curves.main(learning_curves.cli.parse(learning_curves.build_parser(), ["--record", str(folder)]))


def test_a_page_and_a_picture(monkeypatch, tmp_path):
    """The table stands between the markers, nothing else moves; the picture opens."""
    results = {"nft / 0": run((0, 0, 0.5), (20, 120, 0.7))}
    page = tmp_path / "page.md"
    page.write_text("above\n" + learning_curves.BEGIN + "old\n" + learning_curves.END + "below\n")
    learning_curves.write_into(page, learning_curves.table(results, Table("page.md", SCORE, (0.6,), {"nft": "NFT"})))
    assert page.read_text().startswith("above\n") and page.read_text().endswith("below\n")
    assert "| NFT | 10.0 |" in page.read_text() and "old" not in page.read_text()
    learning_curves.draw(results, [Panel("strict", SCORE, {"nft": "NFT"}, percent=True, dashed={0.6: "half"})], tmp_path / "curve.png")
    from PIL import Image

    assert Image.open(tmp_path / "curve.png").width > 400


def test_the_pages_show_the_tables_of_what_was_kept():
    """If not: python benchmarks/learning_curves.py --write"""
    results = learning_curves.read()
    for wanted in learning_curves.TABLES:
        text = (learning_curves.ROOT / "docs" / wanted.page).read_text(encoding="utf-8")
        assert text.split(learning_curves.BEGIN)[1].split(learning_curves.END)[0].strip() == learning_curves.table(results, wanted).strip()
    for name, panels in learning_curves.FIGURES.items():
        assert (learning_curves.ROOT / "docs" / "images" / name).is_file()
        assert all(learning_curves.runs_of(results, setting) for panel in panels for setting in panel.settings)
