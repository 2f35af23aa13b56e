"""Traces of some updates for xprof (`pip install xprof`, then `xprof --logdir=<stage>/profile`)."""

import pathlib
import re
from typing import Any

import jax

from rosepo_jax.errors import UserError


class Profiler:
    """Writes what happens on the devices and in the loop during the updates of `log.profile` into `folder`.

    Every process traces the same updates. A run that goes on from a checkpoint between them traces the rest.

    Errors: UserError when the text is neither empty nor "steps:FIRST-LAST".
    """

    def __init__(self, text: str, folder: pathlib.Path):
        found = re.fullmatch(r"steps:(\d+)-(\d+)", text)
        first, last = map(int, found.groups()) if found else (0, -1)
        if text and not 1 <= first <= last:
            raise UserError(f"log.profile={text!r}: write steps:FIRST-LAST, such as steps:10-15; updates count from 1")
        self.steps, self.folder, self.active = range(first, last + 1), folder, False

    def before(self, number: int) -> None:
        """To be called before update `number` is started."""
        if number in self.steps and not self.active:
            jax.profiler.start_trace(self.folder)
            self.active = True

    def after(self, number: int, result: Any) -> None:
        """To be called once update `number` is started; what it will give is waited for before a trace is closed."""
        if self.active and number == self.steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self.active:
            jax.profiler.stop_trace()
            self.active = False
