"""Looks inside the routers of a checkpoint: which tokens they take, how firmly, and what another choice would give.

    python experiments/router_stats.py out/mod                          markdown tables on standard output
    python experiments/router_stats.py out/mod --dense out/dense_half   "hard" means: to that model
    python experiments/router_stats.py out/mod --other out/mod_seed_1   do both take the same tokens?

On the validation tokens that train.py watches during a byte-level run. "Taken" means by top-k; a token's loss, in
nats, is that of the prediction made at it.
"""

import keyword
import math
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
    """The model of a byte-level run, on the CPU, and its validation data, tokens (N, T) and those that follow them.

    They are the ones that evaluate in train.py takes. T is the model's context; UserError if that is below the T given,
    or if the model has no router, unless dense.
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
    return model, batch[:, :-1], batch[:, 1:]


@torch.no_grad()
def look(model, x, y, rank=None, **options):
    """The loss at each token of x (N, T), and the Route, (L, N, T) each, or None if the model is dense.

    With rank, top-k takes the tokens that have the highest rank(rows) in these rows of x, rather than by r.
    """
    torch.manual_seed(0)  # where a choice is random
    own, losses, routes = RoutedBlock.rank, [], []
    for rows in torch.arange(len(x)).split(16):
        if rank:
            RoutedBlock.rank = lambda block, r, rows=rows: rank(rows)
        logits, _, route = model(x[rows], **options)
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), y[rows], reduction="none"))
        routes.append(route)
    RoutedBlock.rank = own
    return torch.cat(losses), routes[0] and Route(*(torch.cat(part, 1) for part in zip(*routes, strict=True)))


@torch.no_grad()
def look_by_predictor(model, x, y):
    """The loss at each token of x (N, T) when a block takes the k of a sequence that its predictor finds likeliest."""
    own, k = RoutedBlock.decide, model.config.k(x.size(1))

    def decide(block, seen, r):
        logit = own(block, seen, r)
        return logit - logit.sort(dim=1, descending=True).values[:, k : k + 1]

    RoutedBlock.decide = decide
    loss, _ = look(model, x, y, causal=True)
    RoutedBlock.decide = own
    return loss


def table(title, header, rows):
    lines = [header, ["---"] * len(header), *rows]
    print(f"\n### {title}\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n")


def percent(mask):
    return f"{100 * mask.float().mean():.1f} %" if mask.numel() else "-"


def main(argv):
    parser = Parser(description="Which tokens do the routers of a checkpoint take?")
    parser.add_argument("out", nargs="?", default="out/mod", help="folder of the checkpoint")
    parser.add_argument("--dense", help="folder of a dense model: hard is what has a high loss under it")
    parser.add_argument("--other", help="folder of a checkpoint whose choice is compared with this one's")
    args = parser.parse_args(argv)
    model, x, y = load(args.out)
    T, k = model.config.block_size, model.config.k(model.config.block_size)
    if k == T:
        raise UserError(f"routed blocks of {args.out} take every token of a context; nothing was chosen")
    topk, route = look(model, x, y)
    skip, _ = look(model, x, y, causal=True, threshold=math.inf)
    hard = look(load(args.dense, T, dense=True)[0], x, y)[0] if args.dense else skip
    hard_for = args.dense or "this model without its routed blocks"
    print(f"## {args.out}: {x.numel():,} validation tokens, top-k takes {k} of {T}. Hard: for {hard_for}")
    losses = {
        "top-k": topk,
        "causal": look(model, x, y, causal=True)[0],
        "every routed block skipped": skip,
        "random, as many tokens": look(model, x, y, rank=lambda rows: torch.rand(len(rows), T))[0],
        "oracle: the hardest, as many": look(model, x, y, rank=lambda rows: hard[rows])[0],
    }
    if model.config.has_predictor:
        losses["as many in each sequence, by the predictor"] = look_by_predictor(model, x, y)
    position = torch.arange(T).expand_as(x) * 4 // T
    parts = [position >= 0, *(position == quarter for quarter in range(4))]
    rows = [
        (way, f"{v.mean():.4f}", *(f"{(v - topk)[part].mean():+.4f}" for part in parts)) for way, v in losses.items()
    ]
    quarters = [f"in quarter {quarter + 1} of the context" for quarter in range(4)]
    table("Loss by who is chosen", ("choice", "nats per token", "over top-k", *quarters), rows)
    names = [f"block {i}" for i in model.config.routed_layers]
    rows, columns, all_of = [], [], x.flatten().bincount(minlength=257)
    for name, taken, r, logit in zip(names, *route, strict=True):
        gap = -r.sort(descending=True).values.diff()[:, k - 1].mean()
        numbers = [f"{number:.3f}" for number in (r.std(), r[taken].mean(), r[~taken].mean(), gap)]
        rows.append((name, *numbers, percent((logit > 0) == taken), percent(logit[taken] > 0)))
        of = x[taken].bincount(minlength=257)
        share, lift, part = of / all_of, of / all_of * T / k, of / of.sum()
        top = [(ascii(chr(v)).replace("|", "\\|"), share[v], lift[v], part[v]) for v in of.topk(12).indices]
        columns.append([f"{byte} {share:.0%} ({lift:.1f} x), {part:.0%}" for byte, share, lift, part in top])
    header = "block", "std of r", "mean r, taken", "not taken", "k-th r above the next by", "agree", "recall"
    table("How firmly: the router's r, and the causal decision on the same tokens", header, rows)
    title = "The bytes that fill each block: share of the byte that is taken (lift), its part of all that is taken"
    table(title, names, zip(*columns, strict=True))
    kind = kinds_of(x)
    loss = (hard.flatten().argsort().argsort() * 4 // hard.numel()).view_as(hard)
    groups = {f"position in the context, quarter {q + 1}": position == q for q in range(4)}
    groups |= {f"loss, quarter {q + 1} (4: hard)": loss == q for q in range(4)}
    groups |= {name: kind == i for i, name in enumerate(KINDS)}
    sets = *route.taken, route.taken.any(0)
    rows = [(name, percent(g), *(percent(taken[g]) for taken in sets)) for name, g in groups.items()]
    table("Share taken", ("of the tokens", "part of the text", *names, "by any block"), rows)
    if args.other:
        other = look(load(args.other, T)[0], x, y)[1].taken
        rows = [(name, *(percent(b[a]) for b in other)) for name, a in zip(names, route.taken, strict=True)]
        title = f"Of what a block takes, that which blocks of {args.other} take too (by chance {k / T:.1%})"
        table(title, ("block", *(f"its routed block {j + 1}" for j in range(len(other)))), rows)


if __name__ == "__main__":
    run(main)
