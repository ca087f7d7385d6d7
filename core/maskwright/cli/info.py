"""`maskwright info`: all about one component, from the catalogue and the plugin's claim.json; nothing is imported."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from maskwright.cli import health
from maskwright.cli.completion import component_names
from maskwright.cli.listing import HEADINGS, SCHEMA, component_as_json
from maskwright.cli.session import Session, pass_session
from maskwright.cli.tables import Table, shown, width

if TYPE_CHECKING:
    from maskwright.registry import ComponentInfo, PluginInfo, Registry


@click.command(
    epilog="\b\nExamples:\n  maskwright info random\n  maskwright info random --kind pruner\n  maskwright info mae --bibtex"
)
@click.argument("name", shell_complete=component_names())
@click.option("--kind", type=click.Choice(list(HEADINGS)), help="Which kind, for a name that several have.")
@click.option("--bibtex", is_flag=True, help="Print the paper's BibTeX entry only.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@pass_session
def info(session: Session, name: str, kind: str | None, bibtex: bool, as_json: bool) -> None:
    """Say all about a component: what it decides, parameters, signals, partners, paper, measured claim, how to use it.

    NAME is a component's name; `distribution/name` where several have it. Nothing is imported.
    """
    registry = session.registry
    found = _named(registry, name, kind)
    if bibtex:
        entries = dict.fromkeys(bibtex_entry(one.plugin) for one in found)
        click.echo("\n\n".join(entries))
    elif as_json:
        documents = [_document(registry, one) for one in found]
        click.echo(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
    else:
        click.echo("\n\n".join(_text(registry, one) for one in found))


def _named(registry: Registry, name: str, kind: str | None) -> list[ComponentInfo]:
    """The component, or each of the components of several kinds that have this name."""
    kinds = {one.kind for one in registry.find() if name in (one.name, one.qualified)}
    if kind is None and len(kinds) > 1:
        return [registry.info(name, one) for one in HEADINGS if one in kinds]
    return [registry.info(name, kind)]


def _document(registry: Registry, one: ComponentInfo) -> dict[str, Any]:
    """The schema of `info --json`: a component as `list --json` has it, and

    `schema`; `title`, `paper`, `code`, `family`; `providers` (signal → objectives that provide it); `partners` (of a strategy
    the objectives, of an objective the strategies); `partners_with` (parameters of the strategy → more of them); `claim` (claim.json, or null); `command`; `python`; `bibtex`. Several kinds
    of one name give a list of these.
    """
    from maskwright.registry import recorded_claim

    plugin = one.plugin
    return {
        "schema": SCHEMA,
        **component_as_json(registry, one, health.problems(registry.plugins())),
        **{key: getattr(plugin, key) for key in ("title", "paper", "code", "family")},
        "providers": providers(registry, one),
        "partners": [registry.address(other) for other in partners(registry, one)],
        "partners_with": {
            parameters: [registry.address(other) for other in others]
            for parameters, others in partners_with(registry, one).items()
        },
        "claim": recorded_claim(plugin),
        "command": ready_command(registry, one),
        "python": example(registry, one),
        "bibtex": bibtex_entry(plugin),
    }


USUAL = ("mae", "next-token", "random")
"""What a job does when nothing is said; see maskwright.jobs.settings.DEFAULTS, which is slow to import."""

# -- what goes with what -----------------------------------------------------------------------------------------


def providers(registry: Registry, one: ComponentInfo) -> dict[str, list[str]]:
    """Of each signal that a strategy needs, the objectives that provide it or read it from the batch."""
    if one.kind != "mask-strategy":
        return {}
    objectives = registry.find(kind="objective")
    return {
        signal: [registry.address(other) for other in objectives if signal in other.provides | other.needs]
        for signal in sorted(one.needs)
    }


def partners(registry: Registry, one: ComponentInfo) -> list[ComponentInfo]:
    """The objectives that a strategy works with, or the strategies that an objective works with: a modality in common,
    every signal that the strategy needs, equal counts where the objective needs them, and rows disjoint where it mixes them."""
    from maskwright.registry import counts_fit

    return [other for strategy, objective, other in _pairs(registry, one) if counts_fit(strategy, objective)]


def partners_with(registry: Registry, one: ComponentInfo) -> dict[str, list[ComponentInfo]]:
    """More partners, by the strategy's parameters with which they are ones, such as "exact=True"."""
    from maskwright.registry import counts_fit

    found: dict[str, list[ComponentInfo]] = {}
    for strategy, objective, other in _pairs(registry, one):
        if not counts_fit(strategy, objective) and strategy.exact_with:
            found.setdefault(strategy.exact_parameters, []).append(other)
    return found


def _pairs(
    registry: Registry, one: ComponentInfo
) -> Iterator[tuple[ComponentInfo, ComponentInfo, ComponentInfo]]:
    """(strategy, objective, the one of them that is not `one`) with a modality in common and every signal that is needed."""
    other_kind = {"mask-strategy": "objective", "objective": "mask-strategy"}.get(one.kind)
    for other in registry.find(kind=other_kind) if other_kind else ():
        strategy, objective = (one, other) if one.kind == "mask-strategy" else (other, one)
        if (
            one.modalities & other.modalities
            and strategy.needs <= objective.provides | objective.needs
            and strategy.disjoint_rows % objective.disjoint_rows == 0
        ):
            yield strategy, objective, other


