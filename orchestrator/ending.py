"""The end of the command's process, with threads of torch's still in it.

gloo's threads let go of a message's tensors some time after it has arrived, and take Python's lock for that. Before
3.14, Python ends a thread that asks for its lock while the interpreter is being taken apart by unwinding the thread's
stack; C++ does not allow that in a destructor, and aborts: "terminate called without an active exception", exit code
134 in place of the command's own. Those threads are not ours to join: they live as long as their process group, which
caches of DTensor's keep. Threads that a second Ctrl-C leaves behind in the middle of torch end in the same way.

So the process ends with the interpreter whole, after all else that belongs to an end.
"""

from __future__ import annotations

import atexit
import os
import sys


class Ending:
    """Ends this process with `code`, if it is known by then, once what was registered with atexit after it has run.

    What is printed is written out; threads that are no daemons are waited for, as at any end of Python's.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._process = os.getpid()
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.code is None or os.getpid() != self._process:
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # Python will find it again, say it and choose the code
            return
        os._exit(self.code)
