"""Asking a run to stop: once saves, twice leaves; a launcher's death, told several times, is one request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
from lbzoo.engines.signals import StopSignals

signals = StopSignals(lambda signum: print(f"left by {signum}", flush=True), sys.argv[1])
signals.install()
signals.saves = True
for word in sys.argv[2:]:
    if word == "stage":
        signals.saves = False
    elif word == "blind":
        os.close(2)
    elif word.isdigit():
        os.kill(os.getpid(), int(word))
    else:
        time.sleep(float(word))
print(f"asked by {signals.agreed()}")
signals.restore()
os.kill(os.getpid(), signal.SIGTERM)
"""
INT, TERM, USR1, USR2 = (int(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))


@pytest.mark.parametrize(
    ("requeue", "words", "printed", "code"),
    [
        ("SIGUSR1", [USR1], f"asked by {USR1}", -TERM),
        ("SIGUSR2", [USR2], f"asked by {USR2}", -TERM),
        ("SIGUSR2", [USR1], "", -USR1),  # is nothing to the run, and does what it does to any process
        ("SIGUSR1", [INT, INT], f"left by {INT}", 128 + INT),
        ("SIGUSR1", [TERM, TERM, TERM], f"asked by {TERM}", -TERM),
        ("SIGUSR1", [TERM, "2.1", TERM], f"left by {TERM}", 128 + TERM),
        ("SIGUSR1", [TERM, INT], f"left by {INT}", 128 + INT),
        ("SIGUSR1", ["stage", USR1], f"left by {USR1}", 128 + USR1),  # nothing to save
        ("SIGUSR1", ["blind", TERM], f"asked by {TERM}", -TERM),  # the terminal is gone
    ],
)
def test_requests(requeue: str, words: list[int | str], printed: str, code: int) -> None:
    command = [sys.executable, "-c", SCRIPT, requeue, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.stdout.strip() == printed
    assert done.returncode == code
