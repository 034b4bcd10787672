"""Generation with a KV cache: many prompts at once, or one answer as a stream.

    answers = generate(model, prompts, max_new_tokens=64, stop_ids=(model.config.eos_token_id,))
    for token in stream(model, prompt, max_new_tokens=64): ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ..model.cache import KVCache
from ..model.transformer import LingForCausalLM
from .sampler import GREEDY, Sampling, next_tokens, uniform_draws

PREFILL_TOKENS = 4096  # in one forward: bounds the attention mask and the experts' buffers, whatever the prompt's length
CACHE_STEP_TOKENS = 128  # a cache starts with room for so many new tokens and doubles when full
DROP_SHARE = 0.25  # finished rows are dropped once they are this share of the batch: each drop copies the cache


@dataclass
class PrefixCache:
    """The KV cache of one sequence, kept between answers: `ids` are the tokens whose keys and values `cache` holds."""

    ids: list[int] = field(default_factory=list)
    cache: KVCache | None = None


@dataclass
class Rows:
    """The batch while it is generated; row r is sequence `sequences[r]`. `padding` [batch, columns] is False at left padding, None when
    there is none; `positions` [batch] of the next token; `history` [batch, columns] its tokens, `draws` [batch, max new tokens], each None
    when the sampling needs none; `tokens_left` per row."""

    sequences: list[int]
    tokens_left: list[int]
    cache: KVCache
    padding: Tensor | None
    positions: Tensor
    history: Tensor | None
    draws: Tensor | None

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self.positions.device)
        self.sequences = [self.sequences[r] for r in rows]
        self.tokens_left = [self.tokens_left[r] for r in rows]
        self.cache.keep_rows(index)
        self.positions = self.positions[index]
        self.padding = None if self.padding is None else self.padding[index]
        self.history = None if self.history is None else self.history[index]
        self.draws = None if self.draws is None else self.draws[index]


def generate(
    model: LingForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (), on_token: Callable[[int, int], None] | None = None, first_sequence: int = 0,
) -> list[list[int]]:
    """The continuation of each prompt, without the stop token that ended it.

    A row ends at a stop token, after `max_new_tokens`, or when prompt and output fill `max_position_embeddings`. Prompt n samples with
    the draws of sequence `first_sequence + n`, whatever else is in the batch. `on_token(n, token)` is called for each new token.
    Raises `UserError` for an empty prompt, one with unknown ids, or one that leaves no room in the context.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, max_new_tokens, sampling, stop_ids, first_sequence):
        for sequence, token in step:
            outputs[sequence].append(token)
            if on_token is not None:
                on_token(sequence, token)
    return outputs


def stream(
    model: LingForCausalLM, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, stop_ids: Collection[int] = (),
    prefix: PrefixCache | None = None, sequence: int = 0,
) -> Generator[int, None, None]:
    """The tokens of one continuation as they come; ends and raises as `generate` does, and samples with the draws of `sequence`.

    With `prefix`, what it shares with the prompt is not computed again, and it is left holding this sequence. Breaking off at any
    moment, also by Ctrl-C, leaves it usable.
    """
    for step in decode(model, [prompt], max_new_tokens, sampling, stop_ids, sequence, prefix):
        for _, token in step:
            yield token


@torch.inference_mode()
def decode(
    model: LingForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop_ids: Collection[int],
    first_sequence: int = 0, prefix: PrefixCache | None = None,
) -> Generator[list[tuple[int, int]], None, None]:
    """One list of (prompt number, new token) a step, for the rows that go on. `prefix` is for a single prompt."""
    check_prompts(model, prompts, max_new_tokens)
    if not prompts or max_new_tokens == 0:
        return
    stops = frozenset(stop_ids)
    rows, logits = prefill(model, prompts, max_new_tokens, sampling, first_sequence, prefix)
    step = 0
    while True:
        history = None if rows.history is None else rows.history[:, :rows.cache.length]
        tokens = next_tokens(logits, history, sampling, None if rows.draws is None else rows.draws[:, step])
        step += 1
        new, going_on = [], []
        for r, token in enumerate(tokens.tolist()):
            if rows.tokens_left[r] == 0:                                         # finished earlier, not dropped yet
                continue
            rows.tokens_left[r] = 0 if token in stops else rows.tokens_left[r] - 1
            if token not in stops:
                new.append((rows.sequences[r], token))
            if rows.tokens_left[r]:
                going_on.append(r)
        yield new
        if not going_on:
            return
        if len(rows.sequences) - len(going_on) >= DROP_SHARE * len(rows.sequences):
            rows.keep(going_on)
            tokens = tokens[torch.tensor(going_on, device=tokens.device)]
        logits = advance(model, rows, tokens)
        if prefix is not None:
            prefix.cache = rows.cache
            prefix.ids.append(int(tokens))


