"""Speed beside other models, on a machine that does nothing else; each command writes a table of assets/.

    python experiments/bench.py             bench.json: sampling, over widths, batch sizes and contexts
    python experiments/bench.py step        step_time.json: a training step, MoD and dense of the same shape
    python experiments/bench.py peers       bench_peers.json: sampling, beside GPT-2 (pip install transformers first)

    python experiments/bench.py --n_embd 128 --batch 1      one part of bench.json: its other rows stay
    python experiments/bench.py step --help                 the flags of that table

What is compared takes turns; figures are medians over rounds. Weights are random, which speed doesn't depend on; for
sampling each router is scaled so that it takes the share of the tokens that a trained one does, its capacity.
"""

import itertools
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mod import MoD, MoDConfig, RoutedBlock, choice_loss  # noqa: E402
from prepare_data import Parser, UserError, run, write_json  # noqa: E402
from sample import (  # noqa: E402
    WARMUP,
    bench,
    bench_table,
    computing_all,
    dense_twin,
    device_name,
    generate_without_cache,
    store_by_columns,
    time_steps,
    to_bfloat16,
)
from train import make_optimizers, pick_device, step_flops, use_threads  # noqa: E402

MAX_TOKENS = 2**14  # of a batch and its context; the prompts alone would take minutes
THRESHOLD = 1.0  # what the routers of random_model are scaled for


def make_parser(about, n_embd, rounds, out):
    """A Parser with the flags that all tables have."""
    parser = Parser(description=about, allow_abbrev=False)
    parser.add_argument("--n_embd", type=int, nargs="+", default=n_embd, help="multiples of 64")
    parser.add_argument("--n_layer", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / out)
    return parser


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
    return store_by_columns(model)


# ---------------------------------------------------------------------------------------------------------
# Sampling


def sampling_row(model, prompt, num_tokens, rounds):
    """The row of sample.py's bench for prompt (B, T), and how fast the prompt is run: a dict.

    *_prefill_tok_s count its tokens up to the first that is drawn, topk_forward_tok_s in a forward pass as in training.
    """
    use_threads(len(prompt), model.config.n_embd)
    row = bench(model, prompt, num_tokens, rounds, THRESHOLD)
    models = {"fast": model, "all_blocks": computing_all(model), "dense": dense_twin(model)}
    rates = defaultdict(list)
    for _ in range(rounds + 1):
        passes = {f"{way}_prefill": models[way].generate(prompt, 1, threshold=THRESHOLD) for way in models}
        passes["topk_forward"] = map(model, [prompt])  # lazy: runs when it is timed
        for name, steps in passes.items():
            torch.manual_seed(0)
            with torch.inference_mode():
                seconds, _ = time_steps(1, steps, prompt.device)
            rates[f"{name}_tok_s"].append(prompt.numel() / seconds)
    return {**row, **{name: statistics.median(values[1:]) for name, values in rates.items()}}


def key_of(row):
    return row["device"], row["dtype"], row["n_layer"], row["n_embd"], row["context"], row["batch"]


