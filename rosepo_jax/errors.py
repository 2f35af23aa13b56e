"""The one exception that users see."""


class UserError(Exception):
    """Something the user can mend: bad input, bad config, a missing file.

    The message is one line: what is wrong, where (file, row, key), what to do. The command line prints it without a
    traceback and exits with status 2.
    """
