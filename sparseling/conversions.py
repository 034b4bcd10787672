"""The verb `convert`: from a public folder, a run or a GGUF file to any of the formats that a model can be written in."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import above_zero
from .errors import UsageError, UserError

PACKED = ("fp32", "bf16", "int8", "int4")
GGUF = ("gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_0")


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder, hub id, or GGUF file")
    parser.add_argument("--out", required=True, metavar="PATH", help="folder or GGUF file to write")
    parser.add_argument("--to", choices=["public", *PACKED, *GGUF], default="public", metavar="FORMAT",
                        help=f"public: safetensors (default); {', '.join(PACKED)}: packed for the native engine, which maps them into "
                             f"memory; {', '.join(GGUF)}: one file for llama.cpp")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of public folders (default bfloat16)")
    parser.add_argument("--shard-gb", type=above_zero, help="of public folders: largest file in GiB (default 10)")
    parser.add_argument("--quality", metavar="TEXT_FILE",
                        help="measure packed weights against bf16 on this text (.txt, or the .jsonl of a run's validation)")


def convert_verb(options: argparse.Namespace) -> None:
    """Write it. Raises `UsageError` for options of another format."""
    if options.to != "public" and (options.dtype or options.shard_gb):
        raise UsageError(f"--{'dtype' if options.dtype else 'shard-gb'}: is for public folders; leave it out with --to {options.to}")
    if options.quality and options.to not in PACKED:
        raise UsageError("--quality: is for packed weights; give --to int8 or int4 too")
    if options.model.endswith(".gguf") and options.to != "public":
        raise UsageError(f"{options.model}: a GGUF file becomes a public folder first; leave --to out, and convert that folder")
    if options.to in PACKED:
        to_packed(options)
    elif options.to in GGUF:
        to_gguf(options)
    else:
        to_public(options)
    print(f"wrote {options.out}")


def to_public(options: argparse.Namespace) -> None:
    import torch

    from .checkpoint.convert import convert_folder
    from .checkpoint.gguf_import import import_gguf
    from .info import model_folder

    dtype = getattr(torch, options.dtype or "bfloat16")
    if options.model.endswith(".gguf"):
        import_gguf(options.model, options.out, dtype)
    else:
        convert_folder(model_folder(options.model), options.out, dtype, max_shard_bytes=int((options.shard_gb or 10.0) * 2**30))


def to_packed(options: argparse.Namespace) -> None:
    from .info import model_folder
    from .run.pack_folder import check_room_for_quality, measure_quality, pack_folder, report

    source = model_folder(options.model)
    if options.quality:
        if not Path(options.quality).is_file():  # not after hours
            raise UserError(f"--quality: {options.quality} is no file; give a text, or leave it out")
        check_room_for_quality(source)
    pack_folder(source, options.out, options.to)
    if options.quality:
        print(report(measure_quality(source, options.out, options.quality), options.to))
    elif options.to in ("int8", "int4"):
        print("quality not measured; --quality TEXT_FILE gives perplexity and divergence against bf16")


def to_gguf(options: argparse.Namespace) -> None:
    from .checkpoint.gguf import export_folder
    from .info import model_folder

    export_folder(model_folder(options.model), options.out, options.to.removeprefix("gguf-"))
