"""Sampling speed over widths, batch sizes and contexts: writes assets/bench.json, a row for each.

    python experiments/bench.py                             all of it; on a machine that does nothing else
    python experiments/bench.py --n_embd 128 --batch 1      one part of it: the table's other rows stay

The weights are random, which speed doesn't depend on; each router is scaled so that it takes the share of the tokens
that a trained one does, its capacity. Combinations of more than MAX_TOKENS tokens are left out.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mod import MoD, MoDConfig, RoutedBlock  # noqa: E402
from prepare_data import Parser, UserError, run, write_json  # noqa: E402
from sample import WARMUP, bench, bench_table, to_bfloat16  # noqa: E402
from train import pick_device  # noqa: E402

MAX_TOKENS = 2**14  # of a batch and its context; the prompts alone would take minutes
THRESHOLD = 1.0  # what the routers of random_model are scaled for


@torch.no_grad()
def random_model(config, device):
    """A model with random weights, none of them zero, whose routers take `capacity` of the tokens at THRESHOLD."""
    with torch.device(device):
        model = MoD(config).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(std=p.size(-1) ** -0.5)
    idx = torch.randint(config.vocab_size, (max(1, 2048 // config.block_size), config.block_size), device=device)
    routed = [block for block in model.blocks if isinstance(block, RoutedBlock)]
    for i, block in enumerate(routed):  # in order, since the later ones see what the earlier ones do
        r = model(idx, causal=True, threshold=THRESHOLD)[2].r[i]
        block.router.weight /= r.flatten().quantile(1 - config.capacity)
    return model


def check_sizes(args):
    """Raise UserError for numbers that nothing can be measured with."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number < 1:
                raise UserError(f"--{name} {number} must be at least 1")
            if name == "n_embd" and number % 64:
                raise UserError(f"--n_embd {number} must be a multiple of 64, the size of a head")
            if name == "n_layer" and number < 2:
                raise UserError("--n_layer 1 has no routed block, which the second one would be")
            if name == "context" and number < args.num_tokens + 12:  # bench_cuda.py needs so many
                raise UserError(f"--context {number} must be at least --num_tokens + 12, since a prompt comes first")


def key_of(row):
    return row["device"], row["dtype"], row["n_layer"], row["n_embd"], row["context"], row["batch"]


def main(argv):
    parser = Parser(description="Sampling speed over widths, batch sizes and contexts.")
    parser.add_argument("--n_embd", type=int, nargs="+", default=[128, 256, 512, 768], help="multiples of 64")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024], help="length of the text at the end")
    parser.add_argument("--n_layer", type=int, default=8)
    parser.add_argument("--num_tokens", type=int, default=64, help="steps timed in each of the rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "bench.json")
    args = parser.parse_args(argv)
    check_sizes(args)
    device = pick_device(args.device)
    rows = {}
    if args.out.exists():
        try:
            rows = {key_of(row): row for row in json.loads(args.out.read_text(encoding="utf-8"))["rows"]}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{args.out} is no table of this script; move it away or give another --out") from error
    for n_embd, context in itertools.product(args.n_embd, args.context):
        torch.manual_seed(0)
        config = MoDConfig(block_size=context, n_layer=args.n_layer, n_head=n_embd // 64, n_embd=n_embd)
        model = random_model(config, device)
        if args.dtype == "bfloat16":
            model = to_bfloat16(model)
        for batch in args.batch:
            if batch * context > MAX_TOKENS:
                print(f"left out, too many tokens: batch {batch} x context {context}", file=sys.stderr)
                continue
            shape = (batch, context - WARMUP - args.num_tokens)
            prompt = torch.randint(config.vocab_size, shape, device=device)
            row = bench(model, prompt, args.num_tokens, args.rounds, THRESHOLD)
            rows[key_of(row)] = row
            print(bench_table(row), end="\n\n", flush=True)
            write_json(args.out, {"rows": [rows[key] for key in sorted(rows)]})


if __name__ == "__main__":
    run(main)
