"""Draws the README's figures into assets/, from trained runs and the tables beside them.

    python experiments/figures.py                                   all, from out/mod, out/dense and out/random
    python experiments/figures.py --only routing_map --mod out/gpu --snippet "class "

routing_map   which routed block processes which byte of a piece of validation text
histograms    router weight and predictor probability of tokens that top-k takes, against the others
curves        loss of dense, MoD and random routing against training FLOPs and wall-clock
spending      what the routed blocks process: by kind of byte, position, and loss
bench         sampling speed and cache size, from bench.json
ablations     the loss of each variant of the recipe, from ablations.csv

The first, second and fourth need a byte-level run. What is "processed" is so causally, as when sampling.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch, Patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.isoflop import COLORS  # noqa: E402
from experiments.router_stats import KINDS, kinds_of, load, look  # noqa: E402
from experiments.sweep import read_table  # noqa: E402
from prepare_data import UserError, load_data, run  # noqa: E402

INK, GREY, PALE = "#1b1b1b", "#6b6b6b", "#e9e9e9"
FAMILIES = {"dense": "dense", "mod": "MoD", "random": "random routing"}
MADE_BY = {  # what makes an input that is missing
    "mod": "python train.py --flops 2e13 --out {path}",
    "dense": "python train.py --capacity 1 --n_layer 4 --flops 2e13 --out {path}",
    "random": "python train.py --routing random --flops 2e13 --out {path}",
    "bench.json": "python experiments/bench.py",
    "ablations.csv": "python experiments/ablate.py",
}


def routed_blocks(model):
    return [i for i in range(model.config.n_layer) if model.config.is_routed(i)]


def shades(n):
    """A colour for each of n blocks, early to late."""
    return plt.get_cmap("plasma")(np.linspace(0.05, 0.8, n))


def find_snippet(data, start):
    """Where in data (byte tokens) the first paragraph of 100 to 160 bytes and short lines begins and ends."""
    text = "".join(map(chr, data))
    for match in re.finditer(rf"(?<=\n\n){re.escape(start)}.*\n(?:.+\n)+", text):
        lines = match[0].splitlines()
        if 100 <= len(match[0]) <= 160 and max(map(len, lines)) <= 64 and match[0].isascii():
            return match.span()
    raise UserError(f"no paragraph of 100 to 160 bytes begins with {start!r}; choose another --snippet")


def routing_map(args):
    """The snippet, line by line; under each byte a cell per routed block, filled where the block processed it."""
    model, *_ = load(args.mod)
    data = load_data(ROOT / json.loads((args.mod / "log.jsonl").open().readline())["train"]["data"])[1]
    begin, end = find_snippet(data, args.snippet)
    tokens = torch.from_numpy(data[max(0, end - model.config.block_size) : end].astype(np.int64))
    taken = look(model, tokens[None], tokens[None], causal=True)[1].taken[:, 0, begin - end :]  # (L, length)
    blocks = routed_blocks(model)
    lines = "".join(map(chr, data[begin:end])).splitlines(keepends=True)
    width, height = max(map(len, lines)), 1.75 + 0.5 * len(blocks)  # of a line of text, in cells
    figure = plt.figure(layout="none", figsize=(10, 10 * (height * len(lines) + 5.2) / (width + 6)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-5, width + 1), ylim=(height * len(lines) + 1.9, -3.3), aspect="equal")
    axis.axis("off")
    size = 10 * 72 / (width + 6)  # of a cell, in points

    def box(x, y, w, h, color):
        style = "round,pad=0,rounding_size=0.12"
        axis.add_patch(
            FancyBboxPatch((x + 0.05, y), w - 0.1, h, boxstyle=style, linewidth=0, facecolor=color)
        )

    i, heat = 0, plt.get_cmap("Oranges")
    for row, line in enumerate(lines):
        y = row * height
        for j, block in enumerate(blocks):
            axis.text(
                -0.3,
                y + 1.42 + 0.5 * j,
                f"block {block}",
                size=0.42 * size,
                color=GREY,
                ha="right",
                va="center",
            )
        for x, char in enumerate(line):
            depth = taken[:, i].float().mean().item()
            box(x, y, 1, 1.1, heat(0.75 * depth) if depth else "white")
            shown = {" ": "·", "\n": "↵", "\t": "⇥"}.get(char, char)
            color = "#9a9a9a" if char.isspace() else INK
            axis.text(x + 0.5, y + 0.55, shown, size=0.95 * size, color=color, ha="center", va="center",
                      family="monospace")  # fmt: skip
            for j in range(len(blocks)):
                box(x, y + 1.22 + 0.5 * j, 1, 0.4, COLORS["mod"] if taken[j, i] else PALE)
            i += 1
    axis.text(
        0,
        -2.3,
        "Which bytes does a routed block spend compute on?",
        size=1.15 * size,
        color=INK,
        weight="bold",
    )
    note = (
        f"Real validation text through a trained Mixture-of-Depths model; on it, each routed block processed "
        f"{taken.float().mean():.0%} of the bytes.\nThe other blocks are ordinary and process all of them."
    )
    axis.text(0, -0.5, note, size=0.55 * size, color=GREY)
    legend = [
        Patch(color=COLORS["mod"], label="processed"),
        Patch(color=PALE, label="skipped: no compute, nothing cached"),
    ]
    axis.legend(handles=legend, loc="lower left", bbox_to_anchor=(5 / (width + 6), 0), ncols=2, frameon=False,
                fontsize=0.6 * size, labelcolor=INK, borderpad=0)  # fmt: skip
    return figure


def histograms(args):
    """Per routed block, how r and the predictor's probability are distributed over tokens taken by top-k or not."""
    model, x, y = load(args.mod)
    route, blocks = look(model, x, y)[1], routed_blocks(model)
    figure, axes = plt.subplots(
        2, len(blocks), figsize=(2.5 * len(blocks), 4.6), sharex="row", sharey="row", squeeze=False
    )
    rows = ((route.weight, "router weight r"), (route.logit.sigmoid(), "predictor probability"))
    for (values, label), row in zip(rows, axes, strict=True):
        bins = (
            np.linspace(values.quantile(0.001), values.quantile(0.999), 41)
            if row is axes[0]
            else np.linspace(0, 1, 21)
        )
        for j, axis in enumerate(row):
            for chosen, color, name in (
                (~route.taken[j], "#9aa5b1", "not taken"),
                (route.taken[j], COLORS["mod"], "taken"),
            ):
                weights = np.full(int(chosen.sum()), 100 / chosen.numel())
                axis.hist(values[j][chosen], bins, weights=weights, color=color, alpha=0.75, label=name)
            axis.set(xlabel=label, title=f"block {blocks[j]}" if row is axes[0] else "")
        row[0].set_ylabel("% of the tokens")
    for axis in axes[1]:
        axis.set_yscale("log")
        axis.axvline(0.5, color=INK, linewidth=0.8, linestyle="--")
    axes[0, 0].legend(title="by top-k")
    return figure


