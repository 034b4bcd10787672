"""Export as GGUF, which llama.cpp runs: architecture `bailingmoe2`, one tensor (or the stacked experts of a layer) in memory at a time.

    export_folder("runs/laptop/merge-sft/model", "laptop.gguf", "bf16")
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError
from ..files import write_aside
from ..model.transformer import LingForCausalLM
from ..progress import bar
from .gguf_blocks import BLOCK, quantize
from .gguf_metadata import ARCHITECTURE, add_config, add_tokenizer, refuse_unloadable
from .gguf_names import ROUTER, GgufTensor, gguf_tensors
from .hf import open_checkpoint, read_checkpoint
from .names import HEAD, public_views

Read = Callable[[Sequence[str]], Iterator[Tensor]]


@dataclass(frozen=True)
class Scheme:
    """GGUF types of the matrices (`weights`), and of embedding and head (`ends`); `file_type` is llama.cpp's number of the mix.

    Norms, router and expert bias are always F32. In q4_0 the ends have 8 bits: 4 there cost more than in all the rest (docs/figures.md).
    """

    weights: str
    ends: str
    file_type: int


SCHEMES = {
    "f32": Scheme("F32", "F32", 0), "f16": Scheme("F16", "F16", 1), "bf16": Scheme("BF16", "BF16", 32),
    "q8_0": Scheme("Q8_0", "Q8_0", 7), "q4_0": Scheme("Q4_0", "Q8_0", 2),
}
BLOCK_BYTES = {"F32": 128, "F16": 64, "BF16": 64, "Q8_0": 34, "Q4_0": 18}


def require_gguf() -> Any:
    """The package gguf; `UserError` when it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf; run: pip install 'sparseling[gguf]'") from None
    return gguf


def export_folder(source: str | Path, target: str | Path, to: str, overwrite: bool = False) -> None:
    """Write a public folder as one GGUF file with its tokenizer. `to` is a key of `SCHEMES`.

    MTP layers go along (llama.cpp keeps but does not use them). Raises `UserError` for a model that llama.cpp cannot load, an existing
    target (unless `overwrite`), a full disk, and as `open_checkpoint` does. The file is complete or not there.
    """
    checkpoint = open_checkpoint(source)

    def read(names: Sequence[str]) -> Iterator[Tensor]:
        return (tensor for _, tensor in read_checkpoint(checkpoint, names, fp8_to=torch.float32))

    write_gguf(target, checkpoint.config, read, to, checkpoint.folder, str(source), overwrite)


def export_model(model: LingForCausalLM, target: str | Path, to: str, ends: str | None = None, overwrite: bool = False) -> None:
    """Write a model in memory, on the CPU, without a tokenizer (token ids go in and out). `ends`: another type for embedding and head.

    Raises as `export_folder` does.
    """
    views = dict(public_views({name: tensor.detach() for name, tensor in model.state_dict().items()}))
    if model.config.tie_word_embeddings:
        del views[HEAD]
    write_gguf(target, model.config, lambda names: (views[name] for name in names), to, None, type(model).__name__, overwrite, ends)


def write_gguf(target: str | Path, config: ModelConfig, read: Read, to: str, tokenizer_folder: Path | None, source: str, overwrite: bool,
               ends: str | None = None) -> None:
    """`read(names)` gives public tensors in that order. See `export_folder`."""
    gguf, target = require_gguf(), Path(target)
    refuse_unloadable(config, source)
    scheme = SCHEMES[to]
    tensors = gguf_tensors(config)
    types = [type_of(tensor, scheme, ends) for tensor in tensors]
    sizes = [bytes_of(tensor.shape, kind) for tensor, kind in zip(tensors, types, strict=True)]
    make_room(target, sum(sizes), overwrite)
    with write_aside(target, "wb") as stream:
        writer = gguf.GGUFWriter(stream.name, ARCHITECTURE)
        try:
            add_config(writer, config, target.stem)
            writer.add_file_type(scheme.file_type)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            if tokenizer_folder is None:
                writer.add_tokenizer_model("none")
            else:
                add_tokenizer(writer, tokenizer_folder, config.vocab_size)
            for tensor, kind, size in zip(tensors, types, sizes, strict=True):
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with bar(f"writing {target.name}", len(tensors)) as line:
                for tensor, kind in zip(tensors, types, strict=True):
                    line.note(tensor.name)
                    writer.write_tensor_data(encoded(tensor, kind, read))
                    line.advance()
        finally:
            writer.close()


def make_room(target: Path, needed_bytes: int, overwrite: bool) -> None:
    """Refuse a target that exists or does not fit on the disk."""
    if target.is_dir() or (target.exists() and not overwrite):
        raise UserError(f"{target}: exists already; choose another name or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if needed_bytes > free_bytes:
        raise UserError(f"{target}: needs {needed_bytes / 1e9:.1f} GB and the disk has {free_bytes / 1e9:.1f} GB free; free some space")


def type_of(tensor: GgufTensor, scheme: Scheme, ends: str | None = None) -> str:
    """The GGUF type that a tensor gets. Rows that do not fill blocks of 32 stay F16, as llama.cpp's own tool does."""
    if len(tensor.shape) == 1 or tensor.name.endswith(ROUTER):
        return "F32"
    wanted = (ends or scheme.ends) if tensor.name in ("token_embd.weight", "output.weight") else scheme.weights
    return "F16" if wanted in ("Q8_0", "Q4_0") and tensor.shape[-1] % BLOCK else wanted


def bytes_of(shape: Sequence[int], kind: str) -> int:
    return math.prod(shape) * BLOCK_BYTES[kind] // BLOCK


def encoded(tensor: GgufTensor, kind: str, read: Read) -> np.ndarray:
    """The bytes of a tensor, uint8. Raises `UserError` for a value beyond what F16 can hold."""
    if len(tensor.sources) == 1:
        return encode(next(read(tensor.sources)), kind, tensor.sources[0])
    out = np.empty((len(tensor.sources), bytes_of(tensor.shape, kind) // len(tensor.sources)), dtype=np.uint8)
    for part, matrix in enumerate(read(tensor.sources)):
        out[part] = encode(matrix, kind, tensor.sources[part])
    return out


def encode(matrix: Tensor, kind: str, name: str) -> np.ndarray:
    """One public tensor's bytes in a GGUF type, uint8 [bytes]; F16 and BF16 round to nearest even."""
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
    if plain is None:
        return quantize(matrix.cpu(), kind).reshape(-1).numpy()
    rounded = matrix.to("cpu", plain).contiguous()
    if kind == "F16" and not torch.isfinite(rounded).all():
        raise UserError(f"{name}: has values beyond what f16 can hold; export it as bf16 or f32")
    return rounded.reshape(-1).view(torch.uint8).numpy()
