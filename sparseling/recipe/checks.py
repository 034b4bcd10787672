"""Rules between the keys of a recipe: what no single key can tell, found before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..checkpoint.decay import merge_weights
from ..data.mixture import build_mixture
from ..data.sources import DOMAINS, SOURCES, select
from ..errors import UsageError, UserError, nearest
from .keys import TEXT_DOMAINS, Data, Eval, Merge, Pretrain, Recipe, Sft, Stage

Trained = Pretrain | Sft


def check_recipe(recipe: Recipe) -> None:
    """Raise `UsageError` for the first rule that a recipe breaks, naming the key and the mend."""
    check_data(recipe.data)
    wanted = recipe.data.tokenizer
    if wanted.folder is None and recipe.model.vocab_size < wanted.vocab_size:
        raise UsageError(f"model.vocab_size: {recipe.model.vocab_size} has no room for the {wanted.vocab_size} rows of data.tokenizer; "
                         "make them equal")
    if not recipe.stages or not isinstance(recipe.stages[0], (Pretrain, Sft)):
        raise UsageError("stages: the first stage must train (kind: pretrain)")
    context = recipe.model.max_position_embeddings
    for position, stage in enumerate(recipe.stages):
        before = recipe.stages[:position]
        where = f"stages.{stage.name}"
        if stage.name in ("data", *(s.name for s in before)):
            raise UsageError(f"{where}.name: '{stage.name}' is taken; choose another")
        if not stage.name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"{where}.name: '{stage.name}' cannot be a folder name; use letters, digits, '-' and '_'")
        if isinstance(stage, Pretrain):
            context = stage.max_position_embeddings or context
            check_pretrain(stage, where, before, recipe.data)
        elif isinstance(stage, Sft) and not (stage.samples and stage.tasks) and not stage.files:
            raise UsageError(f"{where}.samples: nothing to train on; give tasks and samples, or files")
        elif isinstance(stage, Merge):
            check_merge(stage, where, {s.name: s for s in before if isinstance(s, (Pretrain, Sft))})
        elif isinstance(stage, Eval):
            check_eval(stage, where, before)
        if isinstance(stage, (Pretrain, Sft)) and stage.seq_length > context:
            raise UsageError(f"{where}.seq_length: {stage.seq_length} exceeds the context of {context}; raise "
                             "max_position_embeddings or lower this")
        if isinstance(stage, (Sft, Eval)):
            check_tasks(stage.tasks, where)


def check_data(data: Data) -> None:
    """Domains, sources and task families exist."""
    check_tasks(data.worked.tasks, "data.worked")
    documents = data.documents
    domains = [(f"files: {file.path}", file.domain) for file in documents.files]
    domains += [(f"huggingface: {dataset.name}", dataset.domain) for dataset in documents.huggingface]
    for which, domain in domains:
        if domain not in TEXT_DOMAINS:
            raise UsageError(f"data.documents.{which}: domain: there is no '{domain}'; {nearest(domain, TEXT_DOMAINS)}")
    known = {*TEXT_DOMAINS, *(source.name for source in SOURCES), *(file.name for file in documents.files if file.name)}
    for name in documents.max_bytes:
        if name not in known and not documents.files:  # a file without a name is named by its path
            raise UsageError(f"data.documents.max_bytes.{name}: there is no such domain or source; {nearest(name, known)}")


def check_pretrain(stage: Pretrain, where: str, before: Sequence[Stage], data: Data) -> None:
    """Shares sum to 1, domains exist and will have text, and there is something to continue."""
    total = sum(side.share for side in stage.mixture.values())
    if abs(total - 1) > 1e-6:
        raise UsageError(f"{where}.mixture: the shares sum to {total:g}, not 1; change one of {', '.join(stage.mixture)}")
    for side_name, side in stage.mixture.items():
        for domain in side.domains:
            if domain not in DOMAINS:
                raise UsageError(f"{where}.mixture.{side_name}.domains.{domain}: unknown domain; {nearest(domain, DOMAINS)}")
        for domain, weight in side.domains.items():
            if side.share and weight and domain not in domains_with_text(data):
                mend = "give data.worked tasks and bytes" if domain == "worked" else "add a source of that domain or take it out"
                raise UsageError(f"{where}.mixture.{side_name}.domains.{domain}: has no text; {mend}")
    try:
        build_mixture({name: dataclasses.asdict(side) for name, side in stage.mixture.items()}, dict.fromkeys(DOMAINS, 1), seed=0)
    except UsageError as error:
        raise UsageError(f"{where}.{error}") from None
    if stage.start != "fresh" and not any(isinstance(s, (Pretrain, Sft)) for s in before):
        raise UsageError(f"{where}.start: '{stage.start}' needs a stage before it; use fresh")
    if stage.start == "continue":
        changed = next((s for s in reversed(before) if not isinstance(s, Eval)), None)
        if isinstance(changed, Merge):
            raise UsageError(f"{where}.start: 'continue' would go on from before {changed.name}, whose weights have no optimiser state; "
                             "use weights, or move the merge")


def domains_with_text(data: Data) -> set[str]:
    """The domains that some source of the recipe gives text for."""
    documents = data.documents
    found = {source.domain for source in (select(documents.preset) if documents.preset != "none" else ())}
    found |= {file.domain for file in documents.files} | {dataset.domain for dataset in documents.huggingface}
    return found | ({"worked"} if data.worked.bytes and data.worked.tasks else set())


def check_merge(stage: Merge, where: str, trained: dict[str, Trained]) -> None:
    """The stage to merge is there, keeps snapshots, and the curve fits their number."""
    if not trained or (stage.of is not None and stage.of not in trained):
        raise UsageError(f"{where}.of: no training stage '{stage.of or ''}' before this one; {nearest(stage.of or '', trained)}")
    source = trained[stage.of or list(trained)[-1]]
    if not source.snapshots:
        raise UsageError(f"stages.{source.name}.snapshots: 0 leaves nothing for {stage.name} to merge; set it, e.g. to 8")
    if stage.last is not None and stage.top is not None:
        raise UsageError(f"{where}.top: cannot be used together with last; leave one of them out")
    for name, number in (("last", stage.last), ("top", stage.top)):
        if number is not None and number > source.snapshots:
            raise UsageError(f"{where}.{name}: {number} snapshots are more than the {source.snapshots} of {source.name}; lower it")
    try:
        merge_weights(stage.decay or stage.curve, stage.last or stage.top or source.snapshots)
    except UserError as error:
        raise UsageError(f"{where}.{'decay' if stage.decay else 'curve'}: {str(error).removeprefix('curve: ')}") from None


def check_eval(stage: Eval, where: str, before: Sequence[Stage]) -> None:
    """There are tasks to ask, and the stages to evaluate are there and leave a model."""
    if not stage.tasks:
        raise UsageError(f"{where}.tasks: nothing to ask; `sparseling recipe --tasks` lists the families")
    names = [s.name for s in before if not isinstance(s, Eval)]
    for name in stage.stages:
        if name not in names:
            raise UsageError(f"{where}.stages: no stage '{name}' before this one; {nearest(name, names)}")


def check_tasks(tasks: tuple[str, ...], where: str) -> None:
    """Every task family exists."""
    from ..study.tasks.families import FAMILIES

    for task in tasks:
        if task not in FAMILIES:
            raise UsageError(f"{where}.tasks: no task '{task}'; {nearest(task, FAMILIES)}")
