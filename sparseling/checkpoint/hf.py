"""The public Hugging Face layout of Ling 2.0, both ways, one tensor in memory at a time.

    model = load_model("path/to/Ling-mini-2.0")
    save_model(model, model.config, "path/to/copy", tokenizer_folder="path/to/Ling-mini-2.0")
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import ModelConfig
from ..errors import UserError
from ..files import read_json, write_json
from ..model.transformer import LingForCausalLM, initialize
from ..progress import track
from .folders import write_folder_aside
from .fp8 import SCALE_SUFFIX, block_of, dequantize_blocks, scale_shape
from .names import EMBEDDING, HEAD, LAYER, config_as_stored, expected_tensors, layer_of, mtp_layers, public_views
from .tensor_files import StoredTensor, TensorPlan, list_tensors, read_stored, write_shards

T = TypeVar("T")
MAX_SHARD_BYTES = 10 * 2**30  # as the published checkpoints
SHOW_PROGRESS_BYTES = 500_000_000  # reading less is a matter of a second or two
TRANSFORMERS_VERSION = "4.52.3"  # what the published files say; their remote code runs on it
SAVE_DTYPES = (torch.bfloat16, torch.float32)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja",
)


@dataclass(frozen=True)
class WeightFolder:
    """A folder whose headers have been read and checked; no weights are in memory.

    `config` holds the layers that are really there: decoder layers without MTP in `num_hidden_layers`, MTP layers in
    `num_nextn_predict_layers`. `tensors` has exactly the names of `expected_tensors(config)`, in the order of the files; `scales` has
    the scales of those that are FP8 codes. `public` is config.json as it stands.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    scales: dict[str, StoredTensor]
    block: tuple[int, int]
    public: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; for an FP8 checkpoint that of what is not FP8 (the embedding never is)."""
        return self.tensors[EMBEDDING].dtype


def open_checkpoint(folder: str | Path) -> WeightFolder:
    """Read config.json and the headers of all shards and check that they belong together.

    Raises `UserError`: a file is missing or damaged (named), or tensors are missing, extra or of another shape (the first few named).
    """
    folder = Path(folder)
    stored = list_tensors(folder)
    public = read_json(folder / "config.json")
    if not isinstance(public, dict):
        raise UserError(f"{folder / 'config.json'}: is not a JSON object; download the file again")
    config = config_as_stored(ModelConfig.from_dict(public, str(folder / "config.json")), stored, str(folder))
    scales, weights = split_scales(stored)
    if config.tie_word_embeddings and HEAD in weights:
        refuse_untied_head(folder, weights)
        del weights[HEAD]
    block = block_of(public, str(folder / "config.json"))
    check_names_and_shapes(folder, config, weights)
    check_scales(folder, weights, scales, block)
    return WeightFolder(folder, config, weights, scales, block, public)


def split_scales(stored: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """(FP8 scales by the name of their weight, all other tensors)."""
    scales = {name.removesuffix(SCALE_SUFFIX): tensor for name, tensor in stored.items() if name.endswith(SCALE_SUFFIX)}
    return scales, {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE_SUFFIX)}


def refuse_untied_head(folder: Path, weights: Mapping[str, StoredTensor]) -> None:
    """A tied checkpoint may store the head as a copy of the embedding, but not another one."""
    if EMBEDDING in weights:
        embedding, head = read_stored([weights[EMBEDDING], weights[HEAD]])
        if not torch.equal(embedding, head):
            raise UserError(f"{folder}: {HEAD} differs from {EMBEDDING}, yet config.json says tie_word_embeddings; set it to false")


def check_names_and_shapes(folder: Path, config: ModelConfig, weights: Mapping[str, StoredTensor]) -> None:
    """One `UserError` for all tensors that are missing, extra or misshapen."""
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    misshapen = [
        f"{name} {list(weights[name].shape)} instead of {list(shape)}"
        for name, (shape, _) in expected.items() if name in weights and weights[name].shape != shape
    ]
    problems = [some(missing, "missing"), some(extra, "not part of the model"), some(misshapen, "of another shape")]
    if any(problems):
        raise UserError(f"{folder}: the weights do not fit the model's config, {'; '.join(filter(None, problems))}; "
                        "use config.json and weights of the same model")


def some(names: list[str], what: str) -> str:
    """'3 tensors missing (a, b, c)', at most three named; empty when there are none."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what} ({shown})" if names else ""


