"""Shell completion: of commands and options by click, of component names from the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

from maskwright.cli.session import Session

if TYPE_CHECKING:
    pass

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def component_names(*kinds: str) -> Completer:
    """Completes the names of components of these kinds (none: of all), as they must be typed."""
    return _completer(lambda session: _components(session, kinds))


def plugin_names() -> Completer:
    """Completes the slugs of plugins."""
    return _completer(lambda session: ((one.slug, one.title) for one in session.registry.plugins()))


def component_and_plugin_names() -> Completer:
    """Completes both."""

    def both(session: Session) -> Iterator[tuple[str, str]]:
        yield from _components(session, ())
        yield from ((one.slug, one.title) for one in session.registry.plugins())

    return _completer(both)


def words(attribute: str) -> Completer:
    """Completes the words that the catalogue's components have in `modalities`, `needs` or `provides`."""

    def known(session: Session) -> Iterator[tuple[str, str]]:
        every = session.registry.find()
        yield from ((word, "") for word in sorted({w for info in every for w in getattr(info, attribute)}))

    return _completer(known)


def _components(session: Session, kinds: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    registry = session.registry
    for info in registry.find():
        if not kinds or info.kind in kinds:
            yield registry.address(info), info.summary


def _completer(known: Callable[[Session], Iterator[tuple[str, str]]]) -> Completer:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            found = dict(known(ctx.ensure_object(Session)))
        except (
            Exception
        ):  # a mistake shows when the command is run; in the middle of a word it would only disturb
            return []
        return [
            CompletionItem(name, help=said) for name, said in found.items() if name.startswith(incomplete)
        ]

    return complete


@click.command(
    epilog="\b\nExamples:\n"
    '  eval "$(maskwright completion bash)"         in ~/.bashrc\n'
    '  eval "$(maskwright completion zsh)"          in ~/.zshrc\n'
    "  maskwright completion fish > ~/.config/fish/completions/maskwright.fish"
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options and component names.

    Completion reads the catalogue only: it never runs a plugin's code.
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "maskwright", "_MASKWRIGHT_COMPLETE").source())
