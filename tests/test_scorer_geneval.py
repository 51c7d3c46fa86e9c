"""GenEval's rules on detections made by hand, at each rule's boundary; and the detector and the colours on random weights."""

import json
from dataclasses import replace

import pytest
import torch

from src import scorers
from src.scorers import base, geneval, networks
from src.scorers.base import Loader
from src.scorers.geneval import Detection

LINES = """
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "tv remote", "count": 1}], "prompt": "a cat and a tv remote"}
{"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], "prompt": "a photo of two dogs"}
{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "white"}], "prompt": "a photo of a white car"}
{"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}], "prompt": "a dog right of a cat"}
{"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "cow", "count": 1, "color": "blue"}], "prompt": "a red cup and a blue cow"}
"""  # noqa: E501  a file in the public format, one line of every tag
METADATA = {line["tag"]: line for line in map(json.loads, LINES.strip().splitlines())}


def seen(name, score=0.95, box=(0, 0, 10, 10)):
    return Detection(name, score, box)


def verdict(tag, *detections, colors=()):
    """The checks for one line of LINES; `colors` names them in the order of asking."""
    answers = iter(colors)
    objects = geneval.keep(list(detections), counting=tag == "counting")
    return geneval.checks(objects, METADATA[tag], lambda name, found: [next(answers) for _ in found])


# ---------------------------------------------------------------------------------------------- what is kept


def test_a_detection_must_exceed_the_threshold():
    detections = [seen("dog", 0.3), seen("dog", 0.301), seen("dog", 0.9), seen("dog", 0.901)]
    assert [one.score for one in geneval.keep(detections, counting=False)["dog"]] == [0.901, 0.9, 0.301]
    assert [one.score for one in geneval.keep(detections, counting=True)["dog"]] == [0.901]
    assert geneval.keep([seen("dog", 0.3)], counting=False) == {}


def test_of_each_class_the_16_surest_are_kept():
    detections = [seen("dog", 0.5 + i / 100) for i in range(20)] + [seen("cat", 0.4)]
    kept = geneval.keep(detections, counting=False)
    assert [one.score for one in kept["dog"]] == [0.5 + i / 100 for i in range(19, 3, -1)]
    assert len(kept["cat"]) == 1


# ---------------------------------------------------------------------------------------------- objects and counts


def test_one_object_is_there_or_not():
    assert verdict("single_object", seen("bench")) == [True]
    assert verdict("single_object", seen("bench"), seen("bench"), seen("dog")) == [True]  # more of it, and other things, do not matter
    assert verdict("single_object", seen("chair")) == [False]
    assert verdict("single_object") == [False]


def test_two_objects_are_two_checks():
    assert verdict("two_object", seen("cat"), seen("tv remote")) == [True, True]
    assert verdict("two_object", seen("tv remote")) == [False, True]


@pytest.mark.parametrize(("dogs", "expected"), [(0, [False, True]), (1, [False, True]), (2, [True, True]), (3, [True, False])])
def test_a_count_is_exact_where_one_more_is_excluded(dogs, expected):
    assert verdict("counting", *[seen("dog")] * dogs) == expected


def test_counting_ignores_doubtful_objects():
    assert verdict("counting", seen("dog"), seen("dog"), seen("dog", 0.9)) == [True, True]


# ---------------------------------------------------------------------------------------------- colours


def test_the_surest_object_must_have_the_colour():
    assert verdict("colors", seen("car", 0.9), seen("car", 0.8), colors=["white"]) == [True, True]
    assert verdict("colors", seen("car", 0.9), seen("car", 0.8), colors=["red", "white"]) == [True, False]  # the second is not asked


def test_no_colour_is_asked_of_an_object_that_is_missing():
    assert verdict("colors", seen("dog"), colors=[]) == [False, False]


def test_colours_belong_to_their_objects():
    both = seen("cup"), seen("cow")
    assert verdict("color_attr", *both, colors=["red", "blue"]) == [True, True, True, True]
    assert verdict("color_attr", *both, colors=["blue", "red"]) == [True, False, True, False]


# ---------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((30, 0, 40, 10), {"right of"}),
        ((-30, 0, -20, 10), {"left of"}),
        ((0, 30, 10, 40), {"below"}),  # y points downwards
        ((0, -30, 10, -20), {"above"}),
        ((30, 30, 40, 40), {"right of", "below"}),
        ((0, 0, 10, 10), set()),  # the same place
        ((2, 0, 12, 10), set()),  # an offset of 2 = 0.1 x (10 + 10) counts as none
        ((4, 0, 14, 10), set()),  # offset 4, 2 of it left: 2 / 4 is not more than a half
        ((4.1, 0, 14.1, 10), {"right of"}),  # offset 4.1, 2.1 left: 2.1 / 4.1 = 0.512
        ((20, 40, 30, 50), {"below"}),  # offset (20, 40), left (18, 38), length 44.7: 0.40 and 0.85
        ((-20, 0, 30, 10), set()),  # the same centre, five times as wide
        ((-3, 0, 37, 10), {"right of"}),  # offset 12, of it 0.1 x (40 + 10) = 5 go: 7 / 12 = 0.58
    ],
)
def test_a_relation_needs_more_than_half_of_the_offset_left_after_the_margin(box, expected):
    """All against the box (0, 0, 10, 10): margins are a tenth of both widths, and of both heights, together."""
    assert geneval.relations(box, (0, 0, 10, 10)) == expected


