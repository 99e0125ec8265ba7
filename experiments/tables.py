"""The learning tables of README.md and assets/isoflop.md, from assets/isoflop.csv.

    python experiments/tables.py          prints the first and writes the second: every recipe that was run

A recipe is a shape, batch size, learning rate, its schedule, the part of it that routed blocks have, and who chooses
without the future. A family's lowest at a budget is the recipe with the lowest mean loss among those with the most
seeds. What stands in brackets after a difference of two families' means is its standard error, where both have three
seeds; together: these budgets' differences, weighted by the inverse squares of their errors.
"""

import sys
from collections import defaultdict, namedtuple
from math import inf, sqrt
from pathlib import Path
from statistics import mean, variance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.sweep import lowest_of, read_table  # noqa: E402
from prepare_data import Parser, run, write_atomic  # noqa: E402

ASSETS = ROOT / "assets"
TEXTS = {  # by the first digits of the text's SHA-256, and the context
    ("09399e66bd8f", "256"): "stdlib, CPU",
    ("09399e66bd8f", "1024"): "stdlib, CPU, a context of 1,024",
    ("27c4952391d5", "256"): "packages, GPU",
}
Recipe = namedtuple("Recipe", "shape batch_size lr routed_lr_scale causal schedule")  # columns of isoflop.csv


def recipes():
    """The rows of each recipe's seeds, by (text and context, budget, family), then by recipe."""
    runs = defaultdict(lambda: defaultdict(list))
    for row in read_table(ASSETS / "isoflop.csv"):
        text = row["data_sha256"], row["block_size"]
        recipe = Recipe(*(row[name] for name in Recipe._fields))
        runs[text, float(row["budget"]), row["family"]][recipe].append(row)
    return runs


def losses(rows, which="val_causal"):
    return [float(row[which]) for row in sorted(rows, key=lambda row: int(row["seed"]))]


def difference(losses, others):
    """The difference of two means and its standard error, in percent of the second; two seeds say little of errors."""
    of = [variance(some) / len(some) if len(some) > 2 else inf for some in (losses, others)]
    percent = 100 / mean(others)
    return percent * (mean(losses) - mean(others)), percent * sqrt(sum(of))


def together(differences):
    """Their mean, weighted by the inverse squares of their errors, and its error."""
    weights = [1 / error**2 for _, error in differences]
    return sum(w * d for w, (d, _) in zip(weights, differences, strict=True)) / sum(weights), 1 / sqrt(sum(weights))


def difference_cell(difference, error):
    return f"{difference:+.1f} %" + f" ({error:.1f})" * (error < inf)


def lowest_table(runs, text):
    differences = defaultdict(list)
    lines = ["| budget | dense | MoD | random routing | MoD against dense | against random routing |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for budget in sorted({key[1] for key in runs if key[0] == text}):
        cells, best = [f"{budget:.0e}".replace("+", "")], {}
        for family in ("dense", "mod", "random"):
            by_recipe = runs.get((text, budget, family))
            if not by_recipe:
                cells.append("not run")
                continue
            recipe = lowest_of({recipe: losses(rows) for recipe, rows in by_recipe.items()})
            best[family] = losses(by_recipe[recipe])
            cells.append(f"{recipe.shape}: {mean(best[family]):.4f}")
        for other in ("dense", "random"):
            if "mod" in best and other in best:
                differences[other].append(difference(best["mod"], best[other]))
                cells.append(difference_cell(*differences[other][-1]))
            else:
                cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    known = [[pair for pair in differences[other] if pair[1] < inf] for other in ("dense", "random")]
    if any(known):
        cells = [difference_cell(*together(pairs)) if pairs else "" for pairs in known]
        lines.append("| together | | | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def every_recipe(runs):
    lines = [
        "Every recipe of `isoflop.csv`, by `python experiments/tables.py`: causal validation loss in nats per byte.",
        "Rate: in thousandths; routed: the part of it that routed blocks have. Schedule: linear ends",
        "at 0; the older runs followed a cosine to a tenth of the rate (train.py of commit `33ed75c`).",
    ]
    for text, name in TEXTS.items():
        for budget in sorted({key[1] for key in runs if key[0] == text}):
            lines += ["", f"## {name}, {budget:g} training FLOPs", ""]
            lines += ["| | shape | batch | rate | schedule | routed | who chooses | mean | seeds |", "| --- " * 9 + "|"]
            for family in ("dense", "mod", "random"):
                by_recipe = runs.get((text, budget, family), {})
                for recipe, rows in sorted(by_recipe.items(), key=lambda item: mean(losses(item[1]))):
                    cells = [
                        *(family, recipe.shape, recipe.batch_size, f"{float(recipe.lr) * 1e3:g}", recipe.schedule),
                        recipe.routed_lr_scale if family != "dense" else "",
                        recipe.causal if family == "mod" else "",
                        *(f"{mean(losses(rows)):.4f}", " ".join(f"{loss:.4f}" for loss in losses(rows))),
                    ]
                    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv):
    Parser(description="The learning tables.").parse_args(argv)
    runs = recipes()
    print("\n\n".join(lowest_table(runs, text) for text in TEXTS))
    with write_atomic(ASSETS / "isoflop.md") as file:
        file.write(every_recipe(runs).encode())


if __name__ == "__main__":
    run(main)
