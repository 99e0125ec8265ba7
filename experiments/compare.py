"""Does a change help? Trains the working tree and a base commit at equal training FLOPs, and says which has less loss.

    python experiments/compare.py                             the working tree against HEAD: 15 minutes on two cores
    python experiments/compare.py --base main --seeds 0 1 2 3 4 5 6 7
    python experiments/compare.py --with "--capacity 0.25"    flags of train.py; --base_with has those of the base

A seed stands for an initialisation and an order of the text; it moves a loss by more than most changes do. So both
sides have the same seeds, and what counts is the mean of the pairs' differences beside its standard error, which stands
after +-. "Better" and "worse" are said of a mean that luck alone gives one time in twenty. Choose the seeds before: who
adds seeds until it says better will find luck.

The default is the shortest run in which luck weighs little: at 6e12 FLOPs a pair's difference has a standard deviation
of some 0.4 %, so that of five pairs has an error of 0.2 %; at 2e12, in a third of the time, it is 1 % and more.

Files are taken as they are at the start, without those that git ignores; edits during the runs make no difference.
Stopped, the same command goes on. What stands in out/compare/runs.csv is not trained again, so the base's runs serve
the next change, too. FLOPs are what each side's step_flops in train.py counts: a change that costs more must say so
there.
"""

import hashlib
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.sweep import parse_shape, read_table, sweep  # noqa: E402
from prepare_data import Parser, UserError, load_data, prepare, run  # noqa: E402

DATA, OUT = ROOT / "data" / "stdlib", ROOT / "out" / "compare"
TABLE = OUT / "runs.csv"


def git(*command):
    """What a git command says in the project's folder. Raises UserError."""
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("git is not installed; it has the commit to compare with") from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().splitlines()[-1]
        raise UserError(
            f"no commit to compare with ({why}); {ROOT} must be a git checkout, and --base one of its commits"
        ) from None
    return done.stdout.strip("\n")


@contextmanager
def both_trees(base):
    """Folders with the files of the base commit and, as they are now, of the working tree; gone at the end."""
    with tempfile.TemporaryDirectory() as folder:
        commit, work = Path(folder) / "base", Path(folder) / "work"
        try:
            git("worktree", "add", "--detach", str(commit), base)
            for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
                if (ROOT / name).is_file():  # neither deleted nor a submodule
                    (work / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ROOT / name, work / name)
            yield commit / git("rev-parse", "--show-prefix"), work
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(commit)], cwd=ROOT, capture_output=True)


