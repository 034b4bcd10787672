"""The native engine: one call computes a step of the whole model for many sequences, their keys and values in pages.

    engine = Engine(source_of_model(model, "int8"), pages=1024)       # or open_engine(folder), open.py
    out = engine.step(tokens, positions, sequences, tables, wanted)
"""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError
from ..kernels.library import call, load_library
from ..model.rotary import rotary_table
from .packed import BLOCK_ROWS, CODES, GROUP_COLUMNS, Kind, Packed, large_pages, round_up
from .parts import MATRICES, OUTER_MATRICES, OUTER_VECTORS, VECTORS, Part
from .source import Source
from .threads import ThreadChoice

PAGE = 16  # positions of a page


@dataclass(frozen=True)
class StepOutput:
    """`logits` [wanted, vocab] fp32; `hidden` [tokens, hidden] after the final norm when asked for. Of every MoE layer, when asked for:
    `expert_ids` [layers, tokens, k] int32, `expert_weights` likewise, `expert_scores` [layers, tokens, experts] before the bias."""

    logits: Tensor
    hidden: Tensor | None
    expert_ids: Tensor | None
    expert_weights: Tensor | None
    expert_scores: Tensor | None


def why_not(config: ModelConfig) -> str | None:
    """What keeps the engine from this model here; None when nothing does."""
    library, reason = load_library()
    if library is None:
        return reason
    sizes = {
        "hidden_size": config.hidden_size, "head_dim": config.head_dim, "moe_intermediate_size": config.moe_intermediate_size,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % GROUP_COLUMNS:
            return f"{name} {size} is not a multiple of {GROUP_COLUMNS}"
    return None


class Engine:
    """A model ready for the native step, with `pages` pages of 16 positions for keys and values. `ahead`: 1 when the source has an MTP
    layer, which guesses tokens (speculate.py); of several the first is used.

    Not to be stepped by two threads at once.
    """

    def __init__(self, source: Source, pages: int, threads: int | None = None) -> None:
        """Raises `UserError` for a model that the engine cannot take."""
        config = source.config
        if (reason := why_not(config)) is not None:
            raise UserError(f"the native engine cannot run this model: {reason}; run it on PyTorch operations")
        self.config, self.kind, self.pages = config, source.kind, pages
        self.max_positions = config.max_position_embeddings
        self.ahead = min(1, config.num_nextn_predict_layers)
        self.moe_layers = sum(not config.is_dense(layer) for layer in range(config.num_hidden_layers))
        self.kept: list[Tensor] = []  # everything that the C++ points to
        self.expert_biases: list[Tensor] = []  # [experts] fp32 of every MoE layer of the decoder, in order
        self.weight_bytes = 0
        self.threads_used = threads or torch.get_num_threads()
        self.thread_choice = ThreadChoice(self.threads_used)
        self.handle = created(config, self.threads_used, self.kind)
        self.finalizer = weakref.finalize(self, call, "engine_destroy", self.handle)
        cache_dtype = torch.float32 if self.kind == "fp32" else torch.bfloat16
        shape = (config.num_hidden_layers + self.ahead, pages, config.num_key_value_heads, config.head_dim * PAGE)
        self.keys, self.values = (zeros(shape, cache_dtype) for _ in range(2))
        call("engine_set_cache", self.handle, pages, self.keys, self.values)
        rotary = rotary_table(config, torch.arange(self.max_positions)[None], torch.float32)
        self.set_part("cosine", rotary.cos[0, :, :config.rotary_dim // 2])
        self.set_part("sine", rotary.sin[0, :, :config.rotary_dim // 2])
        for name, part in source.parts:
            self.set_part(name, part)

    def set_part(self, name: str, part: Part) -> None:
        """Give the C++ a part by its name (parts.py)."""
        owner, _, rest = name.partition(".")
        number, slot = (int(rest.split(".")[0]), rest.split(".")[1]) if rest else (-1, name)
        if owner == "mtp":
            if number >= self.ahead:
                return
            number += self.config.num_hidden_layers
        if slot in OUTER_MATRICES or slot in OUTER_VECTORS:
            number = -1
        if isinstance(part, Packed):
            self.weight_bytes += part.bytes
            place, size = (OUTER_MATRICES if number < 0 else MATRICES).index(slot), part.padded
            call("engine_set_matrix", self.handle, number, place, CODES[part.kind], *size, self.keep(part.data), self.keep(part.scales))
        elif name == "embedding":
            call("engine_set_embedding", self.handle, int(part.dtype == torch.bfloat16), self.keep(part))
        else:
            if slot == "expert_bias" and owner == "layers" and len(self.expert_biases) < self.moe_layers:
                self.expert_biases.append(part)
            call("engine_set_vector", self.handle, number, (OUTER_VECTORS if number < 0 else VECTORS).index(slot), self.keep(part))

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor.contiguous())
        return self.kept[-1]

    def step(self, tokens: Tensor, positions: Tensor, sequences: Tensor, tables: Tensor, wanted: Tensor, hidden: bool = False,
             routing: bool = False, scores: bool = False) -> StepOutput:
        """Compute new tokens [n] at `positions` of `sequences` (all int64 [n]); the tokens of a sequence stand together and in order, and
        all earlier positions have been computed. tables [sequences, pages] int32: the pages of each. Logits come for the tokens of
        `wanted` (int64 indices).

        Raises `ValueError` for what lies outside the vocabulary, the positions or the pages.
        """
        return self.compute(tokens, positions, sequences, tables, wanted, None, self.moe_layers, hidden, routing, scores)

    def look_ahead(self, hidden: Tensor, tokens: Tensor, positions: Tensor, sequences: Tensor, tables: Tensor, wanted: Tensor,
                   ) -> StepOutput:
        """The MTP layer: from the hidden states [n, hidden] of `positions` (after the final norm, as `step` gives them) and the tokens that
        follow those, logits for the tokens after them, and hidden states of the next depth. It has keys and values of its own: all earlier
        positions have to have gone through it."""
        return self.compute(tokens, positions, sequences, tables, wanted, hidden, 1, True, False, False)

    def compute(self, tokens: Tensor, positions: Tensor, sequences: Tensor, tables: Tensor, wanted: Tensor, previous: Tensor | None,
                moe: int, hidden: bool, routing: bool, scores: bool) -> StepOutput:
        config, n = self.config, len(tokens)
        logits = torch.empty(len(wanted), round_up(config.vocab_size, BLOCK_ROWS))
        k = config.num_experts_per_tok
        final = torch.empty(n, config.hidden_size) if hidden else None
        ids, weights = (torch.empty(moe, n, k, dtype=torch.int32), torch.empty(moe, n, k)) if routing else (None, None)
        expert_scores = torch.empty(moe, n, config.num_experts) if scores else None
        done = torch.zeros(1, dtype=torch.int64)
        threads = self.thread_choice.choose(n)
        if threads != self.threads_used:
            self.threads_used = threads
            call("engine_use_threads", self.handle, threads)
        start = time.perf_counter()
        call("engine_step", self.handle, n, tokens, positions, sequences, len(tables), self.max_positions, tables.shape[1], tables,
             len(wanted), wanted, previous, logits, final, ids, weights, expert_scores, done)
        if not done:
            raise ValueError("a token, position, sequence or page of the step lies outside the model or its cache")
        if previous is None:
            self.thread_choice.learn(n, threads, time.perf_counter() - start)
        return StepOutput(logits[:, :config.vocab_size], final, ids, weights, expert_scores)

    def guess(self, hidden: Tensor, tokens: Tensor, positions: Tensor, sequences: Tensor, tables: Tensor, wanted: Tensor, rooms: Tensor,
              drafts: int, blocks: Tensor) -> Tensor:
        """As `look_ahead`, and on from there, each guess made from the one before: for each row of `wanted` as many as `rooms` says (int64
        [wanted], at most `drafts`), which have to lie within its pages. `blocks` (int64, ascending): the guesses are the likeliest of the
        words 16 b .. 16 b + 15 of these b.

        Returns [wanted, drafts] int64, of which the first `rooms` of each row mean something. Raises `ValueError` as `step` does.
        """
        guesses = torch.zeros(len(wanted), drafts, dtype=torch.int64)
        done = torch.zeros(1, dtype=torch.int64)
        call("engine_guess", self.handle, len(tokens), tokens, positions, sequences, len(tables), self.max_positions, tables.shape[1],
             tables, len(wanted), wanted, hidden, rooms, drafts, len(blocks), blocks, guesses, done)
        if not done:
            raise ValueError("a token, position, sequence, page or block of the guess lies outside the model or its cache")
        return guesses


def created(config: ModelConfig, threads: int, kind: Kind) -> int:
    """The address of a new, empty engine."""
    groups, kept = config.groups
    dense = any(config.is_dense(layer) for layer in range(config.num_hidden_layers))
    sizes = torch.tensor([
        config.num_hidden_layers, min(1, config.num_nextn_predict_layers), config.hidden_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim,
        config.rotary_dim, config.num_experts, config.num_experts_per_tok, groups, kept, config.moe_intermediate_size,
        config.intermediate_size if dense else 0, config.shared_expert_intermediate_size, config.vocab_size,
    ])
    made = torch.zeros(1, dtype=torch.int64)
    scale = config.routed_scaling_factor
    call("engine_create", sizes, float(config.rms_norm_eps), float(scale), threads, int(kind != "fp32"), made)
    return int(made)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros; what is not used of many takes no memory."""
    return large_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
