"""The demo as a user meets it: files, metadata, repeatability, LoRA strength, comparison, both families, and every refusal."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import demo
from src import gallery, images, lora, scorers
from src.pipelines import sd3, sd15, stock
from src.scorers import shapes

ROOT = Path(__file__).parent.parent


def close(one, other, levels=2):
    """Equal up to rounding: batches of other sizes add in another order."""
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= levels


@pytest.fixture(scope="module")
def lora_folder(tiny_sd3_folder, tmp_path_factory):
    return runs.save_lora(tiny_sd3_folder, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def draw(tiny_sd3_folder, tmp_path):
    """Run the demo in process; returns its output folder."""

    def run(*argv, model=tiny_sd3_folder, name="out", steps=2):
        argv = ["--pretrained_model_name_or_path", model, "--num_inference_steps", steps, "--output_dir", tmp_path / name, *argv]
        demo.main(demo.parse_args([str(word) for word in argv]))
        return tmp_path / name

    return run


def pictures(folder):
    """PNGs but for the grid, by name."""
    return {path.name: Image.open(path) for path in sorted(folder.glob("*.png")) if path.name != "grid.png"}


def arrays(folder):
    return [np.asarray(picture) for picture in pictures(folder).values()]


def refusal(capsys, *argv):
    """The one line, with exit code 2."""
    capsys.readouterr()  # of what the test itself has loaded
    with pytest.raises(SystemExit) as exit_:
        demo.main(demo.parse_args([str(word) for word in argv]))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1, error
    return error


# ---------------------------------------------------------------------------------------------- files


def test_names_are_safe_whatever_the_prompt_holds():
    prompts = ["../../etc/passwd", 'a/b\\c:d*?"<>|', "🙂", "", "日本語", "line\nbreak\ttab", "x" * 300, "con.", "-rf ~", "$(reboot)"]
    names = [gallery.file_name(i, prompt, 7) for i, prompt in enumerate(prompts)]
    assert names[0] == "000-etc-passwd-seed7.png" and names[2] == "002-picture-seed7.png" and names[5] == "005-line-break-tab-seed7.png"
    assert gallery.file_name(3, "Schöner Käse, naïve café", 7) == "003-schoner-kase-naive-cafe-seed7.png"
    assert len(set(names)) == len(prompts)
    for name in names:
        assert len(name) < 100 and name == Path(name).name and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")


def test_awkward_prompts_are_drawn_and_stored_word_for_word(draw, tmp_path, capsys):
    listed = tmp_path / "prompts.txt"
    listed.write_text("\ufeff" + "word " * 200 + "\n\n  a heart  \n", encoding="utf-8")
    out = draw("--prompt", 'a/b "c" 🙂\nnew line, ünïcode', "--prompt", "", "--prompts_file", listed, steps=1)
    stored = [picture.text["prompt"] for picture in pictures(out).values()]
    assert stored == ['a/b "c" 🙂\nnew line, ünïcode', "", ("word " * 200).strip(), "a heart"]
    printed = capsys.readouterr()
    assert "CLIP's 16 tokens" in printed.out and "T5 alone reads the rest" in printed.out
    assert "truncated" not in printed.err  # one line instead of pages
    assert (out / "grid.png").exists()


def test_json_lines_are_prompts_with_what_scorers_know_of_them(draw, tmp_path, capsys):
    """shapes verifies metadata's caption: it could not judge "two cats" by itself, and refuses the second line before anything is drawn."""
    listed, words = tmp_path / "prompts.jsonl", {"prompt": "two cats", "caption": "a red circle on a blue background"}
    listed.write_text(json.dumps(words) + "\n")
    (picture,) = pictures(draw("--prompts_file", listed, "--scorer", "shapes", steps=1)).values()
    assert picture.text["prompt"] == "two cats"
    expected = shapes.credit(images.from_pil(picture)[None], ["two cats"], [words]).item()
    assert json.loads(picture.text["scores"])["shapes"] == pytest.approx(expected)
    listed.write_text(json.dumps(words) + '\n{"prompt": "a dog"}\n')
    assert "shapes cannot judge prompt 1 'a dog'" in refusal(capsys, "--prompts_file", listed, "--scorer", "shapes")


def test_a_second_run_counts_on_from_the_first_and_has_a_grid_of_its_own(draw, capsys):
    """Two pictures, then one: 000 and 001 stay as they are, the third is 002, and grid.png shows it alone."""
    first = draw("--prompt", "a", "--prompt", "b", steps=1)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    out = draw("--prompt", "c", steps=1)
    assert list(pictures(out)) == ["000-a-seed0.png", "001-b-seed0.png", "002-c-seed0.png"]
    assert all((out / name).read_bytes() == before[name] for name in before if name != "grid.png")
    assert "2 picture(s), 000 to 001, in" in (said := capsys.readouterr().out) and "1 picture(s), 002 to 002, in" in said
    alone = draw("--prompt", "c", name="alone", steps=1)
    assert (out / "grid.png").read_bytes() == (alone / "grid.png").read_bytes()


