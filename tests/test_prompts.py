"""Prompts from every kind of source, what is refused, and which prompts an epoch draws on which process."""

import json
from collections import Counter

import pytest

from src.data import prompts
from src.data.prompts import GroupSampler, Prompt
from src.tiny import shapes


def texts(source, **options):
    return [prompt.text for prompt in prompts.read(str(source), cache_dir=None, **options)]


# --------------------------------------------------------------------------- sources


def test_built_in_lists_are_of_the_stated_length_and_hold_every_prompt_once():
    """65 animals; 14 animals x 9 activities = 126; 512 and 256 captions."""
    for name, count in (("simple_animals", 65), ("activities", 126), ("shapes", 512), ("shapes_held_out", 256)):
        found = texts(name)
        assert len(found) == len(set(found)) == count, name
    assert "an owl" in texts("simple_animals") and "a fox riding a bicycle" in texts("activities")


def test_training_captions_never_name_a_held_out_triple():
    for name, held_out in (("shapes", False), ("shapes_held_out", True)):
        for text in texts(name):
            reading = shapes.read_caption(text)
            assert shapes.is_held_out(reading.shape, reading.color, reading.background) is held_out, text
    assert texts("shapes_held_out") == shapes.held_out_prompts(256)  # those of models/README.md, in its order


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt\na fox, asleep\n", "line 2: more fields than the header's 1"),
        ("a fox, asleep\nb,c\nd,e,f\n", "line 3: more fields than the header's 2"),
        ('prompt\n"a fox\nan owl\n', "unexpected end of data"),
        ("prompt\n" + "x" * 140_000, "field larger than field limit"),
    ],
)
def test_a_csv_whose_prompts_would_be_cut_or_joined_is_refused(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=f"a.csv cannot be read as CSV .*{words}"):
        texts(tmp_path / "a.csv")


def test_text_file_has_one_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa fox\r\n\n   an owl at night  \n".encode())
    assert texts(tmp_path / "a.txt") == ["a fox", "an owl at night"]


def test_json_lines_keep_the_other_fields_as_metadata(tmp_path):
    rows = [{"prompt": "two cats", "include": [{"class": "cat", "count": 2}]}, {"prompt": 'a sign that says "open"', "language": "en"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prompts.read(str(tmp_path / "a.jsonl"), cache_dir=None) == [
        Prompt("two cats", {"include": [{"class": "cat", "count": 2}]}), Prompt('a sign that says "open"', {"language": "en"}),
    ]  # fmt: skip


def test_a_prompt_may_hold_what_other_programs_end_a_line_with(tmp_path):
    """JSON leaves U+2028 as it is, which str.splitlines() cuts at; in a table a quoted field goes on over several lines."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a red\u2028fox"}\n{"prompt": "an owl"}\n', encoding="utf-8")
    assert texts(tmp_path / "a.jsonl") == ["a red\u2028fox", "an owl"]
    (tmp_path / "a.txt").write_text("a red\u2028fox\nan owl\n", encoding="utf-8")
    assert texts(tmp_path / "a.txt") == ["a red\u2028fox", "an owl"]
    (tmp_path / "a.csv").write_text('prompt,other\n"a red\nfox",b\nan owl,c\n')
    assert texts(tmp_path / "a.csv") == ["a red\nfox", "an owl"]


def test_a_json_list_holds_objects_as_imagerewards_does_or_texts(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": "000010-0137", "text": "a fox"}, {"id": "000010-0138", "text": "an owl"}]))
    assert prompts.read(str(tmp_path / "a.json"), cache_dir=None)[1] == Prompt("an owl", {"id": "000010-0138"})
    (tmp_path / "b.json").write_text('["a fox", " two cats "]')
    assert texts(tmp_path / "b.json") == ["a fox", "two cats"]


def test_column_of_a_data_set_folder_a_table_and_a_csv(tmp_path):
    import pyarrow
    import pyarrow.parquet

    assert texts("datas/shapes-new")[0] == json.loads(open("datas/shapes-new/metadata.jsonl").readline())["text"]
    table = pyarrow.table({"caption": ["a", "b"], "other": ["c", "d"]})
    for path in (tmp_path / "one.parquet", tmp_path / "folder/0.parquet"):
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, path)
    (tmp_path / "one.csv").write_text("caption,other\na,c\nb,d\n")
    for source in ("one.parquet", "folder", "one.csv"):
        assert texts(tmp_path / source) == ["a", "b"], source
        assert texts(tmp_path / source, column="other") == ["c", "d"], source


def test_a_folder_of_tables_is_what_a_data_set_is(tmp_path):
    """As scripts/download.sh leaves one: pictures' tables in data/, of which those for training count; a banner beside them does not."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    for name, word in {"data/train-00000-of-00002": "a", "data/train-00001-of-00002": "b", "data/test-00000-of-00001": "c"}.items():
        (tmp_path / f"set/{name}.parquet").parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"caption": [word]}), tmp_path / f"set/{name}.parquet")
    Image.new("RGB", (4, 4)).save(tmp_path / "set/banner.png")
    assert prompts.is_local(str(tmp_path / "set"))
    assert texts(tmp_path / "set") == texts(tmp_path / "set/data") == ["a", "b"]
    assert texts(tmp_path / "set/data/test-00000-of-00001.parquet") == ["c"]
    (tmp_path / "other/pictures").mkdir(parents=True)
    with pytest.raises(ValueError, match="--prompts .*other: cannot be read as prompts"):
        texts(tmp_path / "other")


