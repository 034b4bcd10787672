"""The Ling 2.0 model, top to bottom as in L2 §2: decoder layers, head, and the MTP layers that look further ahead.

Module names give the public tensor names; only the routed experts are stacked in memory (model/mlp.py).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import Attention, Mask, build_mask, positions_in_documents
from .cache import KVCache
from .linear import Linear
from .mlp import DenseMLP, MoE
from .norm import RMSNorm
from .rotary import Rotary, rotary_table
from .router import Router, Routing


@dataclass
class ModelOutput:
    """hidden_states [batch, seq, hidden] after the final norm; routing per MoE layer (MTP layers last); one
    [batch, seq, hidden] per MTP depth in mtp_hidden_states when asked for."""

    hidden_states: Tensor
    routing: list[Routing] = field(default_factory=list)
    mtp_hidden_states: list[Tensor] = field(default_factory=list)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, two residual adds."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DenseMLP(config.hidden_size, config.intermediate_size) if config.is_dense(layer) else MoE(config)

    def forward(self, x: Tensor, rotary: Rotary, mask: Mask, cache: KVCache | None) -> tuple[Tensor, Routing | None]:
        """x [batch, seq, hidden] -> same, and the routing of a MoE layer."""
        x = x + self.attention(self.input_layernorm(x), rotary, mask, cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(normed)
            return x + y, routing
        return x + self.mlp(normed), None


class MTPLayer(DecoderLayer):
    """Multi-token prediction, one depth: from h at slot t and the embedding of token t + depth to the hidden of token t + depth + 1.

    eh_proj(concat[enorm(embedding), hnorm(hidden)]), embedding first (L2 §2.2 and the public code), then an ordinary layer.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def look_ahead(self, hidden: Tensor, embedded: Tensor, rotary: Rotary, mask: Mask) -> tuple[Tensor, Routing]:
        """hidden, embedded [batch, seq, hidden] -> hidden of the next depth, and its routing."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        x, routing = super().forward(x, rotary, mask, None)
        assert routing is not None
        return self.final_layernorm(x), routing


class Ling(nn.Module):
    """Embedding, decoder layers, MTP layers (numbered after them) and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        decoder = [DecoderLayer(config, n) for n in range(config.num_hidden_layers)]
        ahead = [MTPLayer(config, config.num_hidden_layers + n) for n in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList([*decoder, *ahead])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None, attention_mask_: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None, with_mtp: bool = False,
                dtype: torch.dtype | None = None) -> ModelOutput:
        batch, seq = input_ids.shape
        cached = cache.length if cache is not None else 0
        mask = build_mask(seq, cached, input_ids.device, document_ids, attention_mask_)
        if position_ids is None:
            position_ids = positions_in_documents(document_ids) if document_ids is not None else (
                torch.arange(cached, cached + seq, device=input_ids.device).expand(batch, seq))
        x = self.word_embeddings(input_ids).to(dtype)                            # [batch, seq, hidden]
        rotary = rotary_table(self.config, position_ids, x.dtype)
        out = ModelOutput(x)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x, routing = layer(x, rotary, mask, cache)
            if routing is not None:
                out.routing.append(routing)
        out.hidden_states = self.norm(x)
        if cache is not None:
            cache.length += seq
        if with_mtp:
            self.look_ahead(out, input_ids, rotary, mask)
        return out

    def look_ahead(self, out: ModelOutput, input_ids: Tensor, rotary: Rotary, mask: Mask) -> None:
        """Fill in the MTP hidden states: ids shift left by one a depth (id 0 enters), positions stay."""
        hidden = out.hidden_states
        for layer in self.layers[self.config.num_hidden_layers:]:
            assert isinstance(layer, MTPLayer)
            input_ids = torch.cat([input_ids[:, 1:], torch.zeros_like(input_ids[:, :1])], dim=1)
            hidden, routing = layer.look_ahead(hidden, self.word_embeddings(input_ids).to(hidden.dtype), rotary, mask)
            out.mtp_hidden_states.append(hidden)
            out.routing.append(routing)


class LingForCausalLM(nn.Module):
    """The model with its output head. Build, then `initialize` or load weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Ling(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.word_embeddings.weight

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None, with_mtp: bool = False,
                dtype: torch.dtype | None = None) -> ModelOutput:
        """input_ids [batch, seq]; document_ids [batch, seq] separates packed documents (attention and positions restart);
        attention_mask [batch, cached + seq], 0 = padding; position_ids [batch, seq] overrides the positions; `cache` is read and
        extended; `with_mtp` also runs the MTP layers (full sequences only); `dtype` of the activations, None = that of the parameters."""
        return self.model(input_ids, document_ids, attention_mask, position_ids, cache, with_mtp, dtype)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., hidden] -> float32 logits [..., vocab]; the product is in the model's dtype."""
        return self.lm_head(hidden_states).float()

    def routers(self) -> list[Router]:
        """The routers in the order of `ModelOutput.routing`."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoE)]


def initialize(model: LingForCausalLM, seed: int) -> LingForCausalLM:
    """Random weights, in place: normal with std `initializer_range` for every matrix, 1 for norms, 0 for biases (L2 §3.2.1).

    Each tensor's numbers depend on `seed` and its name alone, so adding a layer does not change the others.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            # PyTorch's CPU generator uses the low 32 bits of a seed only: both must go into them
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * model.config.initializer_range)
    for router in model.routers():
        router.expert_bias.zero_()
    return model