def test_a_picture_can_be_made_again_from_its_own_metadata(draw, lora_folder):
    out = draw("--prompt", "a red heart", "--seed", 3, "--height", 64, "--width", 32, "--guidance_scale", 2, "--negative_prompt", "blue",
               "--lora_weights_path", lora_folder, "--lora_scale", 0.7, "--max_sequence_length", 12)  # fmt: skip
    (picture,) = pictures(out).values()
    assert picture.size == (32, 64)
    settings = {name: value for name, value in json.loads(picture.text["settings"]).items() if value is not None and name != "skip_layers"}
    assert settings.pop("num_inference_steps") == 2 and settings["dtype"] == "fp32"
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    again = draw("--prompt", picture.text["prompt"], "--seed", picture.text["seed"], *words, name="again")
    assert np.array_equal(arrays(out)[0], arrays(again)[0])


def test_metadata_reads_in_other_programs(draw):
    flags = ("--negative_prompt", "blue", "--seed", 4, "--guidance_scale", 2, "--width", 32)
    (picture,) = pictures(draw("--prompt", "a heart", *flags, steps=1)).values()
    lines = picture.text["parameters"].splitlines()
    assert lines[:2] == ["a heart", "Negative prompt: blue"]
    assert lines[2].startswith("Steps: 1, CFG scale: 2, Seed: 4, Size: 32x64, Model: ")


# ---------------------------------------------------------------------------------------------- seeds and batches


def test_a_picture_depends_on_its_seed_and_not_on_the_batch_or_its_place(draw):
    """Seeds 5, 6, 7 of two prompts in batches of 5 and 1; seed 6 of the second prompt alone."""
    together = draw("--prompt", "a red circle", "--prompt", "a blue star", "--num_images", 3, "--seed", 5, "--batch_size", 5)
    alone = draw("--prompt", "a blue star", "--seed", 6, name="alone")
    assert list(pictures(together))[4] == "004-a-blue-star-seed6.png"
    assert close(arrays(together)[4], arrays(alone)[0])
    assert not close(arrays(together)[3], arrays(together)[4], levels=20), "other seeds are other pictures"


def test_the_same_command_gives_the_same_bytes(draw):
    first, second = draw("--prompt", "a star"), draw("--prompt", "a star", name="second")
    assert [path.read_bytes() for path in sorted(first.iterdir())] == [path.read_bytes() for path in sorted(second.iterdir())]


def test_the_grid_of_a_long_list_is_cut_and_every_picture_is_kept(draw, monkeypatch):
    """Its pictures are shrunk as well, those on the disk are not."""
    sizes, sheet = set(), gallery.sheet
    monkeypatch.setattr(gallery, "sheet", lambda cells, *rest: sizes.update(one.size for one, _ in cells.values()) or sheet(cells, *rest))
    for name, limit in (("PROMPTS", 1), ("SEEDS", 2), ("CELL", 32)):
        monkeypatch.setattr(gallery, name, limit)
    out = draw("--prompt", "a", "--prompt", "b", "--num_images", 3, steps=1)
    assert [picture.size for picture in pictures(out).values()] == [(64, 64)] * 6 and sizes == {(32, 32)}
    wide = Image.open(out / "grid.png").width
    assert 2 * 128 < wide < 4 * 128  # label and two cells of 128


