"""Do routers find the one token in eight that has something to work out? In the made-up language of test_mod.py.

    python experiments/lookups.py --variant total_gain_0.25         the defaults, or a variant of ablate.py

One routed block, 32 wide, and no other that could do the work. A markdown table on standard output: for each seed the
share of the question marks that top-k takes (by chance 12.5 %), and the causal loss in nats per byte. The least that
any model can reach is 0.52, the two letters of eight bytes that can't be foreseen.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.ablate import VARIANTS, follow_progress  # noqa: E402
from prepare_data import Parser, load_data, prepare, run  # noqa: E402
from test_mod import lookups  # noqa: E402
from train import TrainConfig, load_checkpoint, spread_windows, train  # noqa: E402

SHAPE = dict(
    preset="cpu", n_layer=1, route_every=1, n_head=2, n_embd=32, block_size=64, batch_size=16, device="cpu",
    lr=4e-3, routed_lr_scale=1.0,
)  # fmt: skip


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
    x = spread_windows(load_data(data)[1], SHAPE["block_size"], 2**13)[:, :-1]
    rows = ["| variant | seed | of the question marks | causal loss |", "| --- | --- | --- | --- |"]
    for seed in args.seeds:
        out = folder / f"{args.variant}-{seed}"
        run_of = {"data": str(data), "out": str(out), "steps": args.steps, "seed": seed, "overwrite": True}
        result = train(TrainConfig(**{**SHAPE, **run_of, **flags}))
        if result is None:  # Ctrl-C
            return
        asked = x == ord("?")
        found = (load_checkpoint(out, "cpu")[0](x)[2].taken & asked).sum() / asked.sum()
        rows.append(f"| {args.variant} | {seed} | {found:.1%} | {result['val_causal']:.4f} |")
    print("\n".join(rows))


if __name__ == "__main__":
    run(main)