def check_scales(folder: Path, weights: Mapping[str, StoredTensor], scales: Mapping[str, StoredTensor], block: tuple[int, int]) -> None:
    """Each FP8 weight has a scale per block, and nothing else has."""
    codes = {name for name, tensor in weights.items() if tensor.dtype == torch.float8_e4m3fn}
    unmatched = sorted(codes ^ scales.keys())
    if unmatched:
        name = unmatched[0]
        what = f"is FP8 without {name}{SCALE_SUFFIX}" if name in codes else "has FP8 scales but is not FP8"
        raise UserError(f"{folder}: {name} {what}; download the model again")
    for name in sorted(codes):
        shape = weights[name].shape
        if len(shape) != 2 or scales[name].shape != scale_shape(shape, block):
            raise UserError(f"{folder}: {name}{SCALE_SUFFIX} has shape {list(scales[name].shape)}, which does not fit a weight of shape "
                            f"{list(shape)} in blocks of {block[0]}x{block[1]}; check weight_block_size in config.json")


def read_checkpoint(
    checkpoint: WeightFolder, names: Iterable[str] | None = None, fp8_to: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(public name, tensor) in the order of `names` (default: all, shard by shard), as stored; FP8 blocks multiplied out to `fp8_to`
    (default: the dtype that the rest of the checkpoint has)."""
    names = list(checkpoint.tensors if names is None else names)
    order = []
    for name in names:
        order += [checkpoint.tensors[name]] + ([checkpoint.scales[name]] if name in checkpoint.scales else [])
    tensors = read_stored(order)
    dtype = fp8_to or checkpoint.dtype
    for name in names:
        # No tensor is bound to a name here: a waiting generator would keep it, and a merge has one per checkpoint waiting.
        yield name, dequantize_blocks(next(tensors), next(tensors), checkpoint.block, dtype) if name in checkpoint.scales else next(tensors)


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(public name, tensor) of a folder, shard by shard, one tensor in memory. FP8 blocks come multiplied out.

    Raises `UserError` as `open_checkpoint` does, before the first tensor.
    """
    return read_checkpoint(open_checkpoint(folder))


def without_mtp(checkpoint: WeightFolder) -> WeightFolder:
    """The same checkpoint as if it had no MTP layers."""
    decoder = checkpoint.config.num_hidden_layers

    def kept(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        return {name: tensor for name, tensor in stored.items() if (layer_of(name) or 0) < decoder}

    config = checkpoint.config.replace(num_nextn_predict_layers=0)
    return replace(checkpoint, config=config, tensors=kept(checkpoint.tensors), scales=kept(checkpoint.scales))


def with_separate_mtp(checkpoint: WeightFolder, mtp_folder: str | Path) -> WeightFolder:
    """`checkpoint` with the one MTP layer of another folder (there numbered 0, as engines store a draft model) in place of its own."""
    stored = list_tensors(mtp_folder)
    ahead = mtp_layers(stored)
    if len(ahead) != 1:
        raise UserError(f"{mtp_folder}: has {len(ahead)} MTP layers (layers with eh_proj), expected one; give the folder of one MTP layer")
    base, number = without_mtp(checkpoint), checkpoint.config.num_hidden_layers
    renumbered = {f"model.layers.{number}.{match[2]}": tensor for name, tensor in stored.items()
                  if (match := LAYER.fullmatch(name)) and int(match[1]) == ahead[0]}
    scales, weights = split_scales(renumbered)
    config = base.config.replace(num_nextn_predict_layers=1)
    check_names_and_shapes(Path(mtp_folder), config, base.tensors | weights)
    check_scales(Path(mtp_folder), weights, scales, base.block)
    return replace(base, config=config, tensors=base.tensors | weights, scales=base.scales | scales)


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, mtp: bool | Literal["auto"] = "auto", mtp_seed: int | None = None,
    mtp_folder: str | Path | None = None,
) -> LingForCausalLM:
    """The model of a public folder, on the CPU in `dtype` (None: as stored; FP8 becomes what the rest has). expert_bias stays float32.

    mtp: 'auto' takes the MTP layers that are there, False skips them, True wants them: absent ones are a `UserError`, or with `mtp_seed`
    are newly initialised from it. `mtp_folder` holds one MTP layer to take instead. Raises `UserError` as `open_checkpoint` does.
    """
    checkpoint = open_checkpoint(folder)
    if mtp is False:
        checkpoint = without_mtp(checkpoint)
    elif mtp_folder is not None:
        checkpoint = with_separate_mtp(checkpoint, mtp_folder)
    config = checkpoint.config
    fresh_mtp = mtp is True and not config.num_nextn_predict_layers
    if fresh_mtp:
        if mtp_seed is None:
            raise UserError(f"{folder}: has no MTP weights (published chat models have none); load it with mtp off, or give an mtp_seed "
                            "to start new ones")
        config = config.replace(num_nextn_predict_layers=max(1, checkpoint.public.get("num_nextn_predict_layers") or 0))
    model = empty_model(config, dtype or checkpoint.dtype)
    if fresh_mtp:
        initialize(model, mtp_seed or 0)
    fill(model, checkpoint)
    return model


class SkipRandomInit(TorchFunctionMode):
    """Leaves out the random values that torch modules start with."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(config: ModelConfig, dtype: torch.dtype) -> LingForCausalLM:
    """A model whose matrices have memory but no values yet: 16 billion parameters take a moment.

    Not through the meta device: materialising from it imports torch's compiler, seconds before the first word of a chat.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with SkipRandomInit():
            return LingForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def load_into(model: LingForCausalLM, folder: str | Path) -> None:
    """Overwrite the weights of an existing model, in its dtype and on its device, from a public folder.

    MTP tensors are skipped when the model has no MTP layers. Raises `UserError` as `open_checkpoint` does, and when the folder holds
    another model; nothing is overwritten then.
    """
    checkpoint = open_checkpoint(folder)
    if not model.config.num_nextn_predict_layers:
        checkpoint = without_mtp(checkpoint)
    check_names_and_shapes(Path(folder), model.config, checkpoint.tensors)
    fill(model, checkpoint)


@torch.no_grad()
def fill(model: nn.Module, checkpoint: WeightFolder) -> None:
    """Copy every tensor of `checkpoint` to its place in `model`."""
    places = dict(public_views(model.state_dict()))
    tensors = read_checkpoint(checkpoint, fp8_to=next(model.parameters()).dtype)
    for name, tensor in with_progress(tensors, "reading weights", checkpoint):
        places[name].copy_(tensor)


def with_progress(tensors: Iterable[T], what: str, checkpoint: WeightFolder) -> Iterable[T]:
    """A progress line when there is enough to read for a person to wait."""
    size_bytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in checkpoint.tensors.values())
    return track(tensors, what, len(checkpoint.tensors)) if size_bytes > SHOW_PROGRESS_BYTES else tensors


