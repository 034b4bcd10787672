"""`sparseling convert --to int4`: a public folder to a packed one, and what it costs in quality."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..checkpoint.convert import copy_companions
from ..checkpoint.folders import write_folder_aside
from ..checkpoint.hf import open_checkpoint, without_mtp
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files import write_json
from .engine import PAGE, Engine, why_not
from .memory import available_bytes
from .packed import Kind
from .packed_folder import is_packed, open_packed, packed_bytes, source_of_packed, write_packed
from .quality import WINDOW_TOKENS, Quality, compare, texts_of
from .source import source_of_checkpoint

QUALITY_FILE = "quality.json"


def pack_folder(source: str | Path, target: str | Path, kind: Kind, overwrite: bool = False) -> None:
    """Write `target`, complete or not at all, one tensor and one packed part in memory at a time. MTP layers come along.

    Raises `UserError`: the engine cannot take the model, `source` is packed itself, `target` exists, the disk is full, and as
    `open_checkpoint` does.
    """
    if is_packed(source):
        raise UserError(f"{source}: is packed already; give the model that it came from")
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    if (reason := why_not(config)) is not None:
        raise UserError(f"{source}: cannot be packed, for the native engine cannot run it: {reason}")
    embedding = torch.bfloat16 if checkpoint.dtype == torch.bfloat16 else torch.float32
    with write_folder_aside(target, overwrite, needed_bytes=packed_bytes(config, kind, embedding)) as aside:
        copy_companions(checkpoint.folder, aside)
        layers = {"num_hidden_layers": config.num_hidden_layers, "num_nextn_predict_layers": config.num_nextn_predict_layers}
        public = {key: value for key, value in checkpoint.public.items() if key != "quantization_config"}
        write_json(aside / "config.json", public | layers)
        write_packed(source_of_checkpoint(checkpoint, kind), embedding, str(Path(source).name), aside)


def check_room_for_quality(source: str | Path) -> None:
    """Raises `UserError` where the bf16 model, which others are measured against, would not fit into memory."""
    needed, available = packed_bytes(without_mtp(open_checkpoint(source)).config, "bf16", torch.bfloat16), available_bytes()
    if available is not None and needed > available:
        raise UserError(f"--quality: needs the bf16 model in memory, {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free; "
                        "measure on a larger machine, or leave it out")


def measure_quality(source: str | Path, packed: str | Path, text: str | Path) -> Quality:
    """The packed folder beside its source in bf16, on a text; kept in `quality.json`. Raises `UserError` as `compare` does."""
    texts, tokenizer = texts_of(text), Tokenizer.load(Path(source))
    pages = WINDOW_TOKENS // PAGE
    reference = Engine(source_of_checkpoint(without_mtp(open_checkpoint(source)), "bf16"), pages)
    quality = compare(reference, Engine(source_of_packed(open_packed(packed)), pages), texts, tokenizer)
    write_json(Path(packed) / QUALITY_FILE, dataclasses.asdict(quality) | {"text": Path(text).name, "reference": "bf16"})
    return quality


def report(quality: Quality, kind: Kind) -> str:
    """For people, in four lines."""
    change = 100 * (quality.perplexity_ratio - 1)
    return "\n".join((
        f"quality on {quality.tokens:,} tokens ({quality.text_bytes:,} bytes), {kind} against bf16:",
        f"  perplexity    {quality.perplexity:.4f} against {quality.reference_perplexity:.4f} ({change:+.2f}%)",
        f"  bits per byte {quality.bits_per_byte:.4f} against {quality.reference_bits_per_byte:.4f}",
        f"  divergence    {quality.divergence:.5f} nats a token; the same likeliest token {100 * quality.same_choice:.1f}% of the time",
    ))
