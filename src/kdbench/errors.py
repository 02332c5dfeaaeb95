"""What goes wrong through no fault of the program: told to the user in one line."""


class UserError(Exception):
    """Bad input, a damaged file, an impossible request.

    The message is one line that says what is wrong, where (a file with its line, or a key of the configuration) and what to do.
    Scripts print it without a traceback and exit with 2.
    """


def nearest(name: str, valid, what: str) -> str:
    """A sentence that rejects `name` and offers the valid spellings, the most similar one first."""
    import difflib

    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"'{name}' is not {what}{hint} valid: {', '.join(valid)}"
