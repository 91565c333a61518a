"""Starts a program that the kernel kills as soon as its parent is gone, even when the parent was killed with SIGKILL.

Run as ``python -I -S guard.py PARENT_PROCESS_ID PROGRAM ARGUMENT...``. It becomes the program, so there is no process
in between. Doing this between fork and exec instead would run Python in a copy of a process with gRPC's threads: that
may deadlock. Linux only: prctl(2), PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, signal_number: int = signal.SIGKILL) -> bool:
    """Has the kernel send this process a signal when its parent ends; False when ``parent`` has ended already.

    Args:
        parent: process id of the expected parent.
        signal_number: the signal, 0 for none.

    Raises:
        OSError: the kernel refused.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    return os.getppid() == parent


def main(arguments: list[str]) -> None:
    """Becomes the program; exits with 1 when the parent is gone."""
    parent, program = int(arguments[0]), arguments[1]
    if not die_with_parent(parent):
        sys.exit(1)
    os.execvp(program, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