def test_an_object_stands_on_the_right_side_of_the_other():
    cat, right, left = seen("cat"), seen("dog", box=(30, 0, 40, 10)), seen("dog", box=(-40, 0, -30, 10))
    assert verdict("position", cat, right) == [True, True, True]
    assert verdict("position", cat, left) == [True, True, False]
    assert verdict("position", cat, replace(left, score=0.99), right) == [True, True, False]  # the surest dog counts
    assert verdict("position", right) == [False, True, False]  # no cat, no side of it
    assert verdict("position", cat) == [True, False, False]


def test_every_object_of_a_group_must_stand_there():
    """Two dogs right of two cats: four pairs."""
    metadata = {"include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["right of", 0]}]}
    cats = [seen("cat"), seen("cat", box=(20, 0, 30, 10))]

    def position(*lefts):
        dogs = [seen("dog", box=(left, 0, left + 10, 10)) for left in lefts]
        return geneval.checks(geneval.keep([*cats, *dogs], counting=False), metadata, None)[-1]

    assert position(60, 80) and not position(60, 10)


def test_an_object_of_the_wrong_colour_has_no_position():
    metadata = {"include": [{"class": "cat", "count": 1, "color": "black"}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    objects = geneval.keep([seen("cat"), seen("dog", box=(30, 0, 40, 10))], counting=False)
    assert geneval.checks(objects, metadata, lambda name, found: ["black"]) == [True, True, True, True]
    assert geneval.checks(objects, metadata, lambda name, found: ["white"]) == [True, False, True, False]


# ---------------------------------------------------------------------------------------------- metadata


def test_every_tag_of_the_public_format_is_accepted():
    assert len(METADATA) == 6
    for metadata in METADATA.values():
        assert geneval.check_metadata(metadata["prompt"], metadata) is None


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([], 'its metadata has no "include"'),
        ([{"class": "unicorn", "count": 1}], '"class" must be one of COCO\'s 80.*unicorn'),
        ([{"class": "dog"}], '"count" of dog must be a whole number from 1 to 16, got None'),
        ([{"class": "dog", "count": 17}], "from 1 to 16, got 17"),
        ([{"class": "dog", "count": 1, "color": "teal"}], '"color" of dog must be one of red, .*teal'),
        ([{"class": "dog", "count": 1, "position": ["right of", 0]}], "the number of an earlier"),
        ([{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["near", 0]}], '"position" of dog must be .*near'),
        ([{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": []}], '"position" of dog'),
        ([{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": 0}], '"position" of dog'),
        (["dog"], "must be lists of objects .*got 'dog'"),
        ({"class": "dog"}, "must be lists of objects .*got 'class'"),
    ],
)
def test_metadata_outside_the_format_is_refused_with_the_prompt(include, message):
    with pytest.raises(ValueError, match=f"geneval cannot judge prompt 0 'two dogs': .*{message}"):
        scorers.check_prompts("geneval", ["two dogs"], [{"include": include}])
    with pytest.raises(ValueError, match='has no "include"'):
        scorers.check_prompts("geneval", ["two dogs"])


# ---------------------------------------------------------------------------------------------- detector and colours


def test_a_box_is_the_smallest_around_its_mask():
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[2:5, 3:11] = True
    mask[6, 4] = True
    assert geneval.box_of(mask) == (3, 2, 11, 7)


def test_an_object_is_cut_out_on_grey():
    mask = torch.tensor([[False, True, False], [False, True, True]])
    image = torch.arange(18).view(3, 2, 3) / 18
    cut = geneval.cut_out(image, Detection("dog", 0.9, (1, 0, 3, 2), mask))
    assert cut.shape == (3, 2, 2)
    assert torch.equal(cut[:, 0, 0], image[:, 0, 1]) and torch.equal(cut[:, 1], image[:, 1, 1:])
    assert torch.allclose(cut[:, 0, 1], torch.full((3,), 0.6))  # 0x99 of 255


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders in the published layouts: a Mask2Former and a CLIP of random weights, 0.1 million parameters each."""
    pytest.importorskip("scipy")
    pytest.importorskip("open_clip")
    from safetensors.torch import load_file, save_file
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )  # fmt: skip

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=1,
        dim_feedforward=8,
        num_queries=6,
        num_labels=80,
    )
    detector = folder / geneval.DETECTOR.folder
    Mask2FormerForUniversalSegmentation(config).save_pretrained(detector)
    Mask2FormerImageProcessor().save_pretrained(detector)
    state = load_file(detector / "model.safetensors")
    old = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    save_file(state | {old: torch.zeros(4, 4, dtype=torch.long)}, detector / "model.safetensors", {"format": "pt"})  # as Meta's file has it
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = folder / networks.CLIP_L.folder
    text = {**tower, "vocab_size": 49408, "max_position_embeddings": 77}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8})).save_pretrained(clip)
    networks.clip_tokenizer().save_pretrained(clip)
    return folder


@pytest.fixture
def loader(weights, monkeypatch):
    monkeypatch.setattr(base, "MODELS", weights)
    return Loader(torch.device("cpu"), torch.float32, {})


@pytest.mark.slow
def test_the_detector_reads_masks_classes_and_scores_from_mask2former(loader):
    """One query of the first picture is made sure of class 16 on the left half, score 1; all others are sure of no object."""
    detector = geneval.load_detector(loader)
    masks, classes = torch.full((2, 6, 96, 96), -99.0), torch.zeros(2, 6, 81)
    masks[0, 2, :, :48], classes[0, 2, 16], classes[:, :, 80] = 99.0, 99.0, 50.0
    outputs = type("Outputs", (), {"class_queries_logits": classes, "masks_queries_logits": masks})

    class Sure(torch.nn.Module):
        dtype = torch.float32

        def forward(self, pixel_values, pixel_mask=None):
            assert pixel_values.shape == (2, 3, geneval.SIDE, geneval.SIDE)
            return outputs

    first, second = replace(detector, model=Sure())(torch.rand(2, 3, 40, 60))
    assert second == [] and len(first) == 1
    assert first[0].name == "dog" == geneval.CLASSES[16] and first[0].score == 1.0
    assert first[0].box == (0, 0, 30, 40) and first[0].mask.shape == (40, 60) and first[0].mask.dtype == torch.bool


def test_colours_are_named_by_the_mean_of_three_phrasings(loader):
    """Against CLIP called by hand on the cut-out and one text at a time."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = base.MODELS / networks.CLIP_L.folder
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = Detection("dog", 0.9, (0, 0, 32, 32), torch.ones(32, 32, dtype=torch.bool))
    namer = geneval.ColorNamer(networks.clip_l(loader), tokenizer)
    named = [namer(image, "dog", [whole])[0] for image in images]
    expected = []
    with torch.no_grad():
        colors = []
        for color in geneval.COLORS:
            total = 0
            for text in (f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"):
                features = model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0]
                total = total + features / features.norm()
            colors.append(total / total.norm())
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        for image in images:
            pixels = processor(images=(image * 255).round().byte(), return_tensors="pt").pixel_values
            cosines = torch.stack(colors) @ model.get_image_features(pixels).pooler_output[0]
            expected.append(geneval.COLORS[cosines.argmax()])
    assert named == expected


@pytest.mark.slow
def test_the_scorer_runs_from_files_and_judges_each_picture_by_its_metadata(loader):
    """Random weights find nothing above 0.3, so that what must not be there is all that is right."""
    mixture = scorers.build("geneval,geneval_strict", batch_size=2)
    metadata = [METADATA["counting"], METADATA["single_object"], {"include": [{"class": "dog", "count": 1}], "exclude": []}]
    scores = mixture(torch.rand(3, 3, 48, 48), [one.get("prompt", "") for one in metadata], metadata).parts
    assert scores["geneval"].tolist() == [0.5, 0.0, 0.0] and scores["geneval_strict"].tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="the prompt 'two dogs' cannot be judged: its metadata has no"):
        mixture(torch.rand(1, 3, 48, 48), ["two dogs"])


def test_detections_become_scores():
    """Two dogs of which one is asked for twice: counting is right, then the third dog spoils it."""
    dogs = [seen("dog"), seen("dog")]
    found = [dogs, [*dogs, seen("dog")], dogs[:1]]
    for strict, expected in ((False, [1.0, 0.5, 0.5]), (True, [1.0, 0.0, 0.0])):
        judge = geneval.GenEval(lambda images: found, lambda image, name, found: [], strict)
        assert judge(torch.zeros(3, 3, 8, 8), ["two dogs"] * 3, [METADATA["counting"]] * 3).tolist() == expected


def test_each_picture_is_asked_for_its_own_colours():
    """The second picture alone is white, as its car shall be."""
    judge = geneval.GenEval(lambda images: [[seen("car")]] * 2, lambda image, name, found: ["white" if image.all() else "black"], True)
    pictures = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    assert judge(pictures, ["a white car"] * 2, [METADATA["colors"]] * 2).tolist() == [0.0, 1.0]


def test_a_detector_of_other_classes_is_refused(loader, monkeypatch):
    model = type("Model", (), {"config": type("Config", (), {"num_labels": 133})})()
    monkeypatch.setattr(networks, "pretrained", lambda *args, **options: model)
    with pytest.raises(ValueError, match="tells 133 classes apart, not COCO's 80 of instance segmentation"):
        geneval.load_detector(loader)
