"""The verbs. Each is a few lines that call a function anyone can import; errors of the user are one sentence, without a traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .arguments import names, natural, positive
from .bench.options import add_subcommands
from .conversions import add_convert_options, convert_verb
from .errors import UsageError, UserError
from .serve.options import EXAMPLE as SERVE_EXAMPLE
from .serve.options import add_options as add_serve_options
from .serve.options import serve_verb

DESCRIPTION = """The Ling 2.0 recipe made whole: from raw text to a small sparse mixture-of-experts
reasoning model, and tools for the public checkpoints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; exit codes: 0 done, 1 failed, 2 wrong usage."""
    parser = build_parser()
    options = parse(parser, arguments)
    if not hasattr(options, "function"):
        parser.print_help()
        return 2
    try:
        return int(options.function(options) or 0)
    except UsageError as error:
        print(f"sparseling: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"sparseling: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = options.function is run_verb
        print("sparseling: stopped" + ("; the same command goes on where it left off" if goes_on else ""), file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"sparseling: {error.filename}: {error.strerror}; see to the path or its permissions", file=sys.stderr)
        return 1


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a verb. argparse gives up on an optional word that stands behind an option (`chat MODEL --think "..."`): put it in."""
    options, rest = parser.parse_known_args(arguments)
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(options, "prompt", "") is None:
        options.prompt = rest[0]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their options and an example each."""
    parser = argparse.ArgumentParser(prog="sparseling", description=DESCRIPTION, epilog="Example: sparseling run recipes/laptop.yaml",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"sparseling {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, help: str, example: str, function: object) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"Example: {example}")
        sub.set_defaults(function=function)
        return sub

    run = verb("run", "run a recipe, or go on where it was interrupted", "sparseling run recipes/laptop.yaml", run_verb)
    add_run_options(run)
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    data = verb("data", "run only the data stage of a recipe: text to token shards", "sparseling data recipes/laptop.yaml", data_verb)
    add_run_options(data)

    recipe = verb("recipe", "check a recipe, print it with every default, or explain the keys",
                  "sparseling recipe recipes/ling-1t.yaml", recipe_verb)
    recipe.add_argument("recipe", nargs="?", metavar="RECIPE", help="recipe file to check and print")
    recipe.add_argument("--keys", action="store_true", help="explain every key, its unit and its default")
    recipe.add_argument("--tasks", action="store_true", help="list the task families")

    info = verb("info", "parameters, FLOPs per token and KV cache of a model, from its config alone",
                "sparseling info ling-mini-2.0 --json", info_verb)
    info.add_argument("model", metavar="MODEL", help="preset, model folder, config.json, recipe file, or hub id")
    info.add_argument("--seq-length", type=positive, metavar="TOKENS",
                      help="context that FLOPs are counted at (default: the model's, at most 4096)")
    info.add_argument("--mtp", type=int, metavar="N", help="count this many multi-token prediction layers instead of the config's")
    info.add_argument("--json", action="store_true", help="one JSON object on stdout")

    merge = verb("merge", "merge checkpoints instead of decaying the learning rate (WSM)",
                 "sparseling merge runs/laptop/midtrain/snapshots/* --out merged --curve 1-sqrt", merge_verb)
    merge.add_argument("folders", nargs="+", metavar="FOLDER", help="model folders, oldest first")
    merge.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    curves = merge.add_mutually_exclusive_group()
    curves.add_argument("--curve", default="mean", help="decay curve to stand for: mean, linear, cosine, 1-sqrt, ema (default mean)")
    curves.add_argument("--decay", metavar="W,W,...", help="own decay factors, falling within 1 to 0, one fewer than folders")
    merge.add_argument("--top", type=int, metavar="N", help="merge only the N best by the scores in --scores")
    merge.add_argument("--scores", metavar="FILE", help="JSON file {folder: bits per byte} for --top")
    merge.add_argument("--dtype", choices=["float32", "bfloat16"], help="dtype to write (default: as the last folder)")

    convert = verb("convert", "rewrite a model: weights packed for the native engine, GGUF, another dtype, FP8 to plain, size of shards",
                   "sparseling convert runs/laptop --to int4 --out laptop-int4", convert_verb)
    add_convert_options(convert)

    chat = verb("chat", "talk to a model in the terminal", "sparseling chat runs/laptop --think", chat_verb)
    chat.add_argument("model", metavar="MODEL", help="run folder, model folder, or hub id")
    chat.add_argument("prompt", nargs="?", help="ask this one question, print the answer and end")
    chat.add_argument("--think", action="store_true", help="detailed thinking on")
    chat.add_argument("--system", default="", help="system message")
    chat.add_argument("--temperature", type=float, default=0.7, help="0 = always the likeliest token (default 0.7)")
    chat.add_argument("--top-p", type=float, default=0.8, help="nucleus of this probability (default 0.8)")
    chat.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens, 0 = all (default 0)")
    chat.add_argument("--repetition-penalty", type=float, default=1.05, help="above 1 discourages repetition (default 1.05)")
    chat.add_argument("--seed", type=int, default=0, help="same seed, same answer (default 0)")
    chat.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens (default 512)")
    chat.add_argument("--weights", choices=["fp32", "bf16", "int8", "int4"],
                      help="pack the weights so for the native engine (default: fp32 for small models, else as stored)")
    chat.add_argument("--context", type=positive, metavar="TOKENS",
                      help="context length; beyond the model's own by YaRN (default: its own)")
    chat.add_argument("--drafts", type=natural, default=3, metavar="N",
                      help="tokens that an MTP layer may guess at once, where that is faster; 0 = none (default 3)")
    chat.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="CPU threads (default: all)")

    add_serve_options(verb("serve", "an OpenAI-compatible server with a page that shows the experts at work", SERVE_EXAMPLE, serve_verb))

    evaluate = verb("eval", "exact-match accuracy on held-out problems, both thinking modes",
                    "sparseling eval runs/laptop --problems 200 --json", eval_verb)
    evaluate.add_argument("model", metavar="MODEL", help="run folder, model folder, or hub id")
    evaluate.add_argument("--tasks", type=names, metavar="TASK,...", help="task families (default: those of the run, else the laptop's)")
    evaluate.add_argument("--modes", type=names, metavar="MODE,...", default=["off", "on"], help="thinking modes (default off,on)")
    evaluate.add_argument("--problems", type=positive, default=200, help="problems of each family (default 200)")
    evaluate.add_argument("--seed", type=int, default=0, help="which held-out problems (default 0)")
    evaluate.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    evaluate.add_argument("--json", action="store_true", help="one JSON object on stdout")

    report = verb("report", "write report.html of a run again", "sparseling report runs/laptop", report_verb)
    report.add_argument("run", metavar="RUN", help="run folder")

    bench = verb("bench", "measure how fast this machine trains and answers, beside others", "sparseling bench train --json", None)
    add_subcommands(bench)
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that work in a run folder."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML), or a run folder to go on with")
    parser.add_argument("--name", help="name of the run instead of the recipe's")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where run folders lie (default: runs)")
    parser.add_argument("--json", action="store_true", help="summary as one JSON object on stdout")


def run_verb(options: argparse.Namespace) -> None:
    import dataclasses

    from .files import read_json
    from .recipe import check_name, load_recipe
    from .runner import run_recipe
    from .stages.summary import answers_as_text, headline_as_text

    given = Path(options.recipe)
    if given.is_dir() and not (given / "recipe.yaml").is_file():
        raise UsageError(f"{given}: is no run folder (no recipe.yaml in it); give a recipe or a folder such as runs/laptop")
    if options.name is not None:
        check_name(options.name, "--name")
    recipe = load_recipe(given / "recipe.yaml" if given.is_dir() else given)
    folder = given if given.is_dir() else Path(options.runs) / (options.name or recipe.name)
    if options.name and not given.is_dir():
        recipe = dataclasses.replace(recipe, name=options.name)
    until = getattr(options, "until", None)
    if until is not None and until not in ["data", *(stage.name for stage in recipe.stages)]:
        from .errors import nearest

        raise UsageError(f"--until: no stage '{until}'; {nearest(until, ['data', *(stage.name for stage in recipe.stages)])}")
    report = run_recipe(recipe, folder, until)
    if report is None:
        return
    summary = read_json(folder / "summary.json")
    if options.json:
        print(json.dumps(summary))
        return
    print(answers_as_text(summary), headline_as_text(summary), sep="\n\n")
    print(f"\nreport: {report}\ntalk to it: sparseling chat {folder} --think")


def data_verb(options: argparse.Namespace) -> None:
    options.until = "data"
    run_verb(options)


def recipe_verb(options: argparse.Namespace) -> None:
    from .recipe import document_keys, load_recipe, resolved
    from .study.tasks.families import FAMILIES

    if options.keys:
        print(document_keys())
    elif options.tasks:
        print("\n".join(f"{family.name}: {family.about}" for family in FAMILIES.values()))
    elif options.recipe:
        print(resolved(load_recipe(options.recipe)), end="")
    else:
        raise UsageError("recipe: give a file to check, or --keys, or --tasks")


def info_verb(options: argparse.Namespace) -> None:
    from .info import config_of, figures, table

    config = config_of(options.model)
    if options.mtp is not None:
        config = config.replace(num_nextn_predict_layers=options.mtp)
    seq_length = options.seq_length or min(4096, config.max_position_embeddings)
    print(json.dumps(figures(config, seq_length)) if options.json else table(options.model, config, seq_length))


def merge_verb(options: argparse.Namespace) -> None:
    import torch

    from .checkpoint.decay import choose_top, merge_weights
    from .checkpoint.merge import merge_folders
    from .files import read_json

    folders = list(options.folders)
    if options.top is not None:
        if not options.scores:
            raise UsageError("--top: needs --scores FILE with {folder: bits per byte}")
        scores = read_json(options.scores)
        missing = [folder for folder in folders if folder not in scores]
        if missing:
            raise UserError(f"{options.scores}: has no score for {missing[0]}; add it or leave that folder out")
        folders = choose_top({folder: float(scores[folder]) for folder in folders}, options.top)
    try:
        curve = [float(w) for w in options.decay.split(",")] if options.decay else options.curve
    except ValueError:
        raise UsageError(f"--decay: '{options.decay}' is not a list of numbers; write e.g. 0.8,0.5,0.2") from None
    weights = merge_weights(curve, len(folders))
    merge_folders(folders, weights, options.out, dtype=getattr(torch, options.dtype) if options.dtype else None)
    for folder, weight in zip(folders, weights, strict=True):
        print(f"{weight:.4f}  {folder}")
    print(f"wrote {options.out}")


def chat_verb(options: argparse.Namespace) -> int:
    import torch

    from .info import model_folder
    from .run.chat import chat
    from .run.sampler import Sampling

    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k,
                        repetition_penalty=options.repetition_penalty, seed=options.seed)
    torch.set_num_threads(options.threads)
    return chat(model_folder(options.model), thinking=options.think, sampling=sampling, system=options.system, prompt=options.prompt,
                max_new_tokens=options.max_new_tokens, weights=options.weights, context=options.context, drafts=options.drafts)


def eval_verb(options: argparse.Namespace) -> None:
    import torch

    from .info import model_folder, tasks_of_run
    from .recipe import Eval
    from .stages.evaluate import evaluate_model
    from .study.evaluate import accuracy_table
    from .study.tasks.families import LAPTOP

    torch.set_num_threads(options.threads)
    tasks = options.tasks or tasks_of_run(options.model) or LAPTOP
    stage = Eval(name="eval", kind="eval", tasks=tuple(tasks), problems=options.problems, modes=tuple(options.modes))
    result = evaluate_model(model_folder(options.model), stage, options.seed)
    print(json.dumps({"accuracy": result.accuracy, "samples": result.samples}) if options.json else accuracy_table(result.accuracy))


def report_verb(options: argparse.Namespace) -> None:
    from .report.build import write_report

    folder = Path(options.run)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder; give one such as runs/laptop")
    if not (folder / "recipe.yaml").is_file():
        raise UsageError(f"{folder}: is no run folder (no recipe.yaml in it); give one such as runs/laptop")
    print(write_report(folder))


if __name__ == "__main__":
    sys.exit(main())
