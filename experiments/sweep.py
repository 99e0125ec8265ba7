"""What isoflop.py, ablate.py and compare.py share: run train.py many times, a process a core, and keep a table of the
results; and a line on the terminal for whoever waits."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from prepare_data import Status, UserError

ROOT = Path(__file__).resolve().parent.parent
SCHEDULE = "linear"  # that of train.py; the tables' older rows had a cosine from the peak to a tenth of it


def read_table(path):
    """The rows of a CSV file as dicts of strings; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def parse_shape(shape):
    """Blocks and width of a shape such as 4x96. Raises UserError."""
    try:
        layers, width = map(int, shape.split("x"))
    except ValueError:
        raise UserError(f"shape {shape!r} must be LAYERSxWIDTH, such as 4x96") from None
    return layers, width


def dense_half(layers):
    """How many of that many blocks are left without the routed ones, if every other is routed."""
    return layers - layers // 2


def lowest_of(losses):
    """Of losses, a list over seeds for each key, the key with the lowest mean among those of the most seeds."""
    most = max(map(len, losses.values()))
    return min((key for key in losses if len(losses[key]) == most), key=lambda key: mean(losses[key]))


def read_log(out):
    """The lines of a run's log.jsonl, and the part of its steps, 0 to 1, that the last of them has come to."""
    path = out / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return lines, lines[-1].get("step", 0) / lines[0]["steps"] if lines else 0


def watched(parts, name):
    """The parts of a list, one by one; a Status says how far that is."""
    status = Status()
    for i, part in enumerate(parts):
        status(f"{name}: {i} of {len(parts)}")
        yield part
    status.clear()


def print_row(row):
    print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)


def sweep(jobs, table, row_of, processes, report=print_row):
    """Run jobs, dicts with "key" (columns that name the run), "out" and "command", that table has no row of yet.

    Each command is a train.py run into job["out"], resumed if it had been stopped, in the folder job["cwd"] if that is
    given. row_of(job, log) makes the row from the lines of its log.jsonl, and report(row) tells of it. One thread a
    process. Raises UserError for the first run that fails.
    """
    if processes < 1:
        raise UserError(f"--processes {processes} must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the finally below: no run stays behind
    done = [{k: row[k] for k in jobs[0]["key"]} for row in read_table(table)]
    waiting = [job for job in jobs if {k: str(v) for k, v in job["key"].items()} not in done]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are in {table}; {len(waiting)} to go", flush=True)
    running, began, status = [], time.monotonic(), Status()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                running.append(start(waiting.pop(0)))
            time.sleep(0.5)
            parts = ", ".join(f"{read_log(job['out'])[1]:.0%}" for job, _ in running)
            status(f"{time.monotonic() - began:.0f} s; under way: {parts}; after these: {len(waiting)}")
            for job, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((job, process))
                log, part = read_log(job["out"])
                if part < 1:
                    said = job["out"] / "stderr.txt"
                    last = (said.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
                    raise UserError(f"a run failed, and its last words are {last!r}; the rest is in {said}")
                row = row_of(job, log)
                new = not table.exists()
                with open(table, "a", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, row)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                status.clear()
                report(row)
    finally:
        for _, process in running:
            process.terminate()  # train.py saves and stops
        for _, process in running:
            process.wait()


def start(job):
    """A process for the job; it ends at once where the run had come to its end before its row was written."""
    job["out"].mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (job["out"] / "ckpt.pt").exists() else []
    with open(job["out"] / "stderr.txt", "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *job["command"], *resume]
        return job, subprocess.Popen(command, cwd=job.get("cwd", ROOT), env=environment, stdout=log, stderr=log)
