"""`maskwright describe`: a plugin's registry.toml, from what it registers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import click

from maskwright.cli.completion import plugin_names
from maskwright.cli.modules import plugin_of_module
from maskwright.cli.session import Session, pass_session
from maskwright.errors import UnknownComponent, did_you_mean

if TYPE_CHECKING:
    from maskwright.registry import ComponentInfo, PluginInfo


@click.command(
    epilog="\b\nExamples:\n  maskwright describe my_plugin\n  maskwright describe ./my_mask.py\n  maskwright describe hpm"
)
@click.argument("module", shell_complete=plugin_names())
@pass_session
def describe(session: Session, module: str) -> None:
    """Print the registry.toml of a plugin, written from the components that it registers.

    MODULE is a module, a file (./my_mask.py), a package folder (./my_plugin) or a plugin that a catalogue names, whose title,
    paper, code, family and extras are kept. This imports it.
    """
    from maskwright.registry import describe_component

    registry = session.registry
    known = {name: one for one in registry.plugins() for name in (one.module, one.slug)}
    if module in known:
        plugin = known[module]
        if plugin.error:  # its catalogue may be what is to be replaced
            plugin = attrs.evolve(plugin, error="")
        classes = registry.load(plugin)
    else:
        found = plugin_of_module(module)
        if found is None:
            raise UnknownComponent(
                f"There is no module {module!r}.{did_you_mean(module, known)} Give a module that Python can import, or a path "
                f"such as ./{module.replace('.', '/')}."
            )
        scratch, plugin = found
        classes = scratch.load(plugin)
        plugin = attrs.evolve(plugin, title=_title(scratch.module(plugin)))
    click.echo(plugin_table(plugin, [describe_component(one, plugin) for one in classes]))


def _title(module: Any) -> str:
    return (module.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def plugin_table(plugin: PluginInfo, components: Iterable[ComponentInfo]) -> str:
    """The TOML of one plugin's tables, as a registry.toml has them; what is empty is left out."""
    lines = [f"[plugins.{_key(plugin.slug)}]", f"module = {_text(plugin.module)}"]
    for key in ("title", "paper", "code", "family"):
        if getattr(plugin, key):
            lines.append(f"{key} = {_text(getattr(plugin, key))}")
    if plugin.extras:
        lines.append(f"extras = {_texts(plugin.extras)}")
    for info in components:
        lines += ["", f"[[plugins.{_key(plugin.slug)}.components]]"]
        lines += [f"kind = {_text(info.kind)}", f"name = {_text(info.name)}"]
        lines += [f"modalities = {_texts(sorted(info.modalities))}"] if info.modalities else []
        lines += [f"summary = {_text(info.summary)}"] if info.summary else []
        for key in ("needs", "provides"):
            if words := getattr(info, key):
                lines.append(f"{key} = {_texts(sorted(words))}")
        for key in ("counts", "backbone", "domain"):
            if getattr(info, key):
                lines.append(f"{key} = {_text(getattr(info, key))}")
        lines += [f"exact_with = {_inline(info.exact_with)}"] if info.exact_with else []
        lines += [f"budgets = {_texts(sorted(info.budgets))}"] if info.budgets else []
        lines += [f"disjoint_rows = {info.disjoint_rows}"] if info.disjoint_rows != 1 else []
        lines += [f"exempt = {_inline(info.exempt)}"] if info.exempt else []
        if info.parameters:
            lines.append("parameters = [")
            lines += [
                f"  {_inline({key: value for key, value in attrs.asdict(one).items() if value})},"
                for one in info.parameters
            ]
            lines.append("]")
    return "\n".join(lines)


def _text(value: str) -> str:
    """A TOML basic string: JSON's, which leaves only the delete character as it is."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _texts(values: Iterable[str]) -> str:
    return f"[{', '.join(map(_text, values))}]"


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else _text(name)


def _inline(table: Mapping[str, str]) -> str:
    return "{ " + ", ".join(f"{_key(key)} = {_text(value)}" for key, value in table.items()) + " }"
