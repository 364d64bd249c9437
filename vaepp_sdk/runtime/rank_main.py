"""Where a rank's process starts. Run by its path, so that nothing is imported before the first lines.

    python -P rank_main.py <descriptor of the control socket> <process id of the parent>

The first lines tie the rank's life to the parent's: the kernel kills the rank when the parent is gone, and a
parent that died before this was asked for is noticed by its process id. Everything else follows in the boot
message. The parent's script is never imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys

_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _main(descriptor: int) -> int:
    os.set_inheritable(descriptor, False)
    control = socket.socket(fileno=descriptor)
    line = control.makefile("rb").readline()  # nothing else is sent before this rank answers
    if not line:
        return 1  # the parent ended before it sent the boot message
    boot = json.loads(line)
    sys.path[:] = boot["sys_path"]
    from vaepp_sdk.runtime.rank import serve

    return serve(control, boot)


if __name__ == "__main__":
    _die_with(int(sys.argv[2]))
    sys.exit(_main(int(sys.argv[1])))
