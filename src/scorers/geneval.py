"""GenEval's rules over detected objects (arXiv 2310.11513): presence, number, colour and relative position.

1. A detector finds the objects of COCO's 80 classes, each with a score, a box and a mask.
2. The prompt's metadata, in the public format, says what must be there (`include`) and what must not (`exclude`).
3. Where it names a colour, CLIP ViT-L/14 classifies that of the object, cut out and laid on grey.

Differences from the original: the detector is transformers' Mask2Former (Swin-S, instance segmentation on COCO, Meta's weights), not
mmdetection's, which no longer installs. Architecture, classes, thresholds and rules are the same; the weights are not, and it sees pictures
at 384 pixels instead of 800. So scores are comparable with each other, not with published ones. CLIP has the original's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src.scorers import networks
from src.scorers.base import Loader, Scorer, Weights

if TYPE_CHECKING:
    from src.scorers.base import Judge

DETECTOR = Weights(
    "mask2former-swin-small-coco-instance", ("config.json", "preprocessor_config.json", "model.safetensors|pytorch_model.bin"),
    "facebook/mask2former-swin-small-coco-instance",
)  # fmt: skip

# COCO's 80 classes in the order of its detectors' outputs, as GenEval's prompts call them.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant", "stop sign",
    "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
    "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv",
    "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COLOR_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # score that a detection must exceed; higher for counting, against doubtful ones
MAX_OBJECTS = 16  # of a class
POSITION_MARGIN = 0.1  # share of both objects' extents together: a smaller offset counts as none
SIDE = 384  # pixels that the detector was trained on
GREY = 0x99 / 255  # background of an object while its colour is classified


@dataclass(frozen=True)
class Detection:
    """One object in a picture.

    Attributes:
        name: one of CLASSES.
        score: in [0, 1].
        box: (left, top, right, bottom) in pixels, right and bottom exclusive.
        mask: (H, W) bool.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


NameColors = Callable[[str, list[Detection]], list[str]]  # class, detections of it -> the colour of each


# ---------------------------------------------------------------------------------------------- rules


def keep(detections: list[Detection], counting: bool) -> dict[str, list[Detection]]:
    """By class, the 16 most confident detections above the threshold, highest score first; ties stay in their order."""
    threshold = COUNTING_THRESHOLD if counting else THRESHOLD
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold and len(kept.get(detection.name, ())) < MAX_OBJECTS:
            kept.setdefault(detection.name, []).append(detection)
    return kept


def relations(box: tuple[float, ...], other: tuple[float, ...]) -> set[str]:
    """Where `box` lies relative to `other`: none, one or two of RELATIONS.

    The offset of the centres is shortened along each axis by a tenth of both extents together. A relation holds if what remains on its
    axis is more than half of the offset's full length. y points downwards.
    """
    shortened, length = [], []
    for low, high in ((0, 2), (1, 3)):  # x, y
        offset = (box[low] + box[high]) / 2 - (other[low] + other[high]) / 2
        margin = POSITION_MARGIN * (abs(box[high] - box[low]) + abs(other[high] - other[low]))
        shortened.append(math.copysign(max(abs(offset) - margin, 0.0), offset))
        length.append(offset)
    if max(map(abs, shortened)) < 1e-3:  # pixels: the objects lie on each other
        return set()
    dx, dy = (value / math.hypot(*length) for value in shortened)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in held.items() if holds}


