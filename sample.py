"""Text out of a checkpoint, through the fast path: a routed block that a token skips costs nothing.

    python sample.py --prompt "def "            text, streamed; - as the prompt reads standard input
    python sample.py --show_depth               each token shaded by how many routed blocks processed it
    python sample.py --html page.html           the same as a page to explore in a browser
    python sample.py --bench                    tokens per second: fast path, every block computed, dense, no cache

Text goes to standard output, everything else to standard error.
"""

import codecs
import dataclasses
import html
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from mod import MoD, RoutedBlock, sample
from prepare_data import UserError, encode, encode_text, get_tokenizer, make_parser, run, write_atomic
from train import load_checkpoint, option, pick_device

WARMUP = 2  # decoding steps after the prompt that are not timed


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
    threshold: float = option(0.0, "a block takes a token if its predictor's logit is above this: higher is faster")
    show_depth: bool = option(False, "shade each token by how many routed blocks processed it")
    html: str | None = option(None, "also write a page to explore to this file")
    bench: bool = option(False, "measure tokens per second instead, and write bench.json into out")
    device: str | None = option(None, "cuda, mps or cpu (default: the best there is)")


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
        raise UserError("--threshold must be a number; inf skips every routed block, -inf none")
    if not 0 <= config.seed < 2**31:
        raise UserError(f"--seed {config.seed} must be 0 or above, and below 2**31")


# ---------------------------------------------------------------------------------------------------------
# Tokens, with what the model did to each


class Token(NamedTuple):
    id: int
    probability: float | None  # that the model gave it; None for the prompt's
    taken: list | None  # per routed block: processed it? None: never fed to the model, as the last token is not
    chance: list | None  # per routed block: the predictor's probability of taking it
    gate: list | None  # per routed block: what the block's output was, or would have been, scaled by


@dataclass
class Text:
    """One text as it grows: the prompt's tokens, then the drawn ones."""

    tokens: list = field(default_factory=list)
    seconds: float = 0.0  # in the steps that were timed
    timed: int = 0
    context: int = 0  # tokens that a dense model would have in its cache
    cache: list | None = None


def draw(model, prompt, config, text):
    """Continue prompt, a list of ids. Yields a Token, also appended to text, as soon as its route is known.

    That is when it is fed to the model, one step after it was drawn; the last one never is.
    """
    size = model.config.block_size
    routed = [block for block in model.blocks if isinstance(block, RoutedBlock)]
    options = (config.temperature, config.top_k, config.top_p, config.threshold)
    steps = model.generate(torch.tensor([prompt], device=model.rope.device), config.num_tokens, *options)
    waiting = [(id, None) for id in prompt]
    for i in range(config.num_tokens):
        start = time.perf_counter()
        drawn, logits, route, text.cache = next(steps)
        id = drawn.item()  # waits for the device
        if i > WARMUP:
            text.seconds += time.perf_counter() - start
            text.timed += 1
        columns = []  # of the tokens just fed: of the waiting ones and, where the window slid, of older ones
        if route is not None:
            gate = torch.stack([block.gate(r) for block, r in zip(routed, route.weight, strict=True)])
            columns = [x[:, 0].T.tolist() for x in (route.taken, route.logit.sigmoid(), gate)]
            columns = list(zip(*columns, strict=True))
            text.context = len(columns) if len(columns) > 1 else min(text.context + 1, size)
        columns = [(None, None, None)] * (len(waiting) - len(columns)) + columns[-len(waiting) :]
        fed = [Token(*known, *column) for known, column in zip(waiting, columns, strict=True)]
        text.tokens += fed
        yield from fed
        waiting = [(id, logits[0].float().softmax(dim=-1)[id].item())]
    text.tokens.append(Token(*waiting[0], None, None, None))
    yield text.tokens[-1]


def token_bytes(tokenizer, id):
    try:
        return tokenizer.decode_single_token_bytes(id)
    except KeyError:  # the model may have more ids than the tokenizer
        return "\N{REPLACEMENT CHARACTER}".encode()


