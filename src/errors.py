"""What other libraries' exceptions are quoted by."""


def first_line(error: BaseException) -> str:
    """The first line of its message, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
