"""Mixture-of-Depths (MoD), whole, in one file: a transformer that chooses which tokens to spend compute on.

Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
arXiv:2404.02258. In every other block a router lets only the k highest-scoring tokens of a sequence through
attention and MLP (k = capacity * T, say 12.5 %); the others pass by on the residual stream. Section 3.4:

    x_i  <-  x_i + gate(r_i) * f(X~)_i    if r_i is among the k highest of its sequence
    x_i  <-  x_i                          otherwise

(X~: those k tokens; f: the change that the block makes to them, its residual stream not included).

    x (B, T, C) ----+---------------------------------------------------------------+--> x (B, T, C)
                    |                                                               |
                    +--> router r (B, T) --> k indices, in temporal order (B, k)    + scatter-add
                    |       |                     |                                 |
                    |       +---------------------|--------------- gate(r) -------> *
                    |                             |                                 |
                    +------------------------- gather --> (B, k, C) --> f = attention, MLP

In the paper r_i = w . x_i and gate(r) = r. Here r_i = w . norm(x_i), the gate is a sigmoid, and the auxiliary loss
(choice_loss) trains only the router, not the layers below it; a short causal convolution mixes each embedding with the
three before it, and rotary embedding turns only a quarter of its pairs. README says why.

Who is chosen is the only thing that differs between the two modes (attention is causal in both):
    top-k   compares a token with the whole sequence. k is known beforehand, so every shape is fixed: for training.
            The loss under top-k has seen the future, though: whether a token is taken depends on later ones.
    causal  asks each token alone: is r > 0? The router learns to make that mean "top-k takes it" (section 3.5; or a
            small predictor learns it, the paper's other way). For sampling, and for an honest loss. A token that is
            not taken costs a block no more than this question, and leaves nothing in its KV cache. (Only in a batch
            are rows with fewer taken tokens padded, with work that is thrown away.)

Shapes: B batch (a row is one of its sequences), T time, C channels (n_embd), H heads, D head size (C / H),
        V vocabulary, L routed blocks
        k tokens that a routed block takes of each row (K in a suffix: idx_BK is (B, k)); in causal mode as many as the
          row with the most has; the others are padded. Its Block calls this T. (In Attention and KVCache, k is keys.)
        R rows whose new token a block takes, S keys in the longest of these rows: in sampling only

Read from top to bottom: config and FLOPs, norm and rotary, attention, block, routed block, KV cache, model. For
training, RoutedBlock.forward is what matters; its step, and KVCache, are for sampling.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------
# Config, and what a token costs

CHOICES = {"routing": ("topk", "random"), "causal": ("router", "predictor"), "gate": ("sigmoid", "raw")}


@dataclass
class MoDConfig:
    vocab_size: int = 257  # the bytes, and an end-of-text token
    block_size: int = 256  # context length: the longest sequence the rotary table covers
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 128
    capacity: float = 0.125  # share of a sequence that a routed block takes; 1 is the dense transformer
    route_every: int = 2  # every route_every-th block is routed (section 4.1: every other, at 12.5 %, is best)
    routing: str = "topk"  # "topk", or "random": the paper's control, which chooses at random
    causal: str = "router"  # who decides in causal mode: the "router", by r > 0, or a "predictor" (unless random)
    gate: str = "sigmoid"  # "sigmoid", or "raw": the router's output as it is, as the paper has it

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "route_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        # At least 4, since a predictor is n_embd // 4 wide.
        if self.n_embd < 4 or self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of 2 x n_head {self.n_head}, and at least 4")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity {self.capacity} must be above 0 and at most 1 (1 is dense)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(choices)}")

    @property
    def has_predictor(self):
        return self.causal == "predictor" and self.routing == "topk"

    @property
    def routed_layers(self):
        return list(range(self.route_every - 1, self.n_layer, self.route_every)) if self.capacity < 1 else []

    def k(self, T):
        """How many of T tokens a routed block takes under top-k."""
        return max(1, round(self.capacity * T))

    def flops_per_token(self, T, share=None):
        """Forward FLOPs per token of a T-token sequence, the mean over its positions; training counts as 3 times that.

        share is the part of the tokens that every routed block takes, k / T if None. A product of m x p by p x n
        counts 2mpn; of causal attention the needed half is counted, T / 2 keys for the mean query. Norms, rotary and
        embed's convolution are left out.
        """
        C = self.n_embd

        def block(n):  # n tokens through the 12 C^2 weights of qkv, out and MLP; QK^T and AV, 2C each, for n / 2 keys
            return n * (2 * 12 * C**2 + 4 * C * n / 2)

        taken = self.k(T) if share is None else share * T
        chooser = 2 * C  # the router, and the predictor where there is one
        if self.has_predictor:
            chooser += 2 * (C * (C // 4) + C // 4)
        routed = len(self.routed_layers)
        blocks = (self.n_layer - routed) * block(T) / T + routed * (block(taken) / T + chooser)
        return blocks + 2 * C * self.vocab_size


# ---------------------------------------------------------------------------------------------------------
# Norm and rotary position embedding


def norm(x):
    return F.layer_norm(x, (x.size(-1),))  # no gain, which the matrix that follows can learn, and no bias


def rotary_table(block_size, head_size):
    """Cosine and sine of position times frequency, (2, block_size, D); the first half of the sines negated, for rotate.

    About a quarter of the pairs turn (arXiv:2204.06745); with the others a head finds content however far away it is.
    """
    turning = max(1, head_size // 8)  # pairs, of head_size // 2
    frequency = torch.zeros(head_size // 2)
    frequency[:turning] = 10000.0 ** -(torch.arange(turning) / turning)
    angle = torch.arange(block_size)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))


def rotate(x, rope):
    """Turn the pairs (x_i, x_{i + D/2}) of x (B, heads, T, D) by their token's angle; rope (2, B or 1, 1, T, D)."""
    cos, sin = rope.to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


