"""What the Hub's refusals become: one line that names the flag, in every program that takes a model by its Hub id."""

import pytest
import runs
import torch
from huggingface_hub import constants, errors

import demo
import train_dpo_sd15
import train_refl_sd15
from src import hub
from src.pipelines import common, sd3, sd15


def raised(kind, text="404 Client Error", cause=None):
    """An error of huggingface_hub as it comes to us, without the response that its constructor wants."""
    error = kind.__new__(kind, text)
    error.args = (text,)
    error.__cause__ = cause
    return error


REASONS = {
    "there is no such repository": raised(errors.RepositoryNotFoundError),
    "accept its licence": raised(errors.GatedRepoError),
    "no such revision": raised(errors.RevisionNotFoundError),
    "it has no such file": raised(errors.RemoteEntryNotFoundError),
    "the Hub could not be reached": raised(errors.LocalEntryNotFoundError),  # an EntryNotFoundError, too, but of the cache
    "could not be reached": OSError("We couldn't connect to 'https://huggingface.co'"),
    "cache on this machine lacks": raised(errors.HTTPError, "timed out"),  # a connection that broke halfway
    "No space left on device": OSError(28, "No space left on device"),
    "ValueError": ValueError(),
}
REASONS |= {  # as transformers wraps them, in lines of which the first says little
    "there is no such repository, or it is private": OSError("it is not a local folder and is not a valid model identifier"),
    "it is gated": OSError("You are trying to access a gated repo.\nMake sure to have access to it"),
    "429 Client Error: Too Many Requests": OSError("There was a specific connection error when trying to load it:\n429"),
}
REASONS["there is no such repository, or it is private"].__cause__ = raised(errors.RepositoryNotFoundError)
REASONS["it is gated"].__cause__ = raised(errors.GatedRepoError)
REASONS["429 Client Error: Too Many Requests"].__cause__ = raised(errors.HfHubHTTPError, "429 Client Error: Too Many Requests\n\nSlow down")
REASONS["could not be reached"].__cause__ = raised(errors.LocalEntryNotFoundError)  # as transformers wraps it


@pytest.mark.parametrize("words", REASONS)
def test_a_reason_says_what_happened(words):
    assert isinstance(REASONS[words], hub.errors())
    line = hub.reason(REASONS[words])
    assert words in line and "\n" not in line


def test_what_the_hub_is_not_to_blame_for_is_told_apart():
    """A file that is lacking is looked for under its next name, and what is wrong with that one is another matter."""
    assert {words for words, error in REASONS.items() if not hub.concerned(error)} == {"No space left on device", "ValueError"}
    next_name = ValueError("not a checkpoint")
    next_name.__context__ = raised(errors.RemoteEntryNotFoundError)
    assert not hub.concerned(next_name) and hub.reason(next_name) == "not a checkpoint"
    wrapped = ValueError("no such model")  # while another error was handled, not from it
    wrapped.__context__ = raised(errors.HTTPError, "timed out")
    assert hub.concerned(wrapped) and "could not be reached" in hub.reason(wrapped)


def test_a_switch_that_forbids_asking_is_named(monkeypatch):
    error = raised(errors.LocalEntryNotFoundError)
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert ("HF_HUB_OFFLINE is set" in hub.reason(error)) == offline


@pytest.fixture
def no_such_repository(monkeypatch):
    import diffusers.utils.hub_utils  # noqa: F401  whoever is imported first while it is patched keeps the stand-in for good
    import transformers.utils.hub  # noqa: F401

    def refuse(*args, **options):
        raise raised(errors.RepositoryNotFoundError, "404 Client Error. (Request ID: Root=1)\n\nRepository Not Found for url: ...\n")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


LINE = "--pretrained_model_name_or_path somebody/nothing: cannot read model_index.json from the Hub: there is no such repository"


@pytest.mark.parametrize("program", [demo, train_dpo_sd15, train_refl_sd15], ids=lambda program: program.__name__)
def test_a_mistyped_hub_id_is_one_line(program, no_such_repository, tmp_path, capsys):
    data = {"dataset_name": runs.make_pictures(tmp_path / "pictures")} if program is train_dpo_sd15 else {}
    with pytest.raises(SystemExit) as stop:
        program.parse_args(runs.command_line(pretrained_model_name_or_path="somebody/nothing", output_dir=tmp_path / "out", **data))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and LINE in error


@pytest.mark.parametrize("family", [sd15, sd3], ids=["sd15", "sd3"])
def test_loading_what_the_hub_does_not_have_says_so(family, no_such_repository):
    with pytest.raises(ValueError, match=LINE):
        family.load("somebody/nothing")
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path somebody/nothing: cannot read vae/config.json"):
        common.read_config("somebody/nothing", "vae/config.json")


def test_a_revision_and_a_variant_reach_everything_that_is_read(tiny_sd3_folder, monkeypatch):
    """Weights, encoders that are read again for training, and the small files of a plan: none may be the main branch's."""
    import diffusers
    import transformers

    files, weights = [], []

    def downloaded(repository, name, revision=None):
        files.append(revision)
        return str(tiny_sd3_folder / name)

    def watched(kind):
        real = kind.from_pretrained

        def from_pretrained(source, *, revision=None, variant=None, **options):
            weights.append((source, revision, variant))
            return real(tiny_sd3_folder, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", downloaded)
    watched(diffusers.StableDiffusion3Pipeline)
    model = sd3.load("owner/name", revision="abc", variant="fp16", parts=("clip",))
    watched(transformers.CLIPTextModelWithProjection)
    clips = sd3.reload_clips(model, revision="abc", variant="fp16", dtype=torch.bfloat16)
    assert {weight.dtype for clip in clips.values() for weight in clip.parameters()} == {torch.bfloat16}
    assert list(clips.values()) == model.text_encoders and all(weight.requires_grad for weight in clips["text_encoder"].parameters())
    assert weights == [("owner/name", "abc", "fp16")] * 3
    sd3.random_transformer("owner/name", revision="abc", dtype=torch.float32, device="meta")
    sd3.parameter_counts("owner/name", "abc")
    assert sd3.text_tokens("owner/name", "abc") == 16 + 16 and sd3.text_tokens("owner/name", "abc", 9) == 16 + 9
    assert files and set(files) == {"abc"}
