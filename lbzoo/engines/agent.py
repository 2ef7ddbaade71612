"""``python -m lbzoo.engines.agent ARGS``: torchrun that leaves signals to the workers and ends without a traceback.

The launcher signals this process's whole group, so each worker has the signal already; torchrun would send it again,
wait 30 seconds and kill, which cuts a large checkpoint short.
"""

from __future__ import annotations

import signal
import sys

from lbzoo.engines.launch import FORWARDED_SIGNALS, die_with_parent


def main() -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for signum in FORWARDED_SIGNALS:
        # Not SIG_IGN, which the workers would inherit.
        signal.signal(signum, lambda *_: None)
    die_with_parent(signal.SIGQUIT)  # the one signal that makes torchrun end its workers
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError:
        return 1  # the workers have said why
    return 0


if __name__ == "__main__":
    sys.exit(main())
