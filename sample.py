"""Text out of a checkpoint, through the fast path: a block that skips a token does no work for it.

    python sample.py --prompt "def "            text, streamed; - as the prompt reads standard input
    python sample.py --show_depth               each token shaded by how many routed blocks processed it
    python sample.py --html page.html           the same as a page to explore in a browser
    python sample.py --bench                    tokens per second: fast path, every block computed, dense, no cache;
                                                and what --threshold trades: loss against compute

The text goes to standard output, everything else to standard error.
"""

import codecs
import copy
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
import unicodedata
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mod import Cache, MoD, RoutedBlock, flops_per_token, sample
from prepare_data import UserError, encode, get_tokenizer, load_data, make_parser, option, run, write_atomic
from train import EVAL_TOKENS, dense_flops, load_checkpoint, pick_device, spread_windows, use_threads

PAGE = Path(__file__).resolve().parent / "assets" / "page.html"  # the template of --html
WARMUP = 3  # steps that are not timed: the prompt's, and two single tokens


@dataclass
class SampleConfig:
    out: str = option("out/mod", "folder of the checkpoint")
    prompt: str | None = option(
        None, "text to continue; - reads standard input, '' means end-of-text (default: one that suits the run's data)"
    )
    num_tokens: int = option(400, "tokens to draw")
    num_samples: int = option(1, "texts to draw, one after the other, with seed, seed + 1, ...")
    temperature: float = option(0.8, "below 1 is more cautious; 0 always takes the likeliest token")
    top_k: int | None = option(None, "draw among this many of the likeliest tokens (default: all)")
    top_p: float | None = option(None, "draw among the likeliest that hold this probability (default: all)")
    seed: int = option(0, "of the draws")
    threshold: float = option(0.0, "what a router's (or predictor's) output must exceed for its block to take a token")
    show_depth: bool = option(False, "shade each token by how many routed blocks processed it")
    html: str | None = option(None, "write a page to explore to this file, too")
    bench: bool = option(
        False, "measure speed and the compute dial instead, with prompt and threshold; writes bench.json into out"
    )
    device: str | None = option(None, "cuda, mps or cpu (default: the best there is)")
    dtype: str = option("float32", "of the weights and the KV cache", ("float32", "bfloat16"))


def check(config):
    """Raise UserError for a value that can't work."""
    for name, works, must in (
        ("num_tokens", config.num_tokens >= 1, "be at least 1"),
        ("num_samples", config.num_samples >= 1, "be at least 1"),
        ("temperature", 0 <= config.temperature < math.inf, "be 0 or above"),
        ("top_k", config.top_k is None or config.top_k >= 1, "be at least 1"),
        ("top_p", config.top_p is None or 0 < config.top_p <= 1, "be above 0 and at most 1"),
        ("seed", 0 <= config.seed < 2**31, "be 0 or above, and below 2**31"),
        ("threshold", not math.isnan(config.threshold), "be a number; inf skips every routed block, -inf none"),
        ("html", not (config.html and Path(config.html).is_dir()), "be a file, not a folder"),
    ):
        if not works:
            raise UserError(f"--{name} {getattr(config, name)} must {must}")
    if config.bench and (config.html or config.show_depth):
        raise UserError("--bench prints no text, so --html and --show_depth have nothing to show; leave them out")


def to_bfloat16(model):
    """The model, its weights now in bfloat16; but those that decide stay in float32, as they were trained."""
    for name, p in model.named_parameters():
        if ".router." not in name and ".predictor." not in name:
            p.data = p.data.bfloat16()
    return model


def store_by_columns(model):
    """The model, its large matrices now laid out by columns, values unchanged: a CPU multiplies a lone token by them up
    to 1.3 times as fast. Not for training: optimizers and checkpoints should see plain tensors."""
    for name, p in model.named_parameters():
        if name.endswith(("qkv.weight", "up.weight", "head.weight")):
            p.data = p.data.t().contiguous().t()
    return model


def read_prompt(text, tokenizer):
    """The ids of a prompt, at least one. Raises UserError for what can't be encoded."""
    try:  # surrogateescape: bytes of the command line that were not UTF-8 survive
        data = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt has half a character in it ({error}); write it whole") from error
    return encode(tokenizer, data, "the prompt").tolist() or [tokenizer.eot_token]


# ---------------------------------------------------------------------------------------------------------
# Tokens, and what they cost


@dataclass
class Token:
    id: int
    probability: float | None = None  # that the model gave it; None for the prompt's
    route: torch.Tensor | None = None  # (3, L): Route's taken, r and logit; None if it was not fed to a router
    depth: int | None = None  # how many routed blocks processed it, or likewise None


