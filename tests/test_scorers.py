"""The interface of the scorers, with toy scorers whose verdicts are known: mixtures, gradients, NaN, memory bound, and every refusal."""

import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from src import cli, scorers
from src.scorers.base import Loader, Option, Scorer, Weights
from src.scorers.mixture import score_pictures

ROOT = Path(__file__).parent.parent
COMMON = {"summary": "a toy", "range": (0.0, 1.0), "licence": "none"}


@pytest.fixture
def calls():
    """What the toy scorers were asked: (name, batch, prompts)."""
    return []


@pytest.fixture(autouse=True)
def toys(monkeypatch, calls):
    """Four scorers in a file of their own: `mean` and `dark` with gradients, `flat` without, `moody` that cannot judge dark pictures."""

    def loading(name, verdict):
        def load(loader: Loader):
            loader.once("backbone", lambda: calls.append(("backbone", 0, [])))

            def judge(images, prompts, metadata):
                calls.append((name, len(images), prompts))
                assert images.dtype == torch.float32
                return verdict(images, loader)

            return judge

        return load

    def mean(images, loader):
        return images.mean((1, 2, 3))

    def moody(images, loader):
        return torch.where(images.mean((1, 2, 3)) > 0.5, 1.0, torch.nan)

    module = types.ModuleType("src.scorers.toys")
    module.SCORERS = (
        Scorer("mean", load=loading("mean", mean), differentiable=True, normalizer=2.0, **COMMON),
        Scorer("dark", load=loading("dark", lambda images, loader: 1 - mean(images, loader)), differentiable=True, normalizer=0.5,
               **COMMON),
        Scorer("flat", load=loading("flat", lambda images, loader: mean(images, loader).detach()), differentiable=False, normalizer=1.0,
               check_prompt=lambda prompt, metadata: None if "flat" in prompt else "it does not say flat", **COMMON),
        Scorer("moody", load=loading("moody", moody), differentiable=False, normalizer=1.0, **COMMON),
        Scorer("picky", load=loading("picky", lambda images, loader: mean(images, loader) * loader.options["picky_factor"]),
               differentiable=False, normalizer=1.0, options=(Option("picky_factor", default=1.0), Option("picky_kind", "a", ("a", "b"))),
               **COMMON),
        Scorer("far", load=loading("far", mean), differentiable=True, normalizer=1.0,
               weights=lambda options: (Weights("far", ("a.bin|b.bin", "c.json")),), **COMMON),
        Scorer("lone", load=loading("lone", mean), differentiable=True, normalizer=1.0, packages={"no_such_package": "such"}, **COMMON),
        Scorer("needy", load=loading("needy", mean), differentiable=True, normalizer=1.0, options=(Option("needy_url", required=True),),
               **COMMON),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "src.scorers.toys", module)
    monkeypatch.setitem(scorers.FILES, "toys", tuple(scorer.name for scorer in module.SCORERS))


