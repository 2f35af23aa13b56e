"""The exceptions that users see."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: bad input, bad config, a missing file.

    The message is one line: what is wrong, where (file, row, key), what to do. The command line prints it without a
    traceback and exits with status 2.
    """


class Preempted(BaseException):  # as KeyboardInterrupt: no handler of mistakes may swallow it
    """The machine is about to be taken away; what can be saved has been, and the same command goes on from there.

    The command line exits with status 75 (sysexits' EX_TEMPFAIL), by which launchers know that they should start again.
    """


def nearest(word: str, words: Iterable[str]) -> str:
    """A suggestion to end an error message with: "; did you mean beta?", or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
