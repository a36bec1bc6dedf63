"""Keeps one alarm of the compiler out of what scripts print."""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager


# XLA reports each compilation of over two minutes as an error, in a frame, with a request to file a bug. No option
# turns that off but the one that hides all errors. Another process passes on the rest, so that nothing is lost if
# this one aborts.
FILTER = r"""
import re, sys
alarm = re.compile(rb"slow_operation_alarm\.cc|^\*{32}$|Very slow compile\?")
for line in sys.stdin.buffer:
    if not alarm.search(line.rstrip()):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


@contextmanager
def without_alarms() -> Generator[None, None, None]:
    """Within the `with` block, stderr is without XLA's alarm about slow compilation. All else passes."""
    read, write = os.pipe()
    # Out of the process group, so that Ctrl-C does not end it before the last words.
    child = subprocess.Popen([sys.executable, "-ISc", FILTER], stdin=read, start_new_session=True)
    os.close(read)
    stderr = os.dup(2)
    os.dup2(write, 2)
    os.close(write)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        child.wait()
