"""Shared by every test: no network back-end lookups, one thread a process, a clean working folder on request."""

from __future__ import annotations

import os

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test run started by a launcher of its own must not make the code under test believe that it was launched.
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LBZOO_RUN_FOLDER"):
    os.environ.pop(_name, None)
