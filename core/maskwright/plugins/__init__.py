"""The built-in plugins: one sub-package per paper.

In a wheel the plugins lie in this folder. In a checkout they lie in the repository's `plugins/`,
which is added to the search path here, so that both give the same import paths.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[3] / "plugins"
if (_checkout.parent / "registry.toml").is_file() and (_checkout.parent / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