def check_prompts(model: LingForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `UserError` for what cannot be generated, naming the prompt."""
    vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens: {max_new_tokens} is negative; give 0 or more")
    for n, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompts[{n}]: has no tokens; give at least one")
        if len(prompt) >= limit:
            raise UserError(f"prompts[{n}]: its {len(prompt)} tokens leave no room in the model's context of {limit} "
                            "(max_position_embeddings); shorten it")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(f"prompts[{n}]: holds token ids outside 0 to {vocab - 1}; use the tokenizer that belongs to the model")


def prefill(
    model: LingForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, first_sequence: int,
    prefix: PrefixCache | None,
) -> tuple[Rows, Tensor]:
    """Run the prompts, padded on the left to one width; returns the batch and the logits [batch, vocab] after the last token."""
    device, dtype = model.lm_head.weight.device, model.model.word_embeddings.weight.dtype
    limit, lengths = model.config.max_position_embeddings, [len(prompt) for prompt in prompts]
    batch, width = len(prompts), max(lengths)
    tokens_left = [min(max_new_tokens, limit - length) for length in lengths]
    # Padding repeats the prompt's own first token: then it adds nothing to the tokens that the repetition penalty knows.
    ids = torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    padded = torch.tensor([width - length for length in lengths], device=device)  # [batch]
    padding = None
    if min(lengths) < width:
        padding = torch.arange(width + max(tokens_left), device=device) >= padded[:, None]
    capacity = width + min(max(tokens_left), CACHE_STEP_TOKENS)
    if prefix is None:
        cache = KVCache(model.config, batch, capacity, dtype, device)
    else:
        cache = common_prefix_cache(model, prefix, prompts[0], capacity)
    logits = run_prompts(model, ids, padding, cache, prefix)
    draws = None
    if sampling.temperature > 0:
        sequences = range(first_sequence, first_sequence + batch)
        draws = uniform_draws(sampling.seed, sequences, max(tokens_left)).to(device)
    history = None
    if sampling.repetition_penalty != 1:
        history = torch.nn.functional.pad(ids, (0, max(tokens_left)))
    return Rows(list(range(batch)), tokens_left, cache, padding, width - padded, history, draws), logits


def run_prompts(model: LingForCausalLM, ids: Tensor, padding: Tensor | None, cache: KVCache, prefix: PrefixCache | None) -> Tensor:
    """Fill `cache` from column `cache.length` on with ids [batch, width], some columns at a time; logits [batch, vocab] of the last one."""
    batch, width = ids.shape
    columns = max(1, PREFILL_TOKENS // batch)
    hidden = None
    for start in range(cache.length, width, columns):
        part = ids[:, start:start + columns]
        if padding is None:
            out = model(part, cache=cache)
        else:
            end = start + part.shape[1]
            positions = (padding[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
            out = model(part, attention_mask=padding[:, :end], position_ids=positions, cache=cache)
        hidden = out.hidden_states[:, -1]
        if prefix is not None:
            prefix.ids = ids[0, :cache.length].tolist()
    assert hidden is not None
    return model.logits(hidden)


def advance(model: LingForCausalLM, rows: Rows, tokens: Tensor) -> Tensor:
    """Append tokens [batch] to the rows; the logits [batch, vocab] of what comes next."""
    if rows.cache.length == rows.cache.capacity:
        rows.cache = resized(model, rows.cache, 2 * rows.cache.capacity)
    if rows.history is not None:
        rows.history[:, rows.cache.length] = tokens
    if rows.padding is None:
        out = model(tokens[:, None], cache=rows.cache)
    else:
        out = model(tokens[:, None], attention_mask=rows.padding[:, :rows.cache.length + 1], position_ids=rows.positions[:, None],
                    cache=rows.cache)
        rows.positions += 1
    return model.logits(out.hidden_states[:, -1])


def common_prefix_cache(model: LingForCausalLM, prefix: PrefixCache, prompt: Sequence[int], capacity: int) -> KVCache:
    """The cache of `prefix` cut to what it shares with `prompt`, with room for `capacity` tokens; new when there is none.

    The last token of the prompt is always computed again: its logits are needed.
    """
    common = 0
    while common < min(len(prefix.ids), len(prompt) - 1) and prefix.ids[common] == prompt[common]:
        common += 1
    cache = prefix.cache or KVCache(model.config, 1, capacity, model.model.word_embeddings.weight.dtype, model.lm_head.weight.device)
    prefix.ids, cache.length = prefix.ids[:common], common                       # before anything is overwritten
    prefix.cache = cache if cache.capacity >= capacity else resized(model, cache, capacity)
    return prefix.cache


def resized(model: LingForCausalLM, cache: KVCache, capacity: int) -> KVCache:
    """A copy with room for `capacity` tokens a row."""
    larger = KVCache(model.config, cache.keys.shape[1], capacity, cache.keys.dtype, cache.keys.device)
    larger.keys[:, :, :, :cache.length] = cache.keys[:, :, :, :cache.length]
    larger.values[:, :, :, :cache.length] = cache.values[:, :, :, :cache.length]
    larger.length = cache.length
    return larger
