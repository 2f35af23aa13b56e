"""What a chat template writes around a user's text and after an assistant's.

A template is a program of whoever made the model. It is rendered by transformers, in jinja2's sandbox, and in a process
of its own: a sandbox bounds neither time nor memory, a process can be given limits.
"""

import functools
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from rosepo_jax.errors import UserError

DATE = "26 Jul 2024"  # for templates that print today's date
SECONDS, BYTES = 20, 2 << 30  # of computing, the import of transformers included, and of memory beside it
LONGEST = 1 << 20  # characters of a template, and of what it writes
_USER, _ASSISTANT = "\u241fuser\u241f", "\u241fassistant\u241f"


def around(template: str, special: Mapping[str, Any]) -> tuple[str, str, str]:
    """What the chat template writes before and after the user's text, and after the assistant's.

    The same on every day: the date is fixed. Thinking is off, so that the title follows at once.
    special: the tokenizer's special tokens by name, which templates may use.
    Errors: UserError when the template fails, writes the user's text not once, or wants more than the limits.
    """
    return _around(template, json.dumps(special, sort_keys=True))


@functools.lru_cache(maxsize=64)
def _around(template: str, special: str) -> tuple[str, str, str]:
    asked = json.dumps([template, json.loads(special), SECONDS])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=asked, env=environment, timeout=6 * SECONDS,
            capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except (subprocess.TimeoutExpired, ValueError):  # ValueError: it was killed
        limits = f"{SECONDS} s and {BYTES >> 30} GiB"
        raise UserError(f"the chat template does not come to an end within {limits}; remove or mend it") from None
    if "error" in found:
        raise UserError(found["error"])
    before, after, ending = found["around"]
    return before, after, ending


def render(template: str, special: Mapping[str, Any]) -> tuple[str, str, str]:
    """`around`, without limits of time and memory."""
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    fixed = f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro +%}}" + template
    options = {**special, "chat_template": fixed, "date_string": DATE, "enable_thinking": False}
    try:
        if len(template) > LONGEST:
            raise ValueError(f"longer than {LONGEST:,} characters")
        asked, answered = (
            str(render_jinja_template([chat], add_generation_prompt=open, **options)[0][0])
            for chat, open in ((turns[:1], True), (turns, False))
        )
        if max(len(asked), len(answered)) > LONGEST:
            raise ValueError(f"it writes more than {LONGEST:,} characters")
        asked.encode("utf-8"), answered.encode("utf-8")
    except Exception as error:  # a template may raise anything
        raise UserError(f"the chat template cannot be rendered ({type(error).__name__}: {error})") from None
    parts = asked.split(_USER)
    if len(parts) != 2:
        raise UserError(f"the chat template must write the user's text once, not {len(parts) - 1} times")
    return parts[0], parts[1], answered.partition(_ASSISTANT)[2]


def main() -> None:
    """Reads [template, special tokens, seconds] and writes {"around": […]} or {"error": message}, both as JSON."""
    import transformers.utils.chat_template_utils  # noqa: F401  (with torch beside it, it maps gigabytes)

    template, special, seconds = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    statm = pathlib.Path("/proc/self/statm")  # of Linux; elsewhere the limit on memory is not enforced anyway
    mapped = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
    try:
        answer: dict[str, Any] = {"around": render(template, special)}
    except UserError as error:
        answer = {"error": str(error)}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
