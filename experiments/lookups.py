"""Do routers find the one token in eight that has something to work out? In a made-up language.

    python experiments/lookups.py --variant total_gain_0.25         the defaults, or a variant of ablate.py

One routed block, 32 wide, and no other that could do the work. A markdown table on standard output: for each seed the
share of the question marks that top-k takes (by chance 12.5 %), and the causal loss in nats per byte. The least that
any model can reach is 0.52, the two letters of eight bytes that can't be foreseen.
"""

import random
import sys
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from experiments.ablate import VARIANTS, follow_progress  # noqa: E402
from experiments.sweep import read_log  # noqa: E402
from prepare_data import Parser, load_data, prepare, run  # noqa: E402

SHAPE = dict(
    preset="cpu", n_layer=1, route_every=1, n_head=2, n_embd=32, block_size=64, batch_size=16, device="cpu",
    lr=4e-3, routed_lr_scale=1.0,
)  # fmt: skip


def lookups(n, seed):
    """n times two letters, a question mark, the pair's entry in a table of 64 random ones, four dots. Only a question
    mark has something to work out: letters can't be foreseen, and all the rest is known."""
    names = "ABCDEFGH"
    fixed, draw = random.Random(0), random.Random(seed)
    table = {(a, b): fixed.choice(names) for a in names for b in names}
    pairs = [(draw.choice(names), draw.choice(names)) for _ in range(n)]
    return "".join(f"{a}{b}?{table[a, b]}...." for a, b in pairs)


def main(argv):
    parser = Parser(description="Routers in a language in which one token in eight has something to work out.")
    routed = [
        name for name, (flags, _) in VARIANTS.items() if flags.get("capacity") != 1 and "route_every" not in flags
    ]
    parser.add_argument("--variant", choices=routed, default="base", metavar="VARIANT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args(argv)
    flags, patch = VARIANTS[args.variant]
    follow_progress()
    if patch:
        patch()
    folder = ROOT / "out" / "lookups"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text").write_text(lookups(100_000, seed=1), encoding="utf-8")
    data = prepare(inputs=[folder / "text"], out=folder / "data")
    x = train.spread_windows(load_data(data)[1], SHAPE["block_size"], 2**13)[:, :-1]
    rows = ["| variant | seed | of the question marks | causal loss |", "| --- | --- | --- | --- |"]
    for seed in args.seeds:
        out = folder / f"{args.variant}-{seed}"
        of_run = {"data": data, "out": out, "steps": args.steps, "seed": seed}
        with redirect_stdout(sys.stderr):  # the text that a run ends with
            train.main([f"--{flag}={value}" for flag, value in {**SHAPE, **of_run, **flags}.items()] + ["--overwrite"])
        asked = x == ord("?")
        found = (train.load_checkpoint(out, "cpu")[0](x)[2].taken & asked).sum() / asked.sum()
        rows.append(f"| {args.variant} | {seed} | {found:.1%} | {read_log(out)[0][-1]['val_causal']:.4f} |")
    print("\n".join(rows))


if __name__ == "__main__":
    run(main)
