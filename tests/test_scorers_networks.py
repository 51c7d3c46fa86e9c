"""Network scorers on random weights in the published layouts: equal to the original computation, and anything else is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scorer_runs
import torch
from PIL import Image
from reference import scorers as reference

from src import scorers
from src.scorers import aesthetic, aesthetic_v1, image_reward, networks, preprocess
from src.scorers.base import Loader, Weights

REAL = Path(__file__).parent.parent.parent / "shared/data/aesthetic"
NAMES = ("aesthetic", "aesthetic_v1", "aesthetic_v25", "clip", "image_reward", "pickscore")  # hps, openclip: test_scorers_openclip.py
# LAION's linear head on the embeddings rating0 ... rating9 that it publishes
PUBLISHED_V1 = [-2.458, -0.138, 1.895, 3.585, 5.100, 6.470, 7.787, 9.048, 10.226, 11.304]
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.CLIP_MEAN, preprocess.CLIP_STD))
REAL_BLIP = image_reward.VISION, image_reward.TEXT  # before `world` makes them tiny
needs_real_heads = pytest.mark.skipif(not REAL.is_dir(), reason="no published heads beside the repository")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory whose models/ holds tiny weights of every scorer of this file."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in NAMES:
            scorer_runs.weights.write(name, "tiny")
    return folder


@pytest.fixture(autouse=True)
def world(folder, monkeypatch):
    monkeypatch.chdir(folder)
    scorer_runs.make_tiny(monkeypatch)


@pytest.fixture(scope="module")
def mixtures(folder):
    """name -> the built scorer, built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        scorer_runs.make_tiny(patch)
        return {name: scorers.build(name, batch_size=2) for name in NAMES}


def loader(**options):
    return Loader(torch.device("cpu"), torch.float32, options)


