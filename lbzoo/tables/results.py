"""What was measured for the rows of a table: a JSON-lines file each, and the numbers that may be shown from it.

``runs/tables/lamb/3.jsonl`` has a line for every start and every end of a row's run; the last line of a row, scale and
seed says how things stand. A run that was killed leaves its start as the last line: it is interrupted.

Only :func:`measured` makes a :class:`Measured`, and only from the record of a run that finished with the recipe as it
is now.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import socket
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lbzoo.engines.run_folder import RunFolder, environment
from lbzoo.recipe.schema import Scale
from lbzoo.tables.paper_tables import Metric, PaperRow

_CLOCK = 60.0  # seconds that a machine's clock may have been set by since

State = Literal["running", "finished", "failed", "diverged", "interrupted"]


@dataclass(frozen=True)
class Record:
    """One line of a results file: where the run of a row stands, what it trained and on what."""

    table: str
    row: str
    """The row's label: ``optimizer=lamb,batch_size=512``."""
    scale: Scale
    seed: int
    state: State
    recipe: str
    recipe_hash: str
    """Of what is trained; a result of another hash is stale."""
    time: str
    machine: str
    commit: str | None
    pid: int
    host: str
    run: str | None = None
    """The run's folder."""
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last validation, under the engine's names and in its units."""
    seconds: float | None = None
    error: str | None = None
    other_samples: bool = False
    """Whether the data that was there holds another number of training samples than the recipe plans with."""
    checked_with: str | None = None
    """At ``--scale smoke``: the row that ran in this row's place, since the two differ in numbers alone."""

    @property
    def alive(self) -> bool:
        """Whether the process that wrote a start still runs; of one on another machine it is taken for granted."""
        if self.state != "running":
            return False
        if self.host != socket.gethostname():
            return True
        if self.pid == os.getpid() or _began(self.pid) > datetime.fromisoformat(self.time).timestamp() + _CLOCK:
            return False  # numbers of processes are used again
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    @property
    def standing(self) -> State:
        """``state``, but for a run that was killed, which is interrupted."""
        return "interrupted" if self.state == "running" and not self.alive else self.state


@dataclass(frozen=True)
class Measured:
    """A number of ours, in the unit of the paper's metric: the mean over ``n`` seeds, None where they diverged."""

    metric: Metric
    value: float | None
    spread: float | None
    """Standard deviation over seeds, where there are several."""
    n: int
    scale: Scale
    machine: str
    commit: str | None
    runs: tuple[str, ...]


class ResultsFile:
    """The records of one table. Lines are appended whole, so that several processes may write."""

    def __init__(self, runs: Path, table: str) -> None:
        self.table = table
        self.folder = runs / "tables" / table
        self.path = runs / "tables" / f"{table}.jsonl"
        self.damage: list[str] = []
        """Lines that could not be read, after ``records``."""

    def append(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dataclasses.asdict(record)) + "\n"
        with self.path.open("ab") as file:
            if file.tell() and not _ends_with_newline(self.path):
                line = "\n" + line  # what a killed process left unfinished stays a line of its own
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[Record]:
        """All records, oldest first."""
        self.damage = []
        if not self.path.is_file():
            return []
        found = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = _record(json.loads(line))
                _check_against_its_run(record)
            except (ValueError, TypeError) as error:
                self.damage.append(f"{self.path}:{number}: left out: {error}")
            else:
                found.append(record)
        return found

    def latest(self) -> dict[tuple[str, Scale, int], Record]:
        """The last record of each (row, scale, seed)."""
        return {(record.row, record.scale, record.seed): record for record in self.records()}


def new_record(row: PaperRow, scale: Scale, *, seed: int, recipe: str, recipe_hash: str, **values: Any) -> Record:
    """A record of this moment and machine."""
    return Record(
        table=row.table,
        row=row.label,
        scale=scale,
        seed=seed,
        recipe=recipe,
        recipe_hash=recipe_hash,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        commit=_commit(),
        pid=os.getpid(),
        host=socket.gethostname(),
        **{"state": "running", **values},
    )


def measured(metric: Metric, logged: str | None, records: Sequence[Record]) -> Measured | None:
    """The metric over the records of one row at one scale, which must have ended with the recipe as it is now."""
    finished = [record for record in records if record.state == "finished" and record.checked_with is None]
    diverged = [record for record in records if record.state == "diverged"]
    logging = [record for record in finished if logged in record.metrics]
    if logged is None or (finished and not logging) or not (logging or diverged):
        return None  # nothing has ended, or what has does not log it
    values = [record.metrics[logged] for record in logging]
    ended = [*logging, *diverged]
    unit = metric.of_a_fraction
    complete = not diverged  # a mean over the runs that happened to converge would flatter
    return Measured(
        metric=metric,
        value=unit * statistics.fmean(values) if complete else None,
        spread=unit * statistics.stdev(values) if complete and len(values) > 1 else None,
        n=len(ended),
        scale=ended[0].scale,
        machine=", ".join(dict.fromkeys(record.machine for record in ended)),
        commit=", ".join(dict.fromkeys(record.commit for record in ended if record.commit)) or None,
        runs=tuple(record.run for record in ended if record.run),
    )


@functools.cache
def _commit() -> str | None:
    commit: str | None = environment()["commit"]
    return commit


@functools.cache
def describe_machine() -> str:
    """``2 x AMD EPYC 7763``, or the GPUs."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor() or platform.machine()}"


def _record(data: Any) -> Record:
    if not isinstance(data, dict):
        raise ValueError("not a record")
    known = {each.name: each for each in dataclasses.fields(Record)}
    missing = [name for name, each in known.items() if name not in data and _required(each)]
    if missing or not set(data) <= set(known):
        raise ValueError(f"not a record of a run ({', '.join(missing or sorted(set(data) - set(known)))})")
    record = Record(**data)
    if record.state == "finished" and record.run is None and record.checked_with is None:
        raise ValueError("a result without the run that it came from")
    if not all(isinstance(value, int | float) for value in record.metrics.values()):
        raise ValueError("metrics that are no numbers")
    return record


def _required(each: dataclasses.Field[Any]) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _check_against_its_run(record: Record) -> None:
    """While the run's folder is there, its own account is the one that counts."""
    if record.run is None or record.state != "finished":
        return
    status = RunFolder(Path(record.run)).status()
    if status and not (status.get("state") == "finished" and _same(record.metrics, status.get("metrics"))):
        raise ValueError(f"differs from what {record.run}/status.json says")


def _same(ours: Mapping[str, float], theirs: Any) -> bool:
    """Whether two accounts of a run's metrics agree. A NaN, which equals nothing, agrees with a NaN."""
    if not isinstance(theirs, Mapping) or ours.keys() != theirs.keys():
        return False
    pairs = [(value, theirs[name]) for name, value in ours.items()]
    return all(one == other or (one != one and other != other) for one, other in pairs)


def _began(pid: int) -> float:
    """When a process began, in seconds since 1970; 0 where the system does not say (there is no /proc)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        ticks = int(fields[19])
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
    except (OSError, ValueError, LookupError, StopIteration):
        return 0.0
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def by_row(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by the label of their row."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record.row, []).append(record)
    return grouped