def _partner(registry: Registry, one: ComponentInfo) -> str:
    """The partner to show in an example: of the same plugin where it brings one, else what a job uses by default."""
    found = partners(registry, one)
    own = [other for other in found if other.plugin.key == one.plugin.key]
    usual = [other for other in found if other.name in USUAL]
    best = (usual if usual and usual[0] in own else own or usual or found)[:1]
    return registry.address(best[0]) if best else "…"


# -- how to use it -----------------------------------------------------------------------------------------------


def ready_command(registry: Registry, one: ComponentInfo) -> str:
    """A command line that uses the component."""
    address = registry.address(one)
    if one.kind == "mask-strategy":
        partner = _partner(registry, one)
        if partner == "…":
            return f"maskwright show {address}"
        return f"maskwright pretrain --strategy {address} --objective {partner}"
    if one.kind == "objective":
        partner = _partner(registry, one)
        return f"maskwright pretrain --objective {address}" + (
            f" --strategy {partner}" if partner != "…" else ""
        )
    if one.kind == "pruner":
        return f"maskwright prune --pruner {address} {_budget(one)[0]}"
    return f"maskwright sample --sampler {address}"


_BUDGETS = {
    "pattern": ("--pattern 2:4", 'pattern="2:4"'),
    "sparsity": ("--sparsity 0.5", "sparsity=0.5"),
    "params": ("--params 0.7", "params=0.7"),
    "flops": ("--flops 0.7", "flops=0.7"),
    "bits": ("--bits 2", "bits=2"),
    "layers": ("--layers 4", "layers=4"),
}


def _budget(one: ComponentInfo) -> tuple[str, str]:
    kind = next((kind for kind in _BUDGETS if kind in one.budgets), "sparsity")
    return _BUDGETS[kind]


GRIDS = {"image": (14, 14), "video": (8, 14, 14), "motion": (60, 22), "text": (128,)}
"""What a layout of each modality looks like in examples; a sequence for any other."""


def example(registry: Registry, one: ComponentInfo) -> str:
    """Five lines of Python, or fewer, that use the component."""
    address = registry.address(one)
    required = [f"{p.name}=..." for p in one.parameters if not p.default]
    made = f'maskwright.create("{one.kind}", {", ".join([json.dumps(address), *required])})'
    if one.kind == "mask-strategy":
        modality = next((word for word in GRIDS if word in one.modalities), "text")
        grid = GRIDS[modality]
        positions = 1
        for side in grid:
            positions *= side
        signals = ", ".join(
            f'"{signal}": '
            + (
                f"torch.randint(0, 100, (4, {positions}))"
                if signal == "tokens"
                else f"(torch.arange({positions}) // 16).expand(4, -1)"
                if signal == "segments"
                else f"torch.rand(4, {positions}, 32)"
                if signal.endswith("features")
                else f"torch.rand(4, {positions})"
            )
            for signal in sorted(one.needs)
        )
        # Some strategies measure in pixels.
        pixels = ", patch_size=16" if modality in ("image", "video") else ""
        return (
            "import maskwright, torch\n"
            f"strategy = {made}\n"
            f"layout = maskwright.Layout(batch=4, grid={grid}{pixels})\n"
            f"mask = strategy.draw(layout, signals={{{signals}}}, progress=0.5, generator=torch.Generator().manual_seed(0))\n"
            "print(mask.removed_ratio)  # mask.keep is True where it is visible"
        )
    if one.kind == "objective":
        data = "tokens=tokens" if "tokens" in one.needs else "pixels=images"
        return (
            "import maskwright\n"
            f'strategy = maskwright.create("mask-strategy", "{_partner(registry, one)}")\n'
            f"objective = {made}\n"
            "model = maskwright.MaskedTraining(backbone, strategy, objective)  # a transformers model, or your own\n"
            f'model({data})["loss"].backward()'
        )
    if one.kind == "pruner":
        return (
            "import maskwright\n"
            f"pruner = {made}\n"
            f"task = maskwright.PruneTask(maskwright.Budget({_budget(one)[1]}), batches=batches, loss=loss)\n"
            "result = pruner.prune(model, task)  # loss(model, batch) is what stays low\n"
            "print(result.report.sparsity)"
        )
    return (
        "import maskwright, torch\n"
        f"sampler = {made}\n"
        "request = maskwright.SampleRequest(tokens, mask_token, torch.Generator().manual_seed(0))\n"
        "samples = sampler.sample(denoiser, request)  # denoiser(tokens) is logits [B, L, V]\n"
        "print(samples.values, samples.evaluations)"
    )


