"""Is the dense baseline that sampling is compared with a fast one? Against GPT-2 of the same shape in transformers.

    pip install transformers && python experiments/bench_peers.py

One text at a time, greedy (but for the dense model without a cache), float32 on this device; the ways take turns,
medians over rounds. All have random weights. The last two are what GPT-2 code without a cache does (nanoGPT's generate,
for one): the whole text anew for each token. Writes assets/bench_peers.json.
"""

import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.bench import THRESHOLD, check_sizes, random_model  # noqa: E402
from mod import MoDConfig  # noqa: E402
from prepare_data import Parser, UserError, run, write_json  # noqa: E402
from sample import WARMUP, dense_twin, device_name, generate_without_cache, time_steps  # noqa: E402
from train import pick_device  # noqa: E402


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


def ways(mod, dense, gpt2, prompt, n):
    """The ways to continue prompt, each an iterator that has not begun."""
    return {
        "mod": mod.generate(prompt, n, temperature=0, threshold=THRESHOLD),
        "dense": dense.generate(prompt, n, temperature=0),
        "gpt2": generate_gpt2(gpt2, prompt),
        "dense_no_cache": generate_without_cache(dense, prompt, 0.0),
        "gpt2_no_cache": generate_gpt2(gpt2, prompt, use_cache=False),
    }


def main(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_embd", type=int, nargs="+", default=[128, 256, 512, 768], help="multiples of 64")
    parser.add_argument("--n_layer", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="length of the text at the end")
    parser.add_argument("--num_tokens", type=int, default=64, help="steps timed in each of the rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    check_sizes(args)
    try:
        import transformers
    except ImportError:
        raise UserError("this needs the package transformers: pip install transformers") from None
    device = pick_device(args.device)
    rows = []
    print(f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}; tokens/s")
    for n_embd in args.n_embd:
        torch.manual_seed(0)
        shape = dict(n_layer=args.n_layer, n_head=n_embd // 64, n_embd=n_embd)
        mod = random_model(MoDConfig(block_size=args.context, **shape), device)
        dense = dense_twin(mod)
        gpt2_config = transformers.GPT2Config(
            vocab_size=257, n_positions=args.context, bos_token_id=None, eos_token_id=None, **shape
        )
        gpt2 = transformers.GPT2LMHeadModel(gpt2_config).to(device).eval()
        prompt = torch.randint(257, (1, args.context - WARMUP - args.num_tokens), device=device)
        rounds = []
        for _ in range(args.rounds + 1):
            rates = {}
            for way, steps in ways(mod, dense, gpt2, prompt, args.context).items():
                n = args.num_tokens if "no_cache" not in way else max(1, args.num_tokens // 4)
                time_steps(WARMUP, steps, device)
                rates[f"{way}_tok_s"] = n / time_steps(n, steps, device)[0]
            rounds.append(rates)
        medians = {name: statistics.median(rates[name] for rates in rounds[1:]) for name in rounds[0]}
        rows.append(
            {"device": device_name(device), "dtype": "float32", **shape, "context": args.context, **medians,
             "torch": torch.__version__, "transformers": transformers.__version__}
        )  # fmt: skip
        print(n_embd, *(f"{name.removesuffix('_tok_s')} {value:,.1f}" for name, value in medians.items()))
        write_json(ROOT / "assets" / "bench_peers.json", {"rows": rows})


if __name__ == "__main__":
    run(main)