def pictures(*levels):
    """One grey 2 x 2 picture of each level."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


# --------------------------------------------------------------------------- verdicts


def test_total_is_the_sum_of_weight_times_part_over_normalizer():
    """Level 0.25: mean 0.25 of normalizer 2, dark 0.75 of normalizer 0.5: 3 * 0.25 / 2 - 1 * 0.75 / 0.5 = -1.125."""
    mixture = scorers.build("mean=3, dark=-1")
    scores = mixture(pictures(0.25, 1.0), ["a", "b"])
    assert mixture.names == ["mean", "dark"]
    assert scores.parts["mean"].tolist() == [0.25, 1.0] and scores.parts["dark"].tolist() == [0.75, 0.0]
    assert scores.total.tolist() == [-1.125, 1.5]
    assert scores.total.dtype == torch.float32 and not scores.total.requires_grad


def test_a_part_that_cannot_judge_makes_the_total_nan_never_zero():
    scores = scorers.build("moody,mean")(pictures(0.25, 0.75), ["a", "b"])
    assert scores.parts["moody"].isnan().tolist() == [True, False]
    assert scores.total.isnan().tolist() == [True, False] and scores.parts["mean"].tolist() == [0.25, 0.75]


def test_a_network_that_returns_nan_is_an_error(monkeypatch):
    """`mean` has a gradient, so it is a network: NaN from it means broken weights, not a picture that cannot be judged."""
    monkeypatch.setattr(torch.Tensor, "mean", lambda self, *args: torch.full((len(self),), torch.nan))
    with pytest.raises(ValueError, match="mean gave NaN or infinity for a sound picture"):
        scorers.build("mean")(pictures(0.5), ["a"])


def test_pictures_are_judged_in_batches_in_order(calls):
    prompts = list("abcde")
    scores = scorers.build("mean", batch_size=2)(pictures(0.1, 0.2, 0.3, 0.4, 0.5), prompts)
    assert calls[1:] == [("mean", 2, ["a", "b"]), ("mean", 2, ["c", "d"]), ("mean", 1, ["e"])]
    assert scores.total.tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])


def test_no_pictures_have_no_scores(calls):
    scores = scorers.build("mean,moody")(torch.zeros(0, 3, 8, 8), [])
    assert scores.total.shape == (0,) and scores.total.dtype == torch.float32
    assert {name: part.shape for name, part in scores.parts.items()} == {"mean": (0,), "moody": (0,)}
    assert calls == [("backbone", 0, [])]


def test_what_scorers_share_is_made_once_per_mixture(calls):
    scorers.build("mean,dark,flat")
    assert calls == [("backbone", 0, [])]
    scorers.build("mean,dark")
    assert len(calls) == 2


def test_options_reach_the_scorer_and_unset_ones_are_its_defaults():
    images = pictures(0.5)
    assert scorers.build("picky", picky_factor=3.0)(images, ["a"]).total.item() == 1.5
    assert scorers.build("picky", picky_factor=None)(images, ["a"]).total.item() == 0.5
    assert scorers.build("mean", picky_factor=3.0)(images, ["a"]).total.item() == 0.25  # of another scorer: left alone


def test_metadata_follows_its_picture(monkeypatch):
    seen = []
    toy = Scorer("told", load=lambda loader: lambda images, prompts, metadata: (seen.append(metadata), images.mean((1, 2, 3)))[1],
                 differentiable=False, normalizer=1.0, **COMMON)  # fmt: skip
    monkeypatch.setattr(sys.modules["src.scorers.toys"], "SCORERS", (toy,))
    monkeypatch.setitem(scorers.FILES, "toys", ("told",))
    scorers.build("told", batch_size=2)(pictures(0.1, 0.2, 0.3), list("abc"), [{"n": 1}, {"n": 2}, {"n": 3}])
    assert seen == [[{"n": 1}, {"n": 2}], [{"n": 3}]]


def test_pictures_of_several_sizes_keep_their_prompts_metadata_and_places(monkeypatch):
    """Sizes 4, 8, 4 and a hidden 8: sizes are judged together, and a score is the number in its picture's metadata."""
    seen = []
    toy = Scorer("told", load=lambda loader: lambda images, prompts, metadata: (
        seen.extend(zip([len(image[0]) for image in images], prompts, strict=True)), torch.tensor([one["n"] for one in metadata]))[1],
        differentiable=False, normalizer=2.0, **COMMON)  # fmt: skip
    monkeypatch.setattr(sys.modules["src.scorers.toys"], "SCORERS", (toy,))
    monkeypatch.setitem(scorers.FILES, "toys", ("told",))
    pictures = [Image.new("RGB", (side, side)) for side in (4, 8, 4, 8)]
    metadata = [{"n": float(number)} for number in range(4)]
    found = score_pictures(scorers.build("told"), pictures, list("abcd"), metadata, hidden=[False, False, False, True])
    assert sorted(seen) == [(4, "a"), (4, "c"), (8, "b")]
    assert found[:3] == [{"told": n, "total": n / 2} for n in (0.0, 1.0, 2.0)] and all(value != value for value in found[3].values())


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_gradient_reaches_the_pictures_through_every_batch(batch_size):
    """d total / d value = 1 / 2 of normalizer / 12 values a picture."""
    images = pictures(0.0, 0.5, 1.0).clone().requires_grad_()
    scores = scorers.build("mean", batch_size=batch_size)(images, ["a"] * 3)
    scores.total.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 24))


