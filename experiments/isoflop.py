"""Dense, MoD and random routing at equal training FLOPs: which shape of each family gets the lowest loss?

    python experiments/isoflop.py --budgets 2e12 6e12 2e13                  the whole sweep, hours on two cores
    python experiments/isoflop.py --budgets 2e13 --families mod --shapes 6x96 --seeds 0 1 2
    python experiments/figures.py --only isoflop                            draws the table

A shape is LAYERSxWIDTH. Every run is a train.py run, resumed where it was stopped, and one line of
assets/isoflop.csv; runs that stand there are not done again. "best" as the only shape takes each family's
lowest so far (of seed 0), to confirm it with more seeds. On a machine with a GPU the runs are done there.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.sweep import SCHEDULE, parse_shape, read_table, sweep  # noqa: E402
from prepare_data import Parser, UserError, load_data, prepare, run  # noqa: E402
from train import PRESETS, TrainConfig  # noqa: E402

TABLE = ROOT / "assets" / "isoflop.csv"
FAMILIES = {"dense": ["--capacity=1"], "mod": [], "random": ["--routing=random"]}
DENSE = ["2x64", "3x64", "1x96", "2x96", "3x96", "4x96"]
# A MoD model of 2N blocks costs about what its N unrouted blocks cost, so it is swept at twice the depth.
ROUTED = [f"{2 * int(shape[0])}{shape[1:]}" for shape in DENSE]
SHAPES = {"dense": DENSE, "mod": ROUTED, "random": ROUTED}
COLORS = {"dense": "#4477aa", "mod": "#cc3311", "random": "#999933"}


def text_sha256(data):
    """How the SHA-256 of the text in that folder begins. Train.py's default text is made if it is missing."""
    if data == TrainConfig.data and not (ROOT / data / "meta.json").exists():  # it is written last
        prepare(out=ROOT / data)
    return load_data(ROOT / data)[2]["sha256"][:12]


def job(key, data):
    """The train.py run that key, the first columns of its row, describes."""
    layers, width = parse_shape(key["shape"])
    name = "{family}-{budget}-{shape}-{batch_size}-{lr}-{schedule}-{routed_lr_scale}-{causal}-{seed}".format(**key)
    if key["block_size"] != PRESETS["cpu"]["block_size"]:
        name += f"-{key['block_size']}"
    if data != TrainConfig.data:
        name += f"-{Path(data).name}"
    out = ROOT / "out" / "isoflop" / name
    same = "block_size", "batch_size", "lr", "routed_lr_scale", "seed"  # flags of train.py
    command = [
        "train.py", "--preset=cpu", *FAMILIES[key["family"]], *(f"--{flag}={key[flag]}" for flag in same),
        f"--n_layer={layers}", f"--n_embd={width}", f"--n_head={max(2, width // 32)}", f"--flops={key['budget']}",
        f"--out={out}", f"--data={data}", *["--predictor"] * (key["causal"] == "predictor"),
    ]  # fmt: skip
    return {"key": key, "out": out, "command": command}


def row_of(job, log):
    header, last = log[0], log[-1]
    return {
        **job["key"],
        "flops": f"{last['flops']:.4g}",
        "params": header["params"],
        "steps": last["step"],
        "val_topk": f"{last['val_topk']:.4f}",
        "val_causal": f"{last['val_causal']:.4f}",
        "wall_s": f"{last['timing']['seconds']:.0f}",
        "device": header["train"]["device"],
        "torch": header["torch"],
    }


def lowest(rows, family, budget, block_size, sha256):
    """The recipe with the lowest causal loss at seed 0, columns of its row."""
    rows = [r for r in rows if r["family"] == family and float(r["budget"]) == budget and r["seed"] == "0"]
    rows = [r for r in rows if r["data_sha256"] == sha256 and r["block_size"] == str(block_size)]
    if not rows:
        raise UserError(
            f"{TABLE} has no {family} run of seed 0 at {budget:g} for this text and context; name its --shapes"
        )
    row = min(rows, key=lambda r: float(r["val_causal"]))
    return {name: row[name] for name in ("shape", "batch_size", "lr", "routed_lr_scale", "causal")}


def main(argv):
    parser = Parser(description="The isoFLOP sweep.")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2e12, 6e12, 2e13], help="training FLOPs")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--shapes", nargs="+", help="LAYERSxWIDTH, or best (default: the sweep's list)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    preset = PRESETS["cpu"]
    parser.add_argument("--block_size", type=int, default=preset["block_size"], help="context length")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences a step")
    parser.add_argument("--lr", type=float, default=preset["lr"], help="a shorter run wants a higher one")
    parser.add_argument(
        "--routed_lr_scale", type=float, default=preset["routed_lr_scale"], help="of MoD and random routing"
    )
    parser.add_argument("--predictor", action="store_true", help="makes MoD's causal choice, not the router")
    parser.add_argument("--data", default=TrainConfig.data, help="folder that prepare_data.py wrote")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    rows = read_table(TABLE)
    sha256 = text_sha256(args.data)
    jobs = []
    for budget in args.budgets:
        for seed in args.seeds:
            for family in args.families:
                usual = {
                    "batch_size": args.batch_size,
                    "lr": f"{args.lr:g}",
                    "routed_lr_scale": "1" if family == "dense" else f"{args.routed_lr_scale:g}",
                    "causal": "predictor" if args.predictor and family == "mod" else "router",
                }
                recipes = [{"shape": shape, **usual} for shape in args.shapes or SHAPES[family]]
                if args.shapes == ["best"]:
                    recipes = [lowest(rows, family, budget, args.block_size, sha256)]
                for recipe in recipes:
                    key = {
                        "family": family,
                        "budget": f"{budget:g}",
                        "shape": recipe["shape"],
                        "block_size": args.block_size,
                        "batch_size": recipe["batch_size"],
                        "lr": recipe["lr"],
                        "schedule": SCHEDULE,
                        "routed_lr_scale": recipe["routed_lr_scale"],
                        "causal": recipe["causal"],
                        "seed": seed,
                        "data_sha256": sha256,
                    }
                    jobs.append(job(key, args.data))
    sweep(jobs, TABLE, row_of, args.processes)


if __name__ == "__main__":
    run(main)