@dataclass
class Cost:
    seconds: float = 0.0  # spent in the steps that were timed
    timed: int = 0  # how many these were
    fed: int = 0  # tokens that the routed blocks were asked about
    depth: int = 0  # the sum of their depths
    cache: Cache | None = None  # of the last text


def draw(model, prompt, config, cost):
    """Continue prompt, a list of ids. Yields lists of Tokens: the prompt's, then each that is drawn, at once.

    A token is fed to the model to draw the next one: so it has its route when the next list is yielded. The last one
    is never fed, nor is what a long prompt has outside the context. Adds to cost, a Cost.
    """
    options = (config.temperature, config.top_k, config.top_p, config.threshold)
    steps = model.generate(torch.tensor([prompt], device=model.rope.device), config.num_tokens, *options)
    new = [Token(id) for id in prompt]
    for i in range(config.num_tokens):
        yield new
        start = time.perf_counter()
        drawn, logits, route, cost.cache = next(steps)
        id = drawn.item()  # waits for the device
        if i >= WARMUP:
            cost.seconds += time.perf_counter() - start
            cost.timed += 1
        if route is not None:
            routes = torch.stack([x[:, 0].float() for x in route]).cpu().unbind(-1)  # (3, L) for each token fed
            # From the end: of a prompt longer than the context only its last tokens were fed. And where the window
            # slid, older tokens were fed a second time, before the new one.
            for token, its_route in zip(reversed(new), reversed(routes), strict=False):
                token.route, token.depth = its_route, int(its_route[0].sum())
                cost.fed, cost.depth = cost.fed + 1, cost.depth + token.depth
        new = [Token(id, logits[0].float().softmax(dim=-1)[id].item())]
    yield new


def cache_bytes(cache):
    """Bytes of the keys and values that a Cache holds; its buffers may be larger."""
    return sum(2 * sum(kv.length) * kv.k[0, :, 0].numel() * kv.k.element_size() for kv in cache.blocks)


def report(model, cost):
    """Speed, compute and memory as lines for a person."""
    config, weight, T = model.config, model.embedding.weight, cost.cache.length
    rate = f"{cost.timed / cost.seconds:,.1f} tokens/s" if cost.timed else "too few tokens to time"
    lines = [f"{rate} ({device_name(weight.device)}, {weight.dtype}, batch 1; the first {WARMUP} steps left out)"]
    if cost.fed:
        share = cost.depth / (cost.fed * len(config.routed_layers))
        flops, used = flops_per_token(config, T, share), cache_bytes(cost.cache)
        dense, dense_used = dense_flops(config, T), 2 * config.n_layer * T * config.n_embd * weight.element_size()
        lines += [
            f"{1 - share:.1%} of the routed blocks skipped",
            f"{flops:,.0f} forward FLOPs per token, {flops / dense:.2f} of a dense model's of the same shape",
            f"{used:,} bytes of KV cache, {used / dense_used:.2f} of a dense model's",
        ]
    return lines


# ---------------------------------------------------------------------------------------------------------
# --show_depth, and what else a terminal needs

SHADES = (230, 222, 215, 208, 202)  # of a terminal's 256 colours, for few blocks to all of them
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def harmless(text):
    """text with its control characters, but for newline and tab, written out: nothing in it acts on a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: ascii(c[0])[1:-1], text)


def visible(text):
    """A token's text, all of it to be seen, in columns of its own. Newlines still end a line."""
    pictures = {"\n": "↵\n", "\t": "⇥"}
    shown = "".join(c if c.isprintable() else pictures.get(c) or ascii(c)[1:-1] for c in text) or "…"
    return shown if columns(shown[0]) else f"◌{shown}"  # a mark alone would sit on the token before


def columns(text):
    """How many columns of a terminal text takes up: East Asian characters are two wide, marks on others add none."""
    of_its_own = [c for c in text if unicodedata.category(c) not in ("Mn", "Me")]
    return sum(1 + (unicodedata.east_asian_width(c) in "FW") for c in of_its_own)


