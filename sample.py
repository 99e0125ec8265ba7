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
import html
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
import unicodedata
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from mod import MoD, RoutedBlock, sample
from prepare_data import (
    UserError,
    encode,
    get_tokenizer,
    load_data,
    make_parser,
    option,
    run,
    write_atomic,
    write_json,
)
from train import EVAL_TOKENS, dense_flops, load_checkpoint, pick_device, spread_windows

WARMUP = 3  # steps that are not timed: the prompt's, and two single tokens


@dataclass
class SampleConfig:
    out: str = option("out/mod", "folder of the checkpoint")
    prompt: str = option("", "text to continue; - reads standard input; nothing means end-of-text")
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
    for name in ("num_tokens", "num_samples", "top_k"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if not 0 <= config.temperature < math.inf:
        raise UserError(f"--temperature {config.temperature} must be 0 or above")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise UserError(f"--top_p {config.top_p} must be above 0 and at most 1")
    if math.isnan(config.threshold):
        raise UserError("--threshold must be a number; --threshold=inf skips every routed block, --threshold=-inf none")
    if config.bench and (config.html or config.show_depth):
        raise UserError("--bench prints no text, so --html and --show_depth have nothing to show; leave them out")
    if config.html and Path(config.html).is_dir():
        raise UserError(f"{config.html} is a folder; --html takes a file")
    if not 0 <= config.seed < 2**31:
        raise UserError(f"--seed {config.seed} must be 0 or above, and below 2**31")


# ---------------------------------------------------------------------------------------------------------
# Tokens, with what the model did to each


class Token(NamedTuple):
    id: int
    probability: float | None  # that the model gave it; None for the prompt's
    route: torch.Tensor | None  # (3, L): Route's taken, r and logit; None if it was not fed to a router

    @property
    def depth(self):
        """How many routed blocks processed it, or None."""
        return None if self.route is None else int(self.route[0].sum())


@dataclass
class Text:
    tokens: list = field(default_factory=list)  # of the prompt, then those drawn
    seconds: float = 0.0  # spent in the steps that were timed
    timed: int = 0  # how many these were
    cache: list | None = None
    context: int = 0  # tokens that a dense model would have in its cache


def draw(model, prompt, config, text):
    """Continue prompt, a list of ids. Yields a Token, also put into text, once the model has been fed with it.

    That is one step after it was drawn. The last one never is, nor is what a long prompt has outside the context.
    """
    options = (config.temperature, config.top_k, config.top_p, config.threshold)
    steps = model.generate(torch.tensor([prompt], device=model.rope.device), config.num_tokens, *options)
    waiting = [(id, None) for id in prompt]
    for i in range(config.num_tokens):
        start = time.perf_counter()
        drawn, logits, route, text.cache = next(steps)
        id = drawn.item()  # waits for the device
        if i >= WARMUP:
            text.seconds += time.perf_counter() - start
            text.timed += 1
        routes = []  # (3, L) for each token that this step fed
        if route is not None:
            routes = list(torch.stack([x[:, 0].float() for x in route]).cpu().unbind(-1))
            # Several tokens, or one after a full context, begin a new cache; else one is added.
            text.context = len(routes) if len(routes) > 1 else text.context % model.config.block_size + 1
        # Fewer routes than waiting tokens: the beginning of a prompt longer than the context was never fed. More: the
        # window slid, and all but the last were fed a second time.
        routes = [None] * (len(waiting) - len(routes)) + routes[-len(waiting) :]
        for known, of_token in zip(waiting, routes, strict=True):
            text.tokens.append(Token(*known, of_token))
            yield text.tokens[-1]
        waiting = [(id, logits[0].float().softmax(dim=-1)[id].item())]
    text.tokens.append(Token(*waiting[0], None))
    yield text.tokens[-1]


def to_bfloat16(model):
    """The model, its weights now in bfloat16; but those that decide stay in float32, as they were trained."""
    for name, p in model.named_parameters():
        if ".router." not in name and ".predictor." not in name:
            p.data = p.data.bfloat16()
    return model


def read_prompt(text, tokenizer):
    """The ids of a prompt, at least one. Raises UserError for what the tokenizer doesn't know."""
    # surrogateescape: bytes of the command line that were not UTF-8 survive
    data = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    return encode(tokenizer, data, "the prompt").tolist() or [tokenizer.eot_token]


def utf8_decoder():
    """Its decode(bytes) returns the characters that are complete, and keeps the rest for the next call."""
    return codecs.getincrementaldecoder("utf-8")("replace")


def report(model, texts):
    """Print speed, compute and memory of the texts to standard error."""
    config, weight = model.config, model.embedding.weight
    seconds, timed = sum(text.seconds for text in texts), sum(text.timed for text in texts)
    rate = f"{timed / seconds:,.1f} tokens/s" if timed else "too few tokens to time"
    lines = [f"{rate} ({weight.device.type}, {weight.dtype}, batch 1; the first {WARMUP} steps left out)"]
    routes = [token.route for text in texts for token in text.tokens if token.route is not None]
    if routes:
        share, T = torch.stack(routes)[:, 0].mean().item(), texts[-1].context
        flops, dense = config.flops_per_token(T, share), dense_flops(config, T)
        used = sum(kv.bytes_used for kv in texts[-1].cache)
        dense_used = 2 * config.n_layer * T * config.n_embd * weight.element_size()
        lines += [
            f"{1 - share:.1%} of the routed blocks skipped",
            f"{flops:,.0f} forward FLOPs per token, {flops / dense:.2f} of a dense model's of the same shape",
            f"{used:,} bytes of KV cache, {used / dense_used:.2f} of a dense model's",
        ]
    print("\n".join(lines), file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------
# --show_depth

SHADES = (230, 222, 215, 208, 202)  # of a terminal's 256 colours, for few blocks to all of them
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def visible(text):
    """A token's text with nothing in it that can't be seen or that acts on a terminal. Newlines still end a line."""

    def picture(c):
        if c.isprintable():
            return c
        return {"\n": "↵\n", "\t": "⇥"}.get(c) or c.encode("unicode_escape").decode()

    shown = "".join(map(picture, text)) or "·"
    return f"◌{shown}" if unicodedata.combining(shown[0]) else shown  # or a mark beneath it would have no column


def columns(text):
    """How many columns of a terminal text takes up: East Asian characters are two wide, combining ones add none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "FW") for c in text)


class DepthView:
    """Prints tokens shaded by how many of n_routed blocks processed them, or without color with marks beneath."""

    def __init__(self, n_routed, color):
        self.n_routed, self.color = n_routed, color
        self.text = self.marks = ""  # the line so far, where marks are needed

    def shade(self, text, depth):
        if not self.color or depth == 0:
            return text
        if depth is None:
            return f"\033[4m{text}\033[0m"
        color = SHADES[math.ceil(depth / self.n_routed * len(SHADES)) - 1]
        return f"\033[38;5;16;48;5;{color}m{text}\033[0m"

    def mark(self, depth):
        return "-" if depth is None else DIGITS[min(depth, len(DIGITS) - 1)]

    def legend(self):
        scale = " ".join(self.shade(f" {self.mark(n)} ", n) for n in range(self.n_routed + 1))
        return (
            f"{'Shaded' if self.color else 'Beneath'}: how many of {self.n_routed} routed blocks processed a token, "
            f"{scale}; {self.shade('-', None)} was not fed to the model; · is a part of a character"
        )

    def show(self, piece, depth):
        for line in visible(piece).splitlines(keepends=True):
            text = line.rstrip("\n")
            if self.color:  # off before the newline, or a terminal may paint the rest of the line
                sys.stdout.write(self.shade(text, depth) + line[len(text) :])
                continue
            self.text, self.marks = self.text + text, self.marks + self.mark(depth).ljust(columns(text))
            if text != line or len(self.text) >= 80:
                self.end()

    def end(self):
        if self.text:
            sys.stdout.write(f"{self.text}\n{self.marks}\n")
        self.text = self.marks = ""


# ---------------------------------------------------------------------------------------------------------
# --bench

WAYS = {
    "fast": "fast path: a skipped block does no work",
    "all_blocks": "every block computed, result thrown away",
    "dense": "dense model of the same shape",
    "no_cache": "no cache: the text anew for each token",
}


class ComputeAll(RoutedBlock):
    """Decides as a routed block does, but processes and caches every token and then throws the result away."""

    def forward(self, x, rope, causal=False, threshold=0.0, cache=None):
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
    return twin


@torch.inference_mode()
def generate_without_cache(model, text, threshold):
    """Continue text (B, T) for ever, the whole of it recomputed for each token. Yields tokens (B, 1)."""
    while True:
        logits, _, _ = model(text[:, -model.config.block_size :], causal=True, threshold=threshold)
        text = torch.cat((text, sample(logits[:, -1])), dim=1)
        yield text[:, -1:]


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_steps(n, steps, device):
    """Seconds that the next n of steps take, an iterator, and what they yield, a list."""
    synchronize(device)
    start = time.perf_counter()
    outputs = list(itertools.islice(steps, n))
    synchronize(device)
    return time.perf_counter() - start, outputs


def bench(model, prompt, num_tokens=64, rounds=5, threshold=0.0):
    """Tokens per second of the four WAYS to continue prompt (B, T), at temperature 1 with a fixed seed.

    Timed are num_tokens steps after the first WARMUP; without a cache fewer, halfway through. A figure is the
    median over rounds, in each of which the ways take turns, after one that isn't counted. Returns a dict:
    *_tok_s count the tokens of all rows, *_prefill_tok_s those of the prompt up to the first token drawn,
    topk_forward_tok_s those of the prompt in a forward pass as in training; context is the length of the text at
    the end, share the part of the tokens that routed blocks took, ideal the FLOPs of dense over fast at that
    share; *cache_bytes are in use.
    """
    config, device = model.config, prompt.device
    B, T = prompt.shape
    models = {"fast": model, "all_blocks": computing_all(model), "dense": dense_twin(model)}
    taken, cache_bytes = [], {}

    def measure(way):
        torch.manual_seed(0)
        if way == "topk_forward":
            with torch.inference_mode():
                return {way: B * T / time_steps(1, map(model, [prompt]), device)[0]}  # map is lazy: it runs in there
        if way == "no_cache":
            untimed, n = 1, math.ceil(num_tokens / 16)
            text = torch.cat((prompt, prompt[:, :1].expand(-1, num_tokens // 2)), dim=1)
            steps = generate_without_cache(model, text, threshold)
        else:
            untimed, n = WARMUP, num_tokens
            steps = models[way].generate(prompt, untimed + n, threshold=threshold)
        prefill, _ = time_steps(1, steps, device)
        time_steps(untimed - 1, steps, device)
        generation, outputs = time_steps(n, steps, device)
        rates = {way: B * n / generation}
        if way != "no_cache":
            rates[f"{way}_prefill"] = B * T / prefill
            cache_bytes[way] = sum(kv.bytes_used for kv in outputs[-1][3])
        if way == "fast":
            taken.extend(route.taken for _, _, route, _ in outputs)
        return rates

    measured = [
        {name: rate for way in (*WAYS, "topk_forward") for name, rate in measure(way).items()}
        for _ in range(rounds + 1)
    ][1:]
    share = torch.cat(taken).float().mean().item()
    keys = T + WARMUP + num_tokens / 2  # that a timed step's token attends to in a dense block, in the mean
    length = 2 * keys  # flops_per_token counts T / 2 keys a token
    return {
        "device": device_name(device),
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "batch": B,
        "context": T + WARMUP + num_tokens,
        "share": share,
        **{f"{name}_tok_s": statistics.median(rates[name] for rates in measured) for name in measured[0]},
        "ideal": dense_flops(config, length) / config.flops_per_token(length, share),
        "cache_bytes": cache_bytes["fast"],
        "dense_cache_bytes": cache_bytes["dense"],
        "torch": torch.__version__,
    }


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def bench_table(row):
    """A row of bench as text for a person."""
    lines = [
        f"{row['device']}, {row['dtype']}, torch {row['torch']}: {row['n_layer']} blocks, {row['n_embd']} wide, "
        f"batch {row['batch']}, context {row['context']}, {row['share']:.1%} taken by routed blocks",
        f"{'':42}{'tokens/s':>10}{'x dense':>10}",
    ]
    for way, text in WAYS.items():
        rate = row[f"{way}_tok_s"]
        lines.append(f"{text:42}{rate:>10,.1f}{rate / row['dense_tok_s']:>10.2f}")
    lines.append(f"{'ideal: what FLOPs say about the fast path':52}{row['ideal']:>10.2f}")
    prefill = "fast_prefill", "dense_prefill", "topk_forward"
    rates = [f"{row[f'{name}_tok_s']:,.0f}" for name in prefill]
    lines.append("prompt: {} tokens/s, dense {}; a forward pass as in training {}".format(*rates))
    lines.append(f"KV cache: {row['cache_bytes']:,} bytes, dense {row['dense_cache_bytes']:,}")
    return "\n".join(lines)


@torch.inference_mode()
def compute_dial(model, text, thresholds=(-1e3, -4, -2, -1, 0, 1, 2, 4, 1e3)):
    """What each threshold costs and gives on text (N, T + 1): a list of dicts.

    threshold, share (taken by routed blocks), flops (forward, per token), loss (causal, nats per token).
    """
    rows = []
    for threshold in thresholds:
        loss = share = 0.0
        for part in text.split(16):
            _, mean, route = model(part[:, :-1], part[:, 1:], causal=True, threshold=threshold)
            loss += mean.item() * len(part) / len(text)
            share += route.taken.float().mean().item() * len(part) / len(text)
        flops = model.config.flops_per_token(text.size(1) - 1, share)
        rows.append({"threshold": threshold, "share": share, "flops": flops, "loss": loss})
    return rows


def dial_table(rows, dense):
    """Rows of compute_dial as text for a person; dense is a dense model's FLOPs per token."""
    lines = [f"{'--threshold':>11}{'taken':>9}{'FLOPs per token':>18}{'x dense':>9}{'causal loss':>13}"]
    for row in rows:
        trained = "  as trained" if row["threshold"] == 0 else ""
        lines.append(
            f"{row['threshold']:>11g}{row['share']:>9.1%}{row['flops']:>18,.0f}{row['flops'] / dense:>9.2f}"
            f"{row['loss']:>13.4f}{trained}"
        )
    return "\n".join(lines)


def bench_checkpoint(model, prompt, config, data):
    """Bench at batch 1 and an almost full context, on text that the model itself wrote after prompt, a list of ids.

    And the compute dial, on validation data. Writes both into bench.json.
    """
    size = model.config.block_size
    num_tokens = min(64, size // 2)
    idx = torch.tensor([prompt], device=model.rope.device)
    torch.manual_seed(config.seed)
    written = [token for token, *_ in model.generate(idx, size, threshold=config.threshold)]
    idx = torch.cat((idx, *written), dim=1)[:, -(size - WARMUP - num_tokens) :]
    row = bench(model, idx, num_tokens, threshold=config.threshold)
    print(bench_table(row), end="\n\n", file=sys.stderr)
    dial = compute_dial(model, spread_windows(data, size, EVAL_TOKENS).to(idx.device))
    print(dial_table(dial, dense_flops(model.config, size)), file=sys.stderr)
    write_json(Path(config.out) / "bench.json", {"rows": [row], "dial": dial})


# ---------------------------------------------------------------------------------------------------------
# The command


def write_texts(model, prompt, tokenizer, config, view):
    """Draw config.num_samples texts after prompt, a list of ids, to standard output as they come. Returns the Texts."""
    texts = []
    for i in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- {i + 1} of {config.num_samples}, seed {config.seed + i}", file=sys.stderr, flush=True)
        torch.manual_seed(config.seed + i)
        decoder = utf8_decoder()
        texts.append(Text())
        for token in draw(model, prompt, config, texts[-1]):
            piece = decoder.decode(tokenizer.decode_single_token_bytes(token.id))
            if view:
                view.show(piece, token.depth)
            elif token.probability is not None or token.id != tokenizer.eot_token:
                sys.stdout.write(piece)  # but not the end-of-text that stands for an empty prompt
            sys.stdout.flush()
        if view:
            view.end()
        else:
            sys.stdout.write(decoder.decode(b"", final=True))
        print(flush=True)
    return texts


def main(argv):
    config = SampleConfig(**vars(make_parser(SampleConfig, "Sample from a checkpoint.").parse_args(argv)))
    check(config)
    model, checkpoint = load_checkpoint(config.out, pick_device(config.device))
    if config.dtype == "bfloat16":
        model = to_bfloat16(model)
    tokenizer = get_tokenizer(checkpoint["meta"]["tokenizer"])
    n_routed = len(model.config.routed_layers)
    if not n_routed and (config.show_depth or config.html or config.bench):
        raise UserError(f"{config.out} has no routed block; --show_depth, --html and --bench need one")
    prompt = read_prompt(config.prompt, tokenizer)
    if config.bench:
        if model.config.block_size < 8:
            raise UserError(f"{config.out} has a context of {model.config.block_size} tokens; --bench needs 8 or more")
        val_data = load_data(checkpoint["train"]["data"], checkpoint["meta"])[1]
        return bench_checkpoint(model, prompt, config, val_data)

    view = None
    if config.show_depth:
        view = DepthView(n_routed, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
        print(view.legend(), file=sys.stderr)
    # Opened before the first token is drawn: a page that can't be written should not cost the texts.
    with write_atomic(config.html) if config.html else nullcontext() as page:
        texts = write_texts(model, prompt, tokenizer, config, view)
        report(model, texts)
        if page:
            page.write(html_page(model, tokenizer, texts, config.out).encode())


# ---------------------------------------------------------------------------------------------------------
# --html


def html_page(model, tokenizer, texts, name):
    """A self-contained page (str): tokens shaded by depth, and what happened to one that is hovered or tapped."""
    layers = model.config.routed_layers
    gate = model.blocks[layers[0]].gate
    random = model.config.routing == "random"  # its logits are noise
    body, data = [], []

    def span(text, depth):
        kind, depth = ("unfed", 0) if depth is None else ("fed", depth / len(layers))
        return f'<span class="{kind}" tabindex="0" style="--depth:{depth:.3f}">{html.escape(text)}</span>'

    for text in texts:
        decoder = utf8_decoder()
        body.append("<pre>")
        for token in text.tokens:
            blocks = []
            if token.route is not None:
                taken, r, logit = token.route
                chance = torch.full_like(r, model.config.capacity) if random else logit.sigmoid()
                blocks = torch.stack((chance, gate(r), taken), dim=1).tolist()
            piece = decoder.decode(tokenizer.decode_single_token_bytes(token.id))
            body.append(span(visible(piece), token.depth))
            data.append([token.id, token.probability, blocks])
        body.append("</pre>")
    parts = {
        "LAYERS": json.dumps(layers),
        "DATA": json.dumps(data),
        "SCALE": "".join(span(f" {n} ", n) for n in range(len(layers) + 1)),
        "NAME": html.escape(name),
        "BODY": "".join(body),
    }
    return re.sub(r"\$\$(\w+)\$\$", lambda found: parts[found[1]], PAGE)  # one pass: nothing in a part is replaced


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Where the compute went</title>
<style>
:root { color-scheme: light dark; --shade: 255, 140, 0; --back: #fff; --text: #1b1b1b; --faint: #666; --line: #ccc; }
@media (prefers-color-scheme: dark) {
  :root { --shade: 190, 85, 0; --back: #161616; --text: #eee; --faint: #a0a0a0; --line: #444; }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
pre { font: 15px/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
      margin: 1rem 0; padding-top: 1rem; border-top: 1px solid var(--line); }
.fed { background: rgba(var(--shade), calc(var(--depth) * .9)); white-space: pre-wrap; }
.unfed { border-bottom: 2px dotted var(--faint); }
.on, pre span:hover { outline: 2px solid var(--text); }
#scale span { border: 1px solid var(--line); }
#card { position: sticky; bottom: 0; max-height: 45vh; overflow: auto; padding: .6rem 0; background: var(--back);
        border-top: 1px solid var(--line); font-variant-numeric: tabular-nums; }
code { font-size: 1.1em; white-space: pre-wrap; background: rgba(128, 128, 128, .25); padding: 0 .3em; }
table { border-collapse: collapse; }
th, td { padding: .1rem 1.1rem .1rem 0; text-align: left; font-weight: normal; }
th, .skipped { color: var(--faint); }
</style>
<h1>Where the compute went</h1>
<div>Text from the Mixture-of-Depths model in <b>$$NAME$$</b>. The shade of a token says how many routed blocks
processed it: <span id="scale">$$SCALE$$</span>. Dotted: not fed to the model. Hover, tap or focus one.</div>
$$BODY$$
<div id="card">No token chosen yet.</div>
<script>
const layers = $$LAYERS$$, tokens = $$DATA$$;  // id, probability, [the causal decision's, gate, taken] by block
const card = document.getElementById("card"), spans = document.querySelectorAll("pre span");
function add(parent, tag, text) {
  const child = document.createElement(tag);
  child.textContent = text;
  parent.append(child);
  return child;
}
function show(i) {
  const [id, probability, blocks] = tokens[i];
  document.querySelectorAll(".on").forEach(span => span.classList.remove("on"));
  spans[i].classList.add("on");
  card.textContent = "";
  add(card, "code", spans[i].textContent.trimEnd() || " ");
  add(card, "span", ` token ${id}, ` + (probability === null ? "given" : `probability ${probability.toPrecision(3)}`));
  if (!blocks.length) { add(card, "div", "not fed to the model: no block has seen it"); return; }
  const table = add(card, "table", ""), head = add(table, "tr", "");
  for (const name of ["block", "foreseen", "gate", ""]) add(head, "th", name);
  blocks.forEach(([chance, gate, taken], j) => {
    const row = add(table, "tr", "");
    row.className = taken ? "processed" : "skipped";
    for (const text of [layers[j], chance.toFixed(3), gate.toFixed(3), row.className]) add(row, "td", text);
  });
}
spans.forEach((span, i) => {
  for (const event of ["mouseover", "focus", "click"]) span.addEventListener(event, () => show(i));
});
</script>
</html>
"""

if __name__ == "__main__":
    run(main)