@pytest.mark.parametrize(("batch_size", "kept"), [(6, 8), (2, 1)])
def test_several_batches_with_gradient_keep_their_pictures_not_their_activations(batch_size, kept, monkeypatch):
    """`deep` is eight sines of the pictures: one batch keeps what each of them read; of three batches only the pictures are kept."""

    def deep(images, prompts, metadata):
        for _ in range(8):
            images = images.sin()
        return images.mean((1, 2, 3))

    toy = Scorer("deep", load=lambda loader: deep, differentiable=True, normalizer=1.0, **COMMON)
    monkeypatch.setattr(sys.modules["src.scorers.toys"], "SCORERS", (toy,))
    monkeypatch.setitem(scorers.FILES, "toys", ("deep",))
    images = torch.rand(6, 3, 16, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        total = scorers.build("deep", batch_size=batch_size)(images, ["a"] * 6).total
    assert sum(saved) == pytest.approx(kept * images.numel(), rel=0.01)
    total.sum().backward()
    assert (images.grad != 0).all()


def test_without_gradient_none_is_tracked():
    images = pictures(0.5).clone().requires_grad_()
    with torch.no_grad():
        assert not scorers.build("mean,flat")(images, ["flat"]).total.requires_grad
    assert not scorers.build("mean")(images.detach(), ["a"]).total.requires_grad


def test_a_gradient_through_a_scorer_without_one_is_refused_by_name():
    mixture = scorers.build("mean,flat,moody")
    assert not mixture.differentiable and scorers.build("mean,dark").differentiable
    with pytest.raises(ValueError, match="no gradient flows through flat, moody; detach the pictures"):
        mixture(pictures(0.5).clone().requires_grad_(), ["a"])


def test_a_judge_that_cuts_the_gradient_it_declares_is_named(monkeypatch):
    """Beside `dark` the sum still has a gradient, and training would go on without the cut part."""
    toys = sys.modules["src.scorers.toys"]
    cut = Scorer("cut", load=lambda loader: lambda images, prompts, metadata: images.detach().mean((1, 2, 3)), differentiable=True,
                 normalizer=1.0, **COMMON)  # fmt: skip
    monkeypatch.setattr(toys, "SCORERS", (*toys.SCORERS, cut))
    monkeypatch.setitem(scorers.FILES, "toys", (*scorers.FILES["toys"], "cut"))
    mixture = scorers.build("dark,cut", batch_size=1)
    assert mixture(pictures(0.5, 0.25), ["a"] * 2).total.shape == (2,)
    with pytest.raises(AssertionError, match="cut is declared differentiable, but its judge cuts the gradient"):
        mixture(pictures(0.5, 0.25).clone().requires_grad_(), ["a"] * 2)


# --------------------------------------------------------------------------- pictures outside the contract


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), r"images \(b, 3, H, W\), got \(3, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), r"got \(2, 1, 4, 4\)"),
        (torch.zeros(2, 3, 0, 4), r"got \(2, 3, 0, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "floating-point images .* got torch.uint8; divide 8-bit levels by 255"),
        (torch.full((2, 3, 4, 4), -1.0), r"in \[0, 1\], got values from -1 to -1: map \[-1, 1\] by \(x \+ 1\) / 2"),
        (torch.full((2, 3, 4, 4), 255.0), "got values from 255 to 255"),
        (torch.full((2, 3, 4, 4), torch.inf), "got values from inf to inf"),
        (torch.full((2, 3, 4, 4), torch.nan), "the pictures hold NaN"),
        (torch.tensor([0.5, torch.nan]).view(2, 1, 1, 1).expand(2, 3, 4, 4), "the pictures hold NaN"),
    ],
)
def test_pictures_outside_the_contract_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        scorers.build("mean")(images, ["a", "b"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_taken_and_rounding_past_one_is_no_mistake(dtype):
    scores = scorers.build("mean")(torch.full((1, 3, 2, 2), 1.0005, dtype=torch.float64).to(dtype), ["a"])
    assert scores.total.item() == pytest.approx(0.5, abs=1e-3) and scores.total.dtype == torch.float32


@pytest.mark.parametrize(
    ("prompts", "metadata", "message"),
    [
        (["a"], None, r"2 picture\(s\) but 1 prompts"),
        ("ab", None, "prompts must be a list"),
        (["a", "b"], [{}], r"2 picture\(s\) but 1 metadata"),
    ],
)
def test_one_prompt_for_each_picture(prompts, metadata, message):
    with pytest.raises(ValueError, match=message):
        scorers.build("mean")(pictures(0.1, 0.2), prompts, metadata)


# --------------------------------------------------------------------------- what check refuses


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("meen", {}, "--scorer meen: unknown scorer 'meen'; did you mean mean?"),
        ("pikscore", {}, "--scorer pikscore: unknown scorer 'pikscore'; did you mean pickscore?"),
        ("mean=high", {}, "--scorer mean=high: the weight of mean must be a number, got 'high'"),
        ("mean=0", {}, "--scorer mean=0: the weight of mean must be finite and not 0, got 0"),
        ("mean=nan", {}, "--scorer mean=nan: the weight of mean must be finite and not 0, got nan"),
        ("mean,dark,mean=2", {}, "--scorer mean,dark,mean=2: mean stands twice in 'mean,dark,mean=2'; add the weights up"),
        ("mean,", {}, "--scorer mean,: 'mean,' lacks a name; write NAME=WEIGHT,NAME=WEIGHT"),
        ("picky", {"picky_kind": "c"}, "--scorer picky: --picky_kind must be one of a, b; got 'c'"),
        ("needy", {}, "--scorer needy: needs --needy_url"),
        ("mean", {"piky_kind": 0}, "--scorer mean: no scorer has an option piky_kind; did you mean picky_kind?"),
        ("lone", {}, f"--scorer lone: no_such_package is not installed: {sys.executable} -m pip install such"),
        ("mean,far", {}, "--scorer mean,far: far: weights are missing: models/far has no a.bin or b.bin; run bash scripts/download.sh far"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line_with_the_cure(spec, options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refusal:
        scorers.check(spec, **options)
    assert str(refusal.value) == message
    with pytest.raises(ValueError, match="scorers.build"):
        scorers.build(spec, **options)


def test_a_part_without_gradient_is_refused_where_one_is_needed():
    scorers.check("mean,dark", differentiable=True)
    with pytest.raises(ValueError, match="--eval_scorers mean,flat: flat has no gradient; leave it out, or use one of .*aesthetic.*mean"):
        scorers.check("mean,flat", differentiable=True, flag="--eval_scorers")


def test_a_prompt_that_cannot_be_judged_is_named():
    scorers.check_prompts("mean,flat", ["a flat land", "flat"])
    with pytest.raises(ValueError, match="flat cannot judge prompt 1 'a hill': it does not say flat"):
        scorers.check_prompts("mean,flat", ["a flat land", "a hill", "a mountain"])


def test_a_batch_of_none_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        scorers.build("mean", batch_size=0)


# --------------------------------------------------------------------------- where weights lie


def hub_cache(folder: Path, repository: str, *files: str) -> None:
    """The Hub's cache with these files of one repository, as huggingface_hub lays it out."""
    root = folder / ("models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("0" * 40)
    for name in files:
        (root / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
        (root / "snapshots" / ("0" * 40) / name).write_text("from the hub")


def test_weights_are_looked_for_in_models_first_then_in_the_hubs_cache_then_on_the_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants, file_download

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for module in (constants, file_download):
        monkeypatch.setattr(getattr(module, "constants", module), "HF_HUB_CACHE", str(tmp_path / "hub"))
    weights = Weights("local", ("a.bin|b.bin", "c.json"), "somebody/something")
    assert weights.local is None and not weights.cached
    assert weights.missing() == "weights are missing: models/local has no a.bin or b.bin; run bash scripts/download.sh local"
    with pytest.raises(ValueError, match="weights are missing"):
        weights.path("c.json")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert weights.missing() is None and weights.source == "somebody/something"  # the Hub may be asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    hub_cache(tmp_path / "hub", "somebody/something", "b.bin", "c.json")
    assert weights.cached and weights.missing() is None and weights.source == "somebody/something"
    assert weights.path("a.bin|b.bin").name == "b.bin" and weights.path("c.json").read_text() == "from the hub"

    (tmp_path / "models/local").mkdir(parents=True)
    (tmp_path / "models/local/a.bin").touch()
    assert weights.local is None  # half a folder is none
    (tmp_path / "models/local/c.json").write_text("local")
    assert weights.source == "models/local" and weights.path("a.bin|b.bin") == Path("models/local/a.bin")
    assert weights.path("c.json").read_text() == "local"

    own = Weights(str(tmp_path / "models/local"), ("a.bin", "c.json"), by_hand="give another --my_path")  # as docs/scorers.md has it
    assert own.source == str(tmp_path / "models/local") and own.missing() is None
    gone = Weights(str(tmp_path / "nowhere"), ("a.bin",), by_hand="give another --my_path")
    assert gone.missing() == f"weights are missing: {tmp_path}/nowhere has no a.bin; give another --my_path"


@pytest.mark.parametrize(("kinds", "words"), [
    (("LocalEntryNotFoundError",) * 2, "could not be reached.*; run bash scripts/download.sh far"),
    (("RemoteEntryNotFoundError", "LocalEntryNotFoundError"), "could not be reached"),  # the connection broke after the first
    (("RepositoryNotFoundError",) * 2, "there is no such repository.*; run bash scripts/download.sh far"),
    (("RemoteEntryNotFoundError",) * 2, "somebody/something on the Hub has no a.bin or b.bin"),
])  # fmt: skip
def test_a_hub_that_cannot_be_reached_is_told_apart_from_one_that_lacks_the_file(monkeypatch, tmp_path, kinds, words):
    from huggingface_hub import constants, errors

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def refuse(repository, name):
        kind = getattr(errors, kinds[len(asked)])
        asked.append(name)
        raise kind.__new__(kind, "404 Client Error")  # without the response that its constructor wants

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ValueError, match=words) as error:
        Weights("far", ("a.bin|b.bin",), "somebody/something").path("a.bin|b.bin")
    assert asked == ["a.bin", "b.bin"] and "\n" not in str(error.value)


def test_weights_that_the_user_must_fetch_say_how(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    weights = Weights("own", ("head.pth",), by_hand="copy it from your other machine")
    assert weights.missing() == "weights are missing: models/own has no head.pth; copy it from your other machine"


# --------------------------------------------------------------------------- the registry


def test_every_scorer_states_what_a_user_must_know(monkeypatch):
    monkeypatch.delitem(scorers.FILES, "toys")
    for file, names in scorers.FILES.items():
        declared = sys.modules.get(f"src.scorers.{file}") or __import__(f"src.scorers.{file}", fromlist=["SCORERS"])
        assert tuple(scorer.name for scorer in declared.SCORERS) == names, file
        for scorer in declared.SCORERS:
            assert scorer.range[0] < scorer.range[1] and scorer.normalizer > 0 and scorer.licence and scorer.summary
            assert len(scorer.summary) < 110 and scorer.summary[-1] != "."
    assert len(set(scorers.names())) == len(scorers.names())


def test_every_option_of_a_scorer_is_a_flag_and_the_other_way_round(monkeypatch):
    monkeypatch.delitem(scorers.FILES, "toys")
    declared = {option.name: name for name in scorers.names() for option in scorers.get(name).options}
    assert declared == cli.SCORER_OPTIONS
    parser = cli.make_parser("x")
    cli.add_scorer_args(parser, default=None)
    assert set(cli.scorer_options(cli.parse(parser, []))) == set(declared)
    args = types.SimpleNamespace(**{name: f"of --{name}" for name in declared})
    assert cli.scorer_options(args) == vars(args), "each is handed on under its own name"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--aesthetic_head", "ava+logos"], "--aesthetic_head ava+logos has no effect without aesthetic in --scorer"),
        (["--scorer", "aesthetic_v1", "--aesthetic_head", "ava+logos"], "--aesthetic_head ava+logos has no effect without aesthetic in"),
        (["--scorer_batch_size", "4"], "--scorer_batch_size 4 has no effect without --scorer"),
        (["--scorer", "hps", "--judge_max", "5"], "--judge_max 5.0 has no effect without vlm_judge in --scorer"),
    ],
)
def test_a_flag_of_a_scorer_that_is_not_used_is_refused(argv, message, capsys):
    parser = cli.make_parser("x")
    cli.add_scorer_args(parser, default=None)
    with pytest.raises(SystemExit):
        cli.parse(parser, argv)
    assert message in capsys.readouterr().err
    parser = cli.make_parser("x")
    cli.add_scorer_args(parser, default="hps")
    assert cli.parse(parser, ["--scorer", "clip, hps=0.5", "--hps_version", "v2"]).hps_version == "v2"
    parser.add_argument("--eval_scorers")  # whose settings are those of --scorer
    assert cli.parse(parser, ["--scorer", "clip", "--eval_scorers", "hps", "--hps_version", "v2"]).hps_version == "v2"


@pytest.mark.slow
def test_one_file_and_one_line_add_a_scorer(tmp_path):
    """In a copy of src: the file, its line in FILES, and both the list and the command know it."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src/scorers/redness.py").write_text(
        "from src.scorers.base import Scorer\n"
        "SCORERS = (Scorer(name='redness', summary='how red a picture is', differentiable=True, range=(0, 1), normalizer=1.0,\n"
        "                  licence='none', load=lambda loader: lambda images, prompts, metadata: images[:, 0].mean((1, 2))),)\n"
    )
    registry = tmp_path / "src/scorers/__init__.py"
    registry.write_text(registry.read_text().replace('    "clip": ("clip",),\n', '    "clip": ("clip",),\n    "redness": ("redness",),\n'))
    Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / "red.png")
    command = [sys.executable, "-m", "src.scorers"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert any("redness" in line and "ready" in line for line in listed.splitlines())
    scored = subprocess.run([*command, "redness", "red.png"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "1.0000" in scored and "red.png" in scored


def test_the_page_lists_every_scorer_as_it_declares_itself(monkeypatch):
    monkeypatch.delitem(scorers.FILES, "toys")
    rows = [line.strip("| \n").split(" | ") for line in (ROOT / "docs/scorers.md").read_text().splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): row for row in rows if len(row) == 7}
    assert list(table) == scorers.names()
    for name, (_, _, gradient, usual, divisor, licence, needs) in table.items():
        scorer = scorers.get(name)
        low, high = scorer.range
        assert (gradient, usual, divisor) == ("yes" if scorer.differentiable else "no", f"{low:g} to {high:g}", f"{scorer.normalizer:g}")
        assert licence == scorer.licence
        for weights in () if any(option.required for option in scorer.options) else scorer.weights(scorer.settings({})):
            assert weights.folder in needs or needs == "the same" or weights.folder == "tiny-clip", (name, weights.folder)


def test_the_page_shows_a_scorer_that_works(monkeypatch):
    """The example under "Add one" is executed."""
    page = (ROOT / "docs/scorers.md").read_text()
    module = types.ModuleType("src.scorers.toys")
    exec(page.split("```python")[-1].split("```")[0], vars(module))
    monkeypatch.setitem(sys.modules, "src.scorers.toys", module)
    monkeypatch.setitem(scorers.FILES, "toys", ("redness",))
    red = torch.tensor([0.75, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert scorers.build("redness")(red, ["a"]).total.item() == 0.75
