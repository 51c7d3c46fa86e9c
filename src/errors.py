"""What other libraries' exceptions are quoted by."""


def first_line(error: BaseException) -> str:
    """The first line of its message, or the name of its class where it has none."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """The last line, where libraries that list every tensor come to the point; of an empty message as `first_line`."""
    return _lines(error)[-1].strip()


def _lines(error: BaseException) -> list[str]:
    return (str(error).strip() or type(error).__name__).splitlines()
