"""Why a download from the Hugging Face Hub failed, in a few words, for error messages that name the flag.

huggingface_hub is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterator

from src.errors import first_line


def errors() -> tuple[type[Exception], ...]:
    """Exceptions that a download may raise."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    # HTTPError: of huggingface_hub's HTTP library, where a connection breaks halfway; RuntimeError: of hf_xet, which moves large files
    return OSError, ValueError, RuntimeError, EntryNotFoundError, HTTPError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it was raised from, the latest first: transformers and datasets wrap the Hub's errors in their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def unreachable(error: BaseException) -> bool:
    """Whether the error, or one it was raised from, means that the Hub could not be reached."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    for one in _chain(error):
        if isinstance(one, (LocalEntryNotFoundError, ConnectionError)):
            return True
        if isinstance(one, HTTPError) and not isinstance(one, HfHubHTTPError):  # no answer; HfHubHTTPError is the Hub's own
            return True
    return False


def _answer(error: BaseException) -> BaseException | None:
    """The Hub's own error: `error`, or one it was raised from; None if there is none.

    A missing file counts only if `error` itself reports it: callers that try several file names see earlier misses as __context__.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if isinstance(error, EntryNotFoundError):
        return error
    return next((one for one in _chain(error) if isinstance(one, HfHubHTTPError) and not isinstance(one, EntryNotFoundError)), None)


def concerned(error: BaseException) -> bool:
    """Whether the cause is the Hub: `reason` then explains the error better than the library that raised it."""
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
    if unreachable(error):  # before the next: LocalEntryNotFoundError is an EntryNotFoundError, too
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "is there a connection?"
        return f"the Hub could not be reached ({why}), and the cache on this machine lacks files of it"
    if isinstance(answer, EntryNotFoundError):
        return "it has no such file"
    return first_line(answer or error)
