"""Looks inside the routers of a checkpoint: which tokens they take, and what another choice would give.

    python experiments/router_stats.py out/mod                          markdown tables on standard output
    python experiments/router_stats.py out/mod --dense out/dense_half   "hard" means: to that model

On the validation tokens that train.py watches during a byte-level run. "Taken" means by top-k; a token's loss, in
nats, is that of the prediction made at it.
"""

import keyword
import math
import re
import sys
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.sweep import watched  # noqa: E402
from mod import Route, RoutedBlock  # noqa: E402
from prepare_data import Parser, UserError, load_data, run  # noqa: E402
from train import EVAL_TOKENS, load_checkpoint, spread_windows  # noqa: E402

KINDS = {  # of bytes: the first pattern that matches
    "newline": r"\n",
    "indentation": r"(?:(?<=\n)|\A)[ \t]+",
    "other blank": r"[ \t\r\f]+",
    "keyword": rf"\b(?:{'|'.join(keyword.kwlist)})\b",
    "first letter of a word": r"\b[A-Za-z_]",
    "later letter of a word": r"[A-Za-z_]",
    "digit": r"[0-9]",
    "bracket or quote": r"""[][(){}"']""",
    "other punctuation, end of text": r"[\s\S]",
}


def kinds_of(tokens):
    """The kind of each byte token of (N, T), as its number in KINDS, (N, T)."""
    pattern = re.compile("|".join(f"({p})" for p in KINDS.values()), re.ASCII)
    kinds = torch.zeros_like(tokens)
    for row, text in zip(kinds, tokens.tolist(), strict=True):
        for match in pattern.finditer("".join(map(chr, text))):
            row[match.start() : match.end()] = match.lastindex - 1
    return kinds


def load(out, T=None, dense=False):
    """The model of a byte-level run, on the CPU; its validation data, and of these the tokens that evaluate in train.py
    takes, (N, T), and those that follow them.

    T is the model's context. UserError if that is below the T given, or if the model has no router, unless dense.
    """
    model, checkpoint = load_checkpoint(out, "cpu")
    _, data, meta = load_data(ROOT / checkpoint["train"]["data"], checkpoint["meta"])
    T = T or model.config.block_size
    if meta["tokenizer"] != "bytes":
        raise UserError(f"{out} was not trained on bytes")
    if not dense and not model.config.routed_layers:
        raise UserError(f"{out} is a dense model; train one that has routers with `python train.py`")
    if model.config.block_size < T:
        raise UserError(f"{out} has a context of {model.config.block_size}, less than the other's {T}")
    batch = spread_windows(data, T, EVAL_TOKENS)
    return model, data, batch[:, :-1], batch[:, 1:]


@torch.no_grad()
def look(model, x, y, rank=None, **options):
    """The loss at each token of x (N, T), and the Route, (L, N, T) each, or None if the model is dense.

    With rank, top-k takes the tokens that have the highest rank(rows) in these rows of x, rather than by r.
    """
    torch.manual_seed(0)  # where a choice is random
    topk, losses, routes = RoutedBlock.topk, [], []
    for rows in watched(torch.arange(len(x)).split(16), "batches of 16 contexts"):
        with patch.object(RoutedBlock, "topk", lambda block, r, rows=rows: topk(block, rank(rows) if rank else r)):
            logits, _, route = model(x[rows], **options)
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), y[rows], reduction="none"))
        routes.append(route)
    return torch.cat(losses), routes[0] and Route(*(torch.cat(part, 1) for part in zip(*routes, strict=True)))


@torch.no_grad()
def entropy(model, x):
    """Of the distribution of the next byte at each token of x (N, T), in nats, with every routed block skipped."""
    p = [model(rows, causal=True, threshold=math.inf)[0].softmax(dim=-1) for rows in x.split(16)]
    return torch.special.entr(torch.cat(p)).sum(dim=-1)


def read_twice(model, data):
    """Causal loss on half a context of data, and on the same text when it comes a second time."""
    half = model.config.block_size // 2
    twice = spread_windows(data, half - 1, 2**13).repeat(1, 2)
    loss, _ = look(model, twice[:, :-1], twice[:, 1:], causal=True)
    return loss[:, : half - 1].mean(), loss[:, half + 8 :].mean()  # after a few tokens by which the place can be known


