"""What `import maskwright` gives: every promised name, a docstring on each, and no torch until it is needed."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import maskwright

CORE = Path(maskwright.__file__).parent
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "accelerate",
    "sklearn",
    "scipy",
    "matplotlib",
    "hypothesis",
    "rich",
)


def in_a_new_process(code):
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import maskwright",
        "import maskwright; maskwright.names('mask-strategy'); maskwright.registry.find(modality='image')",
        "import maskwright; dir(maskwright); maskwright.__version__; maskwright.Registry().plugins()",
        "import maskwright.errors, maskwright.settings, maskwright.hookspecs",
    ],
)
def test_no_heavy_library_and_no_plugin_is_imported(code):
    loaded = in_a_new_process(code + "; import sys; print(*sorted(sys.modules))").split()
    assert not set(HEAVY) & set(loaded)
    assert not [name for name in loaded if name.startswith("maskwright.plugins.")]


def test_an_observer_and_a_component_can_be_declared_without_torch():
    loaded = in_a_new_process(
        "from maskwright import hookimpl, setting; import attrs, sys\n"
        "@attrs.frozen\n"
        "class Mine:\n    ratio: float = setting(0.5, 'share', ge=0, lt=1)\n"
        "Mine(ratio=0.25)\nprint('torch' in sys.modules)"
    )
    assert loaded == "False"


@pytest.mark.parametrize("name", maskwright.__all__)
def test_every_name_resolves(name):
    value = getattr(maskwright, name)
    assert value is not None
    assert name in dir(maskwright)
    if inspect.isclass(value):
        assert value.__name__ == name
        assert value.__module__.startswith("maskwright.")


def test_the_names_are_those_that_type_checkers_see():
    tree = ast.parse((CORE / "__init__.py").read_text("utf-8"))
    seen = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maskwright")
        for alias in node.names
    }
    assert seen | {"registry"} == set(maskwright.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Maks'"):
        maskwright.Maks  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("maskwright.nothing")


def public_definitions():
    """(file:line, name, docstring) of each public module, class and function of the core, read without importing it."""
    for path in sorted(CORE.rglob("*.py")):
        where = path.relative_to(CORE)
        tree = ast.parse(path.read_text("utf-8"))
        if path.name != "__main__.py":
            yield f"{where}:1", str(where), ast.get_docstring(tree)
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{where}:{node.lineno}", node.name, ast.get_docstring(node)


def test_public_modules_classes_and_functions_say_what_they_are():
    assert [where for where, _, text in public_definitions() if not text] == []


def public_methods():
    for name in maskwright.__all__:
        value = getattr(maskwright, name)
        if not inspect.isclass(value):
            continue
        for attribute, method in vars(value).items():
            method = getattr(method, "__func__", getattr(method, "fget", method))
            if not attribute.startswith("_") and inspect.isfunction(method):
                yield f"{name}.{attribute}", method


@pytest.mark.parametrize(
    "name", [name for name in maskwright.__all__ if inspect.isclass(getattr(maskwright, name))]
)
def test_public_classes_say_what_they_are(name):
    text = getattr(maskwright, name).__doc__
    assert text
    assert not text.startswith(f"{name}("), "attrs or dataclasses made it up"


def test_public_methods_say_what_they_do():
    assert [name for name, method in public_methods() if not inspect.getdoc(method)] == []


def test_every_error_has_an_exit_code_and_a_meaning():
    from maskwright import errors

    classes = [
        value for value in vars(errors).values() if getattr(value, "__module__", "") == errors.__name__
    ]
    classes = [value for value in classes if inspect.isclass(value)]
    assert len(classes) > 15
    for one in classes:
        assert issubclass(one, errors.MaskwrightError)
        interrupted = {"Interrupted": 130}.get(one.__name__, 1)
        assert one.exit_code == (2 if issubclass(one, errors.UsageError) else interrupted)
        assert one.__doc__


def test_nearest_words_are_suggested():
    from maskwright.errors import did_you_mean, nearest

    assert did_you_mean("colourmae", ["colormae", "mae", "hpm"]).startswith(" Did you mean 'colormae'")
    assert did_you_mean("zzz", ["colormae"]) == ""
    assert nearest("mae", ["colormae", "cae", "mae"])[0] == "mae"
    assert nearest("patches", ["hard-patches", "block"]) == ["hard-patches"]
    assert nearest("", ["a"]) == []
