"""Has a model learned to copy? The loss on validation text, and on the same text the second time it comes in a context.

    python experiments/induction.py out/ablate/*2e+13*

A model with induction heads (Olsson et al., arXiv:2209.11895) copies what it has read: its loss falls at the second
reading. Where some runs have these heads and others don't, that weighs more than anything about routing.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prepare_data import Parser, load_data, run  # noqa: E402
from train import load_checkpoint, spread_windows  # noqa: E402


@torch.no_grad()
def losses(model, data, tokens=2**13):
    """Causal loss, nats per token, on the first and the second reading of the same half context."""
    half = model.config.block_size // 2
    text = spread_windows(data, half - 1, tokens)
    twice = torch.cat((text, text), dim=1)
    logits = model(twice[:, :-1], causal=True)[0]
    loss = F.cross_entropy(logits.flatten(0, 1), twice[:, 1:].flatten(), reduction="none").view(len(text), -1)
    first = slice(0, half - 1)
    second = slice(half + 8, None)  # after a few tokens by which the place can be known
    return loss[:, first].mean().item(), loss[:, second].mean().item()


def main(argv):
    parser = Parser(description="Loss at first and second reading.")
    parser.add_argument("out", nargs="+", help="folders of runs")
    rows = ["| run | first reading | second reading |", "| --- | --- | --- |"]
    for out in parser.parse_args(argv).out:
        model, checkpoint = load_checkpoint(out, "cpu")
        first, second = losses(model, load_data(ROOT / checkpoint["train"]["data"], checkpoint["meta"])[1])
        rows.append(f"| {Path(out).name} | {first:.3f} | {second:.3f} |")
    print("\n".join(rows))


if __name__ == "__main__":
    run(main)