def checks(objects: dict[str, list[Detection]], metadata: dict, name_colors: NameColors) -> list[bool]:
    """Whether each requirement of the metadata is met.

    For each of `include`: enough objects; enough of that colour among the `count` most confident ones; all of these in that relation to all
    of the group that `position` refers to. A group too small or of the wrong colour has no position. For each of `exclude`: fewer than
    `count`.

    Args:
        objects: as `keep` returns them.
        name_colors: called only where a colour is required.
    """
    results: list[bool] = []
    groups: list[list[Detection] | None] = []  # the objects of each of `include`; None: a requirement is not met
    for wanted in metadata["include"]:
        found = objects.get(wanted["class"], [])[: wanted["count"]]
        points = [len(found) == wanted["count"]]
        if "color" in wanted:
            right = points[0] and name_colors(wanted["class"], found).count(wanted["color"]) >= wanted["count"]
            points.append(right)
        if "position" in wanted:
            relation, index = wanted["position"]
            targets = groups[index] if all(points) else None
            points.append(targets is not None and all(relation in relations(ours.box, theirs.box) for ours in found for theirs in targets))
        groups.append(found if all(points) else None)
        results += points
    results += [len(objects.get(unwanted["class"], [])) < unwanted["count"] for unwanted in metadata.get("exclude", [])]
    return results


def check_metadata(prompt: str, metadata: dict | None) -> str | None:
    """What is wrong with one line of a metadata file, or None."""
    if not metadata or not metadata.get("include"):
        return ('its metadata has no "include"; give JSON lines in GenEval\'s format, such as {"tag": "counting", "include": '
                '[{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], "prompt": "two dogs"}')  # fmt: skip
    for number, wanted in enumerate([*metadata["include"], *metadata.get("exclude", [])]):
        if not isinstance(wanted, dict):
            return f'"include" and "exclude" must be lists of objects such as {{"class": "dog", "count": 1}}, got {wanted!r}'
        name, count, color = wanted.get("class"), wanted.get("count"), wanted.get("color", COLORS[0])
        if name not in CLASSES:
            return f'"class" must be one of COCO\'s 80, as in geneval.CLASSES, got {name!r}'
        if type(count) is not int or not 1 <= count <= MAX_OBJECTS:
            return f'"count" of {name} must be a whole number from 1 to {MAX_OBJECTS}, got {count!r}'
        if color not in COLORS:
            return f'"color" of {name} must be one of {", ".join(COLORS)}, got {color!r}'
        if "position" in wanted and not _sound_position(wanted["position"], number):
            return (f'"position" of {name} must be [one of {", ".join(RELATIONS)}; the number of an earlier "include", from 0], '
                    f"got {wanted['position']!r}")  # fmt: skip
    return None


def _sound_position(position: Any, number: int) -> bool:
    """Whether this position is valid for the `number`-th of the objects."""
    if not isinstance(position, (list, tuple)) or len(position) != 2:
        return False
    relation, index = position
    return relation in RELATIONS and type(index) is int and 0 <= index < number


# ---------------------------------------------------------------------------------------------- detector and colours


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """The smallest box around a mask (H, W) that is not empty: (left, top, right, bottom), the last two exclusive."""
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@dataclass(frozen=True)
class Detector:
    """transformers' Mask2Former with its image processor."""

    model: Any
    processor: Any

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """Detections in each picture (b, 3, H, W) in [0, 1]: all above THRESHOLD."""
        size = tuple(images.shape[2:])
        levels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        square = {"height": SIDE, "width": SIDE}  # no padding, which the post-processing would not undo
        pixels = self.processor(images=list(levels), size=square, return_tensors="pt").to(images.device, self.model.dtype)
        outputs = self.model(**pixels)
        results = self.processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[size] * len(images), return_binary_maps=True
        )
        found = []
        for result in results:  # not strict: without a single segment, "segmentation" is a map of -1 instead of no masks
            found.append(
                [
                    Detection(CLASSES[segment["label_id"]], segment["score"], box_of(mask), mask.bool())
                    for segment, mask in zip(result["segments_info"], result["segmentation"], strict=False)
                ]
            )
        return found


def cut_out(image: Tensor, detection: Detection) -> Tensor:
    """The object alone on grey, cut to its box: (3, H, W) in [0, 1] -> (3, h, w)."""
    left, top, right, bottom = (int(edge) for edge in detection.box)
    alone = torch.where(detection.mask.to(image.device), image, GREY)
    return alone[:, top:bottom, left:right]


