"""Draws the READMEs' figures, from trained runs and the tables in assets/.

    python experiments/figures.py                  all that there is something for, into out/figures
    python experiments/figures.py --only routing_map --mod out/gpu --snippet "class "
    python experiments/figures.py --only isoflop --out assets       in the place of the READMEs' own

routing_map   which routed block processes which byte of a piece of validation text
spending      what the routed blocks process: by kind of byte, and by loss
dial          causal loss against FLOPs per token, over --threshold of sample.py
isoflop       the lowest loss of MoD and random routing beside dense's, from isoflop.csv
halves        each MoD shape against its dense half, from isoflop.csv

"Processed" means causally, as when sampling; "taken" by top-k. The first two need a byte-level run.
"""

import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.isoflop import COLORS  # noqa: E402
from experiments.router_stats import KINDS, kinds_of, load, look  # noqa: E402
from experiments.sweep import SCHEDULE, dense_half, lowest_of, parse_shape, read_table  # noqa: E402
from prepare_data import Parser, Status, UserError, run  # noqa: E402
from sample import compute_dial  # noqa: E402
from train import dense_flops  # noqa: E402

try:
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch, Patch
except ImportError:
    plt = None

INK, GREY, PALE = "#1b1b1b", "#6b6b6b", "#e9e9e9"
FAMILIES = {"dense": "dense", "mod": "MoD", "random": "random routing"}
ASSETS = ROOT / "assets"


def block_names(model):
    return [f"block {i}" for i in model.config.routed_layers]


def shades(n):
    """A colour for each of n things in an order."""
    return plt.get_cmap("plasma")(np.linspace(0.05, 0.8, n))


def find_snippet(data, start):
    """Begin and end of the first paragraph in data (byte tokens) that is neither too short nor too long to show."""
    for match in re.finditer(rf"(?<=\n\n){re.escape(start)}.*\n(?:.+\n)+", "".join(map(chr, data))):
        lines = match[0].splitlines()
        if 100 <= len(match[0]) <= 150 and len(lines) <= 5 and 32 <= max(map(len, lines)) <= 44:
            return match.span()
    raise UserError(f"no paragraph of a size to show begins with {start!r}; choose another --snippet")


def routing_map(args):
    """The snippet, line by line; under each byte a cell per routed block, filled where the block processed it."""
    model, data, _, _ = load(args.mod)
    begin, end = find_snippet(data, args.snippet)
    tokens = torch.from_numpy(data[max(0, end - model.config.block_size) : end].astype(np.int64))[None]
    taken = look(model, tokens, tokens, causal=True)[1].taken[:, 0, begin - end :]  # (L, length)
    blocks = block_names(model)
    lines = "".join(map(chr, data[begin:end])).splitlines(keepends=True)
    height = 1.85 + 0.55 * len(blocks)  # of a line with its cells; the unit is a byte's width
    left, right, top, bottom = -3.6, max(map(len, lines)) + 0.6, -4.9, height * len(lines) + 1.4
    figure = plt.figure(figsize=(10, 10 * (bottom - top) / (right - left)), layout="none")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
    axis.axis("off")
    unit = 10 * 72 / (right - left)  # in points

    def box(x, y, h, color):
        shape = FancyBboxPatch((x + 0.05, y), 0.9, h, boxstyle="round,pad=0,rounding_size=0.12")
        axis.add_patch(shape).set(linewidth=0, facecolor=color)

    i = 0
    for y, line in zip(np.arange(len(lines)) * height, lines, strict=True):
        for j, block in enumerate(blocks):
            axis.text(-0.2, y + 1.7 + 0.55 * j, block, size=0.5 * unit, color=GREY, ha="right")
        for x, char in enumerate(line):
            depth = taken[:, i].float().mean().item()
            box(x, y, 1.12, plt.get_cmap("Oranges")(0.75 * depth) if depth else "white")
            shown, color = {" ": "·", "\n": "↵", "\t": "⇥"}.get(char, char), GREY if char.isspace() else INK
            style = {"size": 0.95 * unit, "color": color, "family": "monospace"}
            axis.text(x + 0.5, y + 0.56, shown, ha="center", va="center", **style)
            for j in range(len(blocks)):
                box(x, y + 1.27 + 0.55 * j, 0.46, COLORS["mod"] if taken[j, i] else PALE)
            i += 1
    axis.text(0, -3.2, "Which bytes get the extra compute?", size=1.2 * unit, color=INK, weight="bold")
    note = (
        "Unseen text in a trained Mixture-of-Depths model. Each routed block processes a few bytes, here "
        f"{100 * taken.float().mean():.0f} %,\nand the others pass it by. Dark bytes went through many. "
        "The blocks in between, not shown, process every byte."
    )
    axis.text(0, -0.7, note, size=0.6 * unit, color=GREY, linespacing=1.5)
    colors = {"processed": COLORS["mod"], "skipped: no compute, nothing in the KV cache": PALE}
    handles = [Patch(color=color, label=label) for label, color in colors.items()]
    legend = axis.legend(handles=handles, ncols=2, fontsize=0.6 * unit, loc="lower left", borderpad=0)
    legend.set_bbox_to_anchor((-0.4, bottom - 0.4), transform=axis.transData)
    return figure