def test_pictures_of_one_seed_stand_beside_each_other(monkeypatch):
    """Two columns, two seeds from 7 on, one prompt: base and tuned of 7, then of 8; one picture for each is named without its seed."""
    seen, real = [], gallery.images.grid
    monkeypatch.setattr(gallery.images, "grid", lambda cells, **options: seen.append(options) or real(cells, **options))
    colors = {("base", 0): "red", ("tuned", 0): "lime", ("base", 1): "blue", ("tuned", 1): "white"}
    cells = {key: (Image.new("RGB", (128, 128), color), {}) for key, color in colors.items()}
    sheet = gallery.sheet(cells, ["a star"], ["base", "tuned"], range(7, 9))
    centres = [sheet.getpixel((x, sheet.height - 70)) for x in range(sheet.width - 4 * 134 + 64, sheet.width, 134)]
    assert centres == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert seen[-1]["column_labels"] == ["base, seed 7", "tuned, seed 7", "base, seed 8", "tuned, seed 8"]
    gallery.sheet(cells, ["a star"], ["base", "tuned"], range(7, 8))
    assert seen[-1]["column_labels"] == ["base", "tuned"]
    gallery.sheet(cells, ["a star"], ["tuned"], range(7, 9))
    assert seen[-1]["column_labels"] == ["seed 7", "seed 8"]
    cells = {("base", number): (Image.new("RGB", (128, 128), (number, 0, 0)), {"n": number}) for number in range(4)}
    gallery.sheet(cells, ["a star", "a heart"], ["base"], range(7, 9))
    assert seen[-1]["labels"] == ["n 0", "n 1", "n 2", "n 3"]  # the second prompt's pictures are 2 and 3


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.slow
def test_scores_stand_in_names_files_grid_and_output(draw, lora_folder, capsys):
    """--compare with two scorers that need no weights: each picture carries what its own pixels score."""
    from src.scorers import jpeg

    prompt = ("--prompt", "a red circle on a blue background", "--num_images", 2)
    out = draw(*prompt, "--scorer", "shapes=2,jpeg_compressibility", "--lora_weights_path", lora_folder, "--compare", steps=1)
    printed = capsys.readouterr().out
    sizes = {"base": [], "tuned": []}
    for name, picture in pictures(out).items():
        scores = json.loads(picture.text["scores"])
        assert scores["jpeg_compressibility"] == pytest.approx(-jpeg.kilobytes(images.from_pil(picture)[None]).item())
        assert scores["total"] == pytest.approx(2 * scores["shapes"] + scores["jpeg_compressibility"] / 100)
        assert name.endswith(f"-shapes{scores['shapes']:.3g}-jpeg_compressibility{scores['jpeg_compressibility']:.3g}.png")
        sizes["base" if "-base-" in name else "tuned"].append(scores["jpeg_compressibility"])
    assert [len(values) for values in sizes.values()] == [2, 2] and sizes["base"] != sizes["tuned"]
    for column, values in sizes.items():
        assert f"{column}: mean jpeg_compressibility {sum(values) / 2:.4f} over 2 picture(s)" in printed
    plain = draw(*prompt, name="plain", steps=1)
    assert Image.open(out / "grid.png").height > Image.open(plain / "grid.png").height  # room for the scores
    assert all("scores" not in picture.text for picture in pictures(plain).values())
    draw(*prompt, "--scorer", "shapes", name="one", steps=1)
    assert "base: mean shapes" in capsys.readouterr().out


def test_wins_by_hand():
    """Of five pairs the tuned picture is better, equal, worse; one picture could not be judged in the others: 1 + 1/2 of 3."""
    base, tuned = [1, 2, 3, math.nan, 5], [1.5, 2, 2, 9, -math.inf]
    scores = [[{"shapes": value, "total": 0.0} for value in values] for values in (base, tuned)]
    assert gallery.wins(*scores) == {"shapes": (1.5, 3), "total": (2.5, 5)}
    assert gallery.report({"base": scores[0][:3], "tuned": scores[1][:3]}) == [
        "base: mean shapes 2.0000 over 3 picture(s)", "base: mean total 0.0000 over 3 picture(s)",
        "tuned: mean shapes 1.8333 over 3 picture(s)", "tuned: mean total 0.0000 over 3 picture(s)",
        "tuned wins 1.5 of 3 by shapes", "tuned wins 1.5 of 3 by total",
    ]  # fmt: skip
    assert gallery.report({"base": [{}]}) == gallery.report({"base": [{}], "tuned": [{}]}) == []


# ---------------------------------------------------------------------------------------------- LoRA


def test_compare_draws_what_base_and_tuned_draw_alone(draw, lora_folder):
    common = ("--prompt", "a", "--num_images", 3, "--batch_size", 2)
    both = draw(*common, "--lora_weights_path", lora_folder, "--compare", steps=1)
    base = draw(*common, name="base", steps=1)
    tuned = draw(*common, "--lora_weights_path", lora_folder, name="tuned", steps=1)
    found = pictures(both)
    assert list(found)[:2] == ["000-a-seed0-base.png", "000-a-seed0-tuned.png"]
    sides = {side: [np.asarray(picture) for name, picture in found.items() if side in name] for side in ("base", "tuned")}
    assert all(map(np.array_equal, sides["base"], arrays(base)))
    assert all(map(np.array_equal, sides["tuned"], arrays(tuned)))
    assert not close(sides["base"][0], sides["tuned"][0], levels=20)
    used = [json.loads(picture.text["settings"])["lora_weights_path"] for picture in found.values()]
    assert used == [None, str(lora_folder)] * 3


def test_scale_0_is_the_base_model(draw, lora_folder):
    base = draw("--prompt", "a heart")
    file = lora_folder / "pytorch_lora_weights.safetensors"
    zero = draw("--prompt", "a heart", "--lora_weights_path", file, "--lora_scale", 0, name="zero")
    assert np.array_equal(arrays(base)[0], arrays(zero)[0])