def save_model(
    source: nn.Module | Iterable[tuple[str, Tensor]], config: ModelConfig, folder: str | Path, tokenizer_folder: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False,
) -> None:
    """Write a model, or (name, tensor) pairs in any order, as a public folder: config, shards, index, generation config, tokenizer.

    Written aside and renamed: `folder` is complete or not there. One tensor at a time is converted to `dtype` (bfloat16 or float32);
    expert_bias stays float32. A tied head is not written. Equal weights give equal bytes.
    Raises `UserError`: the folder exists (unless `overwrite`), the disk is full, tensors are missing, extra or misshapen.
    """
    plan = plan_of(config, dtype)
    state = source.state_dict().items() if isinstance(source, nn.Module) else source
    tensors = (pair for name, tensor in state for pair in public_views({name: tensor}))
    if config.tie_word_embeddings:
        tensors = (pair for pair in tensors if pair[0] != HEAD)
    with write_folder_aside(folder, overwrite, needed_bytes=sum(tensor.size_bytes for tensor in plan.values())) as aside:
        write_shards(aside, plan, tensors, max_shard_bytes)
        write_json(aside / "config.json", config.to_dict() | dtype_entries(dtype))
        write_json(aside / "generation_config.json", generation_config(config))
        if tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder), aside)


def plan_of(config: ModelConfig, dtype: torch.dtype) -> dict[str, TensorPlan]:
    """What will be written: every public tensor in the order of the forward pass, in `dtype` but for the expert biases."""
    if dtype not in SAVE_DTYPES:
        raise UserError(f"dtype: weights are written as bfloat16 or float32, not {name_of(dtype)}; choose one of the two")
    expected = expected_tensors(config).items()
    return {name: TensorPlan(shape, torch.float32 if kind == "float32" else dtype) for name, (shape, kind) in expected}


def dtype_entries(dtype: torch.dtype) -> dict[str, str]:
    """What the public config.json says about dtype and writer."""
    return {"torch_dtype": name_of(dtype), "transformers_version": TRANSFORMERS_VERSION}


def name_of(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The public generation_config.json: a chat model stops at its end of turn and at the end of a document (= padding)."""
    ends = [config.pad_token_id, config.eos_token_id] if config.eos_token_id != config.pad_token_id else config.eos_token_id
    return {"eos_token_id": ends, "pad_token_id": config.pad_token_id, "transformers_version": TRANSFORMERS_VERSION}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files."""
    if not (source / "tokenizer.json").exists():
        raise UserError(f"{source / 'tokenizer.json'}: no such file; give the folder of a tokenizer")
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
