"""Does skipping pay on a GPU? Sampling at batch 1 on CUDA, with Python (as sample.py does it) and without.

    python experiments/bench_cuda.py              writes assets/bench_cuda.json, a row a width

Without Python: of the dense model a whole step is one CUDA graph, replayed without ever waiting for the device. MoD's
step is cut where the next decision is known: the host waits for one bit, and only if it is a yes, replays the graph
of that routed block. Once with torch's own kernels, once with those that torch.compile makes. Weights are random, in
bfloat16 (routers in float32), routers scaled as in bench.py. Each row is checked first: the graphs must give the
logits that model.generate gives.
"""

import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.bench import THRESHOLD, check_sizes, random_model, sampling_row  # noqa: E402
from mod import MoDConfig, RoutedBlock, flops_per_token, norm  # noqa: E402
from prepare_data import Parser, UserError, run, write_json  # noqa: E402
from sample import dense_twin, device_name, time_steps, to_bfloat16  # noqa: E402
from train import dense_flops, pick_device  # noqa: E402


class StaticCache:
    """A KVCache of one row whose shapes never change: attention sees all of the buffer, and a mask of what is real."""

    def __init__(self, kv, room):
        self.k, self.v = (F.pad(x[:, :, : kv.length[0]], (0, 0, 0, room)) for x in (kv.k, kv.v))
        self.begin = kv.length[0]
        self.length = torch.tensor([self.begin], device=kv.k.device)

    def update(self, k, v):
        self.k.index_copy_(2, self.length, k)
        self.v.index_copy_(2, self.length, v)
        mask = torch.arange(self.k.size(2), device=k.device) <= self.length
        self.length += 1
        return self.k, self.v, mask[None, None, None]


# The parts of a step, on x (1, 1, C). They are functions of tensors and modules alone, for torch.compile.


def embed(model, text, position):
    embedded = norm(model.embedding(text))  # of the last four tokens
    x, _ = model.mix(embedded[:, 3:], embedded[:, :3])
    return x, model.rope.index_select(0, position)


def dense_block(block, x, rope, cache):
    return x + block(x, rope, cache)


def decide(block, x):
    r, logit = block.score(x)
    return block.gate(r), logit > THRESHOLD


def routed_block(block, x, rope, gate, cache):
    return x + (gate[..., None] * block.block(x, rope, cache)).to(x.dtype)


def predict(model, x):
    return model.head(norm(x))[:, -1].float()


class GraphDecoder:
    """Continues prompt (1, T), by at most `room` tokens at a time, in CUDA graphs."""

    def __init__(self, model, prompt, room, compiled):
        wrap = (lambda f: torch.compile(f, fullgraph=True)) if compiled else (lambda f: f)
        do = {f.__name__: wrap(f) for f in (embed, dense_block, decide, routed_block, predict)}
        cache = model.new_cache(1)
        logits, _ = model.extend(prompt, cache, THRESHOLD)
        self.caches = [StaticCache(kv, room) for kv in cache.blocks]
        self.prompt, self.logits = prompt, logits.float()
        self.text, self.position = prompt[:, -4:].clone(), torch.tensor([prompt.size(1)], device=prompt.device)
        self.x, self.rope = do["embed"](model, self.text, self.position)
        self.gate = torch.zeros(1, 1, device=prompt.device)
        self.yes = torch.zeros(1, 1, dtype=torch.bool, pin_memory=True)
        self.parts = []  # of a step: (graph, whether self.yes then says that the next one may be skipped)

        def begin():
            x, rope = do["embed"](model, self.text, self.position)
            self.rope.copy_(rope)
            return x

        def end(x):
            self.logits.copy_(do["predict"](model, x))
            token = (self.logits.softmax(dim=-1) / torch.empty_like(self.logits).exponential_()).argmax(-1)
            self.text.copy_(torch.cat((self.text[:, 1:], token[:, None]), dim=1))
            self.position += 1

        waiting = [begin]  # what belongs into the same graph, each a function of the one before's result

        def flush():
            todo = list(waiting)
            waiting.clear()

            def part():
                x = todo[0]()
                for f in todo[1:]:
                    x = f(x)

            return self.capture(part)

        for block, kv in zip(model.blocks, self.caches, strict=True):
            if not isinstance(block, RoutedBlock):
                waiting.append(lambda x, b=block, kv=kv: do["dense_block"](b, x, self.rope, kv))
                continue

            def ask(x, block=block):
                gate, yes = do["decide"](block, x)
                self.x.copy_(x)
                self.gate.copy_(gate)
                self.yes.copy_(yes, non_blocking=True)

            waiting.append(ask)
            self.parts.append((flush(), True))
            waiting.append(lambda b=block, kv=kv: self.x.copy_(do["routed_block"](b, self.x, self.rope, self.gate, kv)))
            self.parts.append((flush(), False))
            waiting.append(lambda: self.x)
        waiting.append(end)
        self.parts.append((flush(), False))
        self.reset()

    def capture(self, part):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                part()
                for kv in self.caches:
                    kv.length.fill_(kv.begin)
                self.position.fill_(self.prompt.size(1))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            part()
        return graph

    def reset(self):
        for kv in self.caches:
            kv.length.fill_(kv.begin)
        self.position.fill_(self.prompt.size(1))
        self.text.copy_(self.prompt[:, -4:])

    def steps(self):
        """Yields how many routed blocks took the token, for ever; the device may still be at work on it."""
        while True:
            skip, taken = False, 0
            for graph, asks in self.parts:
                if not skip:
                    graph.replay()
                skip = False
                if asks:
                    torch.cuda.current_stream().synchronize()
                    skip = not self.yes.item()
                    taken += not skip
            yield taken


