"""What went wrong between this machine and the Hugging Face Hub, in a few words, for errors that name the flag.

huggingface_hub is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterator

from src.errors import first_line


def errors() -> tuple[type[Exception], ...]:
    """What a download may raise."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    # HTTPError: of huggingface_hub's HTTP library, where a connection breaks halfway; RuntimeError: of hf_xet, which moves large files
    return OSError, ValueError, RuntimeError, EntryNotFoundError, HTTPError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """It and what it was raised from, the last one first: transformers and datasets wrap what the Hub says in words of their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def unreachable(error: BaseException) -> bool:
    """Whether it, or what it was raised from, says that the Hub was not there to be asked."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    for one in _chain(error):
        if isinstance(one, (LocalEntryNotFoundError, ConnectionError)):
            return True
        if isinstance(one, HTTPError) and not isinstance(one, HfHubHTTPError):  # no answer; HfHubHTTPError is the Hub's own
            return True
    return False


def _answer(error: BaseException) -> BaseException | None:
    """The Hub's own words in it or in what it was raised from.

    That a file is lacking counts in the error itself alone: who looks for a file under several names goes on, and what happens to the next
    one has the first one's absence as its context.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if isinstance(error, EntryNotFoundError):
        return error
    return next((one for one in _chain(error) if isinstance(one, HfHubHTTPError) and not isinstance(one, EntryNotFoundError)), None)


def concerned(error: BaseException) -> bool:
    """Whether the Hub is what went wrong, so that `reason` knows better than the library that raised it."""
    return unreachable(error) or _answer(error) is not None


def reason(error: BaseException) -> str:
    """Why a repository, "it", could not be downloaded, and what to do; one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    answer = _answer(error)
    if isinstance(answer, GatedRepoError):
        return "it is gated; accept its licence on its page, and run hf auth login"
    if isinstance(answer, RepositoryNotFoundError):
        return "there is no such repository, or it is private; look at the spelling, or run hf auth login"
    if isinstance(answer, RevisionNotFoundError):
        return "it has no such revision"
    if unreachable(error):  # before the next: what the cache lacks is an EntryNotFoundError, too
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "is there a connection?"
        return f"the Hub could not be reached ({why}), and the cache on this machine lacks files of it"
    if isinstance(answer, EntryNotFoundError):
        return "it has no such file"
    return first_line(answer or error)