def test_the_scale_multiplies_the_update_with_alpha_over_rank(tiny_sd3_folder, lora_folder, scale=-0.5):
    """W x + scale * alpha / rank * B A x, with alpha 8 from the file's metadata and rank 4."""
    pipeline = stock.load(str(tiny_sd3_folder), dtype=torch.float32, device="cpu", lora_path=lora_folder, lora_scale=scale)
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(3, layer.base_layer.in_features)
    update = layer.lora_B["tuned"](layer.lora_A["tuned"](x))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * 8 / 4 * update)


@pytest.mark.parametrize("kind", [RuntimeError, KeyError])
def test_a_lora_whose_error_says_nothing_is_refused_all_the_same(tiny_sd3_folder, lora_folder, monkeypatch, kind):
    from diffusers import StableDiffusion3Pipeline

    def refuse(*args, **options):
        raise kind

    monkeypatch.setattr(StableDiffusion3Pipeline, "load_lora_weights", refuse)
    with pytest.raises(ValueError, match=f"--lora_weights_path .*: does not fit the model: {kind.__name__}$"):
        stock.load(str(tiny_sd3_folder), dtype=torch.float32, device="cpu", lora_path=lora_folder)


@pytest.mark.parametrize(("kind", "words"), [
    ("HTTPError", "the Hub could not be reached"),  # it broke halfway: neither an OSError nor a ValueError
    ("OSError", "Error no file named model.safetensors"),
])  # fmt: skip
def test_a_model_that_cannot_be_loaded_is_one_line(tiny_sd3_folder, monkeypatch, kind, words):
    from diffusers import StableDiffusion3Pipeline
    from huggingface_hub import errors

    def refuse(*args, **options):
        raise getattr(errors, kind, OSError)(f"{words}\nand a second line")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=rf"--pretrained_model_name_or_path .*: cannot be loaded \({words}.*; download") as error:
        stock.load(str(tiny_sd3_folder), dtype=torch.float32, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_bf16_draws_with_a_lora(draw, lora_folder):
    out = draw("--prompt", "a heart", "--lora_weights_path", lora_folder, "--dtype", "bf16")
    assert arrays(out)[0].std() > 1


def test_a_lora_of_a_larger_model_is_refused(draw, tiny_sd3_folder, lora_folder, tmp_path, capsys):
    """diffusers would drop the layers that are not there with no more than a warning."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(lora_folder / "pytorch_lora_weights.safetensors")
    more = {key.replace("transformer_blocks.0.", "transformer_blocks.9."): value.clone() for key, value in tensors.items()}
    save_file(tensors | more, tmp_path / "large.safetensors")
    narrow = {key: value[:, :4].contiguous() if "lora_A" in key else value for key, value in tensors.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    for name, words in (("large", "only"), ("narrow", "does not fit the model")):
        line = refusal(capsys, "--pretrained_model_name_or_path", tiny_sd3_folder, "--lora_weights_path", tmp_path / f"{name}.safetensors",
                       "--output_dir", tmp_path / "none")  # fmt: skip
        assert "--lora_weights_path" in line and words in line
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("keys", "family"), [
    (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "sd3"),
    (["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"], "sd15"),
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_x.lora_up.weight"], "sd15"),
    (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], "kohya"),
    (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "transformer.transformer_blocks.0.a.lora_A.weight"], None),
    (["transformer.transformer_blocks.0.attn.to_q.weight"], None),
    ([], None),
])  # fmt: skip
def test_the_family_of_a_lora_is_read_from_its_names(keys, family):
    assert stock.lora_family(keys) == family


# ---------------------------------------------------------------------------------------------- SD1.5 and SDXL


@pytest.fixture(scope="module")
def tiny_sd15_folder(tiny_sd3_folder, tmp_path_factory):
    """A random StableDiffusionPipeline, 16 x 16 latents at most a handful of channels."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd3_folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        latent_channels=4, norm_num_groups=2)  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=16))  # fmt: skip
    folder = tmp_path_factory.mktemp("sd15")
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_sd15_is_drawn_with_its_own_pipeline(draw, tiny_sd15_folder):
    out = draw("--prompt", "a heart", "--num_images", 2, "--resolution", 32, model=tiny_sd15_folder)
    assert [picture.size for picture in pictures(out).values()] == [(32, 32)] * 2


@pytest.mark.slow
def test_another_sampler_draws_what_it_draws_in_diffusers(draw, tiny_sd15_folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    flags = ("--prompt", "a heart", "--resolution", 32, "--num_inference_steps", 4, "--guidance_scale", 2)
    drawn = {name: next(iter(pictures(draw(*flags, *rest, model=tiny_sd15_folder, name=name)).values()))
             for name, rest in (("own", ()), ("ddim", ("--scheduler", "DDIMScheduler")))}  # fmt: skip
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd15_folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    want = pipe(
        "a heart", height=32, width=32, num_inference_steps=4, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    far = {name: np.abs(np.asarray(picture).astype(int) - np.asarray(want)).max() for name, picture in drawn.items()}
    assert far["ddim"] <= 1 < far["own"] and json.loads(drawn["ddim"].text["settings"])["scheduler"] == "DDIMScheduler"


@pytest.fixture(scope="module")
def prudish_sd15_folder(tiny_sd15_folder, tmp_path_factory):
    """The same with a safety checker that takes every picture for unsafe: no cosine is below -1."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=tower, projection_dim=8))
    for threshold in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        threshold.data.fill_(-2.0)
    side = {"height": 8, "width": 8}
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_sd15_folder, safety_checker=checker, feature_extractor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=side),
        requires_safety_checker=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("prudish")
    pipeline.save_pretrained(folder)
    return folder


SAFE = ("--resolution", 32, "--scorer", "jpeg_compressibility", "--prompt")


def test_pictures_that_the_models_safety_checker_blacks_out_are_named_and_not_scored(draw, prudish_sd15_folder, capsys):
    out = draw(*SAFE, "a heart", "--num_images", 2, model=prudish_sd15_folder, steps=1)
    printed = capsys.readouterr().out
    names = list(pictures(out))
    assert not any(picture.any() for picture in arrays(out)) and all(name.endswith("-jpeg_compressibilitynan.png") for name in names)
    assert [line for line in printed.splitlines() if "safety checker" in line] == [
        f"note: the model's safety checker blacked out 2 of 2 picture(s), which are not scored: {', '.join(names)}"
    ]
    assert "mean jpeg_compressibility nan over 0 picture(s)" in printed
    assert json.loads(pictures(out)[names[0]].text["scores"]) == {"jpeg_compressibility": None, "total": None}


def test_a_mean_leaves_out_what_was_blacked_out(draw, prudish_sd15_folder, capsys, monkeypatch):
    """The second of three in batches of two: one hit in the first batch, none in the second."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    def second_alone(self, clip_input, images):
        found = [number == 1 for number in range(len(images))]
        images[found] = 0
        return images, found

    monkeypatch.setattr(StableDiffusionSafetyChecker, "forward", second_alone)
    out = draw(*SAFE, "a heart", "--num_images", 3, "--batch_size", 2, model=prudish_sd15_folder, steps=1)
    first, second, third = (json.loads(picture.text["scores"])["jpeg_compressibility"] for picture in pictures(out).values())
    printed = capsys.readouterr().out
    assert second is None and f"mean jpeg_compressibility {(first + third) / 2:.4f} over 2 picture(s)" in printed
    assert f"blacked out 1 of 3 picture(s), which are not scored: {list(pictures(out))[1]}\n" in printed


def test_a_long_list_of_blacked_out_pictures_is_cut():
    names = [f"{number}.png" for number in range(12)]
    assert gallery.safety_note(names, 20, scored=False) == (
        "note: the model's safety checker blacked out 12 of 20 picture(s): " + ", ".join(names[:10]) + " and 2 more"
    )


def test_what_sd15_does_not_know_is_refused(tiny_sd15_folder, lora_folder, capsys):
    model = ("--pretrained_model_name_or_path", tiny_sd15_folder)
    assert "--skip_layer_guidance is for Stable Diffusion 3" in refusal(capsys, *model, "--skip_layer_guidance", 2.8)
    assert "--max_sequence_length is for Stable Diffusion 3" in refusal(capsys, *model, "--max_sequence_length", 77)
    assert "is for Stable Diffusion 3.x, but" in refusal(capsys, *model, "--lora_weights_path", lora_folder)


@pytest.fixture(scope="module")
def unet_loras(tiny_sd15_folder, tiny_sdxl_folder, tmp_path_factory):
    """A trainer's file for each of the two, by its model: rank 4, B not zero."""
    folders = {}
    for model in (tiny_sd15_folder, tiny_sdxl_folder):
        unet, folder = sd15.load(model, parts=("unet",)).unet, tmp_path_factory.mktemp("unet-lora")
        torch.manual_seed(1)
        lora.add(unet, rank=4)
        for parameter in lora.parameters(unet):
            parameter.data.normal_(0, 0.5)
        lora.save(unet, folder)
        folders[model] = folder
    return folders


def test_xl_is_drawn_as_its_trainers_draw_it_compared_and_scored(draw, tiny_sdxl_folder, unet_loras, capsys):
    """Its empty negative prompt is zeros there."""
    flags = ("--prompt", "a ring", "--resolution", 32, "--guidance_scale", 5, "--scorer", "jpeg_compressibility")
    out = draw(*flags, "--lora_weights_path", unet_loras[tiny_sdxl_folder], "--compare", model=tiny_sdxl_folder)
    base, tuned = arrays(out)
    model = sd15.load(tiny_sdxl_folder)
    condition, negative = (sd15.encode_prompts(model, [text]) for text in ("a ring", ""))
    trained = sd15.render(model, model.unet, condition, negative=negative, seeds=[0], height=32, width=32, num_inference_steps=2,
                          guidance_scale=5.0)  # fmt: skip
    assert close(base, images.to_pil(trained)[0]) and not close(base, tuned, levels=20)
    scores = [json.loads(picture.text["scores"])["jpeg_compressibility"] for picture in pictures(out).values()]
    assert f"tuned wins {scores[1] > scores[0]:d} of 1 by jpeg_compressibility\n" in capsys.readouterr().out


def test_a_lora_of_another_unet_is_refused(tiny_sd15_folder, tiny_sdxl_folder, unet_loras, tmp_path, capsys):
    for model, other in ((tiny_sdxl_folder, tiny_sd15_folder), (tiny_sd15_folder, tiny_sdxl_folder)):
        line = refusal(capsys, "--pretrained_model_name_or_path", model, "--lora_weights_path", unet_loras[other], "--output_dir", tmp_path)
        assert f"--lora_weights_path {unet_loras[other]}: does not fit the model" in line


def test_unset_steps_and_guidance_are_those_of_the_trainers_validation(tiny_sd3_folder, tiny_sd15_folder, tiny_sdxl_folder, monkeypatch):
    import train_dpo_sd15
    import train_text_to_image_lora_sd3

    def found(model, *argv):
        args = demo.parse_args(["--pretrained_model_name_or_path", str(model), *argv])
        return args.num_inference_steps, args.guidance_scale

    def validated(script):
        return tuple(script.build_parser().get_default(f"validation_{name}") for name in ("inference_steps", "guidance_scale"))

    assert found(tiny_sd3_folder) == validated(train_text_to_image_lora_sd3) == (28, 4.5)
    assert found(tiny_sd15_folder) == found(tiny_sdxl_folder) == validated(train_dpo_sd15) == (25, 7.5)
    assert found(tiny_sd3_folder, "--num_inference_steps", "4", "--guidance_scale", "0") == (4, 0)
    monkeypatch.chdir(ROOT)
    assert found("models/tiny-sd3") == found("models/tiny-sd15") == (20, 2.0)


# ---------------------------------------------------------------------------------------------- skip-layer guidance


@pytest.mark.slow
def test_skip_layer_guidance_changes_the_picture_and_its_layers_count(draw):
    argv = ["--prompt", "a heart"]
    plain = arrays(draw(*argv, steps=8))[0]
    one = arrays(draw(*argv, "--skip_layer_guidance", 5, "--skip_layers", "1", name="one", steps=8))[0]
    two = arrays(draw(*argv, "--skip_layer_guidance", 5, "--skip_layers", "0,2", name="two", steps=8))[0]
    assert not np.array_equal(plain, one) and not np.array_equal(one, two)


# ---------------------------------------------------------------------------------------------- what is handed on


class Recorder:
    """Stands for diffusers' pipeline: keeps what it was called with, and draws grey squares."""

    def __init__(self, tokens=16):
        self.transformer, self.tokenizer_3, self.given = None, SimpleNamespace(model_max_length=tokens), []

    def __call__(self, **given):
        self.given.append(given)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), "grey") for _ in given["prompt"]])


