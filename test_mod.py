"""The claims that this project makes, as tests: small models, float32, CPU, no network.

    python -m pytest            the fast ones
    python -m pytest -m slow    the slow ones

Where outputs are compared, every parameter of the model was drawn anew (see redrawn): a freshly initialised
block changes nothing, so that anything would equal anything. "Trap" in a docstring names a fault that other
implementations have, or one that is easily made.
"""

import ast
import contextlib
import dataclasses
import errno
import hashlib
import html
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import mod
import prepare_data
import train
from mod import MoD, MoDConfig, RoutedBlock, choice_loss, sample
from prepare_data import EOT, UserError, get_tokenizer, load_data, option, prepare
from sample import (
    WAYS,
    DepthView,
    SampleConfig,
    Text,
    compute_dial,
    computing_all,
    dense_twin,
    draw,
    html_page,
    read_prompt,
    to_bfloat16,
    visible,
)
from sample import main as sample_main
from train import TrainConfig, evaluate, load_checkpoint

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # these models are too small to share out

# ---------------------------------------------------------------------------------------------------------
# Helpers

SMALL = dict(vocab_size=29, block_size=24, n_layer=4, n_head=2, n_embd=16, capacity=0.25, causal="predictor")


def tokens(B, T, seed=0):
    return torch.randint(SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def redrawn(seed=0, **changes):
    """A small model with every parameter drawn anew, output projections, predictors and biases included."""
    model = MoD(MoDConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.size(-1) ** -0.5, generator=generator)
    return model


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


def is_decided(route, threshold=0.0):
    """Every routed block takes some tokens and leaves some, no two rows alike, none within rounding of the
    threshold.

    Otherwise a test of causal routing could pass because all tokens went the same way, or fail because a sum
    in another order sent one the other way.
    """
    taken = route.taken.flatten(1)
    both = taken.any(1).all() and (~taken).any(1).all()
    differ = all((route.taken[:, 0] != row).any(1).all() for row in route.taken.unbind(1)[1:])
    return bool(both and differ and ((route.logit - threshold).abs() > 1e-4).all())


@torch.no_grad()
def decided(B=3, T=None, threshold=0.0, **changes):
    """A redrawn model and tokens (B, T), T the full context by default, for which is_decided holds."""
    for seed in range(50):
        model = redrawn(seed, **changes)
        idx = tokens(B, T or model.config.block_size, seed)
        route = model(idx, causal=True, threshold=threshold)[2]
        if is_decided(route, threshold):
            return model, idx
    raise AssertionError(f"no seed gives a model that decides both ways with {changes}")


@torch.no_grad()
def one_shot(model, idx, threshold=0.0):
    """Logits (B, T, V) and Route of one causal pass over the whole text, without a cache."""
    logits, _, route = model(idx, causal=True, threshold=threshold)
    return logits, route


@torch.no_grad()
def step_by_step(model, idx, prompt, threshold=0.0):
    """The same through the KV cache: the first prompt tokens at once, then one at a time.

    Returns the logits of position prompt - 1 and later, who was taken (L, B, T), and the cache.
    """
    cache = model.new_cache(len(idx))
    start, logits, taken = 0, [], []
    for end in range(prompt, idx.size(1) + 1):
        out, _, route = model(idx[:, :end], threshold=threshold, cache=cache, start=start)
        logits.append(out)
        taken.append(route.taken if route else torch.ones(0, len(idx), end - start, dtype=torch.bool))
        start = end
    return torch.cat(logits, dim=1), torch.cat(taken, dim=2), cache


def routed_blocks(model):
    return [block for block in model.blocks if isinstance(block, RoutedBlock)]


def routed_caches(model, cache):
    return [kv for kv, block in zip(cache, model.blocks, strict=True) if isinstance(block, RoutedBlock)]


def gradients(model, loss):
    """Parameter name -> gradient, or None where the loss does not reach."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def part(name):
    return next((part for part in ("router", "predictor") if part in name), "body")


# ---------------------------------------------------------------------------------------------------------
# The model: against references written out here, in float64, that share nothing with mod.py but the weights


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def standard(x):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def turn(x, position):
    """Rotary embedding of x (..., n, D) in complex numbers: pair j turns by position * 10000^(-8j / D), and those from
    D / 8 on, but the first, do not."""
    half = x.size(-1) // 2
    frequency = [10000.0 ** (-4 * j / half) if j < max(1, half / 4) else 0.0 for j in range(half)]
    angle = torch.as_tensor(position).double()[:, None] * torch.tensor(frequency).double()
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def dense_reference(model, idx):
    """A plain pre-norm transformer: explicit mask, explicit softmax."""
    W = {name: p.detach().double() for name, p in model.named_parameters()}
    B, T = idx.shape
    mask = torch.full((T, T), -torch.inf).double().triu(1)
    own = standard(W["embedding.weight"][idx])
    x = W["mix"][:, 3] * own
    for back in (1, 2, 3):
        x[:, back:] += W["mix"][:, 3 - back] * own[:, :-back]
    for i in range(model.config.n_layer):
        qkv = standard(x) @ W[f"blocks.{i}.attention.qkv.weight"].T
        q, k, v = (y.view(B, T, model.config.n_head, -1).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        q, k = turn(q, range(T)), turn(k, range(T))
        p = (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + mask).exp()
        y = (p / p.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + y @ W[f"blocks.{i}.attention.out.weight"].T
        x = x + gelu(standard(x) @ W[f"blocks.{i}.up.weight"].T) @ W[f"blocks.{i}.down.weight"].T
    return standard(x) @ W["head.weight"].T


def block_reference(W, prefix, x, position, H):
    """What a block adds to each of a list of tokens, found token by token and head by head."""
    deltas, keys, values = [], [], []
    for x_i, position_i in zip(x, position, strict=True):
        q, k, v = (W[prefix + "attention.qkv.weight"] @ standard(x_i)).view(3, H, 1, -1)
        keys.append(turn(k, [position_i]))
        values.append(v)
        heads = []
        for h in range(H):  # this token sees itself and the tokens of the list before it
            score = torch.stack([turn(q, [position_i])[h, 0] @ k[h, 0] for k in keys]) / math.sqrt(q.size(-1))
            weight = score.exp() / score.exp().sum()
            heads.append(sum(w * v[h, 0] for w, v in zip(weight, values, strict=True)))
        attended = W[prefix + "attention.out.weight"] @ torch.cat(heads)
        hidden = gelu(W[prefix + "up.weight"] @ standard(x_i + attended))
        deltas.append(attended + W[prefix + "down.weight"] @ hidden)
    return deltas


def mod_reference(model, idx, decide):
    """Mixture-of-Depths by loops over rows, blocks and tokens.

    decide(l, b, r, logit) lists the tokens that routed block l takes of row b. Returns logits and who was
    taken.
    """
    c = model.config
    W = {name: p.detach().double() for name, p in model.named_parameters()}
    logits, taken = [], torch.zeros(len(routed_blocks(model)), *idx.shape, dtype=torch.bool)
    for b, row in enumerate(idx):
        own = [standard(W["embedding.weight"][token]) for token in row]
        x = [sum(W["mix"][:, 3 - back] * own[t - back] for back in range(min(t, 3) + 1)) for t in range(len(row))]
        layer = 0
        for i in range(c.n_layer):
            prefix, chosen, gate = f"blocks.{i}.", list(range(len(x))), [1] * len(x)
            if (i + 1) % c.route_every == 0:
                r = [(W[prefix + "router.weight"] @ standard(x_t)).item() for x_t in x]
                logit = r
                if prefix + "predictor.0.weight" in W:
                    w0, b0, w2, b2 = (W[f"{prefix}predictor.{n}"] for n in ("0.weight", "0.bias", "2.weight", "2.bias"))
                    logit = [(w2 @ gelu(w0 @ standard(x_t) + b0) + b2).item() for x_t in x]
                chosen = decide(layer, b, r, logit)
                gate = r if c.gate == "raw" else [1 / (1 + math.exp(-r_t)) for r_t in r]
                taken[layer, b, chosen] = True
                prefix, layer = prefix + "block.", layer + 1
            deltas = block_reference(W, prefix, [x[t] for t in chosen], chosen, c.n_head)
            for t, delta in zip(chosen, deltas, strict=True):
                x[t] = x[t] + gate[t] * delta
        logits.append(torch.stack([W["head.weight"] @ standard(x_t) for x_t in x]))
    return torch.stack(logits), taken


@pytest.mark.parametrize("shape", [dict(), dict(n_layer=1, n_head=1), dict(n_head=4, n_embd=24, route_every=1)])
def test_capacity_1_is_a_plain_dense_transformer(shape):
    """With nothing to choose there is no router and no predictor either."""
    model = redrawn(capacity=1, **shape)
    idx = tokens(3, 24)
    for causal in (False, True):
        logits, loss, route = model(idx, idx, causal=causal)
        close(logits, dense_reference(model, idx))
        close(loss, -dense_reference(model, idx).log_softmax(-1).gather(2, idx[..., None]).mean())
        assert route is None
    C, c = model.config.n_embd, model.config
    assert not [name for name, _ in model.named_parameters() if part(name) != "body"]
    assert sum(p.numel() for p in model.parameters()) == 2 * c.vocab_size * C + 4 * C + c.n_layer * 12 * C * C


ROUTED = [
    dict(),
    dict(gate="raw"),
    dict(capacity=0.5, route_every=1, n_layer=2),
    dict(causal="router", gate="raw", route_every=3, n_layer=6),
    dict(causal="router", capacity=0.1),
]


@pytest.mark.parametrize("changes", ROUTED)
def test_top_k_routing_equals_loops(changes):
    """Equation 1. Traps: rotary angles of positions 0..k-1; the residual counted twice; indices from topk
    unsorted, or weights not permuted with them. Each of these is another function."""
    model = redrawn(**changes)
    idx = tokens(2, 13)
    k = max(1, round(model.config.capacity * 13))

    def highest(layer, row, r, logit):
        return sorted(sorted(range(13), key=lambda t: -r[t])[:k])

    expected, taken = mod_reference(model, idx, highest)
    logits, _, route = model(idx)
    assert torch.equal(route.taken, taken)
    close(logits, expected)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("changes", ROUTED)
def test_causal_routing_equals_loops(changes, threshold):
    """Section 3.5. Trap: the gate is the router's weight, also where the predictor decides."""
    model, idx = decided(B=2, T=13, threshold=threshold, **changes)

    def above(layer, row, r, logit):
        return [t for t in range(13) if logit[t] > threshold]

    expected, taken = mod_reference(model, idx, above)
    logits, route = one_shot(model, idx, threshold)
    assert torch.equal(route.taken, taken)
    close(logits, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_random_routing_equals_loops(causal):
    model = redrawn(routing="random", gate="raw")
    idx = tokens(2, 13)
    logits, _, route = model(idx, causal=causal)

    def same(layer, row, r, logit):
        return route.taken[layer, row].nonzero().flatten().tolist()

    expected, _ = mod_reference(model, idx, same)
    close(logits, expected)


def test_angles_are_those_of_the_true_positions():
    """Trap: rotary angles of the gathered tokens taken as 0..k-1, which loses the distance between them."""
    model = redrawn(n_layer=2)
    block = model.blocks[1]
    a, b, other = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    a[0], b[0], other[0] = 4, 4, -4
    block.router.weight.data = torch.eye(16)[:1]  # so that a and b are taken

    def output_of_b(text):
        x = torch.stack([{"a": a, "b": b, ".": other}[letter] for letter in text])[None]
        out, route = block(x, model.rope[:, : len(text)])
        assert route.taken[0].tolist() == [letter != "." for letter in text]
        return out[0, text.index("b")]

    adjacent = output_of_b("ab......")
    close(output_of_b("......ab"), adjacent)  # the embedding is relative
    assert (output_of_b("a......b") - adjacent).abs().max() > 0.01
    assert (output_of_b(".a..b...") - adjacent).abs().max() > 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_that_changes_nothing_leaves_the_residual_stream_as_it_is(causal):
    """Trap: the block called with its residual inside, then added onto x again, so that taken tokens count
    twice."""
    model = redrawn(seed=1, gate="raw")
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            nn.init.zeros_(p)
    idx = tokens(3, 24)
    logits, _, route = model(idx, causal=causal)
    assert route.taken.any()
    close(logits, model.head(standard(model.embed(idx))), atol=1e-5)


def test_attention_among_the_taken_is_causal_in_time_not_in_score():
    """Trap: indices from topk unsorted. Random routing shows it alone: there top-k doesn't depend on the
    tokens."""
    model = redrawn(routing="random")
    idx = tokens(2, 24)
    torch.manual_seed(0)
    before = model(idx)[0]
    for t in range(1, 24):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 29
        torch.manual_seed(0)
        after = model(changed)[0]
        close(after[:, :t], before[:, :t], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# The model: who is taken


@pytest.mark.parametrize(
    "capacity, T, k",
    [(0.125, 256, 32), (0.125, 24, 3), (0.5, 6, 3), (0.01, 24, 1), (0.9, 1, 1), (0.99, 20, 20)],
)
@pytest.mark.parametrize("routing", ["topk", "random"])
def test_exactly_k_tokens_of_each_sequence_are_taken(capacity, T, k, routing):
    model = redrawn(capacity=capacity, routing=routing, block_size=256)
    route = model(tokens(3, T))[2]
    assert model.config.k(T) == k
    assert route.taken.shape == route.r.shape == route.logit.shape == (2, 3, T)
    assert route.taken.dtype == torch.bool
    assert (route.taken.sum(-1) == k).all()


def test_exactly_k_tokens_are_taken_where_all_tie():
    """Trap: weights > threshold instead of >=, one token fewer than the budget, and none with ties."""
    model = redrawn()
    for block in routed_blocks(model):
        nn.init.zeros_(block.router.weight)
    assert (model(tokens(3, 24))[2].taken.sum(-1) == 6).all()
    assert (redrawn()(torch.zeros(3, 24, dtype=torch.long))[2].taken.sum(-1) == 6).all()  # and one token repeated


def test_every_routed_block_decides_for_itself():
    """Trap: one router shared by all layers. Another router in one block leaves earlier blocks' choices
    alone."""
    model = redrawn(n_layer=6)
    idx = tokens(3, 24)
    before = model(idx)[2]
    assert len({id(block.router.weight) for block in routed_blocks(model)}) == 3
    assert len({id(block.predictor[0].weight) for block in routed_blocks(model)}) == 3
    nn.init.normal_(routed_blocks(model)[1].router.weight, generator=torch.Generator().manual_seed(1))
    after = model(idx)[2]
    assert torch.equal(before.taken[0], after.taken[0]) and torch.equal(before.r[0], after.r[0])
    assert (before.taken[1] != after.taken[1]).any()
    assert all((a != b).any() for a, b in zip(before.taken[:-1], before.taken[1:], strict=True))


@pytest.mark.parametrize(
    "route_every, n_layer, routed", [(1, 3, [0, 1, 2]), (2, 5, [1, 3]), (3, 6, [2, 5]), (4, 3, [])]
)
def test_which_blocks_are_routed(route_every, n_layer, routed):
    model = redrawn(route_every=route_every, n_layer=n_layer)
    assert [i for i, block in enumerate(model.blocks) if isinstance(block, RoutedBlock)] == routed
    assert model.config.routed_layers == routed
    route = model(tokens(2, 5))[2]
    assert route.taken.shape == (len(routed), 2, 5) if routed else route is None


@pytest.mark.parametrize("changes", [dict(), dict(causal="router"), dict(gate="raw", route_every=1)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_does_not_depend_on_the_others(changes, causal):
    """Trap: batch-dependence. Rows that take more pad the others, which must not show."""
    model, idx = decided(**changes)
    together, _, route = model(idx, causal=causal)
    for b in range(len(idx)):
        alone, _, route_alone = model(idx[b : b + 1], causal=causal)
        close(alone[0], together[b], atol=1e-5)
        assert torch.equal(route_alone.taken[:, 0], route.taken[:, b])


@pytest.mark.parametrize("position", [1, 7, 16, 23])
@pytest.mark.parametrize("changes", [dict(), dict(causal="router"), dict(capacity=1)])
def test_a_later_token_changes_no_earlier_logit_if_routing_is_causal(changes, position):
    model, idx = decided(**changes) if "capacity" not in changes else (redrawn(**changes), tokens(3, 24))
    changed = idx.clone()
    changed[:, position] = (idx[:, position] + 1) % 29
    before, after = one_shot(model, idx)[0], one_shot(model, changed)[0]
    close(after[:, :position], before[:, :position], atol=1e-5)
    assert ((after - before)[:, position].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("position", [7, 16, 23])
@pytest.mark.parametrize("changes", [dict(), dict(causal="router")])
def test_under_top_k_a_later_token_does_change_earlier_logits(changes, position):
    """The reason for the predictor: whether a token is among the k highest depends on those to come."""
    model, idx = redrawn(**changes), tokens(8, 24)
    changed = idx.clone()
    changed[:, position] = (idx[:, position] + 1) % 29
    difference = (model(changed)[0] - model(idx)[0])[:, :position].abs().amax((1, 2))
    assert (difference > 0.01).any()


def test_random_routing_is_blind_to_the_router():
    """The paper's control: same seed, same choice, whatever the router; only the gate is the router's."""
    idx = tokens(8, 128)
    for causal in (False, True):
        model = redrawn(routing="random", block_size=128, n_layer=8)
        assert not [name for name, _ in model.named_parameters() if part(name) == "predictor"]
        torch.manual_seed(0)
        before, loss, route = model(idx, idx, causal=causal)
        grads = gradients(model, loss)
        assert all(grads[name].abs().max() > 0 for name in grads if part(name) == "router")
        for block in routed_blocks(model):
            nn.init.normal_(block.router.weight)
        torch.manual_seed(0)
        after, _, other = model(idx, causal=causal)
        assert torch.equal(other.taken, route.taken)
        assert (other.r != route.r).any() and (after - before).abs().max() > 1e-3
        torch.manual_seed(1)
        assert (model(idx, causal=causal)[2].taken != route.taken).any()
        assert len({tuple(row.tolist()) for row in route.taken.flatten(0, 1)}) == 4 * 8  # drawn row by row
        if causal:  # 4,096 draws: four standard deviations are 0.027
            assert abs(route.taken.float().mean() - 0.25) < 0.027
            assert route.taken.sum(-1).unique().numel() > 1
        else:
            assert (route.taken.sum(-1) == 32).all()


# ---------------------------------------------------------------------------------------------------------
# The model: the KV cache, and text from it

CACHED = [
    (0.0, dict()),
    (0.0, dict(gate="raw")),
    (0.0, dict(causal="router")),
    (0.0, dict(causal="router", gate="raw")),
    (0.0, dict(capacity=0.5, route_every=1)),
    (0.0, dict(capacity=0.125, route_every=3, n_layer=6, n_head=1)),
    (0.4, dict()),
    (-0.3, dict(causal="router", gate="raw")),
]


@pytest.mark.parametrize("prompt", [1, "k", 23, 24])
@pytest.mark.parametrize("threshold, changes", CACHED)
def test_steps_through_the_cache_equal_one_shot(threshold, changes, prompt):
    """Sampling is the same function as the causal forward pass, however the rows of a batch skip. Traps:
    skipped slots attended to; the prompt processed with top-k, the continuation with the predictor."""
    model, idx = decided(threshold=threshold, **changes)
    expected, route = one_shot(model, idx, threshold)
    assert is_decided(route, threshold)
    prompt = model.config.k(24) if prompt == "k" else prompt
    logits, taken, _ = step_by_step(model, idx, prompt, threshold)
    assert torch.equal(taken, route.taken)
    close(logits, expected[:, prompt - 1 :])
    for b in range(3) if prompt == model.config.k(24) else [0]:  # a batch of 1: each row alone gives the same
        logits, taken, _ = step_by_step(model, idx[b : b + 1], prompt, threshold)
        assert torch.equal(taken[:, 0], route.taken[:, b])
        close(logits[0], expected[b, prompt - 1 :])


@pytest.mark.parametrize("prompt", [1, 6, 24])
def test_steps_through_the_cache_equal_one_shot_in_a_dense_model(prompt):
    """Trap: is_causal=True with one query against a longer cache attends to the first key only."""
    model, idx = redrawn(capacity=1), tokens(3, 24)
    close(step_by_step(model, idx, prompt)[0], one_shot(model, idx)[0][:, prompt - 1 :])


def test_a_start_is_refused_without_a_cache_or_for_several_tokens():
    """Either would pass for a text that begins in its middle."""
    model, idx = redrawn(), tokens(1, 8)
    for start, cache in ((7, None), (5, model.new_cache(1))):
        with pytest.raises(AssertionError, match="exactly one new token"):
            model(idx, start=start, cache=cache)


def test_what_a_cache_never_wrote_is_never_seen():
    """Trap: NaN * 0 is NaN, so a masked slot of uninitialised memory is not harmless. A shorter row's slots
    up to the length of the longest are such slots; here all memory not yet written is NaN."""
    model, idx = decided()
    expected = one_shot(model, idx)[0]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(1).isnan()
        for prompt in (1, 6):
            close(step_by_step(model, idx, prompt)[0], expected[:, prompt - 1 :])
    finally:
        torch.use_deterministic_algorithms(False)


def test_padding_is_never_seen():
    """A prompt's shorter rows are padded with tokens that were not taken; later tokens must not attend to
    them."""
    model, idx = decided()
    cache = model.new_cache(3)
    expected, route = one_shot(model, idx)
    with torch.no_grad():
        model(idx[:, :12], causal=True, cache=cache)
        for kv in routed_caches(model, cache):
            for b, length in enumerate(kv.length):
                kv.k[b, :, length:] = 1e3
                kv.v[b, :, length:] = 1e3
        for t in range(12, 24):
            logits = model(idx[:, : t + 1], cache=cache, start=t)[0]
            close(logits[:, 0], expected[:, t])


@pytest.mark.parametrize("prompt", [1, 6, 24])
def test_nothing_is_cached_for_skipped_tokens(prompt):
    """Trap: a cache with a slot for every token: no memory saved."""
    model, idx = decided()
    taken, cache = step_by_step(model, idx, prompt)[1:]
    for count, kv in zip(taken.sum(-1), routed_caches(model, cache), strict=True):
        assert list(kv.length) == count.tolist()
        assert kv.k.size(2) <= max(16, 2 * max(kv.length))
    dense = [kv for kv in cache if kv not in routed_caches(model, cache)]
    assert all(list(kv.length) == [24] * 3 for kv in dense)
    slots = int(taken.sum()) + 2 * 3 * 24
    assert sum(kv.bytes_used for kv in cache) == slots * 2 * 16 * 4  # key and value, 16 channels, 4 bytes


def test_an_infinite_threshold_skips_every_routed_block():
    """What remains is the dense model of the other blocks. Trap: at sampling, top-1 of one token always takes
    it."""
    model, idx = redrawn(), tokens(3, 24)
    dense = redrawn(capacity=1, n_layer=2)
    dense.embedding, dense.mix, dense.head = model.embedding, model.mix, model.head
    dense.blocks[0], dense.blocks[1] = model.blocks[0], model.blocks[2]
    expected = one_shot(dense, idx)[0]
    close(one_shot(model, idx, torch.inf)[0], expected, atol=1e-5)
    for prompt in (1, 6, 24):
        logits, taken, cache = step_by_step(model, idx, prompt, torch.inf)
        close(logits, expected[:, prompt - 1 :])
        assert not taken.any()
        assert all(kv.length == [0] * 3 and kv.bytes_used == 0 for kv in routed_caches(model, cache))


def test_buffers_grow_by_doubling_and_keep_their_contents():
    model, idx = redrawn(block_size=80, n_layer=2), tokens(2, 80)
    expected = one_shot(model, idx, -torch.inf)[0]
    cache = model.new_cache(2)
    dense, routed = cache
    assert dense.k.size(2) == dense.v.size(2) == 80
    sizes, before = [routed.k.size(2)], None
    with torch.no_grad():
        for t in range(80):
            logits = model(idx[:, : t + 1], threshold=-torch.inf, cache=cache, start=t)[0]
            close(logits[:, 0], expected[:, t])
            if routed.k.size(2) != sizes[-1]:
                sizes.append(routed.k.size(2))
                assert torch.equal(torch.stack((routed.k, routed.v))[..., :t, :], before)
            assert routed.v.size(2) == routed.k.size(2)
            before = torch.stack((routed.k, routed.v))[..., : t + 1, :].clone()
    assert dense.k.size(2) == 80
    assert sizes == [sizes[0] * 2**n for n in range(len(sizes))] and len(sizes) > 2


def test_the_gate_is_not_the_predictors():
    """Trap: the gate at sampling taken from the predictor. A predictor of the same decisions at three times
    the confidence is the same model."""
    model, idx = decided()
    before, taken, _ = step_by_step(model, idx, 6)
    with torch.no_grad():
        for block in routed_blocks(model):
            block.predictor[-1].weight *= 3
            block.predictor[-1].bias *= 3
    after, taken_after, _ = step_by_step(model, idx, 6)
    assert torch.equal(taken, taken_after)
    close(after, before, atol=0)


@torch.no_grad()
def from_scratch(model, idx, num_tokens, threshold=0.0):
    """Greedy continuation without a cache: the whole window is computed again for each token.

    Once the window has outgrown the context, only the last half a context of the text remains in it.
    Returns tokens (B, N) and the logits they were taken from (B, N, V).
    """
    size = model.config.block_size
    window, new, logits = idx[:, -size:], [], []
    for _ in range(num_tokens):
        if window.size(1) > size:
            window = window[:, -max(1, size // 2) :]
        out, route = one_shot(model, window, threshold)
        assert route is None or ((route.logit - threshold).abs() > 1e-5).all()
        logits.append(out[:, -1])
        new.append(logits[-1].argmax(-1))
        window = torch.cat((window, new[-1][:, None]), dim=1)
    return torch.stack(new, dim=1), torch.stack(logits, dim=1)


def generated(model, idx, num_tokens, **options):
    new, logits, routes, caches = zip(*model.generate(idx, num_tokens, temperature=0, **options), strict=True)
    return torch.cat(new, dim=1), torch.stack(logits, dim=1), routes, caches


@pytest.mark.parametrize("prompt", [1, 12])
@pytest.mark.parametrize("threshold, changes", [*CACHED, (0.0, dict(capacity=1))])
def test_greedy_text_equals_recomputing_from_scratch(threshold, changes, prompt):
    dense = "capacity" in changes and changes["capacity"] == 1
    model, idx = (redrawn(**changes), tokens(3, 24)) if dense else decided(threshold=threshold, **changes)
    expected, expected_logits = from_scratch(model, idx[:, :prompt], 12, threshold)
    new, logits, routes, caches = generated(model, idx[:, :prompt], 12, threshold=threshold)
    close(logits, expected_logits)
    assert torch.equal(new, expected) and new.shape == (3, 12)
    if not dense:  # the routes are those of the tokens fed: first the prompt, then one token at a time
        assert [route.taken.size(2) for route in routes] == [prompt] + 11 * [1]
        _, route = one_shot(model, torch.cat((idx[:, :prompt], new[:, :-1]), dim=1), threshold)
        assert torch.equal(torch.cat([r.taken for r in routes], dim=2), route.taken)
        lengths = [kv.length for kv in routed_caches(model, caches[-1])]
        assert lengths == route.taken.sum(-1).tolist()


@pytest.mark.parametrize("size, prompt, num_tokens", [(24, 20, 40), (24, 24, 20), (24, 31, 20), (7, 3, 20), (1, 1, 4)])
@pytest.mark.parametrize("changes", [dict(), dict(causal="router", gate="raw"), dict(capacity=1)])
def test_generation_past_the_context_goes_on_from_its_second_half(size, prompt, num_tokens, changes):
    """So does a prompt that is longer than the context: of that the last context counts."""
    model, idx = redrawn(seed=1, block_size=size, **changes), tokens(2, prompt)
    expected, expected_logits = from_scratch(model, idx, num_tokens)
    new, logits, routes, _ = generated(model, idx, num_tokens)
    close(logits, expected_logits)
    assert torch.equal(new, expected)
    if routes[0]:
        fed = [route.taken.size(2) for route in routes]
        assert fed[0] == min(size, prompt) and max(fed[1:]) == max(1, size // 2)


def test_the_prompt_is_routed_by_the_predictor_as_well():
    """Trap: the prompt processed with top-k, the continuation with the predictor."""
    model, idx = decided(B=2)
    _, logits, routes, _ = generated(model, idx, 1)
    expected, route = one_shot(model, idx)
    assert torch.equal(routes[0].taken, route.logit > 0)
    close(logits[:, 0], expected[:, -1])
    assert (routes[0].taken != model(idx)[2].taken).any()
    assert (model(idx)[0][:, -1] - expected[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("B", [1, 3])
def test_one_token_at_a_time_costs_only_what_is_taken(B):
    """Traps: top-1 of one token always takes it; every token computed, then thrown away. Counted in FLOPs."""
    model, idx = decided(B=B, n_layer=6, threshold=0.6)
    c, cache, all_taken = model.config, model.new_cache(B), []
    linear = 2 * 12 * c.n_embd**2  # a block's four matrices
    chooser = 2 * c.n_embd + 2 * (c.n_embd * c.n_embd // 4 + c.n_embd // 4)
    for t in range(24):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            route = model(idx[:, : t + 1], threshold=0.6, cache=cache, start=t)[2]
        counts = counter.get_flop_counts()["Global"]
        counted = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
        all_taken.append(int(route.taken.sum()))
        assert counted == B * (3 * linear + 3 * chooser + 2 * c.n_embd * c.vocab_size) + all_taken[-1] * linear
    assert len(set(all_taken)) > 2 and 0 in all_taken


# ---------------------------------------------------------------------------------------------------------
# The model: gradients and training


@pytest.mark.parametrize("causal", ["predictor", "router"])
@pytest.mark.parametrize("gate", ["sigmoid", "raw"])
def test_the_language_model_loss_reaches_routers_and_no_predictor(gate, causal):
    """Multiplying by the gate is what gives the router a gradient (section 3.4)."""
    model = redrawn(gate=gate, causal=causal)
    grads = gradients(model, model(tokens(3, 24), tokens(3, 24, seed=1))[1])
    for name, grad in grads.items():
        if part(name) == "predictor":
            assert grad is None, name
        else:
            assert grad.isfinite().all() and grad.abs().max() > 0, name


@pytest.mark.parametrize("causal", ["router", "predictor"])
def test_the_choices_loss_reaches_who_decides_alone(causal):
    """Section 3.5. Traps: a predictor that is never trained; a loss of the choice's that moves the body."""
    model = redrawn(causal=causal)
    grads = gradients(model, choice_loss(model(tokens(3, 24))[2]))
    assert {part(name) for name, grad in grads.items() if grad is not None and grad.abs().max() > 0} == {causal}


@pytest.mark.parametrize("causal", ["router", "predictor"])
def test_the_bodys_gradient_is_the_same_with_and_without_the_choices_loss(causal):
    model = redrawn(causal=causal)
    _, loss, route = model(tokens(3, 24), tokens(3, 24, seed=1))
    with_it = gradients(model, loss + choice_loss(route))
    without = gradients(model, model(tokens(3, 24), tokens(3, 24, seed=1))[1])
    assert all(torch.equal(with_it[name], without[name]) for name in without if part(name) != causal)


@pytest.mark.parametrize("causal", [False, True])
def test_the_loss_is_the_mean_cross_entropy(causal):
    """Also under causal routing. Trap: only the loss under top-k routing reported, which sampling can't
    reach."""
    model, idx = decided()
    targets = tokens(3, 24, seed=9)
    logits, loss, _ = model(idx, targets, causal=causal)
    expected = torch.stack(
        [-logits[b, t].double().log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(24)]
    ).mean()
    close(loss, expected, atol=1e-5)
    assert model(idx, causal=causal)[1] is None
    assert (loss - model(idx, targets, causal=not causal)[1]).abs() > 1e-4


@pytest.mark.parametrize("gate", ["sigmoid", "raw"])
def test_a_row_in_which_nobody_is_taken_gives_no_nan(gate):
    """Trap: a row that is all padding while another takes tokens; masked completely it is NaN, and NaN * 0 is
    NaN."""
    model, idx = redrawn(n_layer=2, gate=gate), tokens(2, 24)
    highest = model(idx, causal=True)[2].logit[0].amax(-1)  # of each row
    threshold = highest.mean().item()  # so that one row takes tokens and the other doesn't
    logits, loss, route = model(idx, idx, causal=True, threshold=threshold)
    assert sorted(route.taken[0].any(-1).tolist()) == [False, True]
    assert logits.isfinite().all()
    grads = gradients(model, loss)
    assert all(grad.isfinite().all() for name, grad in grads.items() if part(name) != "predictor")
    for b in range(2):
        close(model(idx[b : b + 1], causal=True, threshold=threshold)[0][0], logits[b], atol=1e-5)
    close(step_by_step(model, idx, 12, threshold)[0], logits[:, 11:])
    close(step_by_step(model, idx, 24, threshold)[0], logits[:, 23:])


def test_a_new_model_is_the_identity_and_says_nothing():
    """Output projections start at 0, so that each token is as likely as any other and no block changes
    anything."""
    model = MoD(MoDConfig(**SMALL))
    _, loss, route = model(tokens(3, 24), tokens(3, 24, seed=1))
    close(loss, torch.tensor(math.log(29)), atol=1e-5)
    model.head.weight.data.normal_()
    close(model(tokens(3, 24))[0], model.head(standard(model.embed(tokens(3, 24)))), atol=1e-5)
    assert (route.r.std(-1) > 0.1).all()  # routers don't start with ties


@pytest.mark.parametrize("changes", [dict(capacity=1), dict(), dict(causal="router"), dict(routing="random")])
def test_overfits_one_batch(changes):
    """Routed too, and then the causal loss is close as well: the choice that was trained is the one sampled
    with."""
    torch.manual_seed(0)
    model = MoD(MoDConfig(**{**SMALL, "n_layer": 2, "n_embd": 32, "capacity": 0.5, **changes}))
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(150):
        _, loss, route = model(idx, targets)
        total = loss if route is None or changes.get("routing") else loss + choice_loss(route)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert model(idx, targets)[1] < 0.05
    if route is not None and not changes.get("routing"):
        _, loss, route = model(idx, targets, causal=True)
        assert loss < 0.1
        assert (route.taken == model(idx)[2].taken).float().mean() > 0.95
        assert 0.3 < route.taken.float().mean() < 0.7


# ---------------------------------------------------------------------------------------------------------
# The model: FLOPs, compilation, precision

SHAPES = [
    dict(capacity=1),
    dict(capacity=1, n_layer=3, n_head=4, n_embd=24),
    dict(),
    dict(capacity=0.125, n_embd=32),
    dict(causal="router"),
    dict(routing="random"),
    dict(routing="random", causal="router"),
    dict(route_every=1, capacity=0.5),
    dict(route_every=3, n_layer=7, n_head=1, vocab_size=50),
]


def counted_flops(model, idx, **options):
    """Linear layers, and attention, of a forward pass as torch counts them: attention over all of T x T."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(idx, **options)
    counts = counter.get_flop_counts()["Global"]
    attention = counts.get(torch.ops.aten.bmm, 0)
    return counter.get_total_flops() - attention, attention


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("T", [8, 24])
def test_flop_formula_equals_what_torch_counts(changes, T):
    """Linear layers exactly, attention as the half that a causal mask leaves."""
    model = redrawn(**changes)
    linear, attention = counted_flops(model, tokens(3, T))
    assert model.config.flops_per_token(T) * 3 * T == pytest.approx(linear + attention / 2, rel=1e-9)
    assert attention > 0


@pytest.mark.parametrize("changes", [dict(), dict(causal="router"), dict(capacity=0.5)])
def test_flop_formula_takes_the_share_really_taken(changes):
    """Under causal routing. One routed block and one row, where the share is one number and nothing is
    padded."""
    for B, threshold in [(1, 0.0), (3, torch.inf), (3, -torch.inf)]:
        model, idx = redrawn(**{**changes, "n_layer": 3}), tokens(B, 24)
        share = one_shot(model, idx, threshold)[1].taken.float().mean().item()
        linear, attention = counted_flops(model, idx, causal=True, threshold=threshold)
        flops = model.config.flops_per_token(24, share=share) * B * 24
        assert flops == pytest.approx(linear + attention / 2, rel=1e-6)
    c = MoDConfig(**SMALL)
    assert c.flops_per_token(24) == c.flops_per_token(24, share=6 / 24)


def test_training_costs_three_times_the_forward_pass():
    """In a dense model; the predictor's input has no gradient, so that a routed one's costs slightly less."""
    model, idx = redrawn(capacity=1), tokens(3, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == 3 * sum(counted_flops(model, idx))


def test_block_stack_at_capacity_one_eighth_costs_056_of_dense():
    """The design's figure for the paper's shape, and for one in which attention weighs more."""
    for shape in (dict(n_embd=1024, n_head=16, n_layer=24), dict(n_embd=256, n_head=4, n_layer=8)):
        shape = dict(shape, block_size=2048, vocab_size=1)  # a head of next to nothing
        mod, dense = MoDConfig(**shape, capacity=0.125), MoDConfig(**shape, capacity=1)
        head = 2 * shape["n_embd"]
        ratio = (mod.flops_per_token(2048) - head) / (dense.flops_per_token(2048) - head)
        assert ratio == pytest.approx(0.56, abs=0.02)


def train_steps(model, forward, steps, B=2):
    """A few training steps as a training script takes them; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        _, loss, route = forward(tokens(B, 24, seed=step), tokens(B, 24, seed=99 + step))
        total = loss if route is None else loss + choice_loss(route)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    "changes", [dict(), dict(causal="router", gate="raw"), dict(routing="random"), dict(capacity=1)]
)
def test_training_forward_is_one_static_graph(changes):
    """Traps: .item(), prints or attributes written in the forward pass break the graph; a loop over the batch
    is unrolled into it; a size that depends on the data compiles it again."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    model, eager = redrawn(n_layer=2, **changes), redrawn(n_layer=2, **changes)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    torch.manual_seed(0)
    losses = train_steps(model, compiled, 3)
    assert len(graphs) == 1
    train_steps(model, compiled, 1, B=5)
    assert len(graphs) == 2 and graphs[0] == graphs[1]
    torch.manual_seed(0)
    close(losses, train_steps(eager, eager, 3), atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(), dict(causal="router", gate="raw")])
def test_compiled_with_inductor_equals_eager(changes):
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    model, idx, targets = redrawn(**changes), tokens(3, 24), tokens(3, 24, seed=1)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        _, loss, route = forward(idx, targets)
        total = loss if route is None else loss + choice_loss(route)
        results.append((loss.detach(), gradients(model, total), route))
    (loss, grads, route), (loss_compiled, grads_compiled, route_compiled) = results
    close(loss, loss_compiled, atol=1e-5)
    for name in grads:
        close(grads[name], grads_compiled[name], atol=1e-5)
    assert route is None or torch.equal(route.taken, route_compiled.taken)
    torch._dynamo.reset()


@pytest.mark.parametrize("causal", ["predictor", "router"])
@pytest.mark.parametrize("routing", [False, True])
def test_routers_and_predictors_stay_in_float32_under_autocast(causal, routing):
    """Trap: router and predictor logits in bfloat16 tie and flip. The block's input may itself be less exact
    under autocast, so that the same input is given to the same block again, without autocast."""
    model, idx = decided(causal=causal)
    given = []
    block = routed_blocks(model)[0]
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss, route = model(idx, idx, causal=routing)
    handle.remove()
    assert logits.isfinite().all() and loss.isfinite() and loss.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in gradients(model, loss + choice_loss(route)).values())
    assert route.r.dtype == route.logit.dtype == torch.float32
    args, kwargs = given[0]
    _, exact = block(*args, **kwargs)
    assert torch.equal(route.r[0], exact.r) and torch.equal(route.logit[0], exact.logit)
    assert torch.equal(route.taken[0], exact.taken)
    assert all(route.r[0, b].unique().numel() > 1 for b in range(3))


def test_generation_is_the_same_under_autocast():
    """Trap: decisions taken in bfloat16, or keys of one dtype in a cache of another."""
    model, idx = decided()
    plain = list(model.generate(idx[:, :6], 30, temperature=0))
    with torch.autocast("cpu", torch.bfloat16):
        for (new, logits, *_), (expected, *_) in zip(model.generate(idx[:, :6], 30, temperature=0), plain, strict=True):
            assert logits.dtype == torch.float32 and torch.equal(new, expected)


# ---------------------------------------------------------------------------------------------------------
# The model: sampling a token, configuration, import

PROBABILITIES = [0.125, 0.5, 0.125, 0.25]  # not in order, and with a tie


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (dict(temperature=0.5), [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (dict(top_k=3), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),  # a tie for the third place: both are in
        (dict(top_k=99), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (dict(top_p=1e-6), [0, 1, 0, 0]),  # never fewer than one
        (dict(top_p=1e-50), [0, 1, 0, 0]),  # which is 0 in float32
        (dict(top_p=0.4), [0, 1, 0, 0]),
        (dict(top_p=0.6), [0, 2 / 3, 0, 1 / 3]),
        (dict(top_p=0.95), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (dict(top_p=1.0), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),  # of the two that top_k leaves, one already holds 2 / 3
        (dict(temperature=2, top_p=0.36), [0, 1, 0, 0]),  # the temperature comes first: 0.369 is enough
        (dict(temperature=2, top_p=0.38), [0, 2**0.5 / (1 + 2**0.5), 0, 1 / (1 + 2**0.5)]),
    ],
)
def test_sample_keeps_the_right_tokens_in_the_right_proportion(options, expected):
    """Of 20,000 draws a share is off by 0.014 at four standard deviations. Every other row has its tokens
    reversed: each row is sorted for itself."""
    torch.manual_seed(0)
    logits = torch.tensor(PROBABILITIES).log() + 3  # the same up to a constant
    drawn = sample(torch.stack((logits, logits.flip(0))).repeat(20_000, 1), **options)
    assert drawn.shape == (40_000, 1) and drawn.dtype == torch.int64
    for row, want in ((drawn[::2], expected), (drawn[1::2], expected[::-1])):
        share = row.flatten().bincount(minlength=4) / len(row)
        close(share, torch.tensor(want), atol=0.015)
        assert torch.equal(share > 0, torch.tensor(want) > 0)


def test_top_p_among_ties_keeps_no_more_than_it_needs():
    torch.manual_seed(0)
    assert sample(torch.zeros(2000, 4), top_p=0.6).unique().numel() == 3
    assert sample(torch.tensor(PROBABILITIES).log().repeat(2000, 1), top_p=0.8).unique().numel() == 3


@pytest.mark.parametrize("options", [dict(), dict(top_k=3), dict(top_p=0.9), dict(top_k=2, top_p=0.5)])
def test_temperature_0_is_argmax(options):
    logits = torch.randn(50, 29, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, temperature=0, **options), logits.argmax(-1, keepdim=True))
    for cold in 1e-4, 1e-50:
        assert torch.equal(sample(logits, temperature=cold, **options), logits.argmax(-1, keepdim=True))


def test_generate_hands_its_sampling_options_on():
    model, idx = decided()
    greedy = from_scratch(model, idx[:, :6], 12)[0]
    for options in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-5)):
        new = torch.cat([new for new, *_ in model.generate(idx[:, :6], 12, **options)], dim=1)
        assert torch.equal(new, greedy), options
    torch.manual_seed(0)
    assert not torch.equal(torch.cat([new for new, *_ in model.generate(idx[:, :6], 12)], dim=1), greedy)


@pytest.mark.parametrize(
    "changes",
    [
        dict(capacity=0),
        dict(capacity=-0.5),
        dict(capacity=1.5),
        dict(capacity=math.nan),
        dict(n_embd=30, n_head=4),
        dict(n_embd=12, n_head=4),  # a head size of 3: rotary embedding turns pairs
        dict(n_embd=0),
        dict(n_embd=-16),
        dict(n_head=0),
        dict(n_head=-2),
        dict(n_layer=0),
        dict(block_size=0),
        dict(vocab_size=0),
        dict(route_every=0),
        dict(routing="expert"),
        dict(causal="topk"),
        dict(gate="softmax"),
    ],
    ids=str,
)
def test_a_bad_config_is_a_value_error_that_names_the_value(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name} {value!r}"):
        MoDConfig(**{**SMALL, **changes})


def test_mod_imports_nothing_but_torch_and_the_standard_library_and_prints_nothing(capfd):
    path = Path(__file__).with_name("mod.py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("" if node.level else node.module.split(".")[0])
    assert imported <= {"torch", *sys.stdlib_module_names}
    spec = importlib.util.spec_from_file_location("mod_again", path)
    before = torch.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled()
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert before == (torch.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled())
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------
# prepare_data.py

TEXT = b"".join(b"line %d of the text\n" % i for i in range(200))
NASTY = "naïve 😀 é\r\n\n".encode() + b"\x00\xff\xfe\x80" + EOT.encode() + bytes(range(256))


def folder(path):
    """What a directory holds: {relative name: bytes}."""
    return {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def decoded(tokenizer, tokens):
    return tokenizer.decode_bytes(tokens.tolist())


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def fake_gpt2(monkeypatch):
    """Stands in for gpt2, whose vocabulary needs a network: real tiktoken, same name and size, no merges."""
    ranks = {bytes([i]): i for i in range(256)}
    enc = tiktoken.Encoding("gpt2", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={EOT: 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: enc)
    return enc


@pytest.fixture
def fake_stdlib(tmp_path, monkeypatch):
    """A small standard library; every kept file has text of its own, {its content} is what is returned."""
    root = tmp_path / "stdlib"
    kept = {f"m{i}.py": f"# module {i}\nx = {i}\n".encode() for i in range(36)}
    kept |= {f"package/p{i}.py": f"# in the package: {i} é\n".encode() for i in range(4)}
    kept["test.py"] = b"# a module, not a folder called test\n"
    left_out = {"package/empty.py": b"", "readme.txt": b"left out", "latin.py": b"# \xe9 left out\n"}
    for name in "test package/tests idlelib lib2to3 encodings pydoc_data site-packages dist-packages".split():
        left_out[f"{name}/module.py"] = b"left out"
    for name, data in (kept | left_out).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    monkeypatch.setattr(prepare_data, "STDLIB", root)
    return kept


@pytest.fixture
def server(monkeypatch):
    """A web server on localhost for the real ones; yields use(dataset, "KIND/NAME") to set it up."""
    released = threading.Event()

    def zipped(name, text):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, text)
        return archive.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            kind, name = self.path.strip("/").split("/")
            text = TEXT.upper() if kind == "wrong" else TEXT
            body = text if name == "input.txt" else zipped("other" if kind == "renamed" else "enwik8", text)
            length = len(body)
            if kind == "missing":
                return self.send_error(404)
            if kind == "page":  # what a login page of a hotel's network does
                body = b"<html>".ljust(length)
            if kind == "corrupt":
                body = body[:100] + b"\xff" * 100 + body[200:]
            if kind in ("truncated", "stalled"):
                body = body[: length // 2]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)
            if kind == "stalled":
                released.wait(10)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.3)
    monkeypatch.setattr(prepare_data, "DOWNLOADS", {})

    def use(dataset, path):
        url = f"http://127.0.0.1:{httpd.server_port}/{path}"
        prepare_data.DOWNLOADS[dataset] = (url, hashlib.sha256(TEXT).hexdigest())

    yield use
    released.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


# Tokenizers


def test_bytes_tokenizer_round_trips_anything():
    enc = prepare_data.get_tokenizer("bytes")
    assert (enc.n_vocab, enc.eot_token) == (257, 256)
    tokens = prepare_data.encode(enc, NASTY)
    assert tokens.dtype == np.uint16 and len(tokens) == len(NASTY)
    assert decoded(enc, tokens) == NASTY


def test_bytes_tokenizer_encodes_text_as_encode_does():
    """tiktoken's own path, which a user may take, agrees; a special token's name is text; newlines match."""
    enc = prepare_data.get_tokenizer("bytes")
    text = f"naïve 😀\r\n\n\0{EOT}\u2028x"
    assert enc.encode_ordinary(text) == read_prompt(text, enc) == list(text.encode())
    assert decoded(enc, np.array([104, 256, 105])) == f"h{EOT}i".encode()


def test_prompt_with_bytes_that_are_no_utf8(fake_gpt2):
    text = b"a\xffb".decode("utf-8", "surrogateescape")  # as Python gives such a command line
    assert read_prompt(text, prepare_data.get_tokenizer("bytes")) == [97, 255, 98]
    with pytest.raises(UserError, match="the prompt is not valid UTF-8"):
        read_prompt(text, fake_gpt2)


def test_gpt2_takes_the_name_of_a_special_token_as_text(fake_gpt2):
    """tiktoken's encode() raises on it; a model would take the text for the end of the document."""
    assert prepare_data.encode(fake_gpt2, EOT.encode()).tolist() == list(EOT.encode())


def test_unknown_tokenizer():
    with pytest.raises(UserError, match="unknown tokenizer 'gpt9'; choose one of bytes, gpt2"):
        prepare_data.get_tokenizer("gpt9")


def test_gpt2_without_a_network(monkeypatch, tmp_path, text_file):
    def no_network(name):
        raise ConnectionError("Max retries exceeded")  # requests' own is an OSError just like this one

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="needs a network. `prepare_data.py --tokenizer bytes` works offline"):
        prepare(inputs=[text_file], tokenizer="gpt2", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is written


def test_stdlib_is_split_by_file_and_always_the_same(fake_stdlib, tmp_path, monkeypatch, capsys):
    first = prepare(out=tmp_path / "a")
    assert "left out 1 files that are not UTF-8" in capsys.readouterr().err
    in_other_order = list(prepare_data.STDLIB.rglob("*.py"))[::-1]
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: in_other_order)  # as another file system might
    second = prepare(out=tmp_path / "b")
    monkeypatch.undo()
    assert folder(first) == folder(second)
    assert set(folder(first)) == {"train.bin", "val.bin", "meta.json"}

    train, val, meta = load_data(first)
    enc = prepare_data.get_tokenizer("bytes")
    train_files, val_files = (decoded(enc, split).split(EOT.encode()) for split in (train, val))
    assert len(val_files) == len(fake_stdlib) // 10
    assert sorted(train_files + val_files) == sorted(fake_stdlib.values())  # each in one of them, and whole
    names = {data: name for name, data in fake_stdlib.items()}
    assert [names[data] for data in train_files + val_files] != sorted(fake_stdlib)  # shuffled
    everything = b"".join(train_files + val_files)
    assert meta == {
        "dataset": "stdlib",
        "size": len(everything),
        "sha256": hashlib.sha256(everything).hexdigest(),
        "tokenizer": "bytes",
        "vocab_size": 257,
        "eot": 256,
        "train_tokens": sum(map(len, train_files)) + len(train_files) - 1,
        "val_tokens": sum(map(len, val_files)) + len(val_files) - 1,
        "bytes_per_val_token": sum(map(len, val_files)) / len(val),
        "python": platform.python_version(),
    }
    assert (first / "train.bin").read_bytes()[:2] == bytes([train_files[0][0], 0])  # little-endian


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "STDLIB", tmp_path)
    with pytest.raises(UserError, match="no Python source .* use `--dataset shakespeare` or `--input FILE`"):
        prepare(out=tmp_path / "out")


def test_input_takes_the_last_tenth_of_each_file_for_validation(tmp_path):
    a, b = NASTY * 4, TEXT
    (tmp_path / "a").write_bytes(a)
    (tmp_path / "b").write_bytes(b)
    train, val, meta = load_data(prepare(inputs=[tmp_path / "a", tmp_path / "b"], out=tmp_path / "out"))
    n, m = len(a) * 9 // 10, len(b) * 9 // 10
    assert train.tolist() == [*a[:n], 256, *b[:m]]
    assert val.tolist() == [*a[n:], 256, *b[m:]]
    assert (meta["dataset"], meta["size"], "python" in meta) == ("input", len(a + b), False)
    assert meta["bytes_per_val_token"] == (len(val) - 1) / len(val)


@pytest.mark.parametrize("lead", range(5))
def test_no_character_is_cut_in_two(lead, tmp_path, fake_gpt2):
    """A cut at 90 % of the bytes falls into a character more often than not in such a text."""
    data = b"x" * lead + "😀é".encode() * 100
    (tmp_path / "a").write_bytes(data)
    train, val, _ = load_data(prepare(inputs=[tmp_path / "a"], tokenizer="gpt2", out=tmp_path / "out"))
    assert decoded(fake_gpt2, train).decode() + decoded(fake_gpt2, val).decode() == data.decode()
    assert len(data) * 0.9 - 4 < len(train) <= len(data) * 0.9


def test_default_directories(fake_stdlib, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_data.main([])
    prepare_data.main(["--input", "text.txt"])
    assert load_data("data/stdlib")[2]["dataset"] == "stdlib"
    assert load_data("data/input")[2]["dataset"] == "input"


@pytest.mark.parametrize(
    "name, content, tokenizer, message",
    [
        ("nowhere", None, "bytes", "cannot read nowhere: No such file"),
        (".", None, "bytes", "cannot read .: "),
        ("empty", b"", "bytes", "empty is empty"),
        ("short", b"x" * 320, "bytes", "too little text: 288 tokens for training and 32 for validation"),
        ("one byte", b"x", "bytes", "too little text: 0 tokens for training and 1 for validation"),
        (
            "latin",
            b"caf\xe9 " * 200,
            "gpt2",
            "latin is not valid UTF-8.*`prepare_data.py --tokenizer bytes` takes any file",
        ),
    ],
)
def test_bad_input(name, content, tokenizer, message, text_file, tmp_path, monkeypatch, fake_gpt2):
    """A bad file is refused by name, a good one beside it or not, and nothing is written or lost."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    prepare(inputs=["text.txt"], out="old")
    before = folder(".")
    for out in ("old", "new"):
        with pytest.raises(UserError, match=message):
            prepare(inputs=[name], tokenizer=tokenizer, out=out)
        if "too little" not in message:
            with pytest.raises(UserError, match=message):
                prepare(inputs=["text.txt", name], tokenizer=tokenizer, out=out)
    assert folder(".") == before and not Path("new").exists()


def test_shortest_input_that_works(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 330)
    _, val, _ = load_data(prepare(inputs=[tmp_path / "a"], out=tmp_path / "out"))
    assert len(val) == prepare_data.MIN_VAL_TOKENS


def test_out_is_a_file(text_file):
    with pytest.raises(UserError, match="text.txt is a file; --out takes a directory"):
        prepare(inputs=[text_file], out=text_file)


def test_full_disk_leaves_the_old_data_whole(text_file, tmp_path, monkeypatch):
    """None of the three files takes its place before the last is written."""
    out = prepare(inputs=[text_file], out=tmp_path / "out")
    before = folder(out)
    text_file.write_bytes(TEXT.upper())

    def replace(temporary, path):  # when the first takes its place, all are whole
        sizes = {p.name.split(".")[0]: p.stat().st_size for p in out.glob("*.tmp")}
        assert sizes["meta"] > 100 and sizes["val"] == len(before["val.bin"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError):
        prepare(inputs=[text_file], out=out)
    assert folder(out) == before


def test_write_atomic(tmp_path):
    path = tmp_path / "new" / "file"
    with prepare_data.write_atomic(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        with prepare_data.write_atomic(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt
    assert folder(tmp_path) == {os.path.join("new", "file"): b"old"}


# Downloads


def test_download_once_for_both_tokenizers(server, tmp_path, fake_gpt2, capsys):
    server("shakespeare", "good/input.txt")
    out = prepare("shakespeare", out=tmp_path / "out")
    train, val, meta = load_data(out)
    cut = len(TEXT) * 9 // 10
    assert (bytes(train.tolist()), bytes(val.tolist())) == (TEXT[:cut], TEXT[cut:])
    assert (meta["dataset"], meta["sha256"]) == ("shakespeare", hashlib.sha256(TEXT).hexdigest())
    assert set(folder(out)) == {"input.txt", "train.bin", "val.bin", "meta.json"}
    assert "0.0 of 0.0 MB" in capsys.readouterr().err  # progress

    server("shakespeare", "missing/input.txt")  # so this must do with the file that is there
    prepare("shakespeare", tokenizer="gpt2", out=out)
    assert load_data(out)[2]["tokenizer"] == "gpt2"


def test_damaged_file_from_an_earlier_download_is_replaced(server, tmp_path):
    server("shakespeare", "good/input.txt")
    (tmp_path / "input.txt").write_bytes(TEXT[:-1])
    prepare("shakespeare", out=tmp_path)
    assert (tmp_path / "input.txt").read_bytes() == TEXT


def test_enwik8_is_unzipped_and_split_90_5_5(server, tmp_path):
    server("enwik8", "good/enwik8.zip")
    train, val, meta = load_data(prepare("enwik8", out=tmp_path / "out"))
    a, b = len(TEXT) * 90 // 100, len(TEXT) * 95 // 100
    assert (bytes(train.tolist()), bytes(val.tolist())) == (TEXT[:a], TEXT[a:b])
    assert (meta["size"], meta["bytes_per_val_token"]) == (len(TEXT), 1)
    assert (tmp_path / "out" / "enwik8").read_bytes() == TEXT


@pytest.mark.parametrize(
    "dataset, name, kind, reason",
    [
        ("shakespeare", "input.txt", "truncated", "it broke off after 2,045 of 4,090 bytes|IncompleteRead"),
        ("shakespeare", "input.txt", "wrong", "its SHA-256 is .*, not"),
        ("shakespeare", "input.txt", "missing", "HTTP Error 404"),
        ("shakespeare", "input.txt", "stalled", "timed out"),
        ("enwik8", "enwik8.zip", "truncated", "it broke off after|IncompleteRead"),
        ("enwik8", "enwik8.zip", "wrong", "its SHA-256 is .*, not"),
        ("enwik8", "enwik8.zip", "page", "File is not a zip file"),
        ("enwik8", "enwik8.zip", "corrupt", "Error -3 while decompressing|Bad CRC"),
        ("enwik8", "enwik8.zip", "renamed", "no item named 'enwik8'"),
    ],
)
def test_failed_download(server, tmp_path, text_file, dataset, name, kind, reason):
    server(dataset, f"{kind}/{name}")
    out = prepare(inputs=[text_file], out=tmp_path / "old")
    before = folder(tmp_path)
    message = f"could not download .*/{name}: .*({reason}).*`--dataset stdlib`"
    for out in ("old", "new"):
        with pytest.raises(UserError, match=message):
            prepare(dataset, out=tmp_path / out)
    assert folder(tmp_path) == before and not (tmp_path / "new").exists()


def test_nobody_answers(server, tmp_path):
    server("shakespeare", "good/input.txt")
    _, sha256 = prepare_data.DOWNLOADS["shakespeare"]
    prepare_data.DOWNLOADS["shakespeare"] = ("http://127.0.0.1:1/input.txt", sha256)
    with pytest.raises(UserError, match="refused.*work offline with `--dataset stdlib` or `--input FILE`"):
        prepare("shakespeare", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Loading


def damage(**changes):
    def do(out):
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        (out / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")

    return do


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda out: [path.unlink() for path in out.iterdir()] and out.rmdir(), "no prepared data in .*meta"),
        (lambda out: (out / "val.bin").unlink(), "no prepared data in .*val.bin is missing"),
        (lambda out: (out / "meta.json").unlink(), "no prepared data in .*meta.json is missing"),
        (lambda out: (out / "meta.json").write_bytes(b'{"data'), "damaged .JSONDecodeError"),
        (lambda out: (out / "meta.json").write_bytes(b"\xff\xfe"), "damaged .UnicodeDecodeError"),
        (lambda out: (out / "meta.json").write_bytes(b"[]"), "damaged .TypeError"),
        (lambda out: (out / "meta.json").write_bytes(b"{}"), "damaged .KeyError: 'vocab_size'"),
        (lambda out: (out / "train.bin").write_bytes(b"xx"), "disagree about the number of tokens"),
        (lambda out: (out / "train.bin").write_bytes(b"xxx"), "damaged .ValueError"),
        (lambda out: (out / "train.bin").write_bytes(b""), "damaged .ValueError.*empty"),
        (damage(val_tokens=1), "disagree about the number of tokens"),
        (damage(tokenizer="gpt9"), "unknown tokenizer 'gpt9'"),
        (damage(tokenizer="gpt2"), "tokenizer 'gpt2' with 257 tokens"),
        (
            lambda out: np.full(len(TEXT) // 10, 257, "<u2").tofile(out / "val.bin"),
            "token 257 is outside the vocabulary of 257",
        ),
    ],
)
def test_load_data_refuses(break_it, message, text_file, tmp_path):
    out = prepare(inputs=[text_file], out=tmp_path / "my data")
    load_data(out)
    break_it(out)
    with pytest.raises(UserError, match=message) as error:
        load_data(out)
    assert str(error.value).endswith(f"`python prepare_data.py --input FILE... --out '{out}'`")


def test_load_data_names_the_command_for_a_dataset():
    with pytest.raises(UserError, match="`python prepare_data.py --dataset enwik8 --out nowhere/enwik8`"):
        load_data("nowhere/enwik8")


def test_loaded_tokens_are_read_only_maps(text_file, tmp_path):
    train, _, _ = load_data(prepare(inputs=[text_file], out=tmp_path / "out"))
    assert isinstance(train, np.memmap) and train.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        train[0] = 1


# The command line


@dataclass
class Flags:
    steps: int = option(7, "optimizer steps, 100 % of them")
    lr: float = option(1e-3, "learning rate")
    out: str = option("out/mod", "directory")
    causal: str = option("predictor", "which", ("predictor", "router"))
    flops: float | None = option(None, "budget")
    compile: bool = option(True, "use torch.compile")
    html: bool | None = option(None, "write it")
    prompt: str = option("", "nothing means none")


def test_make_parser_types_and_defaults():
    parser = prepare_data.make_parser(Flags, "What it does.")
    assert Flags(**vars(parser.parse_args([]))) == Flags()
    argv = "--steps 3 --lr 1 --out a=b --causal router --flops 1e15 --no-compile --html".split()
    parsed = Flags(**vars(parser.parse_args(argv)))
    assert parsed == Flags(3, 1.0, "a=b", "router", 1e15, False, True)
    assert isinstance(parsed.lr, float)
    text = " ".join(parser.format_help().split())
    assert "--steps INT optimizer steps, 100 % of them (default: 7)" in text
    assert "--compile, --no-compile use torch.compile (default: True)" in text and "budget --compile" in text
    assert text.count("default:") == 5 and "What it does." in text


@pytest.mark.parametrize(
    "argv", ["--steps 1.5", "--lr fast", "--causal neither", "--step 3", "--compile yes", "--steps", "x"]
)
def test_make_parser_refuses(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare_data.make_parser(Flags, "What it does.").parse_args(argv.split())
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    ["--dataset nothing", "--tokenizer gpt9", "--input", "--dataset stdlib --input x", "--data stdlib"],
)
def test_prepare_refuses_flags(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main(argv.split())
    assert not folder(tmp_path)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("x is empty"), 2, "error: x is empty\n"),
        (OSError(28, "No space left on device", "f"), 2, "error: [Errno 28] No space left on device: 'f'\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_run_says_what_was_wrong_in_one_line(error, status, message, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        prepare_data.run(main)
    assert (stopped.value.code, capsys.readouterr().err) == (status, message)


@pytest.mark.parametrize("lines", [1, 10_000])
def test_run_is_silent_when_the_reader_has_gone(lines):
    """One line is still in Python's buffer when main ends; ten thousand break the pipe while it runs."""
    code = f"from prepare_data import run; run(lambda argv: [input(), *(print('x') for _ in range({lines}))])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(prepare_data.__file__).parent,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b"now\n")
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


@pytest.mark.slow
def test_whole_stdlib_takes_under_20_seconds(tmp_path):
    start = time.perf_counter()
    train, val, _ = load_data(prepare(out=tmp_path / "out"))
    assert time.perf_counter() - start < 20
    assert len(train) > 3e6 and 0.05 < len(val) / (len(train) + len(val)) < 0.2


# ---------------------------------------------------------------------------------------------------------
# Training: train.py

TINY = ["--n_layer=4", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=4", "--device=cpu"]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A folder with a few kB of prepared text."""
    folder = tmp_path_factory.mktemp("text")
    text = "".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(400))
    (folder / "text.py").write_text(text, encoding="utf-8")
    return prepare_data.prepare(inputs=[folder / "text.py"], out=folder / "data")


@pytest.fixture
def run_train(small_data, tmp_path):
    """train.main on the small data and a tiny model, into tmp_path / name; returns the lines of its log."""

    def call(*flags, name="run"):
        out = tmp_path / name
        train.main([*TINY, f"--data={small_data}", f"--out={out}", *flags])
        return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    return call


def without_clock(lines, *others):
    return [{key: value for key, value in line.items() if key not in ("timing", "train", *others)} for line in lines]


def same_parameters(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load(path):
    return torch.load(path / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize("flags", [(), ("--routing=random",), ("--capacity=1",), ("--causal=predictor",)])
def test_a_resumed_run_equals_an_uninterrupted_one(run_train, tmp_path, monkeypatch, flags):
    """Bit for bit: weights, optimizer and log, though Ctrl-C came between two evaluations."""
    flags = [*flags, "--steps=20", "--eval_interval=6"]
    whole = run_train(*flags, name="whole")
    get_batch = train.get_batch

    def interrupted(data, block_size, batch_size, seed, step):
        if step == 9:
            signal.raise_signal(signal.SIGINT)
        return get_batch(data, block_size, batch_size, seed, step)

    monkeypatch.setattr(train, "get_batch", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_train(*flags, name="parts")
    assert load(tmp_path / "parts")["step"] == 10
    monkeypatch.setattr(train, "get_batch", get_batch)
    train.main(["--resume", f"--out={tmp_path / 'parts'}"])
    parts = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text("utf-8").splitlines()]
    assert without_clock(parts) == without_clock(whole)
    a, b = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert same_parameters(a["model"], b["model"])
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        for p, q in zip(x["state"].values(), y["state"].values(), strict=True):
            assert same_parameters(p, q)


def test_bits_per_byte_count_the_bytes_of_a_token():
    result = {"step": 1, "loss": 1.0, "val_causal": 3 * math.log(2), "timing": {"seconds": 1, "tokens_per_second": 1}}
    assert "(3.000 bits per byte)" in train.report(result, 2, 1) and "(0.750 bits" in train.report(result, 2, 4)


def test_an_evaluation_can_be_repeated(run_train, tmp_path):
    """Under random routing, too, which draws noise."""
    run_train("--steps=2", "--routing=random")
    model, checkpoint = train.load_checkpoint(tmp_path / "run", "cpu")
    model.blocks[1].block.down.weight.data.normal_()  # or the choice makes no difference
    val = load_data(checkpoint["train"]["data"])[1]
    a, b = (train.evaluate(model.eval(), val, 2000, contextlib.nullcontext) for _ in range(2))
    assert a == b and a["val_topk"] != a["val_skip"]


def test_out_of_memory_says_what_to_do(run_train, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(MoD, "forward", forward)
    with pytest.raises(UserError, match="allocate 2.00 GiB.*--batch_size.*--accumulate"):
        run_train("--steps=2")


def test_losses_do_not_depend_on_how_often_one_evaluates(run_train, tmp_path):
    run_train("--steps=12", "--eval_interval=1", "--routing=random", name="often")
    run_train("--steps=12", "--eval_interval=12", "--routing=random", name="once")
    assert same_parameters(load(tmp_path / "often")["model"], load(tmp_path / "once")["model"])


def test_log_lines_say_what_they_promise(run_train):
    header, *lines = run_train("--steps=10", "--eval_interval=5")
    assert header["model"]["n_embd"] == 16 and header["params"] > 0
    config = mod.MoDConfig(**header["model"])
    flops = 3 * config.flops_per_token(32) * 32 * 4 + train.step_flops(MoD(config), tokens=0)
    for line, step in zip(lines, (5, 10), strict=True):
        assert line["step"] == step and line["flops"] == pytest.approx(step * flops)
        assert {"loss", "val_topk", "val_causal", "val_skip", "timing"} < line.keys()
        for name in ("agree", "recall", "share"):
            assert len(line[name]) == 2 and all(0 <= x <= 1 for x in line[name])
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_gpu_that_only_emulates_bfloat16_trains_in_float32(monkeypatch):
    def dtype(native):
        supported = lambda including_emulation=True: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        return train.fill_in(TrainConfig(), torch.device("cuda")).dtype

    assert (dtype(native=True), dtype(native=False)) == ("bfloat16", "float32")


@pytest.mark.parametrize("flags", ["--capacity=1", "--route_every=5"])
def test_a_dense_run_has_one_validation_loss(run_train, flags):
    """Also where no block happens to be routed."""
    last = run_train("--steps=4", flags)[-1]
    assert last["val_topk"] == last["val_causal"] == last["val_skip"] and "agree" not in last


def test_a_flops_budget_is_kept(run_train):
    per_step = run_train("--steps=1", name="one")[-1]["flops"]
    last = run_train(f"--flops={7.9 * per_step}", name="seven")[-1]
    assert last["step"] == 7 and last["flops"] == pytest.approx(7 * per_step)


@pytest.mark.parametrize("causal, steps, learns", [("predictor", 5, ".predictor."), ("router", 1, ".router.")])
def test_the_body_does_not_feel_the_choice_loss(run_train, tmp_path, monkeypatch, causal, steps, learns):
    """Trap: one gradient-norm clip over both rescales the body's step by it. (A router then chooses otherwise.)"""
    run_train(f"--steps={steps}", f"--causal={causal}", name="with")
    monkeypatch.setattr(train, "choice_loss", lambda route: 100 * route.logit.square().sum())
    run_train(f"--steps={steps}", f"--causal={causal}", name="other")
    a, b = load(tmp_path / "with")["model"], load(tmp_path / "other")["model"]
    assert any(not torch.equal(a[name], b[name]) for name in a if learns in name)
    assert all(torch.equal(a[name], b[name]) for name in a if learns not in name)


def test_gradients_are_clipped(run_train, monkeypatch):
    """However large they were: body and routers have a norm of 1 each when the optimizers step."""
    forward, squares = MoD.forward, []

    def large(model, *args, **options):
        logits, loss, route = forward(model, *args, **options)
        return logits, loss if loss is None else 1e4 * loss, route

    def look(optimizer, *_):
        for group in optimizer.param_groups:
            of = "routers" if group["scale"] == 0.1 else "body"
            squares.append((of, sum(p.grad.square().sum().item() for p in group["params"])))

    monkeypatch.setattr(MoD, "forward", large)
    monkeypatch.setattr(train, "choice_loss", lambda route: 1e4 * choice_loss(route))
    hook = register_optimizer_step_pre_hook(look)
    try:
        run_train("--steps=1", "--router_lr_scale=0.1", "--routed_lr_scale=1")
    finally:
        hook.remove()
    for of in ("body", "routers"):
        assert sum(square for whose, square in squares if whose == of) == pytest.approx(1, rel=1e-3)


def test_random_routing_draws_anew_for_each_step(run_train, monkeypatch):
    forward, taken = MoD.forward, []

    def record(model, *args, **options):
        result = forward(model, *args, **options)
        if model.training:
            taken.append(result[2].taken)
        return result

    monkeypatch.setattr(MoD, "forward", record)
    run_train("--steps=3", "--routing=random")
    assert len(taken) == 3 and not any(torch.equal(a, b) for a, b in itertools.combinations(taken, 2))


def test_accumulation_changes_nothing(run_train, tmp_path):
    """But rounding, which Muon makes visible after some steps."""
    whole = run_train("--steps=2", name="whole")[-1]
    parts = run_train("--steps=2", "--accumulate=4", name="parts")[-1]
    assert parts["loss"] == pytest.approx(whole["loss"]) and parts["choice_loss"] == pytest.approx(whole["choice_loss"])
    a, b = load(tmp_path / "whole")["model"], load(tmp_path / "parts")["model"]
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_batches_are_fixed_by_seed_and_step():
    data = np.arange(1000, dtype=np.uint16)
    x, y = train.get_batch(data, 16, 4, seed=1, step=5)
    assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, train.get_batch(data, 16, 4, seed=1, step=5)[0])
    assert not torch.equal(x, train.get_batch(data, 16, 4, seed=1, step=6)[0])
    assert not torch.equal(x, train.get_batch(data, 16, 4, seed=2, step=5)[0])
    starts = {train.get_batch(np.arange(18), 16, 1, 0, step)[0][0, 0].item() for step in range(40)}
    assert starts == {0, 1}  # the last window, which ends with the last token, is drawn too


def test_optimizers_and_schedule():
    model = mod.MoD(mod.MoDConfig(n_layer=4, n_embd=16, n_head=2))
    muon, adamw = train.make_optimizers(model, router_lr_scale=0.1, routed_lr_scale=0.5, weight_decay=0.3)
    groups = [*muon.param_groups, *adamw.param_groups]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    dense = [p for block in model.blocks if isinstance(block, mod.Block) for p in block.parameters()]
    assert {id(p) for p in muon.param_groups[0]["params"]} == set(map(id, dense)) and len(dense) == 8
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    routed = routed_blocks(model)
    assert {scale[id(block.router.weight)] for block in routed} == {0.1}
    assert adamw.param_groups[-1]["params"][0] is routed[0].router.weight and not adamw.param_groups[-1]["weight_decay"]
    inside = [p for block in routed for p in block.block.parameters()]
    assert {scale[id(p)] for p in inside} == {0.5}
    for p in [*inside, *(block.router.weight for block in routed)]:
        del scale[id(p)]
    assert set(scale.values()) == {1}
    assert all(p.dim() >= 2 for group in groups for p in group["params"] if group["weight_decay"])
    every_block = mod.MoD(mod.MoDConfig(**SMALL, route_every=1))
    assert [type(optimizer) for optimizer in train.make_optimizers(every_block, 0.1, 1, 0.3)] == [torch.optim.AdamW]
    rates = [train.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 20) and max(rates) == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.002 and rates[20:] == sorted(rates[20:], reverse=True)


def test_gains_that_a_fork_adds_start_at_one_and_are_no_matrices(monkeypatch):
    class Gained(mod.Block):
        def __init__(self, config):
            super().__init__(config)
            self.gain = torch.nn.Parameter(torch.ones(config.n_embd))

    plain = train.step_flops(MoD(MoDConfig(**SMALL)), tokens=24)
    monkeypatch.setattr(mod, "Block", Gained)
    monkeypatch.setattr(train, "Block", Gained)
    model = MoD(MoDConfig(**SMALL))
    gains = [model.blocks[0].gain, model.blocks[1].block.gain]
    assert all((gain == 1).all() for gain in gains)
    muon, _ = train.make_optimizers(model, 0.1, 0.5, 0.3)
    assert all(p.dim() == 2 for p in muon.param_groups[0]["params"])
    assert train.step_flops(model, tokens=24) == plain


def test_muon_is_torchs_but_for_rounding():
    """torch's multiplies in bfloat16; older versions of it have none."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("no torch.optim.Muon")
    start = [torch.randn(48, 16), torch.randn(16, 64), torch.randn(16, 16)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [
        train.Muon([{"params": ours}], lr=0.02, weight_decay=0.5),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - p).norm()


@pytest.mark.parametrize("capacity", [0.25, 1])
def test_muon_costs_what_the_formula_says(capacity):
    """Against torch's own counter: what a FLOPs budget would otherwise not see."""
    model = mod.MoD(mod.MoDConfig(**{**SMALL, "capacity": capacity}))
    muon, _ = train.make_optimizers(model, 0.1, 1, 0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == train.step_flops(model, tokens=0)


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(run_train, tmp_path, monkeypatch):
    run_train("--steps=10", "--eval_interval=5")
    before = load(tmp_path / "run")
    forward = mod.MoD.forward

    def poisoned(model, *args, **kwargs):
        logits, loss, route = forward(model, *args, **kwargs)
        return logits, loss * torch.nan, route

    monkeypatch.setattr(mod.MoD, "forward", poisoned)
    with pytest.raises(UserError, match=r"loss is nan by step 1[25]; nothing since the last save was saved"):
        train.main(["--resume", "--steps=20", f"--out={tmp_path / 'run'}"])
    after = load(tmp_path / "run")
    assert after["step"] == 10 and same_parameters(before["model"], after["model"])


@pytest.mark.slow
def test_a_compiled_run_compiles_once_and_learns_what_an_eager_one_does(run_train):
    """Over steps, evaluations between them, and top-k routing of other tokens each time."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    counters.clear()
    flags = ["--steps=8", "--eval_interval=2"]
    compiled = run_train(*flags, "--compile", name="compiled")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()
    eager = run_train(*flags, "--no-compile", name="eager")
    for a, b in zip(compiled[1:], eager[1:], strict=True):
        for name in ("loss", "val_topk", "val_causal"):
            assert a[name] == pytest.approx(b[name], rel=1e-2)


def test_checkpoints_of_a_compiled_run_are_clean(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: torch._dynamo.OptimizedModule(model, lambda f: f))
    run_train("--steps=2", "--compile")
    assert not any("_orig_mod" in name for name in load(tmp_path / "run")["model"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps=0"], "--steps 0 must be above 0"),
        (["--flops=10"], "less than one step"),
        (["--flops=nan"], "--flops nan must be above 0"),
        (["--steps=5", "--flops=1e12"], "two budgets"),
        (["--n_embd=17"], "n_embd 17"),
        (["--lr=inf"], "--lr inf must be above 0 and finite"),
        (["--n_head=3"], "n_head 3"),
        (["--n_layer=0"], "n_layer 0"),
        (["--capacity=0"], "capacity 0.0"),
        (["--capacity=1.5"], "capacity 1.5"),
        (["--capacity=nan"], "capacity nan"),
        (["--route_every=0"], "route_every 0"),
        (["--batch_size=0"], "--batch_size 0"),
        (["--batch_size=5", "--accumulate=2"], "--batch_size 5 doesn't divide"),
        (["--lr=-1"], "--lr -1.0"),
        (["--router_lr_scale=-0.1"], "--router_lr_scale -0.1"),
        (["--routed_lr_scale=-0.1"], "--routed_lr_scale -0.1"),
        (["--seed=-1"], "--seed -1"),
        (["--eval_interval=0"], "--eval_interval 0"),
        (["--block_size=100000"], "--block_size 100000 needs more tokens for validation than"),
        (["--block_size=0"], "block_size 0"),
        (["--device=nonsense"], "device 'nonsense'"),
        (["--device=meta"], "device 'meta'"),
        (["--data=nowhere"], "no prepared data in nowhere"),
        (["--resume", "--out=nowhere"], "no checkpoint"),
        (["--resume", "--out=no where"], "train one with `python train.py --out 'no where'`"),
    ],
)
def test_bad_flags_of_train(run_train, tmp_path, flags, message):
    with pytest.raises(prepare_data.UserError, match=re.escape(message)):
        run_train("--steps=1", *flags) if "--flops" not in flags[0] else run_train(*flags)
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler_is_refused(run_train, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C.. compiler"):
        run_train("--steps=1", "--compile")


def test_an_existing_run_is_neither_overwritten_nor_changed_by_accident(run_train, tmp_path):
    run_train("--steps=2")
    out = f"--out={tmp_path / 'run'}"
    with pytest.raises(prepare_data.UserError, match="holds a run"):
        run_train("--steps=2")
    with pytest.raises(prepare_data.UserError, match="--lr 0.5 differs"):
        train.main(["--resume", out, "--lr=0.5"])
    with pytest.raises(prepare_data.UserError, match="--steps 1 differs.* can only be raised"):
        train.main(["--resume", out, "--steps=1"])
    with pytest.raises(prepare_data.UserError, match="has done 2 of 2 steps"):
        train.main(["--resume", out])
    with pytest.raises(prepare_data.UserError, match="give one of them"):
        train.main(["--resume", "--overwrite", out, "--steps=4"])
    train.main(["--resume", out, "--steps=4"])
    assert load(tmp_path / "run")["step"] == 4
    assert run_train("--steps=3", "--overwrite")[-1]["step"] == 3


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(run_train, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delattr(train, "get_batch")
    with pytest.raises(OSError, match="file/run"):
        run_train("--steps=2", name="file/run")


def test_a_run_does_not_go_on_with_other_text(run_train, small_data, tmp_path):
    """One regression: every --input goes to data/input, and a resumed run took whatever was there."""
    run_train("--steps=2")
    meta = json.loads((small_data / "meta.json").read_text(encoding="utf-8"))
    try:
        (small_data / "meta.json").write_text(json.dumps({**meta, "sha256": "0" * 64}), encoding="utf-8")
        with pytest.raises(UserError, match="not what the run began with, bytes tokens of a text whose"):
            train.main(["--resume", f"--out={tmp_path / 'run'}", "--steps=4"])
    finally:
        (small_data / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def test_a_run_that_is_older_than_a_flag_goes_on(run_train, tmp_path):
    run_train("--steps=2")
    checkpoint = load(tmp_path / "run")
    del checkpoint["train"]["weight_decay"]
    torch.save(checkpoint, tmp_path / "run/ckpt.pt")
    train.main(["--resume", f"--out={tmp_path / 'run'}", "--weight_decay=0.1", "--steps=4"])
    assert load(tmp_path / "run")["step"] == 4


def test_a_run_goes_on_where_its_text_was_moved_to(run_train, small_data, tmp_path):
    run_train("--steps=2")
    shutil.copytree(small_data, tmp_path / "moved")
    train.main(["--resume", f"--out={tmp_path / 'run'}", f"--data={tmp_path / 'moved'}", "--steps=4"])
    assert load(tmp_path / "run")["train"]["data"] == str(tmp_path / "moved")


def test_a_run_goes_on_in_the_folder_it_was_moved_to(run_train, tmp_path, monkeypatch):
    """It once went on in the folder that it began in, or found nothing there."""
    run_train("--steps=2")
    monkeypatch.chdir(tmp_path)
    shutil.move("run", "out/mod")
    train.main(["--resume", "--steps=4"])
    assert load(Path("out/mod"))["step"] == 4 and not Path("run").exists()


def test_default_data_that_was_not_finished_is_prepared_again(tmp_path, monkeypatch):
    """A folder without meta.json, left by a first run that was stopped, once was an error instead."""
    monkeypatch.chdir(tmp_path)
    Path("data/stdlib").mkdir(parents=True)
    calls = []
    monkeypatch.setattr(train, "prepare", lambda: calls.append("prepared"))
    with pytest.raises(UserError, match="no prepared data"):
        train.main(["--device=cpu"])
    assert calls == ["prepared"]


@pytest.mark.parametrize("lost", [False, True])
def test_the_log_of_a_run_that_was_prolonged_says_how_long_it_is(run_train, tmp_path, lost):
    """Also where its log was moved away, which is what a damaged one's message says to do."""
    run_train("--steps=2")
    if lost:
        (tmp_path / "run/log.jsonl").unlink()
    train.main(["--resume", f"--out={tmp_path / 'run'}", "--steps=4"])
    header, *entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text("utf-8").splitlines()]
    assert header["steps"] == 4 and [entry["step"] for entry in entries] == ([3, 4] if lost else [1, 2, 3, 4])


@pytest.mark.parametrize("error", [BrokenPipeError, OSError(errno.EIO, "Input/output error")])
def test_a_run_goes_on_when_nobody_reads_along(run_train, tmp_path, monkeypatch, error):
    """python train.py 2>&1 | head; or the terminal was closed."""

    class Gone:
        def write(self, text):
            raise error

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", Gone())
    with contextlib.suppress(OSError):  # of the text that it prints when all is saved
        run_train("--steps=2")
    assert load(tmp_path / "run")["step"] == 2


def test_a_damaged_log_is_named(run_train, tmp_path):
    run_train("--steps=2")
    (tmp_path / "run/log.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(UserError, match="log.jsonl is damaged"):
        train.main(["--resume", f"--out={tmp_path / 'run'}", "--steps=4"])
    assert load(tmp_path / "run")["step"] == 2


def test_broken_checkpoints(run_train, tmp_path):
    run_train("--steps=2")
    path = tmp_path / "run" / "ckpt.pt"
    whole = path.read_bytes()
    checkpoint = load(tmp_path / "run")
    foreign = {**checkpoint, "config": {**checkpoint["config"], "of_another_version": 1}}
    misshapen = {**checkpoint, "config": {**checkpoint["config"], "n_embd": 32}}
    partial = {key: value for key, value in checkpoint.items() if key != "meta"}
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(broken)
        with pytest.raises(prepare_data.UserError, match="damaged or no checkpoint"):
            train.load_checkpoint(tmp_path / "run", "cpu")
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="ckpt.pt"):  # not "damaged", which would have a good one overwritten
        train.load_checkpoint(tmp_path / "run", "cpu")
    path.rmdir()
    for broken, reason in (
        (foreign, "of_another_version"),
        (misshapen, "size mismatch"),
        (partial, "meta"),
        ({"model": {}}, ""),
    ):
        torch.save(broken, path)
        with pytest.raises(prepare_data.UserError, match=f"not of this version.*{reason}"):
            train.load_checkpoint(tmp_path / "run", "cpu")
    muon, adamw = checkpoint["optimizers"]
    fewer_groups = [muon, {**adamw, "param_groups": adamw["param_groups"][1:]}]
    no_clock = {key: value for key, value in checkpoint.items() if key != "seconds"}
    for broken, reason in (({**checkpoint, "optimizers": fewer_groups}, "group"), (no_clock, "seconds")):
        torch.save(broken, path)
        with pytest.raises(UserError, match=f"not of this version of train.py.*{reason}"):
            train.main(["--resume", f"--out={tmp_path / 'run'}", "--steps=4"])


@pytest.mark.slow
def test_two_processes_train_what_one_does(run_train, small_data, tmp_path):
    """torchrun over gloo: same losses within float tolerance, one log, and one goes on from where two were stopped."""
    whole = run_train("--steps=10", "--eval_interval=5", name="one")
    (tmp_path / "stopped.py").write_text(
        f"import signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
        "get_batch = train.get_batch\n"
        "def stopping(*args):\n    if args[-1] == 7:\n        signal.raise_signal(signal.SIGTERM)\n"
        "    return get_batch(*args)\n"
        "train.get_batch = stopping\ntrain.main(sys.argv[1:])\n",
        encoding="utf-8",
    )
    for name, script in ("two", "train.py"), ("parts", tmp_path / "stopped.py"):
        out = tmp_path / name
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *TINY]
        command += [f"--data={small_data}", f"--out={out}", "--steps=10", "--eval_interval=5"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=HERE, timeout=120, env=environment, capture_output=True, text=True)
        assert (result.returncode == 0) == (name == "two"), result.stderr
        assert bool(re.search(r"exitcode *: 130", result.stderr)) == (name == "parts"), result.stderr
        if name == "parts":
            assert load(out)["step"] == 8
            train.main(["--resume", f"--out={out}"])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        for a, b in zip(whole[1:], lines[1:], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["val_topk"] == pytest.approx(b["val_topk"], abs=1e-3)


# ---------------------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, small_data):
    """A run's folder with the checkpoint of a redrawn byte-level model that decides both ways; context 24."""
    out = tmp_path_factory.mktemp("run")
    model, _ = decided(vocab_size=257)
    save_checkpoint(out, model, small_data)
    return out


def save_checkpoint(out, model, data=None):
    checkpoint = {
        "model": model.state_dict(),
        "config": dataclasses.asdict(model.config),
        "train": dataclasses.asdict(TrainConfig(data=str(data))),
        "meta": load_data(data)[2] if data else {"tokenizer": "bytes"},
        "step": 1,
    }
    torch.save(checkpoint, out / "ckpt.pt")


def sampled(out, capfdbinary, *argv):
    """What sample.py writes to standard output and to standard error, bytes."""
    sample_main(["--out", str(out), "--device", "cpu", *argv])
    return capfdbinary.readouterr()


def drawn_text(out, prompt, **options):
    """The Text that draw makes of a prompt, a list of ids."""
    model, _ = load_checkpoint(out, "cpu")
    torch.manual_seed(0)
    text = Text()
    assert list(draw(model, prompt, SampleConfig(**options), text)) == text.tokens
    return model, text


def test_text_is_streamed_as_utf8_whatever_the_tokens(run_dir, capfdbinary):
    """Half characters are held back until they are whole, and what never becomes one is replaced."""
    prompt = "é€😀\n"
    out, _ = sampled(run_dir, capfdbinary, "--prompt", prompt, "--num_tokens", "15")
    _, text = drawn_text(run_dir, list(prompt.encode()), num_tokens=15)
    ids = [token.id for token in text.tokens[len(prompt.encode()) :]]
    assert len(ids) == 15 and max(ids) < 256
    assert out == (prompt.encode() + bytes(ids)).decode("utf-8", "replace").encode() + os.linesep.encode()


def test_a_character_that_is_never_finished_does_not_get_lost(run_dir, capfdbinary, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\xe2\x82")))
    out, _ = sampled(run_dir, capfdbinary, "--prompt", "-", "--num_tokens", "1", "--temperature", "0")
    _, text = drawn_text(run_dir, list(b"a\xff\xe2\x82"), num_tokens=1, temperature=0.0)
    assert out.startswith("a\N{REPLACEMENT CHARACTER}".encode())
    assert out.decode() == bytes(token.id for token in text.tokens).decode("utf-8", "replace") + os.linesep


def test_no_prompt_means_end_of_text_which_is_not_printed(run_dir, capfdbinary):
    out, _ = sampled(run_dir, capfdbinary, "--num_tokens", "5")
    _, text = drawn_text(run_dir, [256], num_tokens=5)
    assert out.decode() == bytes(t.id for t in text.tokens[1:]).decode("utf-8", "replace") + os.linesep


def test_a_page_that_cannot_be_written_is_found_out_before_the_first_token(run_dir, capfd):
    with pytest.raises(OSError, match="ckpt.pt"):
        sample_main(["--out", str(run_dir), "--html", str(run_dir / "ckpt.pt" / "page.html"), "--device", "cpu"])
    assert capfd.readouterr().out == ""


def test_samples_differ_by_their_seeds_alone(run_dir, capfdbinary):
    flags = ("--prompt", "ab", "--num_tokens", "10")
    both, said = sampled(run_dir, capfdbinary, *flags, "--num_samples", "2", "--seed", "3")
    assert both == b"".join(sampled(run_dir, capfdbinary, *flags, "--seed", seed)[0] for seed in "34")
    assert b"--- 2 of 2, seed 4" in said


@pytest.mark.parametrize(
    "argv",
    [
        "--num_tokens 0", "--num_samples 0", "--top_k 0", "--top_p 0", "--top_p 1.1", "--top_p nan",
        "--temperature -1", "--temperature nan", "--temperature inf", "--threshold nan", "--seed -1",
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(run_dir, argv, capfd):
    flag, value = argv.split()
    with pytest.raises(UserError, match=f"{flag} .*number" if flag == "--threshold" else f"{flag} {value}"):
        sample_main(["--out", str(run_dir), flag, value])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("prompt", [1, 10, 24, 40])
def test_each_token_has_the_route_it_had_when_it_was_first_fed(run_dir, prompt):
    """Also where the window slides and older tokens are fed again, and where the prompt is longer than the window."""
    prompt, n, size = list(range(100, 100 + prompt)), 30, SMALL["block_size"]
    model, text = drawn_text(run_dir, prompt, num_tokens=n)
    ids = [token.id for token in text.tokens]
    assert len(ids) == len(prompt) + n and ids[: len(prompt)] == prompt
    outside = max(0, len(prompt) - size)
    fed = [token.route is not None for token in text.tokens]
    assert fed == [False] * outside + [True] * (len(ids) - outside - 1) + [False]
    start, end = outside, min(len(ids) - 1, max(size, len(prompt)))  # the first window
    logits, route = one_shot(model, torch.tensor([ids[start:end]]))
    seen = torch.stack([token.route for token in text.tokens[start:end]])
    assert torch.equal(seen[:, 0].bool(), route.taken[:, 0].T)
    close(seen[:, 1], route.r[:, 0].T)
    close(seen[:, 2], route.logit[:, 0].T)
    for i in range(len(prompt), end + 1):
        assert abs(text.tokens[i].probability - logits[0, i - start - 1].softmax(-1)[ids[i]].item()) < 1e-5
    assert all(token.probability is None for token in text.tokens[: len(prompt)])
    after = start + size + 1  # the token that the window slid for: it was fed with the second half before it
    if after < len(ids) - 1:
        _, route = one_shot(model, torch.tensor([ids[after - size // 2 : after]]))
        close(text.tokens[after - 1].route[2], route.logit[:, 0, -1])


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_the_context_reported_is_what_a_dense_block_has_cached(block_size):
    """Also where the window slides, in the shortest contexts to a single token."""
    model, text = redrawn(block_size=block_size).eval(), Text()
    for _ in draw(model, [1, 2], SampleConfig(num_tokens=20), text):
        assert [text.context] == text.cache[0].length


def test_the_report_counts_what_was_skipped_and_cached(run_dir, capfdbinary):
    prompt, n = "abcdefg", 12
    _, said = sampled(run_dir, capfdbinary, "--prompt", prompt, "--num_tokens", str(n))
    model, text = drawn_text(run_dir, list(prompt.encode()), num_tokens=n)
    taken = torch.stack([token.route[0] for token in text.tokens[:-1]])
    T = len(prompt) + n - 1
    used = (2 * T + int(taken.sum())) * 2 * 16 * 4  # two dense blocks; keys and values, 16 channels, float32
    assert text.context == T
    said = said.decode()
    assert f"{1 - taken.mean():.1%} of the routed blocks skipped" in said
    assert f"{used:,} bytes of KV cache, {used / (4 * T * 2 * 16 * 4):.2f} of" in said
    flops = model.config.flops_per_token(T, taken.mean().item())
    assert f"{flops:,.0f} forward FLOPs per token" in said
    _, said = sampled(run_dir, capfdbinary, "--num_tokens", "2", "--threshold", "inf")
    assert b"100.0% of the routed blocks skipped" in said and b"too few tokens to time" in said


def test_a_dense_model_can_be_sampled_and_has_no_depth_to_show(tmp_path, capfdbinary):
    save_checkpoint(tmp_path, redrawn(vocab_size=257, capacity=1.0))
    out, said = sampled(tmp_path, capfdbinary, "--prompt", "ab", "--num_tokens", "30")
    assert out.startswith(b"ab") and b"tokens/s" in said and b"skipped" not in said
    for flags in (["--show_depth"], ["--html", "page.html"], ["--bench"]):
        with pytest.raises(UserError, match="no routed block"):
            sample_main(["--out", str(tmp_path), "--device", "cpu", *flags])


def test_show_depth_writes_marks_beneath_where_there_is_no_terminal(run_dir, capfdbinary):
    prompt = "ab\tc\n€d"
    out, said = sampled(run_dir, capfdbinary, "--prompt", prompt, "--num_tokens", "1", "--show_depth")
    _, text = drawn_text(run_dir, list(prompt.encode()), num_tokens=1)
    depth = [str(int(token.route[0].sum())) for token in text.tokens[:-1]]
    lines = out.decode().splitlines()
    assert lines[:3] == ["ab⇥c↵", "".join(depth[:5]), lines[2]] and lines[2].startswith("··€d")
    assert lines[3].rstrip() == "".join(depth[5:]) + "-"
    assert "of 2 routed blocks" in said.decode() and b"\033" not in out + said


def test_show_depth_keeps_marks_beneath_wide_characters(capsys):
    view = DepthView(2, color=False)
    for piece, depth in (("漢字", 1), ("a", 2), ("e\u0301", 1), ("", 0), ("\u0301", 2), ("b\n", 0)):
        view.show(piece, depth)
    assert capsys.readouterr().out == "漢字ae\u0301·◌\u0301b↵\n1   21020 \n"


def test_show_depth_shades_where_there_is_a_terminal(run_dir, capfdbinary, monkeypatch):
    flags = ("--prompt", "abc\nd", "--num_tokens", "1", "--show_depth")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert b"\033" not in b"".join(sampled(run_dir, capfdbinary, *flags))
    monkeypatch.delenv("NO_COLOR")
    out, said = sampled(run_dir, capfdbinary, *flags)
    _, text = drawn_text(run_dir, list(b"abc\nd"), num_tokens=1)
    view = DepthView(2, color=True)
    shaded = [view.shade(c, int(t.route[0].sum())) for c, t in zip("abc↵d", text.tokens, strict=False)]
    assert out.decode().startswith("".join(shaded[:4]) + os.linesep + shaded[4])
    assert len({view.shade("x", depth) for depth in (None, 0, 1, 2)}) == 4
    assert view.legend() in said.decode()


def test_nothing_invisible_reaches_a_terminal():
    assert visible("a b") == "a b"
    assert visible("") == "·"
    assert visible("\033[2J\u202e\x85\r\n") == "\\x1b[2J\\u202e\\x85\\r↵\n"


def test_the_page_escapes_what_the_model_says(run_dir, tmp_path, capfdbinary):
    page = tmp_path / "page.html"
    prompt = "<script>$$DATA$$&amp;"
    sampled(run_dir, capfdbinary, "--prompt", prompt, "--num_tokens", "3", "--html", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "://" not in text and "src=" not in text
    spans = re.findall(r"<span class=[^>]*>(.*?)</span>", text.split("<pre>")[1])
    assert html.unescape("".join(spans)).startswith(prompt)


def test_the_page_of_random_routing_gives_the_true_chance_of_being_taken():
    model, text = redrawn(vocab_size=257, routing="random"), Text()
    list(draw(model, [1, 2, 3], SampleConfig(num_tokens=3), text))
    tokenizer = get_tokenizer("bytes")
    blocks = json.loads(re.search(r"tokens = (.*?);", html_page(model, tokenizer, [text], "x"))[1])[0][2]
    assert [chance for chance, *_ in blocks] == [SMALL["capacity"]] * 2


def test_the_page_shows_a_tokens_route_when_it_is_pointed_at(run_dir, tmp_path, capfdbinary):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here to open the page in")
    page = tmp_path / "page.html"
    sampled(run_dir, capfdbinary, "--prompt", "a<b", "--num_tokens", "3", "--html", str(page))
    model, text = drawn_text(run_dir, list(b"a<b"), num_tokens=3)
    for i, event in ((1, "mouseover"), (4, "focus"), (5, "click")):
        driver = f"<script>document.querySelectorAll('pre span')[{i}].dispatchEvent(new Event('{event}'))</script>"
        copy = tmp_path / "driven.html"
        copy.write_text(page.read_text(encoding="utf-8") + driver, encoding="utf-8")
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --dump-dom"
        )
        dom = subprocess.run(
            [chromium, *flags.split(), copy.as_uri()], capture_output=True, encoding="utf-8", timeout=60
        ).stdout
        card = re.search(r'<div id="card">(.*?)</div>\s*<script>', dom, re.DOTALL)[1]
        token = text.tokens[i]
        assert f"token {token.id}, " in card
        if token.probability is None:
            assert "<code>&lt;</code>" in card and "given" in card
        else:
            shown = float(re.search(r"probability ([^<]*)", card)[1])
            assert math.isclose(shown, token.probability, rel_tol=0.01)
        if token.route is None:
            assert "not fed" in card
            continue
        cells = re.findall("<td>(.*?)</td>", card)
        taken, weight, logit = token.route
        for j, layer in enumerate((1, 3)):
            expected = [str(layer), f"{logit[j].sigmoid():.3f}", f"{weight[j].sigmoid():.3f}"]
            assert cells[4 * j : 4 * j + 4] == [*expected, "processed" if taken[j] else "skipped"]


@torch.no_grad()
def test_sampling_in_bfloat16_equals_one_shot_and_decides_in_float32():
    """Trap: routers and predictors in bfloat16 tie and flip. What is cached has the dtype of the other weights."""
    for seed in range(50):
        model, idx = to_bfloat16(redrawn(seed)), tokens(2, 12, seed)
        expected, route = one_shot(model, idx)
        if is_decided(route) and route.logit.abs().min() > 0.03:  # more than bfloat16 rounds off
            break
    logits, taken, cache = step_by_step(model, idx, 5)
    assert torch.equal(taken, route.taken)
    close(logits.float(), expected[:, 4:].float(), atol=0.1)
    assert expected.std() > 0.5  # against which that is little
    assert route.r.dtype == route.logit.dtype == torch.float32 and route.logit.unique().numel() > 40
    assert expected.dtype == torch.bfloat16 and all(kv.k.dtype == kv.v.dtype == torch.bfloat16 for kv in cache)


def test_dtype_bfloat16_halves_the_kv_cache(run_dir, capfdbinary):
    used = []
    for dtype in ("float32", "bfloat16"):
        _, said = sampled(
            run_dir, capfdbinary, "--dtype", dtype, "--num_tokens", "1", "--prompt", "return x", "--show_depth"
        )
        used.append(int(re.search(rb"([\d,]+) bytes of KV cache", said)[1].replace(b",", b"")))
    assert used[0] == 2 * used[1] > 0


@torch.inference_mode()
def test_the_bench_computes_every_block_and_throws_the_result_away(run_dir):
    """Its second way must do a dense model's work, in prompt and steps, and change only what the fast path changes."""
    model, _ = load_checkpoint(run_dir, "cpu")
    busy = computing_all(model)
    idx = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = busy.new_cache(2)
    for start, end in ((0, 9), (9, 10), (10, 11)):
        *_, route = busy(idx[:, :end], cache=cache, start=start)
    assert [kv.length for kv in cache] == [[11, 11]] * 4
    assert sum(kv.bytes_used for kv in cache) == 4 * 2 * 11 * 2 * 16 * 4
    x = torch.randn(2, 1, 16)
    for threshold, same in ((math.inf, True), (-math.inf, False)):
        new, route = busy.blocks[1].step(x, model.rope[:, 11], threshold, cache[1])
        assert torch.equal(new, x) == same and route.taken.all() != same
    # A lone token attends to itself in either model, so that what is left to differ is who was taken.
    logits = busy(idx[:, :1], causal=True, cache=busy.new_cache(2))[0]
    close(logits, model(idx[:, :1], causal=True)[0])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchs_dense_model_is_one_of_the_same_weights(run_dir, dtype):
    model, _ = load_checkpoint(run_dir, "cpu")
    if dtype == torch.bfloat16:
        model = to_bfloat16(model)
    dense = dense_twin(model)
    assert {weight.dtype for weight in dense.state_dict().values()} == {dtype}
    assert not any(isinstance(block, RoutedBlock) for block in dense.blocks)
    weights = model.state_dict()
    for name, weight in dense.state_dict().items():
        inner = re.sub(r"^(blocks\.[13])\.", r"\1.block.", name)
        assert torch.equal(weight, weights[inner])


def test_the_bench_writes_what_it_measured(run_dir, capfdbinary):
    _, said = sampled(run_dir, capfdbinary, "--bench")
    written = json.loads((run_dir / "bench.json").read_text(encoding="utf-8"))
    (row,) = written["rows"]
    assert set(row) == set(
        "device dtype n_layer n_embd batch context share fast_tok_s all_blocks_tok_s dense_tok_s no_cache_tok_s "
        "fast_prefill_tok_s all_blocks_prefill_tok_s dense_prefill_tok_s topk_forward_tok_s "
        "ideal cache_bytes dense_cache_bytes torch".split()
    )
    assert (row["n_layer"], row["n_embd"], row["batch"], row["context"]) == (4, 16, 1, 24)
    assert min(rate for name, rate in row.items() if name.endswith("_tok_s")) > 0 and 0 < row["share"] < 1
    assert row["cache_bytes"] < row["dense_cache_bytes"] == 4 * 23 * 2 * 16 * 4
    config = MoDConfig(**{**SMALL, "vocab_size": 257})
    dense = dataclasses.replace(config, capacity=1.0)
    keys = 24 - 12 / 2
    assert row["ideal"] == dense.flops_per_token(2 * keys) / config.flops_per_token(2 * keys, row["share"])
    assert f"{row['dense_tok_s']:,.1f}".encode() in said
    assert all(f"{setting['loss']:.4f}".encode() in said for setting in written["dial"])


def test_the_dial_is_not_of_other_text(run_dir, tmp_path):
    """Every --input goes to data/input, whatever a model there was trained on."""
    checkpoint = load(run_dir)
    torch.save({**checkpoint, "meta": {**checkpoint["meta"], "sha256": "0" * 64}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not what the run began with, bytes tokens of a text whose"):
        sample_main(["--out", str(tmp_path), "--device", "cpu", "--bench"])


def test_the_compute_dial(run_dir):
    """Its ends are all blocks and none, its middle is what evaluate reports, and less compute is a smaller share."""
    model, checkpoint = load_checkpoint(run_dir, "cpu")
    data = load_data(checkpoint["train"]["data"])[1]
    size = model.config.block_size
    rows = compute_dial(model, train.spread_windows(data, size, train.EVAL_TOKENS))
    usual = evaluate(model, data, train.EVAL_TOKENS, contextlib.nullcontext)
    losses = {row["threshold"]: row["loss"] for row in rows}
    assert losses[0] == pytest.approx(usual["val_causal"], abs=1e-5)
    assert losses[1e3] == pytest.approx(usual["val_skip"], abs=1e-5)
    shares = [row["share"] for row in rows]
    assert shares[0] == 1 and shares[-1] == 0 and shares == sorted(shares, reverse=True)
    assert [row["flops"] for row in rows] == [model.config.flops_per_token(size, share) for share in shares]


# ---------------------------------------------------------------------------------------------------------
# What the router learns


def lookups(n, seed):
    """n times two letters, a question mark, the pair's entry in a table of 64 random ones, four dots. Only a question
    mark has something to work out: letters can't be foreseen, and all the rest is known."""
    names = "ABCDEFGH"
    fixed, draw = random.Random(0), random.Random(seed)
    table = {(a, b): fixed.choice(names) for a in names for b in names}
    pairs = [(draw.choice(names), draw.choice(names)) for _ in range(n)]
    return "".join(f"{a}{b}?{table[a, b]}...." for a, b in pairs)


@pytest.mark.slow
def test_routers_find_the_tokens_that_need_them(tmp_path):
    """In every seed, with train.py's recipe but every block routed, so that nobody else does the work: some block
    takes the question marks far more often than by chance, 1/8, and the loss is below random routing's."""
    (tmp_path / "text").write_text(lookups(100_000, seed=1), encoding="utf-8")
    data = prepare(inputs=[tmp_path / "text"], out=tmp_path / "data")
    shape = ["--n_layer=3", "--route_every=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--batch_size=16"]
    shape += ["--routed_lr_scale=1"]  # narrow blocks want the full rate

    def ended(seed, routing):
        out = tmp_path / f"{routing}{seed}"
        flags = [f"--data={data}", f"--out={out}", f"--seed={seed}", f"--routing={routing}", "--device=cpu"]
        train.main([*shape, *flags, "--steps=1000"])
        return load_checkpoint(out, "cpu")[0], json.loads((out / "log.jsonl").read_text("utf-8").splitlines()[-1])

    x = train.spread_windows(load_data(data)[1], 64, 2**13)[:, :-1]
    for seed in range(3):
        model, learned = ended(seed, "topk")
        found = (model(x)[2].taken & (x == ord("?"))).sum((1, 2)) / (x == ord("?")).sum()
        assert found.max() > 0.4
        assert max(learned["val_topk"], learned["val_causal"]) < 0.95 * ended(seed, "random")[1]["val_topk"]


# ---------------------------------------------------------------------------------------------------------
# End to end


def test_prepare_train_resume_and_sample(tmp_path, capfd):
    """As a user types it, but for the sizes, through main(argv)."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(1000)), encoding="utf-8")
    data, out = tmp_path / "data", tmp_path / "out"
    prepare_data.main(["--input", str(text), "--out", str(data)])
    train.main([*TINY, f"--data={data}", f"--out={out}", "--steps=20"])
    train.main(["--resume", f"--out={out}", "--steps=30"])
    capfd.readouterr()
    sample_main([f"--out={out}", "--prompt=12 squared", "--num_tokens=20", "--show_depth", "--device=cpu"])
    printed, said = capfd.readouterr()
    assert printed.startswith("12 squared") and "routed blocks skipped" in said
    sample_main([f"--out={out}", "--bench", "--device=cpu"])
    row = json.loads((out / "bench.json").read_text(encoding="utf-8"))["rows"][0]
    assert all(row[f"{way}_tok_s"] > 0 for way in WAYS) and row["ideal"] > 1


def test_the_programs_from_the_command_line(tmp_path):
    """As subprocesses: status, streams and messages, good and bad."""

    def call(program, *flags):
        command = [sys.executable, str(HERE / program), *map(str, flags)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)

    (tmp_path / "text.txt").write_bytes(b"all work and no play makes jack a dull boy\n" * 200)
    for command in (
        ("prepare_data.py", "--input", "text.txt", "--out", "data"),
        ("train.py", *TINY, "--data=data", "--out=out", "--steps=3"),
        ("sample.py", "--out=out", "--num_tokens=5", "--device=cpu"),
    ):
        result = call(*command)
        assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr.decode()
    for command, message in (
        (("train.py", "--data=nowhere"), b"error: no prepared data in nowhere"),
        (("sample.py", "--num_tokenz=3"), b"unrecognized arguments: --num_tokenz=3"),
    ):
        result = call(*command)
        assert result.returncode == 2 and message in result.stderr, (command, result.stderr.decode())
        assert b"Traceback" not in result.stderr and not result.stdout


# ---------------------------------------------------------------------------------------------------------
# Nothing lost: crashes, full disks, bad flags by the hundred


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_and_ends_the_same(run_train, small_data, tmp_path):
    """SIGKILL, in the middle of a checkpoint too; what is lost is never more than one evaluation interval."""
    flags = ["--steps=600", "--eval_interval=5"]
    whole = run_train(*flags, name="whole")
    out = tmp_path / "killed"
    rng, killed, done = np.random.default_rng(0), 0, 0
    command = [sys.executable, str(HERE / "train.py"), *TINY, f"--data={small_data}", f"--out={out}", *flags]
    while True:
        resume = ["--resume"] if (out / "ckpt.pt").exists() else []
        with open(tmp_path / "stderr.txt", "wb") as errors:
            process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=errors)
            before = done
            while process.poll() is None and done < before + 60:  # let it get somewhere
                time.sleep(0.02)
                done = load(out)["step"] if (out / "ckpt.pt").exists() else 0
            time.sleep(rng.uniform(0, 0.1))
            if process.poll() is None:
                process.kill()
                killed += 1
            process.wait()
        if process.returncode == 0 or load(out)["step"] == 600:  # the latter: killed while it printed its sample
            break
        assert process.returncode == -signal.SIGKILL, (tmp_path / "stderr.txt").read_text()
        step = load(out)["step"]  # whole, whatever happened
        assert step >= done > before
        logged = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines() if line]
        assert logged[-1].get("step", 0) <= step + 5
        done = step
    assert killed >= 3
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert without_clock(lines, "val_causal") == without_clock(whole, "val_causal")
    for line, same in zip(lines[1:], whole[1:], strict=True):  # in another process a last bit was seen to differ
        assert line["val_causal"] == pytest.approx(same["val_causal"], rel=1e-6)
    assert same_parameters(load(out)["model"], load(tmp_path / "whole")["model"])


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(run_train, tmp_path, monkeypatch, capfd):
    run_train("--steps=4")
    before = folder(tmp_path / "run")
    real_fsync = os.fsync

    def full(descriptor):
        if os.fstat(descriptor).st_size > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", f"--out={tmp_path / 'run'}", "--steps=8"])
    with pytest.raises(SystemExit, match="2"):
        prepare_data.run(train.main)
    error = f"error: [Errno 28] No space left on device: {str(tmp_path / 'run' / 'ckpt.pt')!r}"
    assert capfd.readouterr().err.splitlines()[-1] == error
    assert folder(tmp_path / "run") == before and set(before) == {"ckpt.pt", "log.jsonl"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_leave(run_train, tmp_path, monkeypatch, capfd, number):
    get_batch, before = train.get_batch, signal.getsignal(number)  # a job in the background may ignore Ctrl-C

    def interrupted(*args):
        if args[-1] == 3:
            signal.raise_signal(number)
        return get_batch(*args)

    monkeypatch.setattr(train, "get_batch", interrupted)
    with pytest.raises(SystemExit, match="130"):  # `python train.py && python sample.py` ends there
        run_train("--steps=100")
    assert load(tmp_path / "run")["step"] == 4
    assert "stopped at step 4, saved; go on with `python train.py --resume" in capfd.readouterr().err
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_no_combination_of_flags_makes_a_traceback(small_data, tmp_path, monkeypatch):
    """A seeded fuzz: whatever the flags, a run, or one line and status 2."""
    rng = np.random.default_rng(0)
    odd = ["-1", "0", "1", "2", "3", "7", "0.5", "nan", "inf", "-inf", "1e30", "", "x", "16", "999999999999"]
    monkeypatch.chdir(tmp_path)
    run_train_flags = [*TINY, f"--data={small_data}", "--steps=1", "--out=run", "--overwrite"]
    outcomes = []
    for _ in range(300):
        program, config, base = (
            (train, TrainConfig, run_train_flags) if rng.random() < 0.7 else (None, SampleConfig, ["--out=run"])
        )
        names = [f.name for f in dataclasses.fields(config) if f.name not in ("data", "device", "compile", "html")]
        flags = [*base]
        for name in rng.choice(names, size=rng.integers(1, 4), replace=False):
            value = rng.choice(odd)
            # Sizes that are valid and absurd only cost time and memory: a machine's limit is not a traceback's matter.
            if name in (
                "steps",
                "flops",
                "n_layer",
                "n_embd",
                "n_head",
                "batch_size",
                "num_tokens",
                "num_samples",
            ):
                value = rng.choice(["-1", "0", "1", "2", "3", "x", "", "nan"])
            flags.append(
                f"--{name}={value}" if name not in ("bench", "show_depth", "resume", "overwrite") else f"--{name}"
            )
        try:
            (program.main if program else sample_main)([*flags, "--device=cpu"])
            outcomes.append("ran")
        except (UserError, OSError):
            outcomes.append("refused")
        except SystemExit as error:
            assert error.code == 2
            outcomes.append("usage")
        except BaseException as error:
            raise AssertionError(f"{' '.join(flags)}: {error!r}") from error
    assert {"ran", "refused", "usage"} == set(outcomes)


@pytest.mark.slow
def test_memory_stays_flat(run_train, tmp_path):
    """Over 600 training steps, and 3,000 tokens; the first ones, which fill caches and pools, don't count."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    run_train("--steps=200", "--eval_interval=20", name="warm")
    before = peak()
    run_train("--steps=600", "--eval_interval=20", name="long")
    model, _ = load_checkpoint(tmp_path / "long", "cpu")
    for _ in model.generate(tokens(2, 5), 3000):
        pass
    assert peak() - before < 30, f"{peak() - before:.0f} MiB more"