def clip_pixels(pictures, side, torchvision_crop):
    """The original preparation: torchvision's transforms on the PIL picture, or transformers' processor."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if torchvision_crop:
        steps = [Resize(side, interpolation=InterpolationMode.BICUBIC), CenterCrop(side), ToTensor()]
        return torch.stack([Compose([*steps, Normalize(preprocess.CLIP_MEAN, preprocess.CLIP_STD)])(picture) for picture in pictures])
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return processor(pictures, return_tensors="pt")["pixel_values"]


# --------------------------------------------------------------------------- parity, scorer by scorer


@pytest.mark.parametrize(("name", "source"), [("clip", "models/clip-vit-large-patch14"), ("pickscore", "models/pickscore")])
def test_clip_and_pickscore_equal_transformers_own_logits(mixtures, name, source):
    """CLIPModel's logits_per_image are exp(logit_scale) * cosine: PickScore itself, and CLIPScore times that scale."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(source).eval()
    tokenizer = CLIPTokenizer.from_pretrained(source) if name == "clip" else networks.clip_tokenizer()
    pictures = scorer_runs.photos()
    texts = tokenizer(scorer_runs.PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=clip_pixels(pictures, 32, False), **texts).logits_per_image.diagonal()
        expected = logits if name == "pickscore" else logits / model.logit_scale.exp()
    ours = mixtures[name](scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts[name]
    assert len(set(ours.tolist())) == 3
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_clips_vocabulary_is_that_of_open_clip():
    from open_clip.tokenizer import SimpleTokenizer

    texts = ["A photo of  a cat.", 'Zoë\'s "naïve" café, 123 42nd Street!', "", "a red fox " * 40, "日本語 and 😀"]
    ours = networks.clip_tokenizer()(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    theirs = SimpleTokenizer()(texts)
    assert torch.equal(ours.input_ids * ours.attention_mask, theirs)


def embedding_of(model_class, source, pixels):
    import transformers

    model = getattr(transformers, model_class).from_pretrained(source).eval()
    with torch.no_grad():
        output = model.get_image_features(pixels) if model_class == "CLIPModel" else model(pixels)
    features = output.image_embeds if model_class == "CLIPVisionModelWithProjection" else output.pooler_output
    return (features / features.norm(dim=-1, keepdim=True)).double().numpy()


def test_aesthetic_v2_equals_its_layers_one_by_one(mixtures):
    pictures = scorer_runs.photos()
    state = torch.load("models/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth")
    embeddings = embedding_of("CLIPModel", "models/clip-vit-large-patch14", clip_pixels(pictures, 32, True))
    ours = mixtures["aesthetic"](scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts["aesthetic"]
    torch.testing.assert_close(ours, torch.tensor([reference.head(state, one) for one in embeddings]), atol=1e-5, rtol=1e-5)


def test_the_relu_head_is_told_by_its_keys(folder):
    scorer_runs.weights.aesthetic(Path("models"), "tiny", "ava+logos-l14-reluMSE.pth", activation=True)
    state = torch.load("models/improved-aesthetic-predictor/ava+logos-l14-reluMSE.pth")
    assert sorted(state)[-1] == "layers.9.weight" and "layers.11.weight" in state
    embedding = torch.nn.functional.normalize(torch.randn(1, 768, generator=torch.Generator().manual_seed(1)), dim=-1)
    ours = aesthetic.head("ava+logos-relu", loader())(embedding).item()
    assert ours == pytest.approx(reference.head(state, embedding[0].numpy(), relu=True), abs=1e-5)
    assert ours != pytest.approx(reference.head(state, embedding[0].numpy()), abs=1e-3)


def test_aesthetic_v1_in_one_folder_equals_its_linear_layer(mixtures):
    from safetensors.torch import load_file

    pictures, source = scorer_runs.photos(), "models/aesthetics-predictor-v1-vit-large-patch14"
    state = load_file(f"{source}/model.safetensors")
    embeddings = embedding_of("CLIPVisionModelWithProjection", source, clip_pixels(pictures, 32, False))
    expected = embeddings @ state["predictor.weight"][0].double().numpy() + state["predictor.bias"].item()
    ours = mixtures["aesthetic_v1"](scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts["aesthetic_v1"]
    torch.testing.assert_close(ours.double(), torch.tensor(expected), atol=1e-5, rtol=0)


def test_aesthetic_v1_as_a_bare_layer_stands_on_clip(monkeypatch, tmp_path, folder):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/clip-vit-large-patch14").symlink_to(folder / "models/clip-vit-large-patch14")
    monkeypatch.chdir(tmp_path)
    layer = scorer_runs.weights.spread(torch.nn.Linear(768, 1))
    scorer_runs.weights.save(layer, Path("models") / aesthetic_v1.FOLDER / "sa_0_4_vit_l_14_linear.pth")
    pictures = scorer_runs.photos()
    embeddings = embedding_of("CLIPModel", "models/clip-vit-large-patch14", clip_pixels(pictures, 32, True))
    expected = embeddings @ layer.weight[0].detach().double().numpy() + layer.bias.item()
    ours = scorers.build("aesthetic_v1")(scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts["aesthetic_v1"]
    torch.testing.assert_close(ours.double(), torch.tensor(expected), atol=1e-5, rtol=0)


def test_aesthetic_v25_equals_siglip_and_its_layers_one_by_one(mixtures):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pictures = scorer_runs.photos()
    pixels = SiglipImageProcessorPil(size={"height": 28, "width": 28})(pictures, return_tensors="pt")["pixel_values"]
    state = torch.load("models/aesthetic-predictor-v2-5/aesthetic_predictor_v2_5.pth")
    assert state["scoring_head.8.weight"].dtype == torch.bfloat16
    embeddings = embedding_of("SiglipVisionModel", "models/siglip-so400m-patch14-384", pixels)
    expected = torch.tensor([reference.head(state, one, "scoring_head.") for one in embeddings])
    ours = mixtures["aesthetic_v25"](scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts["aesthetic_v25"]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_image_reward_equals_the_original_layers_one_by_one(mixtures):
    """The oracle takes no padding at all: what is padded to 35 tokens must not change the score."""
    pictures = scorer_runs.photos()
    state = torch.load("models/image-reward/ImageReward.pt")
    original = reference.ImageReward(state, vision_heads=2, text_heads=2)
    words = Path("models/image-reward/vocab.txt").read_text().split("\n")
    tokenizer = image_reward.tokenizer()
    tokens = [tokenizer(prompt, truncation=True, max_length=35).input_ids for prompt in scorer_runs.PROMPTS]
    # "a red fox" in a vocabulary of letters and of the pieces ##a to ##m, which cannot spell "fox"
    spelled = ("[CLS]", "a", "r", "##e", "##d", "[UNK]", "[SEP]")
    assert tokens[0] == [words.index(word) for word in spelled] and len(tokens[2]) == 35
    expected = [original(image, ids) for image, ids in zip(clip_pixels(pictures, 32, True), tokens, strict=True)]
    ours = mixtures["image_reward"](scorer_runs.batch(pictures), scorer_runs.PROMPTS).parts["image_reward"]
    torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_image_rewards_real_geometry_has_its_446_million_parameters():
    """ViT-L/16: 787,456 + 1,024 + 197 * 1,024 + 24 * 12,596,224 + 2,048 = 303,301,632, as timm's. BERT over 30,524 words with
    cross-attention to 1,024: 23,837,184 + 12 * 9,844,992 = 141,977,088. Head: 927,969. A file of 1.79 GB in fp32."""
    with torch.device("meta"):
        model = image_reward.Network(*REAL_BLIP)
    assert sum(parameter.numel() for parameter in model.parameters()) == 303_301_632 + 141_977_088 + 927_969


# --------------------------------------------------------------------------- the published heads


def embeddings():
    return np.concatenate([np.load(REAL / f"rating{number}.npy").reshape(1, -1) for number in range(10)])  # (10, 768)


@needs_real_heads
def test_the_published_v1_head_gives_the_published_figures():
    state = networks.read(REAL / "sa_0_4_vit_l_14_linear.pth")
    predict = aesthetic_v1._predictor(state, REAL, loader())
    scores = predict(networks.unit(torch.tensor(embeddings())))
    assert scores.squeeze(1).tolist() == pytest.approx(PUBLISHED_V1, abs=1e-3)


@needs_real_heads
@pytest.mark.parametrize("name", ["sac+logos+ava1", "ava+logos"])
def test_the_published_v2_heads_rate_the_published_embeddings_in_order(name, monkeypatch, tmp_path):
    """Ratings 0 to 9 come out in order, but for neighbours; each equals its layers one by one."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/improved-aesthetic-predictor").symlink_to(REAL)
    monkeypatch.chdir(tmp_path)
    given = networks.unit(torch.tensor(embeddings()))
    scores = aesthetic.head(name, loader())(given).squeeze(1)
    state = torch.load(REAL / aesthetic.HEADS[name], map_location="cpu")
    expected = [reference.head(state, one.numpy()) for one in given]
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)
    assert np.corrcoef(np.arange(10), scores.numpy())[0, 1] > 0.95


# --------------------------------------------------------------------------- what every one of them keeps to


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(mixtures, name):
    images = scorer_runs.batch(scorer_runs.photos())
    scores = mixtures[name](images, scorer_runs.PROMPTS).parts[name]  # batches of 2 and 1
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    order = [2, 0, 1]
    permuted = mixtures[name](images[order], [scorer_runs.PROMPTS[i] for i in order]).parts[name]
    torch.testing.assert_close(permuted, scores[order], atol=1e-5, rtol=1e-5)
    single = mixtures[name](images[1:2], scorer_runs.PROMPTS[1:2]).parts[name]
    torch.testing.assert_close(single, scores[1:2], atol=1e-5, rtol=1e-5)
    assert mixtures[name](images[:0], []).total.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_reaches_every_picture_and_saturated_pixels(mixtures, name):
    images = (scorer_runs.batch(scorer_runs.photos(size=(32, 32))) > 0.5).float()  # black and white alone
    images.requires_grad_()
    scores = mixtures[name](images, scorer_runs.PROMPTS)
    scores.total.sum().backward()
    assert torch.isfinite(images.grad).all()
    assert ((images.grad != 0).float().mean(dim=(1, 2, 3)) > 0.9).all()
    with torch.no_grad():
        same = mixtures[name](images, scorer_runs.PROMPTS)
    torch.testing.assert_close(same.total, scores.total.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_from_one_pixel_to_a_strip_are_judged(mixtures, name):
    for size in ((1, 1), (3, 400), (4096, 2)):
        scores = mixtures[name](scorer_runs.batch(scorer_runs.photos(1, size)), ["a fox"])
        assert torch.isfinite(scores.total).all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_near_and_scores_stay_fp32(mixtures, name):
    images = scorer_runs.batch(scorer_runs.photos())
    exact = mixtures[name](images, scorer_runs.PROMPTS).parts[name]
    rough = scorers.build(name, dtype=torch.bfloat16)(images, scorer_runs.PROMPTS).parts[name]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(rough, exact)


def test_nothing_is_left_to_train_and_no_dropout(mixtures):
    for name, mixture in mixtures.items():
        modules = [cell.cell_contents for cell in mixture.parts[0].judge.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)]
        assert modules, name
        for module in modules:
            assert not any(weight.requires_grad for weight in module.parameters()) and not module.training


def test_loading_prints_nothing_and_leaves_transformers_as_it_was(capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    before = logging.get_verbosity()
    scorers.build("aesthetic_v25,clip")
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert logging.is_progress_bar_enabled() and logging.get_verbosity() == before


def test_autocast_around_a_scorer_changes_nothing(mixtures):
    images = scorer_runs.batch(scorer_runs.photos())
    exact = mixtures["pickscore"](images, scorer_runs.PROMPTS).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixtures["pickscore"](images, scorer_runs.PROMPTS).total, exact)


def test_scorers_that_share_a_backbone_load_it_once(monkeypatch, tmp_path, folder):
    from transformers import CLIPModel

    for name in ("clip-vit-large-patch14", "improved-aesthetic-predictor"):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(folder / "models" / name)
    monkeypatch.chdir(tmp_path)
    scorer_runs.weights.save(torch.nn.Linear(768, 1), Path("models") / aesthetic_v1.FOLDER / "sa_0_4_vit_l_14_linear.pth")
    loads, original = [], CLIPModel.from_pretrained.__func__
    monkeypatch.setattr(CLIPModel, "from_pretrained", classmethod(lambda cls, *a, **k: (loads.append(a[0]), original(cls, *a, **k))[1]))
    mixture = scorers.build("clip,aesthetic=0.5,aesthetic_v1")
    assert loads == ["models/clip-vit-large-patch14"]
    images = scorer_runs.batch(scorer_runs.photos())
    scores = mixture(images, scorer_runs.PROMPTS)
    assert mixture.names == ["clip", "aesthetic", "aesthetic_v1"] and mixture.differentiable
    alone = scorers.build("aesthetic")(images, scorer_runs.PROMPTS)  # a second mixture shares nothing with the first
    assert len(loads) == 2
    torch.testing.assert_close(alone.parts["aesthetic"], scores.parts["aesthetic"])
    # clip / 0.3 + 0.5 * aesthetic / 10 + aesthetic_v1 / 10
    expected = scores.parts["clip"] / 0.3 + 0.5 * scores.parts["aesthetic"] / 10 + scores.parts["aesthetic_v1"] / 10
    torch.testing.assert_close(scores.total, expected)


# --------------------------------------------------------------------------- wrong checkpoints


@pytest.fixture
def copy(monkeypatch, tmp_path, folder):
    """A function that makes models/NAME a copy of the tiny weights, to be damaged."""
    import shutil

    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            shutil.copytree(folder / "models" / name, tmp_path / "models" / name)
        return tmp_path / "models"

    return make


def test_weights_saved_on_a_gpu_load_on_a_cpu(copy, monkeypatch):
    models = copy("improved-aesthetic-predictor", "clip-vit-large-patch14")
    file = models / "improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
    state = torch.load(file)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(state, file)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(file)  # the file does say where it was saved
    scorers.build("aesthetic")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_code_in_a_checkpoint_is_refused_and_not_run(copy):
    models = copy("improved-aesthetic-predictor", "clip-vit-large-patch14")
    file = models / "improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
    torch.save({"layers.0.weight": Payload()}, file)
    with pytest.raises(ValueError, match="linearMSE.pth.*code in it will not be run"):
        scorers.build("aesthetic")
    file.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="linearMSE.pth"):
        scorers.build("aesthetic")
    assert not Path("ran").exists()


def test_a_file_cut_short_is_refused(copy):
    models = copy("image-reward")
    file = models / "image-reward/ImageReward.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="ImageReward.pt.*download it again"):
        scorers.build("image_reward")


def test_a_model_folder_cut_short_is_refused(copy):
    file = copy("pickscore") / "pickscore/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="models/pickscore is not a CLIPModel"):
        scorers.build("pickscore")


def test_a_model_that_cannot_be_downloaded_is_not_called_another(monkeypatch):
    """The Hub is not asked, and this machine's cache does not hold it."""
    weights = Weights("far", ("config.json",), "somebody/nothing")
    monkeypatch.setattr(Weights, "missing", lambda self: None)  # as if the Hub might be asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = "somebody/nothing: the Hub could not be reached .*; run bash scripts/download.sh far"
    with pytest.raises(ValueError, match=line) as error:
        networks.pretrained("CLIPModel", weights, loader())
    assert "is not a" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "words"), [
    ("HTTPError", "the Hub could not be reached"),  # a connection that broke halfway: neither an OSError nor a ValueError
    ("RepositoryNotFoundError", "there is no such repository"),
    ("GatedRepoError", "it is gated; accept its licence"),
])  # fmt: skip
def test_what_the_hub_refuses_is_not_called_another_model(monkeypatch, kind, words):
    from huggingface_hub import constants, errors

    def refuse(*args, **options):
        kind_of_error = getattr(errors, kind)
        raise kind_of_error.__new__(kind_of_error, "404 Client Error")  # without the response that its constructor wants

    weights = Weights("far", ("config.json",), "somebody/nothing")
    monkeypatch.setattr(Weights, "missing", lambda self: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"transformers.utils.hub.{name}", refuse)
    with pytest.raises(ValueError, match=f"somebody/nothing: {words}.*; run bash scripts/download.sh far") as error:
        networks.pretrained("CLIPModel", weights, loader())
    assert "is not a" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "words"), [
    (pickle.UnpicklingError, r"is not a plain file of tensors \(UnpicklingError\)"), (EOFError, r"cannot be read \(it is cut short\)"),
])  # fmt: skip
def test_a_checkpoint_whose_error_says_nothing_is_refused_all_the_same(monkeypatch, kind, words):
    def refuse(*args, **options):
        raise kind

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ValueError, match=f"a.pt: {words}"):
        networks.read(Path("a.pt"))


def test_the_head_of_another_predictor_is_refused_with_both_shapes(copy):
    models = copy("improved-aesthetic-predictor", "clip-vit-large-patch14")
    torch.save(torch.nn.Linear(768, 1).state_dict(), models / "improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth")
    difference = r"expected 10 tensors, found 2; first difference: layers.0.weight, expected \(1024, 768\), found nothing"
    with pytest.raises(ValueError, match=difference):
        scorers.build("aesthetic")


def test_pickscores_scale_is_not_rounded_with_the_weights(copy):
    """exp(4.6052) = 100.0; rounded to bf16, 4.6052 is 4.59375, whose exponential is 98.9: a score of 22 would read 21.75."""
    from safetensors.torch import load_file, save_file

    file = copy("pickscore") / "pickscore/model.safetensors"
    save_file(load_file(file) | {"logit_scale": torch.tensor(4.6052)}, file, metadata={"format": "pt"})
    judge = scorers.build("pickscore", dtype=torch.bfloat16).parts[0].judge
    held = dict(zip(judge.__code__.co_freevars, (cell.cell_contents for cell in judge.__closure__), strict=True))
    assert held["scale"] == pytest.approx(100.0, rel=1e-3) and held["model"].dtype == torch.bfloat16


def test_an_image_reward_that_lacks_a_tensor_is_refused_by_its_name(copy):
    file = copy("image-reward") / "image-reward/ImageReward.pt"
    state = torch.load(file)
    del state["blip.visual_encoder.blocks.1.attn.qkv.bias"]
    torch.save(state, file)
    with pytest.raises(ValueError, match="is not ImageReward v1.0.*vision.encoder.layers.1.self_attn.qkv.bias.*found nothing"):
        scorers.build("image_reward")


def test_another_kind_of_model_in_the_folder_is_refused(copy):
    models = copy("siglip-so400m-patch14-384")
    (models / "siglip-so400m-patch14-384").rename(models / "pickscore")
    with pytest.raises(ValueError, match="models/pickscore is not a CLIPModel"):
        scorers.build("pickscore")


def test_a_clip_folder_without_one_tensor_is_refused_not_filled_with_random_numbers(copy):
    from safetensors.torch import load_file, save_file

    file = copy("pickscore") / "pickscore/model.safetensors"
    state = load_file(file)
    del state["visual_projection.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensor\(s\) missing such as visual_projection.weight"):
        scorers.build("pickscore")


def test_a_picture_that_png_holds_scores_as_its_tensor(mixtures, tmp_path):
    """Saved and opened again, a picture has the same score: to_pil and the scorers round alike."""
    from src import images

    image = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(3))
    images.to_pil(image)[0].save(tmp_path / "picture.png")
    again = images.from_pil(Image.open(tmp_path / "picture.png"))[None]
    for name in ("aesthetic", "aesthetic_v25"):
        assert torch.equal(mixtures[name](image, ["a"]).total, mixtures[name](again, ["a"]).total)
