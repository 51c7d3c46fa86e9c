"""What went wrong between this machine and the Hugging Face Hub, in a few words, for errors that name the flag.

huggingface_hub is imported inside the functions.
"""

from __future__ import annotations

from src.errors import first_line


def errors() -> tuple[type[Exception], ...]:
    """What a download may raise."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    # HTTPError: of huggingface_hub's HTTP library, where a connection breaks halfway; RuntimeError: of hf_xet, which moves large files
    return OSError, ValueError, RuntimeError, EntryNotFoundError, HTTPError


def unreachable(error: BaseException | None) -> bool:
    """Whether it, or what it was raised from, says that the Hub was not there to be asked."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
            return True
        if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):  # no answer; HfHubHTTPError is the Hub's own
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException) -> str:
    """Why a repository, "it", could not be downloaded, and what to do; one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated; accept its licence on its page, and run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private; look at the spelling, or run hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if unreachable(error):  # before the next: what the cache lacks is an EntryNotFoundError, too
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "is there a connection?"
        return f"the Hub could not be reached ({why}), and the cache on this machine lacks files of it"
    if isinstance(error, EntryNotFoundError):
        return "it has no such file"
    return first_line(error)