def curves(args):
    """Causal validation loss against training FLOPs and wall-clock; the last evaluation is on more tokens."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    first, last = [], []
    for family, name in FAMILIES.items():
        lines = (getattr(args, family) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in lines[1:]]
        during = log[:-1] if len(log) > 1 else log
        losses = [line["val_causal"] for line in during]
        label = f"{name}: {log[-1]['val_causal']:.3f} at the end"
        axes[0].plot(
            [line["flops"] for line in during], losses, "o-", ms=3, color=COLORS[family], label=label
        )
        minutes = [line["timing"]["seconds"] / 60 for line in during]
        axes[1].plot(minutes, losses, "o-", ms=3, color=COLORS[family])
        first, last = [*first, losses[len(losses) // 5]], [*last, min(losses)]
    axes[0].set(
        xlabel="training FLOPs",
        ylabel="causal validation loss (nats per token)",
        ylim=(min(last) - 0.03, max(first)),
    )
    axes[1].set(xlabel="wall-clock (minutes, evaluation included)")
    axes[0].legend()
    return figure


def spending(args):
    """The share of the tokens that each routed block processes, by kind of byte, by position, by loss."""
    model, x, y = load(args.mod)
    taken, blocks = look(model, x, y, causal=True)[1].taken, routed_blocks(model)
    hard = look(model, x, y, causal=True, threshold=math.inf)[0]
    kinds = kinds_of(x)
    names = [name for i, name in enumerate(KINDS) if (kinds == i).float().mean() > 0.001]
    sets = [*taken, taken.any(0)]
    share = np.array(
        [[100 * s[kinds == list(KINDS).index(name)].float().mean() for s in sets] for name in names]
    )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.2), width_ratios=(1.5, 1, 1))
    left.imshow(share, cmap="Oranges", vmin=0, vmax=110, aspect="auto")
    for (i, j), value in np.ndenumerate(share):
        left.text(
            j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 65 else INK, size=9
        )
    part = [f"{name} ({100 * (kinds == list(KINDS).index(name)).float().mean():.0f} %)" for name in names]
    left.set_yticks(range(len(names)), part)
    left.set_xticks(range(len(sets)), [*(str(i) for i in blocks), "any"])
    left.axvline(len(blocks) - 0.5, color="white", linewidth=3)
    left.tick_params(length=0)
    left.set(xlabel="routed block", title="by kind of byte (its part of the text): % processed")
    left.spines[:].set_visible(False)
    decile = (hard.flatten().argsort().argsort() * 10 // hard.numel()).view_as(hard)
    position = torch.arange(x.size(1)).expand_as(x) * 16 // x.size(1)
    for j, color in enumerate(shades(len(blocks))):
        by_position = [100 * taken[j][position == q].float().mean() for q in range(16)]
        middle.plot(
            (np.arange(16) + 0.5) * x.size(1) / 16,
            by_position,
            "o-",
            ms=3,
            color=color,
            label=f"block {blocks[j]}",
        )
        right.plot(
            range(1, 11),
            [100 * taken[j][decile == q].float().mean() for q in range(10)],
            "o-",
            ms=3,
            color=color,
        )
    for axis in (middle, right):
        axis.axhline(100 * model.config.capacity, color=GREY, linewidth=0.8, linestyle="--")
        axis.set_ylim(bottom=0)
    middle.set(xlabel="position in the context", ylabel="% processed", title="by position")
    right.set(
        xlabel="decile of the loss, routed blocks skipped",
        title="by how hard the next byte is",
        xticks=range(1, 11),
    )
    middle.legend()
    return figure


def bench(args):
    """Speed over a dense model with a cache: all ways at batch 1, the fast path by batch; and bytes of KV cache."""
    rows = json.loads((args.assets / "bench.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["device"] == rows[0]["device"]]
    context = max(row["context"] for row in rows)
    one = sorted(
        (row for row in rows if row["batch"] == 1 and row["context"] == context),
        key=lambda row: row["n_embd"],
    )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9))
    x = np.arange(len(one))
    ways = (("fast", "MoD, skipping", COLORS["mod"]), ("all_blocks", "MoD, every block computed", "#e8a598"),
            ("no_cache", "MoD, no cache", "#bbbbbb"))  # fmt: skip
    for j, (way, name, color) in enumerate(ways):
        ratio = [row[f"{way}_tok_s"] / row["dense_tok_s"] for row in one]
        bars = left.bar(x + 0.27 * (j - 1), ratio, 0.25, color=color, label=name)
        if way == "fast":
            left.bar_label(bars, [f"{row['fast_tok_s']:,.0f}/s" for row in one], size=7, padding=2)
    left.hlines(
        [row["ideal"] for row in one], x - 0.42, x - 0.1, color=INK, linewidth=1.5, label="ideal, by FLOPs"
    )
    left.set(title=f"batch 1, context {context:,}", ylabel="tokens per second, dense with cache = 1")
    batches, widths = sorted({row["batch"] for row in rows}), sorted({row["n_embd"] for row in rows})
    short = min(row["context"] for row in rows)
    for j, (batch, color) in enumerate(zip(batches, shades(len(batches)), strict=True)):
        ratio = {
            r["n_embd"]: r["fast_tok_s"] / r["dense_tok_s"]
            for r in rows
            if (r["batch"], r["context"]) == (batch, short)
        }
        place = [widths.index(n) + 0.8 * (j - (len(batches) - 1) / 2) / len(batches) for n in ratio]
        middle.bar(place, ratio.values(), 0.75 / len(batches), color=color, label=f"batch {batch}")
    middle.set(title=f"MoD, skipping; context {short:,}", ylabel="tokens per second, dense with cache = 1")
    for j, (key, name, family) in enumerate(
        (("dense_cache_bytes", "dense", "dense"), ("cache_bytes", "MoD", "mod"))
    ):
        bars = right.bar(
            x + 0.4 * j - 0.2, [row[key] / 2**20 for row in one], 0.37, color=COLORS[family], label=name
        )
    right.bar_label(
        bars, [f"{row['cache_bytes'] / row['dense_cache_bytes']:.2f} x" for row in one], size=7, padding=2
    )
    right.set(title=f"KV cache, batch 1, context {context:,}", ylabel="MiB in use")
    for axis, ticks in (
        (left, [row["n_embd"] for row in one]),
        (middle, widths),
        (right, [row["n_embd"] for row in one]),
    ):
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set(xlabel="width (n_embd)", ylim=(0, axis.get_ylim()[1] * 1.3))
        axis.legend(fontsize=8, ncols=2)
    for axis in (left, middle):
        axis.axhline(1, color=COLORS["dense"], linewidth=1.2)
    figure.suptitle(
        f"Sampling on {rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['n_layer']} blocks", size=10
    )
    return figure


def ablations(args):
    """Causal loss of each variant at the budget that most of them have: a dot per seed, and the mean."""
    rows = [{**row, "budget": float(row["budget"])} for row in read_table(args.assets / "ablations.csv")]
    variants = defaultdict(set)
    for row in rows:
        variants[row["budget"]].add(row["variant"])
    budget = args.budget or max(variants, key=lambda budget: len(variants[budget]))
    losses = defaultdict(list)
    for row in rows:
        if row["budget"] == budget:
            losses[row["variant"]].append(float(row["val_causal"]))
    order = sorted(losses, key=lambda name: -np.mean(losses[name]))
    figure, axis = plt.subplots(figsize=(8, 1.1 + 0.26 * len(order)))
    for i, name in enumerate(order):
        color = COLORS[{"dense_half": "dense", "random": "random"}.get(name, "mod")]
        axis.plot(losses[name], [i] * len(losses[name]), "o", color=color, alpha=0.5, ms=5, mew=0)
        axis.plot(np.mean(losses[name]), i, "|", color=color, ms=14, mew=2.5)
    axis.set_yticks(range(len(order)), [f"{name} ({len(losses[name])})" for name in order])
    axis.set(xlabel="causal validation loss (nats per token): a dot per seed, a bar at the mean",
             title=f"variants (seeds) at {budget:.0e} training FLOPs")  # fmt: skip
    return figure


FIGURES = {  # with the inputs each needs
    routing_map: ["mod"],
    histograms: ["mod"],
    curves: ["mod", "dense", "random"],
    spending: ["mod"],
    bench: ["bench.json"],
    ablations: ["ablations.csv"],
}


def main(argv):
    figures = {figure.__name__: figure for figure in FIGURES}
    parser = argparse.ArgumentParser(description="Draw the README's figures.")
    for name, about in FAMILIES.items():
        parser.add_argument(
            f"--{name}", type=Path, default=ROOT / "out" / name, help=f"folder of the {about} run"
        )
    parser.add_argument(
        "--assets", type=Path, default=ROOT / "assets", help="folder of the tables and the figures"
    )
    parser.add_argument(
        "--only", nargs="+", choices=figures, default=list(figures), metavar="NAME", help=", ".join(figures)
    )
    parser.add_argument("--snippet", default="def ", help="how the paragraph that routing_map shows begins")
    parser.add_argument("--budget", type=float, help="training FLOPs of the ablations shown")
    args = parser.parse_args(argv)
    for name in args.only:
        for need in FIGURES[figures[name]]:
            path = getattr(args, need) / "ckpt.pt" if need in FAMILIES else args.assets / need
            if not path.exists():
                command = MADE_BY[need].format(path=path.parent)
                raise UserError(f"{name} needs {path}: make it with `{command}`, or leave it out with --only")
    plt.rcParams.update({"savefig.dpi": 160, "figure.facecolor": "white", "font.size": 9, "axes.titlesize": 9.5,
                         "axes.grid": False, "axes.spines.top": False, "axes.spines.right": False,
                         "legend.frameon": False, "figure.constrained_layout.use": True})  # fmt: skip
    for name in args.only:
        figure = figures[name](args)
        figure.savefig(args.assets / f"{name}.png")
        plt.close(figure)
        print(args.assets / f"{name}.png", flush=True)


if __name__ == "__main__":
    run(main)
