"""experiments/compare.py, at toy size, in a repository made of a copy of this tree."""

import shutil
import subprocess

import pytest
from conftest import ROOT

from experiments import compare


def git(path, *command):
    author = "-c", "user.name=test", "-c", "user.email=test@example.org"
    return subprocess.run(["git", *author, *command], cwd=path, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory, small_data):
    """A git checkout of this tree's programs, all committed, with the small data for its default."""
    path = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "experiments", path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mod.py", "train.py", "prepare_data.py", ".gitignore"):
        shutil.copy(ROOT / name, path)
    shutil.copytree(small_data, path / "data" / "stdlib")
    git(path, "init", "--quiet")
    git(path, "add", ".")
    git(path, "commit", "--quiet", "--message=all")
    return path


@pytest.fixture
def run_compare(repository, program):
    """Run it with two seeds of a toy. Returns its exit status and what it says, in a list of lines; undoes edits."""

    def call(*flags):
        toy = "--budget=5e9", "--shape=2x32", "--seeds", 0, 1
        done = program(repository / "experiments" / "compare.py", *toy, *flags, timeout=600)
        assert len(git(repository, "worktree", "list").splitlines()) == 1
        return done.returncode, (done.stderr if done.returncode else done.stdout).decode().splitlines()

    yield call
    git(repository, "checkout", "--quiet", ".")


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.slow
def test_a_change_that_breaks_the_model_is_worse(repository, run_compare):
    edit(repository / "mod.py", "logits = self.head(norm(x))\n", "logits = self.head(norm(x)) * 0\n")
    status, lines = run_compare()
    assert status == 0
    seeds = sorted(line for line in lines if line.startswith("seed "))
    assert [line.split()[:2] for line in seeds] == [["seed", "0:"], ["seed", "1:"]]
    assert all("5.5491" in line for line in seeds)  # ln 257: every token as likely as another
    assert sum("training FLOPs a token" in line for line in lines) == 2
    assert "2 seeds: worse by" in lines[-1]
    status, again = run_compare()  # nothing is left to train
    assert status == 0 and "4 of 4 runs are in" in " ".join(again)
    assert again[-1] == lines[-1]


@pytest.mark.slow
def test_a_comment_is_no_difference(repository, run_compare):
    edit(repository / "mod.py", "class MoD(", "# A comment.\nclass MoD(")
    status, lines = run_compare()
    assert status == 0 and lines[-1].endswith("no difference: both sides have the very same losses")


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "nothing to compare"),
        (["--with=--lr=1e-3", "--base_with=--lr=1e-3"], "nothing to compare"),
        (["--base=nowhere"], "no commit to compare with"),
        (["--with=--capasity=0.3"], "unrecognized arguments: --capasity=0.3"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run_compare, flags, message):
    status, lines = run_compare(*flags)
    assert status == 2 and len(lines) == 1 and message in lines[0]


def test_both_trees_are_as_they_were_and_are_removed(repository, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", repository)
    committed = (repository / "mod.py").read_text(encoding="utf-8")
    edit(repository / "mod.py", "class MoD(", "# An edit.\nclass MoD(")
    (repository / "new.py").touch()
    try:
        with pytest.raises(KeyboardInterrupt), compare.both_trees("HEAD") as (base, work):
            edit(repository / "mod.py", "# An edit.", "# A later one.")
            assert (base / "mod.py").read_text(encoding="utf-8") == committed
            assert "# An edit." in (work / "mod.py").read_text(encoding="utf-8")
            assert (work / "new.py").exists() and not (work / "data").exists()
            raise KeyboardInterrupt
        assert not base.exists() and not work.exists()
        assert len(git(repository, "worktree", "list").splitlines()) == 1
    finally:
        (repository / "new.py").unlink()
        git(repository, "checkout", "--quiet", ".")


@pytest.mark.parametrize(
    "percent, said",
    [
        ([-1.0, -1.2, -0.9, -1.1, -1.0], "better by 1.04 % +- 0.05"),
        ([1.0, 1.2, 0.9, 1.1, 1.0], "worse by 1.04 % +- 0.05"),
        ([0.3, -0.2, 0.5, 0.1, 0.4], "within noise: +0.22 % +- 0.12; some 10 seeds more would show it"),
        ([1.0, -1.0, 1.0, -1.1], "within noise: -0.03 % +- 0.59; not even 100 seeds would show it"),
        ([-1.0, -1.3], "within noise: -1.15 % +- 0.15; some 2 seeds more would show it"),  # two say little
    ],
)
def test_verdict(percent, said):
    assert compare.verdict(dict(enumerate(percent))) == said