def test_a_hub_id_is_let_through_before_and_its_absence_named_later(tmp_path):
    assert not prompts.is_local("somebody/prompts") and prompts.is_local("simple_animals")  # nothing is asked of the network
    assert not prompts.is_local("somebody/prompts-v1.1")  # a version, no kind of file
    with pytest.raises(ValueError, match="--prompts somebody/prompts.*Hub"):
        prompts.read("somebody/prompts", cache_dir=tmp_path)


@pytest.mark.parametrize(("kind", "words"), [("HTTPError", "the Hub could not be reached"), ("OSError", "OSError")])
def test_a_connection_that_breaks_halfway_or_says_nothing_is_one_line(tmp_path, monkeypatch, kind, words):
    """HTTPError is neither an OSError nor a ValueError; an error without a message has no first line."""
    from huggingface_hub import errors

    def refuse(*args, **options):
        raise getattr(errors, kind)("") if kind == "HTTPError" else OSError

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    with pytest.raises(ValueError, match=rf"--prompts somebody/prompts .*either \({words}.*\); give one of") as error:
        prompts.read("somebody/prompts", cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_a_table_whose_error_says_nothing_is_refused_all_the_same(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError

    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr("pyarrow.parquet.read_schema", refuse)
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet: OSError"):
        prompts.read(str(tmp_path / "a.parquet"), cache_dir=tmp_path)


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("column", [None, "other"])
def test_of_a_data_set_of_the_hub_one_column_is_copied(tmp_path, described, column):
    """Two pictures of a megabyte beside two texts; a folder stands for the repository, with the columns in its card or not."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "repository").mkdir()
    table = pyarrow.table({"image": [bytes(range(256)) * 4096] * 2, "text": ["a fox", "an owl"], "other": ["b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "repository/train-0.parquet", compression="none", use_dictionary=False)
    if described:
        kinds = {"image": "binary", "text": "string", "other": "string"}
        features = "".join(f"  - name: {name}\n    dtype: {kind}\n" for name, kind in kinds.items())
        (tmp_path / "repository/README.md").write_text(f"---\ndataset_info:\n  features:\n{features}---\n")
    for _ in range(2):  # the second time from the copy
        name, values = prompts._from_hub(str(tmp_path / "repository"), column, tmp_path / "cache", None, "--prompts a/b")
        assert (name, values) == ((column, ["b", "c"]) if column else ("text", ["a fox", "an owl"]))
    assert 0 < sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()) < 10_000
    with pytest.raises(ValueError, match="--prompts a/b has no column none; it has image, text, other: rename one, or "):
        prompts._from_hub(str(tmp_path / "repository"), "none", tmp_path / "cache", None, "--prompts a/b")


def test_a_data_set_of_the_hub_that_is_no_parquet_is_read_as_well(tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/train.jsonl").write_text('{"n": 1, "caption": "a fox"}\n')
    assert prompts._from_hub(str(tmp_path / "repository"), None, tmp_path / "cache", None, "--prompts a/b") == ("caption", ["a fox"])


BAD = {
    "empty file": ("a.txt", "\n  \n", None, "holds no prompt"),
    "empty JSON lines": ("a.jsonl", "\n", None, "holds no prompt"),
    "not JSON": ("a.jsonl", '{"prompt": "a"}\n{oops}\n', None, "line 2 is not JSON"),
    "JSON that is no object": ("a.jsonl", '["a"]\n', None, "line 1 must be an object"),
    "a JSON object for a list": ("a.json", '{"prompt": "a"}', None, "must hold one list"),
    "a list of numbers": ("a.json", '["a", 3]', None, "entry 2 must be a text or an object"),
    "a broken list": ("a.json", '["a",\n', None, "line 2 is not JSON"),
    "no such column": ("a.jsonl", '{"prompt": "a"}\n', "caption", "has no column caption; it has prompt"),
    "no column at all": ("a.csv", "words\na\n", None, "--prompt_column"),
    "prompt that is no text": ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', None, "line 2 has no text in 'prompt'"),
    "half a surrogate pair": ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b \\ud83d"}\n', None, "line 3 is not valid Unicode in 'prompt'"),
    "half a pair in a list": ("a.json", '["a", "\\udc80"]', None, "entry 2 is not valid Unicode"),
    "not a table": ("a.parquet", "hello", None, "cannot be read as parquet"),
    "not UTF-8": ("a.txt", b"\xff\xfe\xfa", None, "UTF-8"),
    "unknown kind of file": ("a.docx", "hello", None, "cannot be read as prompts"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_sources_are_named_with_the_flag(tmp_path, what):
    name, content, column, message = BAD[what]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="--eval_prompts") as error:
        prompts.read(str(tmp_path / name), column=column, cache_dir=None, flag="--eval_prompts")
    assert message in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(("source", "message"), [
    ("simple_animal", "did you mean simple_animals?"), ("nowhere/a.txt", "no such file"), ("docs", "cannot be read as prompts"),
    ("datas/none", "no such file"),  # a folder of ours, no Hub id
])  # fmt: skip
def test_unknown_names_are_answered_with_what_there_is(source, message):
    with pytest.raises(ValueError, match="--prompts") as error:
        prompts.is_local(source)
    assert message in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------- which prompts an epoch draws

ANIMALS = [Prompt(text) for text in prompts.simple_animals()[:10]]


def sampler(rank=0, world=1, batch_size=4, **changes):
    options = dict(group_size=4, batches_per_epoch=6, seed=0) | changes
    return GroupSampler(ANIMALS, batch_size=batch_size, rank=rank, world=world, **options)


def drawn(samplers, epoch):
    """{position: (group, prompt)} over the processes."""
    found = {}
    for one in samplers:
        for batch in one.batches(epoch):
            assert len(batch.positions) == len(batch.prompts) == len(batch.groups) == one.batch_size
            for position, prompt, group in zip(batch.positions, batch.prompts, batch.groups, strict=True):
                assert position not in found, "two samples have one position: they would be the same picture"
                found[position] = (group, prompt.text)
    return found


def test_groups_have_k_pictures_of_one_prompt_and_numbers_of_their_own():
    """6 batches of 4 are 6 groups of 4; epoch 3 has groups 18 to 23."""
    found = drawn([sampler()], epoch=3)
    assert sorted(found) == list(range(24))
    groups = Counter(group for group, _ in found.values())
    assert groups == dict.fromkeys(range(18, 24), 4)
    assert len(set(found.values())) == 6  # one prompt in each group


@pytest.mark.parametrize("group_size", [2, 4, 8, 24])
def test_processes_share_exactly_what_one_would_draw(group_size):
    """1 x 4, 2 x 2 and 4 x 1: the same prompt and group at every position, and the same batch of an epoch holds the same positions."""
    whole = sampler(group_size=group_size)
    for world in (2, 4):
        parts = [sampler(rank, world, 4 // world, group_size=group_size) for rank in range(world)]
        assert drawn(parts, 1) == drawn([whole], 1)
        for number, batch in enumerate(whole.batches(1)):
            assert sorted(p for part in parts for p in part.batches(1)[number].positions) == batch.positions


def test_every_prompt_is_drawn_equally_often_and_in_a_new_order():
    """5 epochs of 6 groups are 30 groups: 3 passes over 10 prompts."""
    order = [text for epoch in range(5) for text in dict(drawn([sampler()], epoch).values()).values()]
    assert Counter(order) == dict.fromkeys([prompt.text for prompt in ANIMALS], 3)
    assert len({tuple(order[start : start + 10]) for start in (0, 10, 20)}) == 3


@pytest.mark.parametrize("epochs", [1, 2, 5, 10**12])
def test_what_is_drawn_is_known_before(epochs):
    """6 of 10 prompts in the first epoch, all from the second on; the twice-told one is one text."""
    one = GroupSampler([*ANIMALS[:9], ANIMALS[0]], group_size=4, batch_size=4, batches_per_epoch=6, seed=0)
    found = one.drawn(epochs)
    assert len(found) == len(set(found)) and set(found) == {text for epoch in range(min(epochs, 5)) for text in one.texts(epoch)}


def test_order_depends_on_seed_and_epoch_alone():
    assert drawn([sampler()], 2) == drawn([sampler()], 2)
    assert drawn([sampler(seed=1)], 2) != drawn([sampler()], 2)


def test_more_groups_than_prompts_are_different_groups():
    """12 groups of 2 over 10 prompts: two prompts come twice, in groups of their own."""
    found = drawn([sampler(group_size=2)], 0)
    assert Counter(Counter(dict(found.values()).values()).values()) == {1: 8, 2: 2}


def test_a_group_of_one_lets_every_picture_have_its_own_prompt():
    found = drawn([sampler(group_size=1)], 0)
    assert len({group for group, _ in found.values()}) == 24


def test_updates_share_out_all_batches_in_an_order_of_their_own():
    one = sampler()
    parts = one.updates(0, 3)
    assert [len(part) for part in parts] == [2, 2, 2] and sorted(sum(parts, [])) == list(range(6))
    assert one.updates(1, 3) != parts and sampler(rank=1, world=2).updates(0, 3) == parts


def test_an_update_trains_on_the_same_pictures_whoever_draws_them():
    """24 positions as 6 batches of 4 of one process, 3 of two, 6 of 2 of two, or 2 of three: the same in each of two updates, or of one."""

    def positions(world, batch_size, batches, count):
        parts = [
            GroupSampler(ANIMALS, group_size=4, batch_size=batch_size, batches_per_epoch=batches, seed=0, rank=rank, world=world)
            for rank in range(world)
        ]
        drawn = [part.batches(1) for part in parts]
        return [sorted(p for own in drawn for number in update for p in own[number].positions) for update in parts[0].updates(1, count)]

    assert positions(1, 4, 6, 2) == positions(2, 2, 6, 2) == positions(3, 4, 2, 2) == positions(1, 12, 2, 2)
    assert positions(1, 4, 6, 3) == positions(2, 4, 3, 3) and positions(1, 4, 6, 1) == [list(range(24))]


def test_groups_that_an_epoch_would_cut_are_refused_with_a_number_that_works():
    """2 x 3 batches of 4 are 24 samples; 5 does not divide them, 4 does."""
    with pytest.raises(ValueError, match="--group_size 5 does not divide the 24 samples.*try 4"):
        GroupSampler(ANIMALS, group_size=5, batch_size=4, batches_per_epoch=3, world=2, seed=0)


def test_an_epoch_of_one_picture_has_no_group_size_to_suggest():
    with pytest.raises(ValueError, match="--group_size 16 does not divide the 1 samples.*draw more of them"):
        prompts.check_group_size(16, 1)
