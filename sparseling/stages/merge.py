"""The merge stage: snapshots of a training stage become one model; compared with the last snapshot on validation text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.decay import choose_top, merge_weights
from ..checkpoint.merge import merge_folders
from ..errors import UserError
from ..progress import say
from ..recipe import Merge
from .context import Context
from .pretrain import trained_before
from .training import start_model, validator


def run(context: Context, stage: Merge) -> dict[str, Any]:
    """Merge and leave `model/`. `gain` is how many bits per byte the merge saves against the last checkpoint, mean over domains."""
    source = stage.of or trained_before(context)
    snapshots = sorted(path for path in (context.run_folder / source / "snapshots").glob("step-*"))
    chosen = choose(context, stage, snapshots)
    weights = merge_weights(stage.decay or stage.curve, len(chosen))
    merge_folders(chosen, weights, context.folder / "model", overwrite=True)
    validate = validator(context)
    last, merged = validate(start_model(snapshots[-1])), validate(start_model(context.folder / "model"))
    gain = sum(last[d] - merged[d] for d in last) / max(1, len(last))
    say(f"{stage.name}: merged {len(chosen)} snapshots of {source}; gain over the last one {gain:+.4f} bits per byte")
    return {
        "of": source, "snapshots": [path.name for path in chosen], "weights": weights, "last": last, "merged": merged,
        "gain": round(gain, 6),
        "validation_bits_per_byte": merged,
    }


def choose(context: Context, stage: Merge, snapshots: list[Path]) -> list[Path]:
    """The snapshots to merge, oldest first: all, the newest `last`, or the `top` by mean validation bits per byte."""
    if not snapshots:
        raise UserError(f"{context.folder.parent}: no snapshots to merge; set `snapshots` in the stage before and train it again")
    if stage.top is not None:
        validate = validator(context)
        means = {}
        for path in snapshots:
            scores = validate(start_model(path))
            means[path] = sum(scores.values()) / max(1, len(scores))
        return choose_top(means, stage.top)
    return snapshots[-stage.last:] if stage.last else snapshots
