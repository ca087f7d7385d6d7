"""Distributions as pip would leave them, without pip: plugins' sources, catalogues, and a folder that has them."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path

import attrs


def plugin_source(
    *names: str, kind: str = "mask-strategy", top: str = "", body: str = "", hook: str = ""
) -> str:
    """A plugin module that works: one component class for each name. `top` is run on import, `hook` in the hook."""
    method = {"mask-strategy": "draw", "objective": "bind", "pruner": "prune", "sampler": "sample"}[kind]
    classes = "\n".join(
        f'''
@attrs.frozen
class Component{number}:
    """What {name} decides.

    More about it.
    """

    kind = "{kind}"
    name = "{name}"
    modalities = frozenset({{"image"}})
    needs = frozenset()
    provides = frozenset()
    ratio: float = setting(0.5, "share that is hidden", ge=0, lt=1)
    {body or "pass"}

    def {method}(self, *args, **kwargs):
        return self
'''
        for number, name in enumerate(names)
    )
    offered = ", ".join(f"Component{number}" for number in range(len(names)))
    return (
        f"import attrs\n{textwrap.dedent(top)}\nfrom maskwright import hookimpl, setting\n{classes}\n\n"
        f"@hookimpl\ndef maskwright_components():\n    {hook or 'pass'}\n    return [{offered}]\n"
    )


def catalogue(slug: str, module: str, *names: str, kind: str = "mask-strategy", extra: str = "") -> str:
    """A registry.toml that names these components; `extra` are more lines of the plugin's table."""
    text = f'[plugins.{slug}]\nmodule = "{module}"\n{textwrap.dedent(extra)}\n'
    for name in names:
        text += (
            f'[[plugins.{slug}.components]]\nkind = "{kind}"\nname = "{name}"\nmodalities = ["image"]\n'
            f'summary = "What {name} decides"\n'
            'parameters = [{ name = "ratio", type = "float", default = "0.5", range = "in [0, 1)", '
            'help = "share that is hidden" }]\n'
        )
    return text


@attrs.frozen
class Site:
    """A folder on sys.path in which distributions lie as pip would leave them."""

    folder: Path

    def install(
        self,
        name: str,
        files: dict[str, str],
        entry_points: dict[str, str] | str | None = None,
        *,
        version: str = "1.0",
        requires: tuple[str, ...] = (),
    ) -> Path:
        """Lay a distribution down; by default its one entry point is the package of its name. Returns its package's folder."""
        package = name.replace("-", "_")
        for path, text in files.items():
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")
        info = self.folder / f"{package}-{version}.dist-info"
        info.mkdir()
        required = "".join(f"Requires-Dist: {one}\n" for one in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
        if entry_points is None:
            entry_points = {name: package}
        if isinstance(entry_points, dict):
            lines = "".join(f"{slug} = {module}\n" for slug, module in entry_points.items())
            entry_points = f"[maskwright]\n{lines}"
        (info / "entry_points.txt").write_text(entry_points)
        importlib.invalidate_caches()
        return self.folder / package

    def good(self, name: str, *components: str, version: str = "1.0", **source: str) -> Path:
        """A distribution that works, with its catalogue."""
        package = name.replace("-", "_")
        names = components or (name,)
        kind = source.get("kind", "mask-strategy")
        files = {
            f"{package}/__init__.py": plugin_source(*names, **source),  # type: ignore[arg-type]
            f"{package}/registry.toml": catalogue(name, package, *names, kind=kind),
        }
        return self.install(name, files, version=version)