def sampling(argv):
    parser = make_parser("Sampling speed.", [128, 256, 512, 768], 5, "bench.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024], help="length of the text at the end")
    parser.add_argument("--num_tokens", type=int, default=64, help="steps timed in each of the rounds")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
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
            row = sampling_row(model, prompt, args.num_tokens, args.rounds)
            rows[key_of(row)] = row
            prefill = "fast_prefill", "dense_prefill", "topk_forward"
            rates = [f"{row[f'{name}_tok_s']:,.0f}" for name in prefill]
            print(bench_table(row))
            print("prompt: {} tokens/s, dense {}; a forward pass as in training {}\n".format(*rates), flush=True)
            write_json(args.out, {"rows": [rows[key] for key in sorted(rows)]})


# ---------------------------------------------------------------------------------------------------------
# A training step


def training_steps(model, idx, network):
    """Trains model on idx (B, T) for ever: forward, by network, which may be compiled; backward and optimizer."""
    optimizers = make_optimizers(model, 0.1, 1, 0.1)
    while True:
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=idx.device.type == "cuda"):
            _, loss, route = network(idx, idx)
        (loss if route is None else loss + choice_loss(route)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield


def step(argv):
    parser = make_parser("Training step time, MoD and dense.", [128, 256, 512], 9, "step_time.json")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)
    check_sizes(args)
    device = pick_device(args.device)
    rows = []
    for n_embd in args.n_embd:
        shape = dict(n_embd=n_embd, n_head=n_embd // 64, n_layer=args.n_layer, block_size=args.block_size)
        steps, flops = [], []
        for capacity in (MoDConfig.capacity, 1.0):
            torch.manual_seed(0)
            model = MoD(MoDConfig(**shape, capacity=capacity)).to(device)
            use_threads(args.batch_size * args.block_size, n_embd)
            idx = torch.randint(model.config.vocab_size, (args.batch_size, args.block_size), device=device)
            network = torch.compile(model, fullgraph=True) if args.compile else model
            steps.append(training_steps(model, idx, network))
            flops.append(step_flops(model, idx.numel()))
        times = [[time_steps(1, of, device)[0] for of in steps] for _ in range(args.rounds + 2)][2:]
        row = {
            "device": device_name(device),
            "torch": torch.__version__,
            "compiled": args.compile,
            **shape,
            "tokens": args.batch_size * args.block_size,
            "mod_s": statistics.median(mod for mod, _ in times),
            "dense_s": statistics.median(dense for _, dense in times),
            "ratio": statistics.median(mod / dense for mod, dense in times),
            "flops_ratio": flops[0] / flops[1],
        }
        rows.append(row)
        print(
            f"{row['device']}: {n_embd} wide, {row['tokens']} tokens a step: {row['mod_s']:.3f} s, dense "
            f"{row['dense_s']:.3f} s; ratio {row['ratio']:.3f}, of FLOPs {row['flops_ratio']:.3f}, "
            f"{row['ratio'] / row['flops_ratio']:.3f} x",
            flush=True,
        )
    write_json(args.out, {"rows": rows})


# ---------------------------------------------------------------------------------------------------------
# Is the dense baseline that sampling is compared with a fast one? GPT-2 of the same shape, in float32, one text at a
# time, greedy (but for the dense model without a cache). GPT-2 code without a cache, such as nanoGPT's generate, does
# what the last two ways do: the whole text anew for each token.


@torch.inference_mode()
def generate_gpt2(model, idx, use_cache=True):
    """Continue idx (1, T) for ever. Yields tokens (1, 1). The plain loop, which is faster than model.generate."""
    text = feed = idx
    past = None
    while True:
        output = model(feed, past_key_values=past, use_cache=use_cache, logits_to_keep=1)
        past, token = output.past_key_values, output.logits[:, -1].argmax(dim=-1, keepdim=True)
        text = torch.cat((text, token), dim=1)
        feed = token if use_cache else text
        yield token


def peers(argv):
    parser = make_parser("Sampling speed beside GPT-2.", [128, 256, 512, 768], 5, "bench_peers.json")
    parser.add_argument("--context", type=int, default=256, help="length of the text at the end")
    parser.add_argument("--num_tokens", type=int, default=64, help="steps timed in each of the rounds")
    args = parser.parse_args(argv)
    check_sizes(args)
    try:
        import transformers
    except ImportError as problem:
        raise UserError(f"cannot import transformers ({problem}): pip install transformers") from None
    device = pick_device(args.device)
    rows = []
    print(f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}; tokens/s")
    for n_embd in args.n_embd:
        torch.manual_seed(0)
        shape = dict(n_layer=args.n_layer, n_head=n_embd // 64, n_embd=n_embd)
        use_threads(1, n_embd)
        mod = random_model(MoDConfig(block_size=args.context, **shape), device)
        dense = dense_twin(mod)
        gpt2_config = transformers.GPT2Config(
            vocab_size=257, n_positions=args.context, bos_token_id=None, eos_token_id=None, **shape
        )
        gpt2 = transformers.GPT2LMHeadModel(gpt2_config).to(device).eval()
        prompt = torch.randint(257, (1, args.context - WARMUP - args.num_tokens), device=device)
        rates = defaultdict(list)
        for _ in range(args.rounds + 1):
            ways = {
                "mod": mod.generate(prompt, args.context, temperature=0, threshold=THRESHOLD),
                "dense": dense.generate(prompt, args.context, temperature=0),
                "gpt2": generate_gpt2(gpt2, prompt),
                "dense_no_cache": generate_without_cache(dense, prompt, 0.0),
                "gpt2_no_cache": generate_gpt2(gpt2, prompt, use_cache=False),
            }
            for way, steps in ways.items():
                n = args.num_tokens if "no_cache" not in way else max(1, args.num_tokens // 4)
                time_steps(WARMUP, steps, device)
                rates[f"{way}_tok_s"].append(n / time_steps(n, steps, device)[0])
        medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
        rows.append(
            {"device": device_name(device), "dtype": "float32", **shape, "context": args.context, **medians,
             "torch": torch.__version__, "transformers": transformers.__version__}
        )  # fmt: skip
        print(n_embd, *(f"{name.removesuffix('_tok_s')} {value:,.1f}" for name, value in medians.items()), flush=True)
        write_json(args.out, {"rows": rows})


def main(argv):
    tables = {"sampling": sampling, "step": step, "peers": peers}
    name, flags = (argv[0], argv[1:]) if argv and argv[0] in tables else ("sampling", argv)
    tables[name](flags)


if __name__ == "__main__":
    run(main)