def shares(sets, group, n):
    """% of the tokens in each of n groups that each of the sets (bool, N, T) holds: (len(sets), n)."""
    return np.array([[100 * s[group == g].float().mean() for g in range(n)] for s in sets])


def spending(args):
    """The share of the tokens that each routed block processes, by kind of byte and by loss."""
    model, _, x, y = load(args.mod)
    taken, blocks = look(model, x, y, causal=True)[1].taken, block_names(model)
    hard = look(model, x, y, causal=True, threshold=math.inf)[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(1.2, 1))
    kinds = kinds_of(x)
    part = kinds.flatten().bincount(minlength=len(KINDS)) / kinds.numel()
    shown = part > 0.001
    by_kind = shares([*taken, taken.any(0)], kinds, len(KINDS)).T[shown]
    left.imshow(by_kind, cmap="Oranges", vmin=0, vmax=110, aspect="auto")
    for (i, j), value in np.ndenumerate(by_kind):
        left.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 65 else INK)
    names = [f"{name} ({100 * p:.0f})" for name, p in zip(KINDS, part, strict=True)]
    left.set_yticks(range(len(by_kind)), np.array(names)[shown])
    left.set_xticks(range(len(blocks) + 1), [*blocks, "any"])
    left.axvline(len(blocks) - 0.5, color="white", linewidth=3)
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set_title("Newlines, indentation, or letters, % processed", loc="left")
    left.set_xlabel("beside a kind of byte: % of the text")

    decile = (hard.flatten().argsort().argsort() * 10 // hard.numel()).view_as(hard)
    for block, share, color in zip(blocks, shares(taken, decile, 10), shades(len(blocks)), strict=True):
        right.plot(range(1, 11), share, "o-", ms=3, color=color, label=block)
    right.axhline(100 * model.config.capacity, color=GREY, linewidth=0.8, linestyle="--", label="capacity")
    right.set_ylim(bottom=0)
    right.set_title("Easy bytes more than hard ones, % processed", loc="left")
    right.set_xticks(range(1, 11), ["1\neasiest", *range(2, 10), "10\nhardest"])
    right.set_xlabel("tenths by loss, routed blocks skipped")
    right.legend()
    return figure


def dial(args):
    """One trained model at many thresholds: causal loss against forward FLOPs, as trained in bold."""
    model, _, x, y = load(args.mod)
    rows = compute_dial(model, torch.cat((x, y[:, -1:]), dim=1), [-1e3, -8, -6, -4, -2, 0, 2, 4, 6, 8, 1e3])
    dense = dense_flops(model.config, x.size(1))
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    flops, losses = [row["flops"] / dense for row in rows], [row["loss"] for row in rows]
    axis.plot(flops, losses, "o-", ms=4, color=COLORS["mod"])
    for row, f in zip(rows, flops, strict=True):
        trained = row["threshold"] == 0
        name = {-1e3: "every block", 1e3: "no routed block"}.get(row["threshold"], f"{row['threshold']:+.0f}")
        label = f"--threshold=0, as trained: {row['share']:.1%} taken" if trained else name
        style = {"weight": "bold", "color": COLORS["mod"]} if trained else {"size": 7, "color": GREY}
        offset = (10, -12) if trained else (6, 5)
        axis.annotate(label, (f, row["loss"]), offset, textcoords="offset points", **style)
        if trained:
            axis.plot(f, row["loss"], "o", ms=10, color=COLORS["mod"])
    axis.set(xlabel="forward FLOPs per token, of a dense model's of the same shape", xlim=(None, max(flops) + 0.06))
    axis.set_ylabel(f"causal loss on {x.numel():,} validation bytes (nats)")
    axis.set_title("The threshold that was trained is next to the best", loc="left")
    axis.margins(y=0.12)
    return figure


def label(budget):
    return f"{budget:.0e}".replace("+", "")


def isoflop_runs(args):
    """The runs of isoflop.csv with the text and context that most of them have, by family, budget, shape and recipe."""
    runs = defaultdict(list)
    rows = read_table(ASSETS / "isoflop.csv")
    usual = Counter((row["data_sha256"], row["block_size"]) for row in rows).most_common(1)[0][0]
    for row in (row for row in rows if (row["data_sha256"], row["block_size"]) == usual):
        recipe = row["batch_size"], row["schedule"], row["lr"], row["routed_lr_scale"], row["causal"]
        key = row["family"], float(row["budget"]), row["shape"], *recipe
        run = {"params": int(row["params"]) / 1000, "steps": int(row["steps"]), "loss": float(row["val_causal"])}
        runs[key].append(run)
    return runs


def best_key(runs):
    """The key of runs, a list of runs for each, that is lowest_of their losses."""
    return lowest_of({key: [run["loss"] for run in of] for key, of in runs.items()})


def isoflop(args):
    """The lowest causal loss of MoD and of random routing at each budget, in percent of dense's; bars: one standard
    error of the difference."""
    runs = isoflop_runs(args)
    budgets = sorted({key[1] for key in runs})
    figure, axis = plt.subplots(figsize=(7, 3.6))
    axis.axhline(0, color=COLORS["dense"], lw=1.5, label="dense")
    for shift, family in ((1.04, "mod"), (1 / 1.04, "random")):  # beside each other, so that no bar hides another
        points = []
        for budget in budgets:
            lowest = {}
            for of in (family, "dense"):
                found = {key: runs[key] for key in runs if key[:2] == (of, budget)}
                lowest[of] = np.array([run["loss"] for run in found[best_key(found)]]) if found else None
            a, b = lowest.values()
            if a is not None and b is not None and min(len(a), len(b)) > 1:
                error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
                points.append((budget * shift, 100 * (a.mean() / b.mean() - 1), 100 * error / b.mean()))
        if points:
            x, y, bars = zip(*points, strict=True)
            style = {"marker": "o", "ms": 5, "ls": "none", "capsize": 3, "color": COLORS[family]}
            axis.errorbar(x, y, yerr=bars, label=FAMILIES[family], **style)
    axis.set(xlabel="training FLOPs", xscale="log", ylabel="loss against dense (%)")
    axis.set_title("Even with dense; random routing a little behind", loc="left")
    axis.set_xticks(budgets, list(map(label, budgets)), minor=False)
    axis.set_xticks([], minor=True)
    axis.legend()
    axis.grid(color=PALE)
    return figure


def halves(args):
    """Each MoD shape against its dense half of the same batch and schedule, by the steps that this half makes: the
    difference of causal losses."""
    recipes = defaultdict(dict)
    for key, of in isoflop_runs(args).items():
        recipes[key[:5]][key] = of
    lowest = {}  # (family, budget, shape, batch, schedule): mean loss over seeds, steps, seeds
    for shape, runs in recipes.items():
        of = runs[best_key(runs)]
        lowest[shape] = np.mean([run["loss"] for run in of]), of[0]["steps"], len(of)
    points = defaultdict(list)
    for (family, budget, shape, batch, schedule), (loss, _, seeds) in lowest.items():
        layers, width = parse_shape(shape)
        half = lowest.get(("dense", budget, f"{dense_half(layers)}x{width}", batch, schedule))
        if family == "mod" and half:
            points[budget, schedule].append((half[1], 100 * (loss / half[0] - 1), min(seeds, half[2])))
    if not points:
        raise UserError("halves needs a MoD shape and its dense half, such as 6x96 and 3x96, at one budget and batch")
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.axhline(0, color="black", lw=0.8)
    budgets = sorted({budget for budget, _ in points})
    color = dict(zip(budgets, shades(len(budgets)), strict=True))
    for (budget, schedule), of in points.items():
        x, y, seeds = zip(*of, strict=True)
        face = color[budget] if schedule == SCHEDULE else "none"  # hollow for the older one
        axis.scatter(x, y, s=[16 * n for n in seeds], edgecolors=color[budget], facecolors=face)
    for budget in budgets:
        axis.scatter([], [], color=color[budget], label=f"{label(budget)} FLOPs")
    axis.set(xscale="log", xlabel="training steps of the dense half", ylabel="MoD's loss above its dense half's (%)")
    axis.set_title("Older schedule (hollow): ahead in long runs; present one (filled): about even", loc="left")
    ticks = [500, 1000, 2000, 5000, 10000, 20000]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axis.set_xticks([], minor=True)
    axis.legend()
    axis.grid(color=PALE)
    return figure


FIGURES = {f.__name__: f for f in (routing_map, spending, dial, isoflop, halves)}


def check_inputs(name, args):
    """Raise UserError, with the command that makes it, if a figure lacks something that it is drawn from."""
    if name in ("isoflop", "halves"):
        path, command = ASSETS / "isoflop.csv", "python experiments/isoflop.py"
    else:
        path, command = args.mod / "ckpt.pt", f"python train.py --out {args.mod}"
    if not path.exists():
        raise UserError(f"{name} needs {path}, which `{command}` makes")


def main(argv):
    parser = Parser(description="Draw the READMEs' figures.")
    parser.add_argument("--mod", type=Path, default=ROOT / "out" / "mod", help="folder of a MoD run")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "figures", help="folder for them (out/figures)")
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="NAME", help="these, and all of them")
    parser.add_argument("--snippet", default="def ", help="how the paragraph in routing_map begins")
    args = parser.parse_args(argv)
    if plt is None:
        raise UserError("figures need the package matplotlib: pip install -r requirements-dev.txt")
    args.out.mkdir(parents=True, exist_ok=True)
    plt.rc("font", size=9)
    plt.rc("axes", titlesize="medium", axisbelow=True)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("legend", frameon=False, fontsize="small")
    plt.rc("figure.constrained_layout", use=True)
    left_out, status = [], Status()
    for name in args.only or FIGURES:
        status(f"drawing {name}")
        path = args.out / f"{name}.png"
        try:
            check_inputs(name, args)
            FIGURES[name](args).savefig(path, dpi=160, facecolor="white")
            status.clear()
            print(path, flush=True)
        except UserError as error:
            if args.only:
                raise
            left_out.append(f"left out: {error}")
    for line in left_out:
        print(line)


if __name__ == "__main__":
    run(main)
