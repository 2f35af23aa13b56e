"""The exceptions that users see."""

import difflib
import re
from collections.abc import Iterable

_LONGEST = 2000  # characters of a message; its beginning says where, its end what to do
# Control characters, line ends of all kinds, half surrogate pairs, and marks that reverse the direction of writing.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Something the user can mend: bad input, bad config, a missing file.

    The message is one line: what is wrong, where (file, row, key), what to do. The command line prints it without a
    traceback and exits with status 2. Whatever a file made of its own text, the message stays one line, of printable
    characters, that a terminal can show.
    """

    def __init__(self, message: object):
        line = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(message))
        super().__init__(line if len(line) <= _LONGEST else f"{line[:1500]} ... {line[-450:]}")


class Preempted(BaseException):  # as KeyboardInterrupt: no handler of mistakes may swallow it
    """The machine is about to be taken away; what can be saved has been, and the same command goes on from there.

    The command line exits with status 75 (sysexits' EX_TEMPFAIL), by which launchers know that they should start again.
    """


def nearest(word: str, words: Iterable[str]) -> str:
    """A suggestion to end an error message with: "; did you mean beta?", or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
