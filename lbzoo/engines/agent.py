"""``python -m lbzoo.engines.agent ARGS``: torchrun that dies with its launcher and ends without a traceback."""

from __future__ import annotations

import logging
import signal
import sys

from lbzoo.engines.launch import die_with_parent


def main() -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    die_with_parent(signal.SIGTERM)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # the ranks say what happens
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError:
        return 1  # the workers have said why
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
