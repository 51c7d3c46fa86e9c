"""Arguments of scorers: the choice of those that judge the pictures, and the settings of single ones."""

from __future__ import annotations

import argparse

from src.cli.parser import Parser
from src.cli.types import path_or_name, positive_float, positive_int

# A flag has two lines, its parsing and its help text: formatted, it would have six.
# fmt: off


def add_scorer_args(parser: Parser, *, default: str | None) -> None:
    """What judges the pictures, and the settings of single scorers.

    Args:
        default: names and weights when --scorer is unset; None: nothing is judged.
    """
    g = parser.add_argument_group("scorer")
    g.add_argument("--scorer", default=default, metavar="NAME=WEIGHT,...",
                   help="what judges the pictures: names and weights, a weight of 1 may be left out; `python -m src.scorers` lists them")
    add_scorer_settings(g)


def add_scorer_settings(g: argparse._ArgumentGroup) -> None:
    """How scorers compute, and the settings of single scorers; `scorer_options` hands those on."""
    g.add_argument("--scorer_batch_size", type=positive_int, default=16, help="pictures judged at once: the memory bound")
    g.add_argument("--scorer_dtype", choices=("fp32", "bf16"), default="fp32", help="weights of the judging networks; scores are fp32")
    g.add_argument("--aesthetic_head", help="head of aesthetic: sac+logos+ava1, ava+logos, ava+logos-relu (unset: the first)")
    g.add_argument("--openclip_model", help="model of openclip, as open_clip calls it (unset: ViT-H-14)")
    g.add_argument("--openclip_pretrained", help="weights of --openclip_model, as open_clip calls them (unset: laion2b_s32b_b79k)")
    g.add_argument("--hps_version", help="version of hps, v2.1 or v2, whose numbers cannot be compared (unset: v2.1)")
    g.add_argument("--judge_url", metavar="URL", help="server of vlm_judge, like http://localhost:8000/v1; its key, if any: $JUDGE_API_KEY")
    g.add_argument("--judge_model", help="model name on the --judge_url server")
    g.add_argument("--judge_template", type=path_or_name, metavar="FILE",
                   help="question of vlm_judge, with {prompt} in it (unset: src/scorers/vlm_judge.txt)")
    g.add_argument("--judge_max", type=positive_float, help="highest mark that the question asks for (unset: 10)")
    g.add_argument("--judge_timeout", type=positive_float, help="seconds to wait for an answer of vlm_judge (unset: 60)")
    g.add_argument("--judge_concurrency", type=positive_int, help="questions to vlm_judge at a time (unset: 8)")
    g.add_argument("--judge_cache", type=path_or_name, metavar="FOLDER", help="where answers of vlm_judge are kept (unset: they are not)")


# fmt: on
# setting of a scorer -> the scorer
SCORER_OPTIONS = {
    "aesthetic_head": "aesthetic",
    "openclip_model": "openclip",
    "openclip_pretrained": "openclip",
    "hps_version": "hps",
    **dict.fromkeys(
        ("judge_url", "judge_model", "judge_template", "judge_max", "judge_timeout", "judge_concurrency", "judge_cache"), "vlm_judge"
    ),
}


def scorer_options(args: argparse.Namespace) -> dict[str, object]:
    """The settings of single scorers, as `scorers.check` and `scorers.build` take them; None means unset."""
    return {
        "aesthetic_head": args.aesthetic_head,
        "openclip_model": args.openclip_model,
        "openclip_pretrained": args.openclip_pretrained,
        "hps_version": args.hps_version,
        "judge_url": args.judge_url,
        "judge_model": args.judge_model,
        "judge_template": args.judge_template,
        "judge_max": args.judge_max,
        "judge_timeout": args.judge_timeout,
        "judge_concurrency": args.judge_concurrency,
        "judge_cache": args.judge_cache,
    }


def parts(spec: str | None) -> dict[str, str]:
    """The parts of NAME=WEIGHT,... by their names; empty if unset."""
    return {part.partition("=")[0].strip(): part for part in spec.split(",")} if spec else {}


def judged_by(args: argparse.Namespace, name: str) -> bool:
    """Whether a scorer is named in --scorer, or in --eval_scorers if the script has that flag."""
    return any(name in parts(spec) for spec in (args.scorer, getattr(args, "eval_scorers", None)))