# ---------------------------------------------------------------------------------------------------------
# An ordinary pre-norm transformer block, except that it returns its delta: the caller scales it, if routed, and adds it


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, remember=None):
        """x (B, T, C) -> (B, T, C). remember, if given, is KVCache.fill or append: remember(k, v) stores them and
        returns all the keys and values to attend to, with a mask or None."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)  # (B, 3H, T, D)
        qk, v = qkv.split((2 * self.n_head, self.n_head), dim=1)  # rotated together, one call for two
        q, k = rotate(qk, rope).chunk(2, dim=1)  # (B, H, T, D) each
        mask = None
        if remember is not None:
            k, v, mask = remember(k, v)
        # One query sees every key there is, so only T > 1 needs the triangle. (With one query and a longer
        # cache, is_causal would show it the first key only.)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, remember=None):
        """The change this block makes to x (B, T, C), the residual stream itself not included; rope as in rotate,
        remember as in Attention."""
        attended = self.attention(norm(x), rope, remember)
        return attended + self.down(F.gelu(self.up(norm(x + attended)), approximate="tanh"))


# ---------------------------------------------------------------------------------------------------------
# The routed block: what Mixture-of-Depths is about


class Route(NamedTuple):
    """What one routed block decided, (B, T) each; of the whole model, (L, B, T) with L routed blocks."""

    taken: torch.Tensor  # bool: went through the block
    r: torch.Tensor  # the router's output
    logit: torch.Tensor  # what causal mode compares with the threshold: r, a predictor's output, or noise


class RoutedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.block = Block(config)
        self.router = nn.Linear(C, 1, bias=False)
        self.predictor = None
        if config.has_predictor:
            self.predictor = nn.Sequential(nn.Linear(C, C // 4), nn.GELU("tanh"), nn.Linear(C // 4, 1))

    def score(self, x):
        """For each token of x (B, T, C), by itself: r (section 3.4) and the causal decision's logit, (B, T) each (in
        top-k mode the logit is for choice_loss only).

        In float32: bfloat16 makes ties and flips decisions. forward switches autocast off; for step, generate does it,
        since doing it here would take time at every token.
        """
        seen = norm(x.float())
        r = self.router(seen).squeeze(-1)
        return r, self.decide(seen, r)

    def rank(self, r):
        """What top-k ranks the tokens by, (B, T): r, or noise in the control (section 3.3)."""
        return r if self.config.routing == "topk" else torch.rand_like(r)

    def decide(self, seen, r):
        """The causal decision's logit (B, T): r itself or a predictor's (section 3.5), or, in the control, noise."""
        if self.config.routing == "random":
            return torch.rand_like(r) - (1 - self.config.capacity)  # above 0 with probability capacity
        if self.predictor is None and not seen.requires_grad:
            return r  # no gradient to stop
        # Detached, so that choice_loss trains the router or predictor, not the residual stream that it reads. But the
        # gate's gradient must pass there, so a router runs twice: the same values as r, another gradient.
        return (self.predictor or self.router)(seen.detach()).squeeze(-1)

    def gate(self, r):
        # Multiplying the output by a function of r is how the router learns what to take: choosing has no gradient.
        return r if self.config.gate == "raw" else r.sigmoid()

    def forward(self, x, rope, causal=False, threshold=0.0, cache=None):
        """x (B, T, C) -> new x, Route. rope (2, T, D). With a cache, an empty one, x is a prompt and causal True."""
        assert causal or cache is None, "a prompt is routed causally"
        B, T, C = x.shape
        with torch.autocast(x.device.type, enabled=False):
            r, logit = self.score(x)
        if causal:
            taken = logit > threshold
            count = taken.sum(dim=1).tolist()
            # Stable: the taken tokens come first and keep their order. Shorter rows are padded with tokens
            # that were not taken: at the end, where the causal mask hides them from the taken ones.
            idx_BK = taken.int().argsort(dim=1, descending=True, stable=True)[:, : max(count)]
        else:
            # Sorted by position, since attention among the taken tokens is causal in time, not in score.
            idx_BK = self.rank(r).topk(self.config.k(T), dim=1).indices.sort(dim=1).values
            taken = torch.zeros_like(r, dtype=torch.bool).scatter(1, idx_BK, True)
        route = Route(taken, r, logit)
        if idx_BK.size(1) == 0:  # nobody was taken: in causal mode only
            return x, route

        gate_BK = (self.gate(r) * taken).gather(1, idx_BK)  # 0 for the padding that causal has
        idx_BKC = idx_BK[..., None].expand(-1, -1, C)
        rope_taken = rope[:, idx_BK][:, :, None]  # (2, B, 1, k, D): the angles of the tokens' real positions
        remember = partial(cache.fill, length=count) if cache is not None else None  # so causal: count exists
        delta_BKC = gate_BK[..., None] * self.block(x.gather(1, idx_BKC), rope_taken, remember)
        return x.scatter_add(1, idx_BKC, delta_BKC.to(x.dtype)), route

    def step(self, x, rope, threshold, cache):
        """forward for one new token a row (or a prompt of one): x (B, 1, C) -> new x, Route; rope (2, 1, D). Only the
        rows that take theirs run the block."""
        r, logit = self.score(x)
        taken = logit > threshold
        route = Route(taken, r, logit)
        rows = [row for row, yes in enumerate(taken.flatten().tolist()) if yes]  # waits for the device
        if not rows:
            return x, route
        idx_R = torch.tensor(rows, device=x.device)
        remember = partial(cache.append, rows=rows)
        delta = self.gate(r[idx_R])[..., None] * self.block(x[idx_R], rope[:, None, None], remember)  # (R, 1, C)
        return x.index_add(0, idx_R, delta.to(x.dtype)), route


def choice_loss(route):
    """The auxiliary loss of section 3.5, which teaches the router (or predictor) to foresee the top-k choice: add it to
    the cross-entropy.

    The mean binary cross-entropy in nats. route is of a top-k forward, and not None as a dense model's is; under random
    routing there is nothing to learn.
    """
    return F.binary_cross_entropy_with_logits(route.logit, route.taken.float())


# ---------------------------------------------------------------------------------------------------------
# KV cache


class KVCache:
    """Keys and values of the tokens that one block has taken; beyond a row's length is padding, which is never seen.

    In a routed block each row of the batch has its own length. The buffers double when the longest row
    is full; a dense block's start at the full context and never grow.
    """

    def __init__(self, batch, n_head, size, head_size, like):
        # Zeros, since memory as it comes may hold NaN, and a masked NaN is still NaN (0 * NaN).
        self.k = like.new_zeros(batch, n_head, size, head_size)
        self.v = torch.zeros_like(self.k)
        self.length = [0] * batch  # on the host, where it costs no synchronisation to read

    def reserve(self, size):
        if size > self.k.size(2):
            padding = (0, 0, 0, max(size, 2 * self.k.size(2)) - self.k.size(2))
            self.k, self.v = F.pad(self.k, padding), F.pad(self.v, padding)

    def fill(self, k, v, length):
        """Store a prompt's keys and values (B, H, T, D), of which row b's first length[b] are real, and return them.

        The next token overwrites the padding, or the row's length hides it.
        """
        self.reserve(k.size(2))
        self.k[:, :, : k.size(2)], self.v[:, :, : k.size(2)] = k, v
        self.length = list(length)
        return k, v, None  # a prompt attends to itself alone, and is_causal masks it

    def append(self, k, v, rows):
        """Store one new token's k and v (R, H, 1, D), one for each of rows (ascending). Return all keys and values of
        these rows, (R, H, S, D) each, and a mask (R, 1, 1, S) of the real ones, or None if all are."""
        for row in rows:
            self.length[row] += 1
        length = [self.length[row] for row in rows]  # with the new token, which is the last
        S = max(length)
        self.reserve(S)
        if len(rows) == 1 or (len(rows) == len(self.length) and min(length) == S):
            part = slice(rows[0], rows[-1] + 1)  # one row, or all of them, equally long (a dense block): no copy
            self.k[part, :, S - 1 : S], self.v[part, :, S - 1 : S] = k, v
            return self.k[part, :, :S], self.v[part, :, :S], None
        idx_R, length_R = torch.tensor([rows, length], device=k.device)
        self.k[idx_R, :, length_R - 1], self.v[idx_R, :, length_R - 1] = k[:, :, 0], v[:, :, 0]  # (R, H, D)
        mask = torch.arange(S, device=k.device) < length_R[:, None]  # (R, S)
        k, v = (x[:, :, :S].index_select(0, idx_R) for x in (self.k, self.v))  # copies faster than x[idx_R]
        return k, v, mask[:, None, None]

    @property
    def bytes_used(self):
        """Bytes of the keys and values held; the buffers may be larger."""
        return 2 * sum(self.length) * self.k[0, :, 0].numel() * self.k.element_size()


# ---------------------------------------------------------------------------------------------------------
# The model


class MoD(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.mix = nn.Parameter(torch.empty(config.n_embd, 4))  # see embed
        self.blocks = nn.ModuleList(
            RoutedBlock(config) if i in config.routed_layers else Block(config) for i in range(config.n_layer)
        )
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        table = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rope", table, persistent=False)
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight", "bias")):
                nn.init.zeros_(p)  # every block starts as the identity, every token as likely as another
            elif p.dim() > 1:  # a gain, should you add one, stays as it was made
                nn.init.normal_(p, std=p.size(-1) ** -0.5)
            if name.endswith(("qkv.weight", "up.weight", "head.weight")):
                # Stored by columns: a CPU multiplies a lone token by it up to twice as fast.
                p.data = p.data.t().contiguous().t()
        self.mix.data[:, -1] = 1  # each token's own weight; the three before it have random ones, of std 1/2

    def forward(self, idx, targets=None, causal=False, threshold=0.0, cache=None, start=0):
        """Tokens idx (B, T) -> logits (B, T, V); mean cross-entropy with targets (B, T) in nats, or None; the Route of
        all routed blocks, (L, B, T), or None if there are none. choice_loss is left to the training loop.

        Routing is top-k, unless causal: then a token is taken if its logit exceeds threshold; the higher, the fewer.
        With a cache (from new_cache; under no_grad, without targets, always causal) idx is all the text so far, (B,
        start + T): embed looks back three tokens, all else runs only the last T. The first call has the prompt, start =
        0; each later one a new token, T = 1, start = how many were run before. Logits: the last token's, (B, 1, V).

        Routers and predictors must be float32; all other weights, and with them the cache, may be bfloat16 (sample.py
        does it). Autocast (bfloat16 in matrix products only) is for training, not with a cache.
        """
        causal = causal or bool(cache)  # top-k would need the future
        B, T = idx.size(0), idx.size(1) - start
        assert start == 0 or (cache and T == 1), "start > 0 needs a cache, and the text with exactly one new token"
        assert start + T <= self.config.block_size, f"{start + T} tokens are longer than block_size"
        x = self.embed(idx, start)
        rope = self.rope[:, start : start + T]  # (2, T, D)
        routes = []
        for i, block in enumerate(self.blocks):
            kv = cache[i] if cache else None
            if isinstance(block, RoutedBlock):
                if cache and T == 1:
                    x, route = block.step(x, rope, threshold, kv)
                else:
                    x, route = block(x, rope, causal, threshold, kv)
                routes.append(route)
            else:
                remember = None
                if cache:
                    remember = partial(kv.append, rows=range(B)) if T == 1 else partial(kv.fill, length=[T] * B)
                x = x + block(x, rope[:, None, None], remember)
        if cache:
            x = x[:, -1:]
        logits = self.head(norm(x))
        loss = None if targets is None else F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        route = Route(*(torch.stack(field) for field in zip(*routes, strict=True))) if routes else None
        return logits, loss, route

    def embed(self, idx, start=0):
        """idx (B, start + T) -> the tokens from start on, (B, T, C): a convolution, channel by channel, mixes each with
        the three before it (not in the paper; README tells what it is for)."""
        x = norm(self.embedding(idx[:, max(0, start - 3) :]))
        x = F.pad(x, (0, 0, max(0, 3 - start), 0))  # nothing is before the first token
        return (x.unfold(1, 4, 1) * self.mix).sum(dim=-1)  # the window is the last dimension: (B, T, C, 4)

    def new_cache(self, batch):
        """An empty KV cache: one KVCache per block, for batch rows."""
        c, like = self.config, self.embedding.weight
        return [
            KVCache(batch, c.n_head, 16 if i in c.routed_layers else c.block_size, c.n_embd // c.n_head, like)
            for i in range(c.n_layer)
        ]

    @torch.inference_mode()
    def generate(self, idx, num_tokens, temperature=1.0, top_k=None, top_p=None, threshold=0.0):
        """Continue the prompts idx (B, T), T >= 1, of which the last block_size tokens are used, with a KV cache.

        Yields, num_tokens times: the new tokens (B, 1); the logits (B, V) they came from; the Route (None if dense) of
        the tokens run to get there: the prompt at first, then the last new token; the cache. When the context is full,
        its last half is run again, as the prompt of a new cache. (top_k here is sampling's, not the router's.)
        """
        size = self.config.block_size
        text = idx[:, -size:]
        cache, start = self.new_cache(len(idx)), 0
        for _ in range(num_tokens):
            if text.size(1) > size:
                text = text[:, -max(1, size // 2) :]
                cache, start = self.new_cache(len(idx)), 0
            with torch.autocast(idx.device.type, enabled=False):  # the cache has the dtype of the weights
                logits, _, route = self(text, threshold=threshold, cache=cache, start=start)
            start = text.size(1)
            token = sample(logits[:, -1], temperature, top_k, top_p)
            text = torch.cat((text, token), dim=1)
            yield token, logits[:, -1], route, cache


def sample(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw from logits (B, V): one token a row, (B, 1). Temperature 0 is argmax. top_k >= 1, 0 < top_p <= 1."""
    if temperature < 1e-30:  # 0, or too small to divide float32 by
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits.float() - logits.amax(dim=-1, keepdim=True)) / temperature  # no overflow, however cold
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:  # the smallest set of likeliest tokens that holds top_p of the probability
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        drop = p.cumsum(dim=-1) - p >= max(top_p, 1e-30)  # never the first, however small top_p is
        drop = torch.empty_like(drop).scatter(1, order, drop)  # back in the vocabulary's order
        logits = logits.masked_fill(drop, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1)