@dataclass(frozen=True)
class ColorNamer:
    """Classifies an object's colour among ten by CLIP; the text embedding of a colour is the mean of three phrasings."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def __call__(self, image: Tensor, name: str, detections: list[Detection]) -> list[str]:
        """The colour of each detection of the class `name` in a picture (3, H, W) in [0, 1]."""
        texts = [phrase.format(color=color, name=name) for color in COLORS for phrase in COLOR_TEXTS]
        phrases = networks.embed_prompts(self.model, self.tokenizer, texts).view(len(COLORS), len(COLOR_TEXTS), -1)
        colors = networks.unit(phrases.mean(1))  # (10, d)
        crops = [networks.embed_images(self.model, cut_out(image, detection)[None], "torchvision") for detection in detections]
        return [COLORS[i] for i in (torch.cat(crops) @ colors.T).argmax(1).tolist()]


# ---------------------------------------------------------------------------------------------- scorers


@dataclass(frozen=True)
class GenEval:
    """Detects, names colours where they matter, and applies the rules.

    Attributes:
        strict: score 1 if all requirements are met, else 0, as published; otherwise the share of the requirements that are met.
    """

    detector: Callable[[Tensor], list[list[Detection]]]
    name_colors: Callable[[Tensor, str, list[Detection]], list[str]]
    strict: bool

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None) -> Tensor:
        """Scores (b,) float32 in [0, 1] of pictures (b, 3, H, W) in [0, 1].

        Raises:
            ValueError: metadata that is missing or not in GenEval's format.
        """
        for prompt, asked in zip(prompts, metadata or [None] * len(prompts), strict=True):
            if reason := check_metadata(prompt, asked):
                raise ValueError(f"the prompt {prompt!r} cannot be judged: {reason}")
        scores = []
        for image, asked, found in zip(images, metadata or [], self.detector(images), strict=True):
            objects = keep(found, counting=asked.get("tag") == "counting")
            results = checks(objects, asked, partial(self.name_colors, image))
            scores.append(float(all(results)) if self.strict else sum(results) / len(results))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def load_detector(loader: Loader) -> Detector:
    """The detector, once per mixture.

    Raises:
        ValueError: weights of another model, or with other classes than COCO's 80.
    """
    from transformers import Mask2FormerImageProcessor

    def make() -> Detector:
        # The published file holds tables of Swin's window positions, which transformers now computes.
        model = networks.pretrained("Mask2FormerForUniversalSegmentation", DETECTOR, loader, spare=(".relative_position_index",))
        if model.config.num_labels != len(CLASSES):
            raise ValueError(f"{DETECTOR.source} tells {model.config.num_labels} classes apart, not COCO's 80 of instance segmentation")
        return Detector(model, Mask2FormerImageProcessor.from_pretrained(DETECTOR.source))

    return loader.once(DETECTOR, make)


def _loading(strict: bool) -> Callable[[Loader], Judge]:
    def load(loader: Loader) -> Judge:
        from transformers import CLIPTokenizer

        namer = ColorNamer(networks.clip_l(loader), CLIPTokenizer.from_pretrained(networks.CLIP_L.source))
        return GenEval(load_detector(loader), namer, strict)

    return load


_SHARED: dict[str, Any] = {
    "differentiable": False, "range": (0.0, 1.0), "normalizer": 1.0, "licence": "rules and CLIP MIT; Mask2Former: see its model card",
    "weights": lambda options: (DETECTOR, networks.CLIP_L), "check_prompt": check_metadata,
    "packages": {"scipy": "scipy"},  # imported by Mask2Former's loss, which transformers builds with the model
}  # fmt: skip
SCORERS = (
    Scorer(
        name="geneval", summary="objects, counts, colours and positions: the share that is as the prompt's metadata says",
        load=_loading(strict=False), **_SHARED,
    ),
    Scorer(
        name="geneval_strict", summary="GenEval's own verdict: 1 where all objects, counts, colours and positions are right, else 0",
        load=_loading(strict=True), **_SHARED,
    ),
)  # fmt: skip