JOBS = [gallery.Job(0, "a", 5, {"caption": "a red star"}), gallery.Job(1, "a", 6, {"caption": "a blue star"})]


@pytest.mark.parametrize(("flags", "height", "width"), [
    ("--resolution 96", 96, 96), ("--resolution 96 --height 64", 64, 96), ("--resolution 96 --width 32", 96, 32), ("--width 32", None, 32),
])  # fmt: skip
def test_a_pipeline_is_asked_for_what_the_flags_say(tiny_sd3_folder, flags, height, width):
    """Of two pictures: a noise and a negative prompt for each; --height and --width go before --resolution, unset ones are not passed."""
    argv = f"--negative_prompt dull --num_inference_steps 7 --guidance_scale 3 --skip_layer_guidance 2.5 --skip_layers 0,2 {flags}"
    pipeline, args = Recorder(), demo.parse_args(["--pretrained_model_name_or_path", str(tiny_sd3_folder), *argv.split()])
    demo.draw(pipeline, JOBS, args)
    (given,) = pipeline.given
    assert [generator.initial_seed() for generator in given.pop("generator")] == [5, 6]
    sides = {name: side for name, side in (("height", height), ("width", width)) if side}
    assert given == {
        "prompt": ["a", "a"], "negative_prompt": ["dull", "dull"], "num_inference_steps": 7, "guidance_scale": 3.0,
        "max_sequence_length": 16, "skip_guidance_layers": [0, 2], "skip_layer_guidance_scale": 2.5, **sides,
    }  # fmt: skip