@torch.inference_mode()
def compare(model, prompt, num_tokens, rounds):
    """The row of bench.py, and graph_tok_s, graph_dense_tok_s, compiled_tok_s, compiled_dense_tok_s."""
    row = sampling_row(model, prompt, num_tokens, rounds)
    models = {"": model, "_dense": dense_twin(model)}
    decoders = {}
    for kind, compiled in (("graph", False), ("compiled", True)):
        for which in models:
            decoders[f"{kind}{which}"] = GraphDecoder(models[which], prompt, num_tokens + 1, compiled)
    for way, decoder in decoders.items():  # the prompt's last token once more, at the position after it
        which = models["_dense" if way.endswith("_dense") else ""]
        cache = which.new_cache(1)
        which.extend(prompt, cache, THRESHOLD)
        expected, _ = which.extend(prompt[:, -1:], cache, THRESHOLD)
        decoder.text.copy_(torch.cat((prompt[:, -3:], prompt[:, -1:]), dim=1))
        next(decoder.steps())
        error = (decoder.logits - expected.float()).norm() / expected.float().norm()
        if not error < 0.05:  # bfloat16, and other kernels
            raise UserError(f"{way}, {model.config.n_embd} wide: logits are {error:.3f} off, relative to their norm")
    taken, rates = [], {way: [] for way in decoders}
    for _ in range(rounds):
        for way, decoder in decoders.items():
            decoder.reset()
            torch.manual_seed(0)
            seconds, counts = time_steps(num_tokens, decoder.steps(), prompt.device)
            rates[way].append(num_tokens / seconds)
            if way == "graph":
                taken += counts
    config = model.config
    share = sum(taken) / len(taken) / len(config.routed_layers)
    length = 2 * prompt.size(1) + num_tokens  # a text of this length has as many keys for its mean position
    return {
        **row,
        "graph_share": share,
        "graph_ideal": dense_flops(config, length) / flops_per_token(config, length, share),
        **{f"{way}_tok_s": statistics.median(rates[way]) for way in decoders},
    }


def main(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_embd", type=int, nargs="+", default=[384, 768, 1536, 3072], help="multiples of 64")
    parser.add_argument("--n_layer", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="length of the text at the end, about")
    parser.add_argument("--num_tokens", type=int, default=128, help="steps timed in each of the rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "bench_cuda.json")
    args = parser.parse_args(argv)
    check_sizes(args)
    device = pick_device("cuda")
    rows = []
    print(f"{device_name(device)}, torch {torch.__version__}, bfloat16, batch 1, context {args.context}: tokens/s")
    print(f"{'n_embd':>8}{'':12}{'MoD':>10}{'dense':>10}{'ratio':>8}{'ideal':>8}")
    for n_embd in args.n_embd:
        torch.manual_seed(0)
        torch._dynamo.reset()
        config = MoDConfig(block_size=args.context, n_layer=args.n_layer, n_head=n_embd // 64, n_embd=n_embd)
        model = to_bfloat16(random_model(config, device))
        shape = (1, args.context - args.num_tokens - 8)
        row = compare(model, torch.randint(config.vocab_size, shape, device=device), args.num_tokens, args.rounds)
        rows.append(row)
        for name, ours, dense, ideal in (
            ("eager", "fast", "dense", "ideal"),
            ("graphs", "graph", "graph_dense", "graph_ideal"),
            ("compiled", "compiled", "compiled_dense", "graph_ideal"),
        ):
            a, b = row[f"{ours}_tok_s"], row[f"{dense}_tok_s"]
            print(f"{n_embd:>8}  {name:10}{a:>10,.0f}{b:>10,.0f}{a / b:>8.2f}{row[ideal]:>8.2f}", flush=True)
        write_json(args.out, {"rows": rows})


if __name__ == "__main__":
    run(main)
