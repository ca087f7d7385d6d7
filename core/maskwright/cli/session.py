"""What every command shares: the global options, the registry they lead to, and how errors end."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import click

from maskwright.cli.tables import colour
from maskwright.errors import MaskwrightError, did_you_mean

if TYPE_CHECKING:
    from maskwright.registry import Registry


class Session:
    """What the global options say. `registry` is made when it is first asked for."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.third_party = True
        self.debug = False

    @cached_property
    def registry(self) -> Registry:
        """The built-in, installed and named plugins, as the options and the environment have it."""
        from maskwright.registry import Registry

        return Registry.from_environment(files=self.files, third_party=self.third_party)


pass_session = click.make_pass_decorator(Session, ensure=True)


def global_options(*, hidden: bool = False) -> list[click.Parameter]:
    """`--registry`, `--no-third-party` and `--debug`, which may stand before or after the command's name."""

    def files(context: click.Context, _: click.Parameter, given: Sequence[str]) -> None:
        context.ensure_object(Session).files.extend(given)

    def third_party(context: click.Context, _: click.Parameter, off: bool) -> None:
        session = context.ensure_object(Session)
        session.third_party = session.third_party and not off

    def debug(context: click.Context, _: click.Parameter, on: bool) -> None:
        session = context.ensure_object(Session)
        session.debug = session.debug or on

    shared: dict[str, Any] = {"expose_value": False, "hidden": hidden}
    return [
        click.Option(
            ["--registry"],
            multiple=True,
            metavar="FILE",
            type=click.Path(),
            callback=files,
            help="Read this registry.toml as well (also MASKWRIGHT_REGISTRY). May be repeated.",
            **shared,
        ),
        click.Option(
            ["--no-third-party"],
            is_flag=True,
            callback=third_party,
            help="Leave installed third-party plugins out.",
            **shared,
        ),
        click.Option(
            ["--debug"], is_flag=True, callback=debug, help="Print the traceback of an error.", **shared
        ),
    ]


class LazyGroup(click.Group):
    """A group whose commands are named in a table and imported when they are called."""

    def __init__(
        self, *args: Any, commands_table: Mapping[str, tuple[str, str]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.table = dict(commands_table or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the table's order."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, and let it take the global options too."""
        if cmd_name not in self.table:
            return None
        if cmd_name not in self.commands:
            module, _, attribute = self.table[cmd_name][0].partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            command.name = cmd_name
            command.params.extend(global_options(hidden=True))
            self.commands[cmd_name] = command
        return self.commands[cmd_name]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest names when there is no such command."""
        name = args[0]
        if name not in self.table and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"There is no command {name!r}.{did_you_mean(name, self.table)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands' short help from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in self.table.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Commands and options, importing no command."""
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=help)
            for name, (_, help) in self.table.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; whatever goes wrong ends as one line on stderr and an exit code."""
        session = ctx.ensure_object(Session)
        ctx.color = colour()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            failed("Interrupted.", 130, session.debug)
        except MaskwrightError as error:
            failed(str(error), error.exit_code, session.debug)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read our output has seen enough: click ends quietly
            said = f"{type(error).__name__}: {error}".removesuffix(": ").removesuffix(".")
            failed(f"{said}. Run it again with --debug for the traceback.", 1, session.debug)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and exit. Mistakes in its use are one line too."""
        run: Any = super().main
        if not kwargs.pop("standalone_mode", True):
            return run(*args, **kwargs, standalone_mode=False)
        try:
            code = run(*args, **kwargs, standalone_mode=False)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "maskwright"
            failed(f"{_sentence(error)} See `{path} --help`.", error.exit_code, False)
        except click.ClickException as error:
            failed(_sentence(error), error.exit_code, False)
        except click.Abort:
            failed("Aborted.", 1, False)
        sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: click.ClickException) -> str:
    said = error.format_message().strip()
    return said if said.endswith((".", "?", "!")) else f"{said}."


def failed(sentence: str, code: int, debug: bool) -> NoReturn:
    """End with one line on stderr. Of several processes only the first says what all of them did wrong."""
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    rank = process_rank()
    if rank == 0 or code != 2:
        where = f"[process {rank}] " if rank else ""
        click.echo(f"Error: {where}{' '.join(sentence.split())}", err=True)
    sys.exit(code)


def process_rank() -> int:
    """Which of the processes that torchrun or accelerate started this is; 0 where it is the only one."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdigit() else 0
