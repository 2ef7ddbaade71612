"""Jobs for test_processes.py, in a module that the worker processes can import."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def add_up(values: list[float]) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.all_reduce(torch.ones(1))


def raise_base_exception() -> None:
    raise SystemExit(7)


def die() -> None:
    os._exit(3)


def hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


def fail_while_the_other_hangs() -> None:
    if dist.get_rank() == 0:
        raise ValueError("first")
    time.sleep(600)


def process_id() -> int:
    return os.getpid()