def bibtex_entry(plugin: PluginInfo) -> str:
    """A BibTeX entry from what the catalogue knows: title, and the arXiv number, DOI or address."""
    if not plugin.paper:
        return f"% {plugin.slug}: the catalogue names no paper."
    url = plugin.paper_url
    site, _, number = url.removeprefix("https://").partition("/")
    fields = [("title", "{" + plugin.title + "}")]
    if site == "arxiv.org":
        number = number.removeprefix("abs/")
        fields += [("year", f"20{number[:2]}"), ("eprint", number), ("archivePrefix", "arXiv")]
    elif site == "doi.org":
        fields += [("doi", number)]
    fields += [("url", url)] if url else [("note", plugin.paper)]
    lines = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields)
    return f"@misc{{{plugin.slug},\n{lines}\n}}"


# -- the page ----------------------------------------------------------------------------------------------------


def _text(registry: Registry, one: ComponentInfo) -> str:
    from maskwright.registry import recorded_claim

    plugin = one.plugin
    problem = health.problems([plugin]).get(plugin.key, "")
    facts = Table(indent="  ")
    for label, said in _facts(registry, one, problem):
        if said:
            facts.add(click.style(label, dim=True), said)
    blocks = [
        f"{click.style(registry.address(one), fg='cyan', bold=True)}  {one.kind}"
        + (f"\n{_filled(one.summary + '.')}" if one.summary else ""),
        "\n".join(facts.lines(stretch=1, least=30, wrap=True)),
    ]
    if one.parameters:
        table = Table(indent="  ")
        for parameter in one.parameters:
            legal = f" ({parameter.range})" if parameter.range else ""
            table.add(
                click.style(parameter.name, fg="cyan"),
                parameter.type,
                f"= {parameter.default}" if parameter.default else "required",
                parameter.help + legal,
            )
        blocks.append(_titled("Parameters", table.lines(stretch=3, least=24, wrap=True)))
    if one.exempt:
        table = Table(indent="  ")
        for rule, reason in one.exempt.items():
            table.add(rule, reason)
        blocks.append(_titled("Exempt from the conformance kit", table.lines(stretch=1, least=30, wrap=True)))
    claim = recorded_claim(plugin)
    if claim is not None:
        blocks.append(_titled("Claim", _claim_lines(claim)))
    blocks.append(_titled("Use it", [f"  {ready_command(registry, one)}"]))
    blocks.append(textwrap.indent(example(registry, one), "  "))
    return "\n\n".join(blocks)


_COUNTS = {
    ("mask-strategy", "bounded"): "samples may keep different numbers of positions",
    ("objective", "exact"): "every sample must keep the same number of positions",
}


def _facts(registry: Registry, one: ComponentInfo, problem: str) -> Iterable[tuple[str, str]]:
    plugin = one.plugin
    yield "broken", problem
    yield ("paper", f"{plugin.title} ({plugin.paper})") if plugin.paper else ("title", plugin.title)
    yield "code", plugin.code
    where = shown(plugin.distribution) if plugin.source == "file" else plugin.origin
    yield "plugin", f"{plugin.slug}, {plugin.source}: {where}"
    yield "modalities", ", ".join(sorted(one.modalities))
    if one.kind == "mask-strategy":
        for signal, names in providers(registry, one).items():
            yield (
                "needs",
                f"{signal}: provided by {', '.join(names) if names else 'no objective registered here'}",
            )
    else:
        yield "needs", ", ".join(sorted(one.needs))
    yield "provides", ", ".join(sorted(one.provides))
    yield "counts", _COUNTS.get((one.kind, one.counts), "")
    yield "backbone", one.backbone
    yield "budgets", ", ".join(sorted(one.budgets))
    yield "domain", one.domain
    yield "works with", ", ".join(registry.address(other) for other in partners(registry, one))
    for parameters, others in partners_with(registry, one).items():
        yield f"with {parameters}", ", ".join(registry.address(other) for other in others)
    yield "extras", ", ".join(plugin.extras)


def _claim_lines(claim: dict[str, Any]) -> list[str]:
    table = Table(indent="  ")
    for key in ("verdict", "statement", "baseline", "criterion", "paper", "note"):
        if claim.get(key):
            table.add(click.style("claim" if key == "statement" else key, dim=True), str(claim[key]))
    for name, values in _numbers(claim).items():
        table.add(click.style(name, dim=True), values)
    return table.lines(stretch=1, least=30, wrap=True) if table.rows else []


def _numbers(claim: dict[str, Any]) -> dict[str, str]:
    """Mean and range of each measured number, by name."""
    found: dict[str, list[float]] = {}
    for one in claim.get("measurements", ()):
        for name, value in one.items() if isinstance(one, dict) else ():
            if isinstance(value, int | float):
                found.setdefault(str(name), []).append(float(value))
    return {
        name: f"{sum(values) / len(values):.4g}"
        + (f" ({min(values):.4g} to {max(values):.4g}, {len(values)} seeds)" if len(values) > 1 else "")
        for name, values in found.items()
    }


def _titled(title: str, lines: Iterable[str]) -> str:
    return "\n".join([click.style(title, bold=True), *lines])


def _filled(text: str) -> str:
    return textwrap.fill(text, width() or 100_000, initial_indent="  ", subsequent_indent="  ")
