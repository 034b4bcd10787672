"""The peer: Qwen3-MoE of the library transformers, in the same shape, in the fastest of the settings that it offers.

It has no shared expert, so it does less work a token; everything else is of our size, the dense first layer included.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.choose import DTYPES
from ..progress import Bar
from ..train.device import memory_bytes
from ..train.optimizer import AdamWSettings
from .measure import Candidate, Timing, time_in_turn
from .ours import LEARNING_RATE, SEED, random_batch
from .shapes import HEAD_DIM, Shape, sparse_config

EXPERTS = ("eager", "grouped_mm", "batched_mm")  # its implementations
PRECISIONS = {"fp32": ("fp32",), "bf16": ("fp32", "bf16 autocast", "bf16")}  # what competes at each --dtype
FINALISTS = 2  # settings that are measured fully
WITHOUT = "leave it out with --only ours,reference,dense"
MEMORY_SHARE = 0.4  # of the device's memory that one setting may take


@dataclass(frozen=True)
class Setting:
    """How the peer computes: implementation of its experts, and precision: "bf16 autocast" keeps fp32 weights, "bf16" does not."""

    experts: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.experts}, {self.precision}"


def settings_of(dtype: str) -> list[Setting]:
    """All that compete where ours computes in `dtype` ("bf16" or "fp32")."""
    return [Setting(experts, precision) for precision in PRECISIONS[dtype] for experts in EXPERTS]


def require_transformers() -> Any:
    """The module transformers, told to be quiet; `UserError` when it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"bench: the comparison with transformers needs that package; run: pip install 'sparseling[bench]', or {WITHOUT}"
                        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


def build_peer(shape: Shape) -> Any:
    """A Qwen3MoeForCausalLM with random fp32 weights."""
    transformers, config = require_transformers(), sparse_config(shape)
    torch.manual_seed(SEED)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads, head_dim=HEAD_DIM,
        intermediate_size=config.intermediate_size, mlp_only_layers=[0], moe_intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok, norm_topk_prob=True,
        max_position_embeddings=config.max_position_embeddings, use_cache=False, tie_word_embeddings=False,
    )).train()


def peer_candidates(shape: Shape, settings: Sequence[Setting], device: str = "cpu") -> list[Candidate]:
    """One candidate for each setting. Those of one dtype of weights share a model and its optimiser."""
    batch, candidates = random_batch(shape).to(device), []
    for low in (False, True):
        wanted = [setting for setting in settings if (setting.precision == "bf16") == low]
        if wanted:
            model = build_peer(shape).to(device)
            model = model.bfloat16() if low else model
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            candidates += [peer_candidate(setting, model, optimizer, batch.input_ids) for setting in wanted]
    return candidates


def peer_candidate(setting: Setting, model: Any, optimizer: torch.optim.AdamW, input_ids: Tensor) -> Candidate:
    """One setting of a built peer; its loss is the library's own, clipping and AdamW (fused) are torch's."""
    autocast = setting.precision == "bf16 autocast"

    def step() -> float:
        model.config._experts_implementation = setting.experts
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), AdamWSettings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return Candidate(setting.name, step)


def gathered_bytes(shape: Shape, setting: Setting) -> int:
    """Memory that batched_mm takes: it gathers the weights of every (token, expert) pair and keeps them for the backward; else 0."""
    if setting.experts != "batched_mm":
        return 0
    itemsize = DTYPES["fp32" if setting.precision == "fp32" else "bf16"].itemsize
    return (shape.layers - 1) * shape.tokens * shape.top_k * 3 * shape.hidden * shape.width * itemsize


def finalists(shape: Shape, dtype: str, repetitions: int, line: Bar, device: str = "cpu") -> tuple[list[Setting], dict[str, Any]]:
    """The fastest settings in a few steps, at most `FINALISTS`, and what every one did: {"tokens_per_second"} or {"not_run": why}.

    More than one, for a few steps on a busy machine do not tell near ones apart.
    """
    memory = MEMORY_SHARE * memory_bytes(device)
    settings = settings_of(dtype)
    fitting = [setting for setting in settings if gathered_bytes(shape, setting) <= memory]
    timings = time_in_turn(peer_candidates(shape, fitting, device), repetitions, line, may_fail=True)
    gc.collect()  # the models of all settings, before more are built
    line.advance((len(settings) - len(fitting)) * (repetitions + 1))
    tried = {}
    for setting in settings:
        needed = gathered_bytes(shape, setting) / 2**30
        timing = timings.get(setting.name, Timing(failure=f"would gather {needed:,.0f} GiB of expert weights"))
        tried[setting.name] = {"not_run": timing.failure} if timing.failure else {
            "tokens_per_second": shape.tokens / min(timing.seconds)}
    ran = [setting for setting in fitting if not timings[setting.name].failure]
    if not ran:
        why = next(iter(tried.values()))["not_run"]
        raise UserError(f"bench: transformers runs this shape in none of its settings ({why}); {WITHOUT}")
    return sorted(ran, key=lambda setting: min(timings[setting.name].seconds))[:FINALISTS], tried