def table(title, header, rows):
    lines = [header, ["---"] * len(header), *rows]
    print(f"\n### {title}\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n")


def percent(mask):
    return f"{100 * mask.float().mean():.1f} %" if mask.numel() else "-"


def main(argv):
    parser = Parser(description="Which tokens do the routers of a checkpoint take?")
    parser.add_argument("out", nargs="?", default="out/mod", help="folder of the checkpoint")
    parser.add_argument("--dense", help="folder of a dense model: hard is what has a high loss under it")
    args = parser.parse_args(argv)
    model, data, x, y = load(args.out)
    if model.config.routing == "random":
        raise UserError(f"{args.out} has random routing: there is no choice to look into")
    T = model.config.block_size
    topk, route = look(model, x, y)
    k = int(route.taken[0, 0].sum())
    if k == T:
        raise UserError(f"routed blocks of {args.out} take every token of a context; nothing was chosen")
    skip, _ = look(model, x, y, causal=True, threshold=math.inf)
    dense = args.dense and load(args.dense, T, dense=True)[0]
    hard = look(dense, x, y)[0] if dense else skip
    hard_for = args.dense or "this model without its routed blocks"
    print(f"## {args.out}: {x.numel():,} validation tokens, top-k takes {k} of {T}. Hard: for {hard_for}")
    losses = {
        "top-k": topk,
        "causal": look(model, x, y, causal=True)[0],
        "every routed block skipped": skip,
        "random, as many tokens": look(model, x, y, rank=lambda rows: torch.rand(len(rows), T))[0],
        "oracle: the hardest, as many": look(model, x, y, rank=lambda rows: hard[rows])[0],
    }
    if model.config.predictor:
        with patch.object(RoutedBlock, "above", lambda block, logit, threshold: block.topk(logit)):
            losses["as many in each sequence, by the predictor"] = look(model, x, y, causal=True)[0]
    table(
        "Loss by who is chosen", ("choice", "nats per token"), [(way, f"{v.mean():.4f}") for way, v in losses.items()]
    )
    names = [f"block {i}" for i in model.config.routed_layers]
    columns, all_of = [], x.flatten().bincount(minlength=257)
    for taken in route.taken:
        of = x[taken].bincount(minlength=257)
        share, lift, part = of / all_of, of / all_of * T / k, of / of.sum()
        top = [(ascii(chr(v)).replace("|", "\\|"), share[v], lift[v], part[v]) for v in of.topk(12).indices]
        columns.append([f"{byte} {share:.0%} ({lift:.1f} x), {part:.0%}" for byte, share, lift, part in top])
    title = "The bytes that fill each block: share of the byte that is taken (lift), its part of all that is taken"
    table(title, names, zip(*columns, strict=True))
    kind, position = kinds_of(x), torch.arange(T).expand_as(x) * 4 // T
    loss = (hard.flatten().argsort().argsort() * 4 // hard.numel()).view_as(hard)
    groups = {f"position in the context, quarter {q + 1}": position == q for q in range(4)}
    groups |= {f"loss, quarter {q + 1} (4: hard)": loss == q for q in range(4)}
    groups |= {name: kind == i for i, name in enumerate(KINDS)}
    sets = *route.taken, route.taken.any(0)
    rows = [(name, percent(g), *(percent(taken[g]) for taken in sets)) for name, g in groups.items()]
    table("Share taken", ("of the tokens", "part of the text", *names, "by any block"), rows)
    depth, uncertain = look(model, x, y, causal=True)[1].taken.sum(0), entropy(dense or model, x)
    rows = [(str(n), percent(depth == n), f"{uncertain[depth == n].mean():.3f}") for n in range(len(names) + 1)]
    title = f"Is compute spent where {hard_for} is uncertain? Entropy of the next byte"
    table(title, ("routed blocks that processed the token", "tokens", "mean entropy, nats"), rows)
    readers = {args.out: model} | ({args.dense: dense} if dense else {})
    rows = [(out, *(f"{loss:.3f}" for loss in read_twice(reader, data))) for out, reader in readers.items()]
    table("Has it learned to copy? Causal loss on half a context", ("model", "first reading", "second reading"), rows)


if __name__ == "__main__":
    run(main)