def incremental_decoder(tokenizer):
    """A function from token ids, one by one, to text. A token that ends inside a character gives "" at first."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda id: decoder.decode(token_bytes(tokenizer, id))


def read_prompt(text, tokenizer, vocab_size):
    """The ids of a prompt. Raises UserError if it is not text that the tokenizer and the model know."""
    if text == "-":
        ids = encode(tokenizer, sys.stdin.buffer.read(), "the prompt").tolist()
    else:
        ids = encode_text(tokenizer, text)
    ids = ids or [tokenizer.eot_token]
    if max(ids) >= vocab_size:
        raise UserError(f"the prompt has token {max(ids)}, and the model knows {vocab_size}; train it again")
    return ids


def dense_config(config):
    return dataclasses.replace(config, capacity=1.0)


def report(model, texts):
    """Speed, compute and memory of the texts, for a person."""
    config, weight = model.config, model.embedding.weight
    seconds, timed = sum(text.seconds for text in texts), sum(text.timed for text in texts)
    rate = f"{timed / seconds:,.1f} tokens/s" if timed else f"too few tokens to time: more than {WARMUP + 1} are needed"
    lines = [f"{rate} ({weight.device.type}, {weight.dtype}, batch 1; without the prompt and the first tokens)"]
    taken = [yes for text in texts for token in text.tokens for yes in token.taken or ()]
    if taken:
        share = sum(taken) / len(taken)
        T = max(text.context for text in texts)
        flops, dense = config.flops_per_token(T, share), dense_config(config).flops_per_token(T)
        lines.append(f"{1 - share:.1%} of the routed blocks skipped")
        lines.append(f"{flops:,.0f} forward FLOPs per token, {flops / dense:.2f} of a dense model's of this shape")
        used = sum(kv.bytes_used for kv in texts[-1].cache)
        dense = config.n_layer * texts[-1].context * 2 * config.n_embd * weight.element_size()
        lines.append(f"{used:,} bytes of KV cache in use, {used / dense:.2f} of a dense model's")
    print("\n".join(lines), file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------
# --show_depth

SHADES = (230, 222, 215, 208, 202)  # of the terminal's 256 colours, from few blocks to all
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def visible(piece):
    """A token's text with nothing in it that is invisible or acts on a terminal. A newline still ends the line."""

    def picture(c):
        if c.isprintable():
            return c
        if c < " ":
            return chr(0x2400 + ord(c)) + "\n" * (c == "\n")  # the control pictures, such as ␊ and ␉
        return c.encode("unicode_escape").decode()

    return "".join(map(picture, piece)) or "·"


class DepthView:
    """Prints tokens shaded by how many of n_routed blocks processed them, or with that number beneath."""

    def __init__(self, n_routed, color):
        self.n_routed, self.color = n_routed, color
        self.text = self.marks = ""

    def shade(self, text, depth):
        """text in the colour of depth: none of its own for 0, underlined for None."""
        if not depth:
            return text if depth == 0 else f"\033[4m{text}\033[0m"
        background = SHADES[math.ceil(depth / self.n_routed * len(SHADES)) - 1]
        return f"\033[38;5;16;48;5;{background}m{text}\033[0m"

    def legend(self):
        end = "- or underlined: not fed to the model. · is a part of a character."
        numbers = range(self.n_routed + 1)
        if self.color:
            scale = " ".join(self.shade(f" {n} ", n) for n in numbers)
            return f"processed by {scale} of {self.n_routed} routed blocks. {end}"
        scale = f"0 to {DIGITS[min(self.n_routed, len(DIGITS) - 1)]}"
        return f"beneath each token, how many of {self.n_routed} routed blocks processed it: {scale}. {end}"

    def show(self, piece, depth):
        text = visible(piece)
        if self.color:
            # Colour off before the newline, or some terminals paint the rest of the line.
            lines = text.split("\n")
            sys.stdout.write("\n".join(self.shade(line, depth) if line else "" for line in lines))
            return
        mark = "-" if depth is None else DIGITS[min(depth, len(DIGITS) - 1)]
        *whole, rest = text.split("\n")
        for line in whole:
            self.text, self.marks = self.text + line, self.marks + mark.ljust(len(line))
            self.end()
        self.text, self.marks = self.text + rest, self.marks + (mark.ljust(len(rest)) if rest else "")
        if len(self.text) >= 80:
            self.end()

    def end(self):
        if self.text:
            sys.stdout.write(f"{self.text}\n{self.marks}\n")
        self.text = self.marks = ""
