"""How fast does the choice change while a router learns? A train.py run, looked into at each of its evaluations.

    python experiments/choice_drift.py --flops 1e13 --out out/drift     flags as for train.py; a table at the end

On the same validation tokens each time, for each routed block: the part of what top-k takes that it took at the
evaluation before, too; the standard deviation of r over tokens; the mean gate of those taken.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from experiments.router_stats import look, table  # noqa: E402
from prepare_data import UserError, run  # noqa: E402


def main(argv):
    before, rows, evaluate = None, [], train.evaluate

    def watched(model, data, tokens, autocast):
        nonlocal before
        if not model.config.routed_layers:
            raise UserError("this model has no routed block, so there is no choice to watch")
        text = train.spread_windows(data, model.config.block_size, train.EVAL_TOKENS).to(model.rope.device)
        with torch.no_grad():
            _, route = look(model, text[:, :-1], text[:, 1:])
        kept = route.taken if before is None else route.taken & before  # the first row's is not shown
        overlap, before = kept.sum((1, 2)) / route.taken.sum((1, 2)), route.taken
        gate = model.blocks[model.config.routed_layers[0]].gate
        gates = [gate(r[taken]).mean() for r, taken in zip(route.r, route.taken, strict=True)]
        rows.append((overlap, route.r.std((1, 2)), gates))
        return evaluate(model, data, tokens, autocast)

    train.evaluate = watched
    train.main(argv)
    header = "evaluation", "kept since the one before, by block", "std of r", "mean gate, taken"
    lines = [
        (
            str(i + 1),
            " / ".join(f"{x:.0%}" for x in overlap) if i else "",
            *(" / ".join(f"{x:.2f}" for x in part) for part in rest),
        )
        for i, (overlap, *rest) in enumerate(rows)
    ]
    table("How the choice of the routed blocks changes in training", header, lines)


if __name__ == "__main__":
    run(main)
