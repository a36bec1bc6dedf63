"""Removes one alarm of the compiler from the output of scripts."""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager


# XLA reports every compilation of over two minutes as an error and asks to file a bug. The only option against it hides
# all errors. So another process filters stderr. It forwards all output even if this process aborts.
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
    """Filters XLA's alarm about slow compilation out of stderr within the `with` block."""
    read, write = os.pipe()
    # In a session of its own, so that Ctrl-C does not end it before this process.
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