def test_the_text_is_as_long_as_asked_else_as_in_training(tiny_sd3_folder):
    """Training pads T5 to the tokenizer's own length, at most 256."""
    for flags, tokens, length in (((), 16, 16), ((), 512, 256), (("--max_sequence_length", "9"), 16, 9)):
        pipeline = Recorder(tokens)
        demo.draw(pipeline, JOBS, demo.parse_args(["--pretrained_model_name_or_path", str(tiny_sd3_folder), *flags]))
        assert pipeline.given[0]["max_sequence_length"] == length and pipeline.given[0]["negative_prompt"] is None


def test_each_picture_is_judged_by_its_own_prompt_and_metadata(tiny_sd3_folder, tmp_path):
    seen = []

    def judge(pictures, prompts, metadata):
        seen.extend(zip(prompts, metadata, strict=True))
        return torch.zeros(len(pictures))

    args = demo.parse_args(["--pretrained_model_name_or_path", str(tiny_sd3_folder), "--output_dir", str(tmp_path)])
    mixture = scorers.build("shapes")
    object.__setattr__(mixture.parts[0], "judge", judge)
    demo.render(Recorder(), mixture, JOBS, "base", args)
    assert seen == [("a", {"caption": "a red star"}), ("a", {"caption": "a blue star"})]


