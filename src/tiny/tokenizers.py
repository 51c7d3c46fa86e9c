"""The tiny models' tokenizers: the real classes, with a few hundred tokens and 16 positions, made without any download.

CLIP's is OpenAI's own vocabulary, which ships inside the open_clip package, trimmed to the merges that the words below need;
any other word falls back to shorter merges, letters and bytes. T5's is a Unigram model whose pieces are those words and
single characters, scored by how often they occur in captions.
"""

import gzip
import math
import string
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from src.tiny.shapes import ALL_SHAPES, COLORS, POSITIONS, SIZES, drawings

MODEL_MAX_LENGTH = 16  # the longest caption has 13 CLIP tokens; 77 would cost ten times the picture's 16 tokens
OTHER_WORDS = """
a an and at background by bottom center centre dark drawing from icon illustration image in is it left light logo of on one or
painting photo picture plain right shape side sign sketch style that the this three to top two with
arrow ball bird boat box car cat circles cloud cup dog face fish flower hat hearts hexagon house moon oval pentagon person
rectangle ring sks squares stars sun toy tree triangles
beautiful big bright brown cyan gray grey little pink pretty tiny ugly cute good bad
""".split()


def vocabulary_words() -> list[str]:
    """Return the words that get a token each (where CLIP has one), in a fixed order."""
    positions = [word for position in POSITIONS for word in position.split()]
    return sorted({*ALL_SHAPES, *COLORS, *SIZES, *positions, *OTHER_WORDS})


def clip_merges(words: list[str], vocabulary_file: str | None = None) -> list[tuple[str, str]]:
    """Return those of CLIP's 48,894 merges that spell the words, in CLIP's order.

    Raises:
        ValueError: where the vocabulary file is missing: open_clip is needed to build, never to load.
    """
    if vocabulary_file is None:
        package = find_spec("open_clip")
        if package is None:
            raise ValueError(f"open_clip holds CLIP's vocabulary and is not installed: {sys.executable} -m pip install open_clip_torch")
        vocabulary_file = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.open(vocabulary_file).read().decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]  # as CLIP itself cuts the file
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    used = set()
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            rank, at = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(pieces)))
            if rank == math.inf:
                break
            used.add(rank)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [merges[rank] for rank in sorted(used)]


def clip_tokenizer(pad_token: str = "<|endoftext|>"):
    """Return a `CLIPTokenizer`: bytes, bytes that end a word, merges, start, end.

    Args:
        pad_token: as in Stable Diffusion 3, "<|endoftext|>" for CLIP-L and "!" for CLIP-G.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = clip_merges(vocabulary_words())
    characters = list(bytes_to_unicode().values())
    tokens = [*characters, *(character + "</w>" for character in characters), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=MODEL_MAX_LENGTH)


def t5_tokenizer():
    """Return a `T5Tokenizer`: a piece for every word, and one for every ASCII or Latin-1 character."""
    from transformers import T5Tokenizer

    counts = Counter(vocabulary_words() + ["A", "An", "The", "Photo"])  # T5 knows upper case; prompts may start with it
    for drawing in drawings(2000, seed=0, split="all", shapes=ALL_SHAPES):
        counts.update(drawing.caption.split())
    total = sum(counts.values())
    pieces = [(f"▁{word}", math.log(count / total)) for word, count in sorted(counts.items())]
    latin = [chr(code) for code in range(0xA1, 0x100)]
    # -12: below every word's log-frequency (-9.5 for a word seen once), so that letters are the last resort.
    letters = [(character, -12.0) for character in ["▁", *string.ascii_letters, *string.digits, *string.punctuation, *latin]]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    known = {piece for piece, _ in pieces}
    return T5Tokenizer(
        vocab=special + pieces + [entry for entry in letters if entry[0] not in known], extra_ids=0, model_max_length=MODEL_MAX_LENGTH
    )
