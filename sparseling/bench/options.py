"""The verb `bench` on the command line. Nothing here imports torch: starting the program must stay fast."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import above_zero, names, positive, positives, rates, sizes
from ..errors import UsageError, nearest

if TYPE_CHECKING:
    from .shapes import Shape

EXAMPLES = {
    "train": "sparseling bench train --steps 5 --json",
    "experts": "sparseling bench experts --experts 8,64,256 --peer",
    "growth": "sparseling bench growth --axis experts --out plots",
    "decode": "sparseling bench decode --model mini --llama-python ~/llama/bin/python",
    "prefill": "sparseling bench prefill --model mini --weights bf16 --no-peer",
    "speculate": "sparseling bench speculate runs/laptop --batch 1,4,16",
    "race": "sparseling bench race recipes/race.yaml --minutes 10 --out plots",
    "serve": "sparseling bench serve runs/laptop --streams 200 --seconds 60 --json",
}


def add_subcommands(parser: argparse.ArgumentParser) -> None:
    """`train`, `experts`, `growth`, `race`, `decode`, `prefill`, `speculate` and `serve` with their options."""
    subcommands = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)

    def subcommand(name: str, help: str, function: object) -> argparse.ArgumentParser:
        sub = subcommands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"Example: {EXAMPLES[name]}")
        sub.set_defaults(function=function)
        return sub

    train = subcommand("train", "a whole training step: ours, on PyTorch operations, dense, and transformers", train_verb)
    add_shape_options(train, sequences=16)
    train.add_argument("--only", type=names, metavar="NAME,...", help="of ours, reference, dense, transformers (default: all)")
    add_run_options(train, ["bf16", "fp32"], steps=5, gpu=True)

    experts = subcommand("experts", "the expert layer alone, against the number of experts", experts_verb)
    experts.add_argument("--experts", type=positives, default=[8, 16, 32, 64, 128, 256], metavar="N,...",
                         help="numbers of experts (default 8,16,32,64,128,256)")
    for option, default, what in (("tokens", 8192, "tokens"), ("hidden", 512, "hidden size"), ("width", 128, "width of one expert"),
                                  ("top-k", 8, "experts that a token goes to")):
        experts.add_argument(f"--{option}", type=positive, default=default, metavar="N", help=f"{what} (default {default})")
    experts.add_argument("--peer", action="store_true", help="also on torch.nn.functional.grouped_mm")
    add_run_options(experts, ["bf16", "fp32", "mixed"], steps=5, gpu=True)

    growth = subcommand("growth", "the time of our training step as one thing grows", growth_verb)
    growth.add_argument("--axis", default="all", help="experts, tokens, depth, width, length, or all (default all)")
    growth.add_argument("--values", type=positives, metavar="N,...", help="where to measure, for one axis (default: the usual places)")
    growth.add_argument("--out", type=Path, metavar="FOLDER", help="write an SVG picture of each curve here")
    add_shape_options(growth, sequences=32)
    add_run_options(growth, ["bf16", "fp32"], steps=3)

    race = subcommand("race", "bits per byte after equal time: a recipe's sparse model against dense ones", race_verb)
    race.add_argument("recipe", metavar="RECIPE", help="recipe: its model, its data, and the settings of its first pretrain stage")
    race.add_argument("--minutes", type=above_zero, default=10.0, metavar="N", help="training time of each model (default 10)")
    race.add_argument("--dense", type=sizes, default=[], metavar="HIDDENxLAYERS,...",
                      help="dense models beside the one of equal active parameters (default: three, smaller and larger)")
    race.add_argument("--rates", type=rates, default=[], metavar="X,...",
                      help="learning rates that each model tries first, a tenth of the time each; a single one is taken untried "
                           "(default: half the recipe's, that, and twice)")
    race.add_argument("--points", type=positive, default=20, metavar="N", help="validations on the way (default 20)")
    race.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders lie (default: runs)")
    race.add_argument("--out", type=Path, metavar="FOLDER", help="where race.json and race.svg go (default: race/ in the run folder)")
    race.add_argument("--json", action="store_true", help="one JSON object on stdout")

    decode = subcommand("decode", "new tokens a second of the engine beside llama.cpp, and the share of memory bandwidth", generation_verb)
    decode.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at once (default 1)")
    add_generation_options(decode, prompt_tokens=64)
    decode.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="new tokens of each sequence (default 32)")
    prefill = subcommand("prefill", "prompt tokens a second of the engine beside llama.cpp", generation_verb)
    add_generation_options(prefill, prompt_tokens=512)
    prefill.set_defaults(batch=1, new_tokens=0)

    speculate = subcommand("speculate", "what guessing tokens with the MTP layer gains on a model, by batch and guesses", speculate_verb)
    speculate.add_argument("model", metavar="MODEL", help="run folder, model folder, or hub id")
    speculate.add_argument("--weights", choices=["fp32", "bf16", "int8", "int4"], help="kind of weights (default: as chat has them)")
    speculate.add_argument("--batch", type=positives, default=[1, 4, 16], metavar="N,...", help="sequences at once (default 1,4,16)")
    speculate.add_argument("--drafts", type=positives, default=[1, 2, 3], metavar="N,...", help="guesses a step (default 1,2,3)")
    speculate.add_argument("--answers", type=positive, default=60, metavar="N", help="problems to answer (default 60)")
    speculate.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="CPU threads (default: all)")
    speculate.add_argument("--repetitions", type=positive, default=5, metavar="N", help="in turns; medians count (default 5)")
    speculate.add_argument("--json", action="store_true", help="one JSON object on stdout")

    serve = subcommand("serve", "a server under load: many streams at once, each text compared with the same request alone", serve_verb)
    serve.add_argument("model", nargs="?", metavar="MODEL", help="what to serve: run folder, model folder, or hub id")
    serve.add_argument("--url", help="a server that runs already, instead of MODEL")
    serve.add_argument("--streams", type=positive, default=200, metavar="N", help="at once (default 200)")
    serve.add_argument("--seconds", type=above_zero, default=60.0, metavar="N", help="new requests for so long (default 60)")
    serve.add_argument("--weights", choices=["fp32", "bf16", "int8", "int4"], default="bf16", help="precision of MODEL (default bf16)")
    serve.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="CPU threads of MODEL (default: all)")
    serve.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_generation_options(parser: argparse.ArgumentParser, prompt_tokens: int) -> None:
    """What `decode` and `prefill` share."""
    parser.add_argument("--model", choices=["mini", "tiny"], default="mini",
                        help="shape: mini, 2.6 B parameters, needs 18 GB of memory and 6 of disk; tiny, 29 M (default mini)")
    parser.add_argument("--weights", type=names, default=["bf16", "int8", "int4"], metavar="KIND,...",
                        help="of fp32, bf16, int8, int4 (default bf16,int8,int4)")
    parser.add_argument("--prompt-tokens", type=positive, default=prompt_tokens, metavar="N",
                        help=f"of each sequence (default {prompt_tokens})")
    parser.add_argument("--repetitions", type=positive, default=9, metavar="N", help="in turns; medians count (default 9)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--llama-python", metavar="PATH", help="a Python that has llama-cpp-python (default: this one)")
    parser.add_argument("--no-peer", action="store_true", help="ours alone, without llama.cpp")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_shape_options(parser: argparse.ArgumentParser, sequences: int) -> None:
    """The fields of `shapes.Shape`."""
    options = (
        ("layers", 8, "layers, the first one dense"), ("hidden", 256, "hidden size, heads of 32"),
        ("experts", 64, "routed experts a layer"), ("width", 128, "width of one expert"),
        ("top-k", 8, "experts that a token goes to"), ("vocab", 16384, "size of the vocabulary"),
        ("seq-length", 512, "tokens of a sequence"), ("sequences", sequences, "sequences a step"),
    )
    for option, default, what in options:
        parser.add_argument(f"--{option}", type=positive, default=default, metavar="N", help=f"{what} (default {default})")


def add_run_options(parser: argparse.ArgumentParser, dtypes: list[str], steps: int, gpu: bool = False) -> None:
    """What those that time steps have: precision, device where `gpu`, threads, repetitions, JSON."""
    about = "; mixed: bf16 activations, fp32 weights" if "mixed" in dtypes else ""
    where = "on a GPU or where the CPU multiplies it fast" if gpu else "where the CPU multiplies it fast"
    parser.add_argument("--dtype", choices=dtypes,
                        help=f"to compute in (default: bf16 {where}, else fp32{about})")
    if gpu:
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default cpu)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--steps", type=positive, default=steps, metavar="N", help=f"repetitions; the median counts (default {steps})")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def train_verb(options: argparse.Namespace) -> None:
    from .table import train_table
    from .train import NAMES, bench_train

    only = NAMES if options.only is None else list(dict.fromkeys(options.only))
    result = bench_train(shape_of(options), dtype_of(options), options.threads, options.steps, only, options.device)
    print(json.dumps(result) if options.json else train_table(result))


def experts_verb(options: argparse.Namespace) -> None:
    from .experts import LayerShape, bench_experts
    from .table import experts_table

    shape = LayerShape(options.tokens, options.hidden, options.width, options.top_k)
    result = bench_experts(shape, sorted(set(options.experts)), dtype_of(options), options.threads, options.steps, options.peer,
                           options.device)
    print(json.dumps(result) if options.json else experts_table(result))


def growth_verb(options: argparse.Namespace) -> None:
    from .growth import AXES, bench_growth
    from .table import growth_table

    if options.axis not in (*AXES, "all"):
        raise UsageError(f"--axis: no axis '{options.axis}'; {nearest(options.axis, [*AXES, 'all'])}")
    if options.values and options.axis == "all":
        raise UsageError("--values: are of one axis; name it with --axis")
    axes = list(AXES) if options.axis == "all" else [options.axis]
    result = bench_growth(shape_of(options), axes, dtype_of(options), options.threads, options.steps, options.values or (), options.out)
    print(json.dumps(result) if options.json else growth_table(result))


def generation_verb(options: argparse.Namespace) -> None:
    from .decode import Task, bench_generation
    from .table import generation_table

    kinds = list(dict.fromkeys(options.weights))
    for kind in kinds:
        if kind not in ("fp32", "bf16", "int8", "int4"):
            raise UsageError(f"--weights: no kind '{kind}'; {nearest(kind, ['fp32', 'bf16', 'int8', 'int4'])}")
    task = Task(options.batch, options.prompt_tokens, options.new_tokens)
    result = bench_generation(options.model, kinds, task, options.threads, options.repetitions, not options.no_peer, options.llama_python)
    print(json.dumps(result) if options.json else generation_table(result, kinds))


def speculate_verb(options: argparse.Namespace) -> None:
    from ..info import model_folder
    from .speculate import bench_speculate
    from .table import speculate_table

    result = bench_speculate(str(model_folder(options.model)), options.weights, options.batch, options.drafts, options.answers,
                             options.threads, options.repetitions)
    print(json.dumps(result) if options.json else speculate_table(result))


def race_verb(options: argparse.Namespace) -> None:
    from ..progress import say
    from ..recipe import load_recipe
    from ..runner import run_recipe
    from .race import course_of, first_pretrain, race, refuse_to_overwrite
    from .racers import racers_of
    from .table import race_table

    recipe = load_recipe(options.recipe)
    if recipe.device != "cpu":
        say(f"device: a race is run on the CPU; the recipe's device: {recipe.device} is for `run`")
        recipe = dataclasses.replace(recipe, device="cpu")
    rate = first_pretrain(recipe).optimizer.learning_rate
    racers = racers_of(recipe.model, rate, options.dense)
    folder = options.runs / recipe.name
    out = options.out or folder / "race"
    refuse_to_overwrite(out)  # before text is fetched, too
    run_recipe(recipe, folder, until="data")  # on the CPU, where the race is run
    result = race(course_of(recipe, folder), racers, 60 * options.minutes, options.points, options.rates or [rate / 2, rate, 2 * rate], out)
    print(json.dumps(result) if options.json else race_table(result))


def serve_verb(options: argparse.Namespace) -> None:
    from .serve import bench_serve, serve_table

    if (options.model is None) == (options.url is None):
        raise UsageError("bench serve: give MODEL or --url, one of them")
    result = bench_serve(options.model, options.url, options.streams, options.seconds, options.weights, options.threads)
    print(json.dumps(result) if options.json else serve_table(result))


def shape_of(options: argparse.Namespace) -> Shape:
    """The model and step that the options describe."""
    from .shapes import Shape

    return Shape(options.layers, options.hidden, options.experts, options.width, options.top_k, options.vocab, options.seq_length,
                 options.sequences)


def dtype_of(options: argparse.Namespace) -> str:
    """--dtype, or the one that training uses on this CPU or GPU. Raises `UsageError` where there is no GPU."""
    import torch

    from ..kernels.choose import default_training_dtype

    device = getattr(options, "device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: this machine has no CUDA device that torch can use; leave the option out")
    return options.dtype or ("bf16" if default_training_dtype(device) == torch.bfloat16 else "fp32")
