"""What the tests of the three programs share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prepare_data
import train

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n_layer=4", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=4", "--device=cpu"]

torch.set_num_threads(1)  # these models are too small to share out
os.environ["OMP_NUM_THREADS"] = "1"  # nor in the programs that tests start


def folder(path):
    """What a directory holds: {relative name: bytes}."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def log_lines(out):
    """The lines of a run's log, dicts: first its configuration, then its evaluations."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder with 14 kB of prepared text. Training text has no upper-case letter, validation text no lower-case one.

    So a batch says which of the two it is from, and who learns the one is bad at the other.
    """
    path = tmp_path_factory.mktemp("text")
    text = "".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(400))
    cut = len(text) * 9 // 10
    (path / "text.py").write_text(text[:cut] + text[cut:].upper(), encoding="utf-8")
    return prepare_data.prepare(inputs=[path / "text.py"], out=path / "data")


@pytest.fixture
def run_train(small_data, tmp_path, monkeypatch):
    """train.main on the small data and a tiny model, into tmp_path / name; returns the last line of its log, a dict.

    Without the texts that it has the model write, which take most of the time.
    """
    monkeypatch.setattr(train, "write", lambda *_: "")

    def call(*flags, name="run"):
        train.main([*TINY, f"--data={small_data}", f"--out={tmp_path / name}", *flags])
        return log_lines(tmp_path / name)[-1]

    return call


@pytest.fixture
def program(tmp_path):
    """Run a program of this project in tmp_path, as a shell would; returns a CompletedProcess with bytes."""

    def call(name, *flags, **options):
        command = [sys.executable, str(ROOT / name), *map(str, flags)]
        options = {"capture_output": True, "timeout": 120, "cwd": tmp_path} | options
        return subprocess.run(command, check=False, **options)

    return call