def test_models_and_scorers_are_loaded_as_the_flags_say(tiny_sd15_folder, unet_loras, monkeypatch):
    """The precision of the judges is theirs, not the model's."""
    asked = {}
    monkeypatch.setattr(
        stock, "load", lambda path, **given: asked.update(given) or SimpleNamespace(set_progress_bar_config=lambda **_: None)
    )
    monkeypatch.setattr(scorers, "check", lambda *_, **__: None)
    monkeypatch.setattr(scorers, "build", lambda spec, **given: asked.update(spec=spec, judges=given))
    file, flags = unet_loras[tiny_sd15_folder], "--lora_scale 0.5 --dtype bf16 --scheduler DDIMScheduler --scorer hps,jpeg_compressibility"
    flags += " --scorer_dtype fp32 --scorer_batch_size 3 --hps_version v2 --prompt a"
    args = demo.parse_args(["--pretrained_model_name_or_path", str(tiny_sd15_folder), "--lora_weights_path", str(file), *flags.split()])
    for args.cpu_offload in (True, False):
        demo.load(args)
        judges = asked.pop("judges")
        assert (judges["dtype"], judges["batch_size"], judges["hps_version"]) == (torch.float32, 3, "v2")
        assert asked == {
            "dtype": torch.bfloat16, "device": asked["device"], "lora_path": file, "lora_scale": 0.5, "cpu_offload": args.cpu_offload,
            "scheduler": "DDIMScheduler", "spec": "hps,jpeg_compressibility",
        }  # fmt: skip