class DepthView:
    """Shades tokens by how many of n_routed blocks processed them, or without color writes marks beneath."""

    def __init__(self, n_routed, color):
        self.n_routed, self.color = n_routed, color
        self.text = self.marks = ""  # the line so far, where marks are needed

    def legend(self):
        what = f"how many of the {self.n_routed} routed blocks processed a token"
        others = "not fed to the model; …: part of a character"
        if not self.color:
            letters = "; a: 10, b: 11, ..., z: 35 or more" if self.n_routed > 9 else ""
            return f"Beneath: {what}{letters}\n-: {others}"
        numbers = sorted({n * self.n_routed // len(SHADES) for n in range(len(SHADES) + 1)})
        scale = "".join(self.shade(f" {n} ", n) for n in numbers)
        return f"Shaded: {what}, {scale}\n{self.shade('underlined', None)}: {others}"

    def shade(self, text, depth):
        if depth == 0:
            return text
        if depth is None:
            return f"\033[4m{text}\033[0m"
        color = SHADES[math.ceil(depth / self.n_routed * len(SHADES)) - 1]
        return f"\033[38;5;16;48;5;{color}m{text}\033[0m"

    def show(self, piece, depth):
        """What to print for a token."""
        out = ""
        for line in visible(piece).splitlines(keepends=True):
            text = line.rstrip("\n")
            if self.color:  # off before the newline, or a terminal may paint the rest of the line
                out += self.shade(text, depth) + line[len(text) :]
                continue
            if columns(self.text + text) > 80:
                out += self.end()
            mark = "-" if depth is None else DIGITS[min(depth, len(DIGITS) - 1)]
            self.text, self.marks = self.text + text, self.marks + mark.ljust(columns(text))
            if text != line:
                out += self.end()
        return out

    def end(self):
        """What to print at the end of a line."""
        out = f"{self.text}\n{self.marks}\n" if self.text else ""
        self.text = self.marks = ""
        return out


# ---------------------------------------------------------------------------------------------------------
# --html


def html_page(template, model, texts, cost, config):
    """The template with its data filled in: a self-contained page (str) that shows what happened to each token.

    texts: for each a list of pairs, a Token and what it is as text.
    """
    layers = model.config.routed_layers
    routed = model.blocks[layers[0]]  # as all of them

    def row(token, piece):
        blocks = None
        if token.route is not None:
            taken, r, logit = token.route
            blocks = torch.stack((logit.sigmoid(), routed.gate(r), taken), dim=1).tolist()  # L rows
        return visible(piece), token.id, token.probability, blocks

    data = {
        "name": os.fsencode(config.out).decode("utf-8", "replace"),  # a folder's name may be any bytes
        "cost": report(model, cost),
        "layers": layers,
        "chooser": "lot" if routed.random else "router" if routed.predictor is None else "predictor",
        "raw": routed.raw,
        "cutoff": torch.tensor(config.threshold).sigmoid().item(),
        "texts": [[row(*pair) for pair in text] for text in texts],
    }
    return template.replace("$$DATA$$", json.dumps(data).replace("<", "\\u003c"))  # no tag can begin in there


# ---------------------------------------------------------------------------------------------------------
# --bench

WAYS = {
    "fast": "fast path: a skipped block does no work",
    "all_blocks": "every block computed, result thrown away",
    "dense": "dense model of the same shape",
    "no_cache": "no cache: the text anew for each token",
}
DIAL = (-1e3, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 1e3)  # thresholds, from every block taken to none


class ComputeAll(RoutedBlock):
    """Decides as a routed block does, but processes and caches every token and then throws the result away."""

    def forward(self, x, rope=None, causal=False, threshold=0.0, cache=None):
        return self.throw_away(x, threshold, super().forward(x, rope, causal, -math.inf, cache))

    def step(self, x, rope, threshold, cache):
        return self.throw_away(x, threshold, super().step(x, rope, -math.inf, cache))

    def throw_away(self, x, threshold, result):
        new, route = result
        taken = route.logit > threshold
        return torch.where(taken[..., None], new, x), route._replace(taken=taken)


def computing_all(model):
    """A copy of the model that computes every block."""
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        if isinstance(block, RoutedBlock):
            block.__class__ = ComputeAll
    return twin


def dense_twin(model):
    """A dense model of the same shape and with the same weights, but for routers and predictors, which it lacks."""
    twin = MoD(dataclasses.replace(model.config, capacity=1.0)).to(model.embedding.weight).eval()
    weights = {name.replace(".block.", "."): weight for name, weight in model.state_dict().items()}
    twin.load_state_dict(weights, strict=False)
    return store_by_columns(twin)


@torch.inference_mode()
def generate_without_cache(model, text, threshold):
    """Continue text (B, T) for ever, the whole of it recomputed for each token. Yields tokens (B, 1)."""
    while True:
        logits, _, _ = model(text[:, -model.config.block_size :], causal=True, threshold=threshold)
        text = torch.cat((text, sample(logits[:, -1])), dim=1)
        yield text[:, -1:]


def time_steps(n, steps, device):
    """Seconds that the next n of steps take, an iterator, and what they yield, a list."""
    wait = getattr(torch, device.type).synchronize  # for the device; nothing to do on a CPU
    wait()
    start = time.perf_counter()
    outputs = list(itertools.islice(steps, n))
    wait()
    return time.perf_counter() - start, outputs


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def bench(model, prompt, num_tokens=64, rounds=5, threshold=0.0):
    """Tokens per second of the four WAYS to continue prompt (B, T), at temperature 1 with a fixed seed.

    Timed are num_tokens steps after the first WARMUP; without a cache fewer, halfway through. A figure is the median
    over rounds, in each of which the ways take turns, after one that isn't counted. Returns a dict: *_tok_s count the
    tokens of all rows; context is the length of the text at the end, share the part of the tokens that routed blocks
    took, ideal the FLOPs of dense over fast at that share; *cache_bytes are in use.
    """
    config, device, (B, T) = model.config, prompt.device, prompt.shape
    models = {"fast": model, "all_blocks": computing_all(model), "dense": dense_twin(model)}
    rates, outputs = {way: [] for way in WAYS}, {}
    for _ in range(rounds + 1):
        for way in WAYS:
            torch.manual_seed(0)
            if way == "no_cache":
                untimed, n = 1, math.ceil(num_tokens / 16)
                text = torch.cat((prompt, prompt[:, :1].expand(-1, num_tokens // 2)), dim=1)
                steps = generate_without_cache(model, text, threshold)
            else:
                untimed, n = WARMUP, num_tokens
                steps = models[way].generate(prompt, untimed + n, threshold=threshold)
            time_steps(untimed, steps, device)
            seconds, outputs[way] = time_steps(n, steps, device)
            rates[way].append(B * n / seconds)
    share = torch.cat([step.route.taken for step in outputs["fast"]]).float().mean().item()
    # A timed step has T + WARMUP + num_tokens / 2 keys in the mean, and flops_per_token counts half a text's length.
    length = 2 * (T + WARMUP) + num_tokens
    return {
        "device": device_name(device),
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "batch": B,
        "context": T + WARMUP + num_tokens,
        "share": share,
        **{f"{way}_tok_s": statistics.median(rates[way][1:]) for way in WAYS},
        "ideal": dense_flops(config, length) / flops_per_token(config, length, share),
        "cache_bytes": cache_bytes(outputs["fast"][-1].cache),
        "dense_cache_bytes": cache_bytes(outputs["dense"][-1].cache),
        "torch": torch.__version__,
    }


def bench_table(row):
    """What bench returns, as text for a person."""
    lines = [
        f"{row['device']}, {row['dtype']}, torch {row['torch']}: {row['n_layer']} blocks, {row['n_embd']} wide, "
        f"batch {row['batch']}, context {row['context']}, {row['share']:.1%} taken by routed blocks",
        f"{'':42}{'tokens/s':>10}{'x dense':>10}",
    ]
    for way, text in WAYS.items():
        rate = row[f"{way}_tok_s"]
        lines.append(f"{text:42}{rate:>10,.1f}{rate / row['dense_tok_s']:>10.2f}")
    lines.append(f"{'ideal: what FLOPs say about the fast path':52}{row['ideal']:>10.2f}")
    lines.append(f"KV cache: {row['cache_bytes']:,} bytes, dense {row['dense_cache_bytes']:,}")
    return "\n".join(lines)


@torch.inference_mode()
def compute_dial(model, text, thresholds=DIAL):
    """What each threshold costs and gives on text (N, T + 1): a list of dicts.

    threshold, share (taken by routed blocks), flops (forward, per token), loss (causal, nats per token).
    """
    rows = []
    for threshold in thresholds:
        loss = share = 0.0
        for window in text.split(1):  # one at a time: a large vocabulary's logits take much memory
            _, mean, route = model(window[:, :-1], window[:, 1:], causal=True, threshold=threshold)
            loss, share = loss + mean.item(), share + route.taken.float().mean().item()
        loss, share = loss / len(text), share / len(text)
        flops = flops_per_token(model.config, text.size(1) - 1, share)
        rows.append({"threshold": threshold, "share": share, "flops": flops, "loss": loss})
    return rows


def bench_checkpoint(model, prompt, config, data):
    """Print bench at batch 1 and an almost full context, on text that the model wrote after prompt, a list of ids.

    And the compute dial, on data, validation tokens. Writes both into bench.json.
    """
    size, threshold = model.config.block_size, config.threshold
    if size < 8:
        raise UserError(f"{config.out} has a context of {size} tokens; --bench needs 8 or more")
    num_tokens = min(64, size // 2)
    idx = torch.tensor([prompt], device=model.rope.device)
    torch.manual_seed(config.seed)
    written = [step.token for step in model.generate(idx, size, threshold=threshold)]
    idx = torch.cat((idx, *written), dim=1)[:, -(size - WARMUP - num_tokens) :]
    # Opened before anything is measured: a file that can't be written should not cost that.
    with write_atomic(Path(config.out) / "bench.json") as file:
        row = bench(model, idx, num_tokens, threshold=threshold)
        print(bench_table(row), end="\n\n", file=sys.stderr)
        thresholds = sorted({*DIAL, min(max(threshold, DIAL[0]), DIAL[-1])})
        dial = compute_dial(model, spread_windows(data, size, EVAL_TOKENS).to(idx.device), thresholds)
        print("--threshold    taken   FLOPs per token  x dense  causal loss", file=sys.stderr)
        for at in dial:
            line = f"{at['threshold']:>11g}{at['share']:>9.1%}{at['flops']:>18,.0f}"
            line += f"{at['flops'] / dense_flops(model.config, size):>9.2f}{at['loss']:>13.4f}"
            print(line if at["threshold"] else f"{line}  as trained", file=sys.stderr)
        file.write(json.dumps({"rows": [row], "dial": dial}, indent=2).encode() + b"\n")


# ---------------------------------------------------------------------------------------------------------
# The command


def emit(text, go_on):
    """Print text at once. If its reader has gone, as in `| head`, raises BrokenPipeError, or prints no more: go_on."""
    with suppress(BrokenPipeError) if go_on else nullcontext():
        print(text, end="", flush=True)


def write_texts(model, prompt, tokenizer, config, view, cost):
    """Draw config.num_samples texts after prompt, a list of ids, to standard output as they come.

    Returns what html_page wants of them, but without --html nothing: a route takes a kilobyte.
    """
    texts, clean = [], harmless if sys.stdout.isatty() else str
    for i in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- {i + 1} of {config.num_samples}, seed {config.seed + i}", file=sys.stderr, flush=True)
        torch.manual_seed(config.seed + i)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character for the next call
        texts.append([])
        parts = draw(model, prompt, config, cost)
        if view:  # one step late: a token's depth is known then
            parts = (part for part, _ in itertools.pairwise(itertools.chain(parts, [None])))
        for part in parts:
            out = ""
            for token in part:
                piece = decoder.decode(tokenizer.decode_single_token_bytes(token.id))
                if view:
                    out += view.show(piece, token.depth)
                elif token.probability is not None or token.id != tokenizer.eot_token:
                    out += clean(piece)  # but not the end-of-text that stands for an empty prompt
                if config.html:
                    texts[-1].append((token, piece))
            emit(out, go_on=config.html)
        emit((view.end() if view else decoder.decode(b"", final=True)) + "\n", go_on=config.html)
    return texts


def main(argv):
    config = SampleConfig(**vars(make_parser(SampleConfig, "Sample from a checkpoint.").parse_args(argv)))
    check(config)
    model, checkpoint = load_checkpoint(config.out, pick_device(config.device))
    use_threads(1, model.config.n_embd)
    model = store_by_columns(to_bfloat16(model) if config.dtype == "bfloat16" else model)
    tokenizer = get_tokenizer(checkpoint["meta"]["tokenizer"])
    n_routed = len(model.config.routed_layers)
    if not n_routed and (config.show_depth or config.html or config.bench):
        raise UserError(f"{config.out} has no routed block; --show_depth, --html and --bench need one")
    prompt = read_prompt(checkpoint["meta"]["prompt"] if config.prompt is None else config.prompt, tokenizer)
    if config.bench:
        return bench_checkpoint(model, prompt, config, load_data(checkpoint["train"]["data"], checkpoint["meta"])[1])
    view, cost = None, Cost()
    if config.show_depth:
        view = DepthView(n_routed, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
        print(view.legend(), file=sys.stderr)
    template = PAGE.read_text(encoding="utf-8") if config.html else None
    # Opened before the first token is drawn: a page that can't be written should not cost the texts.
    with write_atomic(config.html) if config.html else nullcontext() as page:
        texts = write_texts(model, prompt, tokenizer, config, view, cost)
        print("\n".join(report(model, cost)), file=sys.stderr)
        if page:
            page.write(html_page(template, model, texts, cost, config).encode())
    if page:
        print(f"the page is {os.path.abspath(config.html)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