def fingerprint(folder, *others):
    """A few letters that stand for a folder's Python files and whatever else a run depends on."""
    digest = hashlib.sha256(repr(others).encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(repr((path.relative_to(folder).as_posix(), path.read_bytes())).encode())
    return digest.hexdigest()[:10]


def job(role, side, folder, flags, seed, args):
    """A train.py run in folder, as sweep takes it; role is base or tree, side their fingerprint."""
    layers, width = parse_shape(args.shape)
    # The rates that were best from 2e12 FLOPs (1.6e-2) to 2e14 (4e-3) lie on this line.
    rate = min(1.6e-2, 1.13e-2 * (args.budget / 6e12) ** -0.3)
    out = OUT / f"{role}-{side}-{args.budget:g}-{args.shape}-{seed}"
    command = [
        "train.py", "--preset=cpu", "--device=cpu", f"--n_layer={layers}", f"--n_embd={width}",
        f"--n_head={max(2, width // 32)}", f"--lr={rate:.3g}", f"--flops={args.budget}", f"--seed={seed}",
        f"--data={DATA}", f"--out={out}", *shlex.split(flags),
    ]  # fmt: skip
    key = {"side": side, "flags": flags, "budget": f"{args.budget:g}", "shape": args.shape, "seed": seed}
    return {"key": key, "out": out, "command": command, "cwd": folder}


def row_of(job, log):
    config, last = log[0]["train"], log[-1]
    tokens = last["step"] * config["batch_size"] * config["block_size"]
    return {
        **job["key"],
        "val_causal": f"{last['val_causal']:.6f}",
        "flops_a_token": f"{last['flops'] / tokens:.0f}",
        "tokens_a_second": f"{median(entry['timing']['tokens_per_second'] for entry in log[1:]):.0f}",
    }


def tell(sides, args, differences):
    """Print and add to differences, {seed: in percent of the base's loss}, the seeds that both sides now have.

    Returns the rows that there are, by side and seed.
    """
    recipe = f"{args.budget:g}", args.shape
    rows = {(r["side"], int(r["seed"])): r for r in read_table(TABLE) if (r["budget"], r["shape"]) == recipe}
    for seed in args.seeds:
        if seed not in differences and all((side, seed) in rows for side in sides):
            base, work = (float(rows[side, seed]["val_causal"]) for side in sides)
            differences[seed] = 100 * (work / base - 1)
            so_far = f"; mean so far {in_percent(differences)}" if len(differences) > 1 else ""
            print(f"seed {seed}: {base:.4f}, {work:.4f}: {differences[seed]:+.2f} %{so_far}", flush=True)
    return rows


def error_of(differences):
    """The standard error of the mean."""
    return stdev(differences.values()) / math.sqrt(len(differences))


def in_percent(differences):
    return f"{mean(differences.values()):+.2f} % +- {error_of(differences):.2f}"


def luck(n):
    """How many standard errors a mean of n lies off by luck alone, one time in twenty: Student's t."""
    return [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26][n - 2] if n < 11 else 1.96 + 2.6 / (n - 1)


def verdict(differences):
    """What the differences of two or more seeds come to: a line of text."""
    n, size, error = len(differences), abs(mean(differences.values())), error_of(differences)
    if not any(differences.values()):
        return "no difference: both sides have the very same losses"
    if size > luck(n) * error:
        return f"{'better' if mean(differences.values()) < 0 else 'worse'} by {size:.2f} % +- {error:.2f}"
    # 0.84 standard errors more: so that four of five such comparisons would show it.
    enough = (m for m in range(n + 2, 101) if size > (luck(m) + 0.84) * error * math.sqrt(n / m))
    more = next(enough, None)
    more = f"some {more - n} seeds more" if more else "not even 100 seeds"
    return f"within noise: {in_percent(differences)}; {more} would show it"


def main(argv):
    parser = Parser(description="Does a change help, at equal training FLOPs?", allow_abbrev=False)
    parser.add_argument("--base", default="HEAD", help="the commit to compare with (default: HEAD)")
    parser.add_argument("--with", default="", dest="work_with", help='flags of train.py: --with "--capacity 0.25"')
    parser.add_argument("--base_with", default="", help="likewise, of the base")
    parser.add_argument("--budget", type=float, default=6e12, help="training FLOPs of each run (default: 6e12)")
    parser.add_argument("--shape", default="4x96", help="LAYERSxWIDTH (default: 4x96)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="two or more (default: 0 to 4)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: as many as there are cores)")
    args = parser.parse_args(argv)
    args.seeds = sorted(set(args.seeds))
    if len(args.seeds) < 2:
        raise UserError("one seed says nothing about luck; give two or more, better five")
    base = git("rev-parse", "--verify", f"{args.base}^{{commit}}")
    if not (DATA / "meta.json").exists():  # it is written last
        prepare(out=DATA)
    sha256 = load_data(DATA)[2]["sha256"]
    flags, differences = (args.base_with, args.work_with), {}
    with both_trees(base) as trees:
        sides = [fingerprint(tree, flag, sha256) for tree, flag in zip(trees, flags, strict=True)]
        if sides[0] == sides[1]:
            raise UserError(f"nothing to compare: the Python files are those of {args.base}, and the flags the same")
        OUT.mkdir(parents=True, exist_ok=True)
        both = list(zip(("base", "tree"), sides, trees, flags, strict=True))
        jobs = [job(*side, seed, args) for seed in args.seeds for side in both]  # in turn: they run side by side
        names = f"{args.base} {args.base_with}".strip(), f"working tree {args.work_with}".strip()
        print(f"causal losses of {names[0]}, then of {names[1]}, and the second's difference:")
        tell(sides, args, differences)
        sweep(jobs, TABLE, row_of, args.processes, lambda _: tell(sides, args, differences))
    rows = tell(sides, args, differences)
    for name, side in zip(names, sides, strict=True):
        flops, speed = (
            median(float(rows[side, seed][column]) for seed in args.seeds)
            for column in ("flops_a_token", "tokens_a_second")
        )
        print(f"{name}: {flops / 1e6:.3f} million training FLOPs a token, {speed:,.0f} tokens a second on a core")
    print(f"{args.budget:g} training FLOPs, {args.shape}, {len(differences)} seeds: {verdict(differences)}")


if __name__ == "__main__":
    run(main)
