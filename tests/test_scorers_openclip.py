"""Scorers with open_clip's names and those with transformers' names, each against the other implementation on the same weights."""

import json
from pathlib import Path

import pytest
import scorer_runs
import torch
from reference import scorers as reference

from src import scorers
from src.scorers import networks, openclip, preprocess

pytestmark = pytest.mark.slow

TINY = {"openclip_model": "tiny-clip", "openclip_pretrained": "tiny"}
HPS, OPENCLIP = Path("models/hps/HPS_v2.1_compressed.pt"), Path("models/openclip-tiny-clip-tiny/open_clip_model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """models/ with tiny CLIPModel folders, and their tensors once more as checkpoints of HPS and of open_clip."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("weights")
    scorer_runs.add_tiny_openclip(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        scorer_runs.weights.write("pickscore", "tiny")
        scorer_runs.weights.clip_folder(Path("models/clip-vit-large-patch14"), "tiny", "clip_l", networks.clip_tokenizer())
        state = reference.open_clip_names(load_file("models/pickscore/model.safetensors"))
        scorer_runs.weights.save({"state_dict": state, "epoch": 1, "optimizer": {"lr": 1e-5}}, HPS)
        OPENCLIP.parent.mkdir()
        save_file({name: value.contiguous() for name, value in state.items()}, OPENCLIP)
    return folder


@pytest.fixture(autouse=True)
def world(folder, monkeypatch):
    monkeypatch.chdir(folder)
    scorer_runs.make_tiny(monkeypatch)


@pytest.fixture(scope="module")
def mixtures(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        scorer_runs.make_tiny(patch)
        return {name: scorers.build(name, batch_size=2, **TINY) for name in ("clip", "pickscore", "hps", "openclip")}


def clip_transform(pictures):
    """open_clip's own evaluation transform of the tiny size."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    return torch.stack([transform(picture) for picture in pictures])


def hps_transform(pictures):
    """HPSv2's: to tensor, longer side by torchvision's antialiased bicubic, zeros around, CLIP's statistics."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    result = []
    for picture in pictures:
        high, wide = (round(extent * (32 / max(picture.size))) for extent in (picture.height, picture.width))
        resized = F.resize(F.to_tensor(picture), [high, wide], InterpolationMode.BICUBIC)
        top, left = (32 - high) // 2, (32 - wide) // 2
        padded = F.pad(resized, [left, top, 32 - wide - left, 32 - high - top], fill=0)
        result.append(F.normalize(padded, preprocess.CLIP_MEAN, preprocess.CLIP_STD))
    return torch.stack(result)


@pytest.mark.parametrize(("name", "source"), [("clip", "models/clip-vit-large-patch14"), ("pickscore", "models/pickscore")])
def test_clip_and_pickscore_equal_open_clips_own_network(mixtures, name, source):
    """open_clip's CLIP with the same tensors, its transform and its tokenizer; QuickGELU for OpenAI's."""
    import open_clip
    from safetensors.torch import load_file

    state = reference.open_clip_names(load_file(f"{source}/model.safetensors"))
    config = json.loads(json.dumps(scorer_runs.weights.TINY_OPENCLIP))
    if name == "clip":
        config["embed_dim"] = 768
        config["vision_cfg"] |= {"width": 16, "head_width": 8}
        config["text_cfg"]["width"] = 8
    model = open_clip.CLIP(**config, quick_gelu=name == "clip").eval()
    model.load_state_dict(state, strict=True)
    pictures = scorer_runs.photos(size=(45, 60))  # 32 x 42: both crop it at 5; at an odd rest they would differ
    with torch.no_grad():
        texts = model.encode_text(open_clip.tokenize(scorer_runs.PROMPTS), normalize=True)
        cosines = (model.encode_image(clip_transform(pictures), normalize=True) * texts).sum(-1)
        expected = cosines * model.logit_scale.exp() if name == "pickscore" else cosines
    ours = mixtures[name](scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts[name]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "transform"), [("hps", hps_transform), ("openclip", clip_transform)])
@pytest.mark.parametrize("size", [(45, 61), (32, 32), (90, 20)], ids=str)
def test_hps_and_openclip_equal_transformers_own_cosines(mixtures, name, transform, size):
    from transformers import CLIPModel

    model, pictures = CLIPModel.from_pretrained("models/pickscore").eval(), scorer_runs.photos(size=size)
    texts = networks.clip_tokenizer()(scorer_runs.PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=transform(pictures), **texts).logits_per_image.diagonal() / model.logit_scale.exp()
    ours = mixtures[name](scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts[name]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["hps", "openclip"])
def test_they_keep_to_what_every_network_scorer_does(mixtures, name):
    """Batches, a gradient for saturated pixels, one-pixel pictures and strips, bf16."""
    images = (scorer_runs.batch(scorer_runs.photos(size=(32, 32))) > 0.5).float().requires_grad_()
    scores = mixtures[name](images, scorer_runs.PROMPTS).parts[name]
    scores.sum().backward()
    assert torch.isfinite(images.grad).all() and (images.grad != 0).float().mean() > 0.9
    images = images.detach()
    torch.testing.assert_close(mixtures[name](images[1:2], scorer_runs.PROMPTS[1:2]).parts[name], scores[1:2].detach())
    for size in ((1, 1), (3, 400), (4096, 2)):
        assert torch.isfinite(mixtures[name](scorer_runs.batch(scorer_runs.photos(1, size)), ["a fox"]).total).all()
    rough = scorers.build(name, dtype=torch.bfloat16, **TINY)(images, scorer_runs.PROMPTS).parts[name]
    assert rough.dtype == torch.float32 and not torch.equal(rough, scores)
    torch.testing.assert_close(rough, scores.detach(), atol=0.05, rtol=0)


# --------------------------------------------------------------------------- what open_clip knows of its weights


@pytest.mark.parametrize("mode", ["squash", "shortest"])
def test_a_tag_brings_its_own_preparation_and_activation(monkeypatch, mode):
    """As for OpenAI's tags (QuickGELU) and SigLIP's (squashed, mean 0.5): what the tag says, not the defaults."""
    import open_clip
    from open_clip import pretrained
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    recipe = {"quick_gelu": True, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": mode, "interpolation": "bilinear"}
    monkeypatch.setitem(pretrained._PRETRAINED["tiny-clip"], "tiny", recipe)
    pictures = scorer_runs.photos(size=(45, 60))
    model = open_clip.CLIP(**scorer_runs.weights.TINY_OPENCLIP, quick_gelu=True).eval()
    model.load_state_dict(networks.read(OPENCLIP))
    resize = Resize((32, 32) if mode == "squash" else 32, InterpolationMode.BILINEAR)
    pixels = scorer_runs.batch([CenterCrop(32)(resize(picture)) for picture in pictures]) * 2 - 1
    with torch.no_grad():
        texts = model.encode_text(open_clip.tokenize(scorer_runs.PROMPTS), normalize=True)
        expected = (model.encode_image(pixels, normalize=True) * texts).sum(-1)
    ours = scorers.build("openclip", **TINY)(scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts["openclip"]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_unknown_models_and_tags_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="--openclip_model ViT-H-41: open_clip has no such model; near ones: .*ViT-H-14"):
        scorers.check("openclip", openclip_model="ViT-H-41")
    with pytest.raises(ValueError, match="--openclip_pretrained openai: ViT-H-14 has laion2b_s32b_b79k"):
        scorers.check("openclip", openclip_pretrained="openai")


def test_weights_of_another_model_are_looked_for_under_its_own_name():
    """The folder says model and tag; open_clip's table says where the Hub has them."""
    (default,) = openclip.weights({"openclip_model": openclip.MODEL, "openclip_pretrained": openclip.TAG})
    import open_clip

    assert open_clip.get_pretrained_cfg(openclip.MODEL, openclip.TAG)["hf_hub"] == default.hub_id + "/"
    (other,) = openclip.weights({"openclip_model": "ViT-L-14", "openclip_pretrained": "openai"})
    assert other.folder == "openclip-ViT-L-14-openai" and other.hub_id == "timm/vit_large_patch14_clip_224.openai"
    refusal = "models/openclip-ViT-L-14-openai has no open_clip_model.safetensors.* put the file there from timm/vit"
    with pytest.raises(ValueError, match=refusal):
        scorers.check("openclip", openclip_model="ViT-L-14", openclip_pretrained="openai")


def test_a_tokenizer_that_the_hub_does_not_give_is_one_line_before_the_weights_are_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = Path("models/openclip-ViT-B-16-SigLIP-webli/open_clip_model.safetensors")
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(ValueError, match="--openclip_model ViT-B-16-SigLIP: .* tokenizer, timm/ViT-B-16-SigLIP on the Hub: ") as refusal:
        scorers.build("openclip", openclip_model="ViT-B-16-SigLIP", openclip_pretrained="webli")
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_of_another_size_is_refused(monkeypatch, folder, tmp_path):
    monkeypatch.chdir(tmp_path)
    state = networks.read(folder / HPS)
    state["visual.proj"] = torch.zeros(32, 8)
    scorer_runs.weights.save({"state_dict": state}, HPS)
    with pytest.raises(ValueError, match=r"is not HPS v2.1.*visual.proj, expected \(32, 12\), found \(32, 8\)"):
        scorers.build("hps")
    scorer_runs.weights.save(state, OPENCLIP.with_name("open_clip_pytorch_model.bin"))
    with pytest.raises(ValueError, match="open_clip_pytorch_model.bin is not open_clip's tiny-clip.*visual.proj"):
        scorers.build("openclip", **TINY)


def test_hps_version_chooses_the_file():
    with pytest.raises(ValueError, match="weights are missing: models/hps has no HPS_v2_compressed.pt; run .*download.sh hps"):
        scorers.check("hps", hps_version="v2")
    with pytest.raises(ValueError, match="--hps_version must be one of v2.1, v2; got '2.1'"):
        scorers.check("hps", hps_version="2.1")