@pytest.mark.parametrize(("device", "offload", "done"), [
    ("cpu", False, ["to cpu"]), ("cuda", False, ["slices", "to cuda"]), ("cuda", True, ["slices", "offload"]),
])  # fmt: skip
def test_a_pipeline_is_loaded_in_its_precision_and_goes_where_it_shall_be(tiny_sd3_folder, monkeypatch, device, offload, done):
    """On a GPU decoding takes one picture at a time; with offloading each part moves by itself."""
    from diffusers import StableDiffusion3Pipeline

    steps, dtypes = [], []
    pipeline = SimpleNamespace(
        vae=SimpleNamespace(enable_slicing=lambda: steps.append("slices")), to=lambda device: steps.append(f"to {device}"),
        enable_model_cpu_offload=lambda: steps.append("offload"),
    )  # fmt: skip
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda path, dtype=None: dtypes.append(dtype) or pipeline)
    assert stock.load(str(tiny_sd3_folder), dtype=torch.bfloat16, device=device, cpu_offload=offload) is pipeline
    assert steps == done and dtypes == [torch.bfloat16]


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("argv", "line"), [
    (["--compare"], "--compare needs --lora_weights_path"),
    (["--lora_scale", "0.5"], "--lora_scale 0.5 has no effect without --lora_weights_path"),
    (["--negative_prompt", "x", "--guidance_scale", "1"], "--negative_prompt x has no effect without --guidance_scale above 1"),
    (["--skip_layer_guidance", "2.8", "--guidance_scale", "1"], "--skip_layer_guidance has no effect at --guidance_scale 1"),
    (["--skip_layer_guidance", "2.8"], "--skip_layers 7,8,9: the blocks of"),
    (["--skip_layer_guidance", "2.8", "--skip_layers", "0,3"], "are 0 to 2"),
    (["--skip_layer_guidance", "2.8", "--num_inference_steps", "5"], "use --num_inference_steps 6 or more"),
    (["--skip_layers", "1"], "--skip_layers has no effect without --skip_layer_guidance"),
    (["--scheduler", "DDIMScheduler"], "--scheduler DDIMScheduler is for models that predict noise; "),
    (["--skip_layers", "7-9"], "must be block numbers such as 7,8,9"),
    (["--lora_weights_path", "nowhere"], "--lora_weights_path nowhere: there is no nowhere"),
    (["--lora_weights_path", "src"], "pytorch_lora_weights.safetensors; give a run's output folder"),
    (["--lora_weights_path", "README.md"], "cannot be read as safetensors"),
    (["--resolution", "500"], "--resolution: must be a multiple of 16 (8x VAE, 2x2 patches), got 500; try 496"),
    (["--resolution", "64", "--height", "64", "--width", "64"], "--resolution has no effect beside"),
    (["--resolution", "4096"], "the position embeddings of"),
    (["--max_sequence_length", "600"], "--max_sequence_length: must lie in 1 .. 512, like 256, got 600"),
    (["--prompts_file", "nowhere"], "--prompts_file: no such file: nowhere"),
    (["--prompts_file", "README.md"], "README.md: cannot be read as prompts; give a .txt, .json, .jsonl, .csv, .parquet file"),
    (["--prompt", "\udcff"], "--prompt is not UTF-8"),
    (["--promt", "x"], "unknown flag --promt; did you mean --prompt?"),
    (["--output_dir", "README.md"], "--output_dir README.md"),
    (["--scorer", "shaeps"], "--scorer shaeps: unknown scorer 'shaeps'; did you mean shapes"),
    (["--scorer", "ocr", "--prompt", "a sign"], "ocr cannot judge prompt 0 'a sign'"),
    (["--scorer_batch_size", "2"], "--scorer_batch_size 2 has no effect without --scorer"),
    (["--pretrained_model_name_or_path", "nowhere"], "--pretrained_model_name_or_path nowhere: no such folder"),
    (["--pretrained_model_name_or_path", "src"], "--pretrained_model_name_or_path src: no model_index.json"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(argv, line, tiny_sd3_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert line in refusal(capsys, "--pretrained_model_name_or_path", tiny_sd3_folder, "--output_dir", tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="these work on a GPU")
def test_what_needs_a_gpu_is_refused_without_one(tiny_sd3_folder, capsys):
    model = ("--pretrained_model_name_or_path", tiny_sd3_folder)
    assert "--cpu_offload has no effect without a GPU" in refusal(capsys, *model, "--cpu_offload")
    assert "--dtype fp16 needs a GPU" in refusal(capsys, *model, "--dtype", "fp16")


def test_damaged_files_are_named(tiny_sd3_folder, lora_folder, tmp_path, capsys):
    model = ("--pretrained_model_name_or_path", tiny_sd3_folder)
    whole = (lora_folder / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    assert "is the file complete?" in refusal(capsys, *model, "--lora_weights_path", tmp_path / "cut.safetensors")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "holds no prompt" in refusal(capsys, *model, "--prompts_file", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    assert "is not UTF-8" in refusal(capsys, *model, "--prompts_file", tmp_path / "latin.txt")
    index = tmp_path / "flux" / "model_index.json"
    index.parent.mkdir()
    index.write_text('{"_class_name": "FluxPipeline"}')
    assert "holds a FluxPipeline" in refusal(capsys, "--pretrained_model_name_or_path", index.parent)
    index.write_text("{")
    assert "damaged" in refusal(capsys, "--pretrained_model_name_or_path", index.parent)


def test_a_lora_in_kohyas_layout_is_named_as_such(tiny_sd3_folder, tmp_path, capsys):
    transformer = sd3.load(tiny_sd3_folder, parts=("transformer",)).transformer
    lora.add(transformer, rank=2)
    lora.export_kohya(transformer, tmp_path / "kohya.safetensors")
    line = refusal(capsys, "--pretrained_model_name_or_path", tiny_sd3_folder, "--lora_weights_path", tmp_path / "kohya.safetensors")
    assert "kohya's names" in line and "pytorch_lora_weights.safetensors" in line


@pytest.mark.slow
def test_help_and_a_wrong_flag_answer_fast_and_nothing_heavy_is_imported():
    for argv, code in ((["--help"], 0), (["--bogus"], 2)):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-X", "importtime", "demo.py", *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and time.perf_counter() - started < 5
        assert "torch" not in done.stderr


@pytest.mark.slow
def test_the_wrapper_draws_without_arguments(tiny_sd3_folder, tmp_path):
    command = ["bash", "demo.sh", "--pretrained_model_name_or_path", tiny_sd3_folder, "--output_dir", tmp_path, "--num_inference_steps", 1]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VENV": "none"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("4 picture(s)") and done.stderr == ""
    assert [picture.text["prompt"] for picture in pictures(tmp_path).values()] == demo.DEFAULT_PROMPTS
