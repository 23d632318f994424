"""Every public class and function says what it takes, which shapes, and shows itself at work."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
from torch import nn

import datasets
import flows
from flows.transforms import Transform

MODULES = [
    "flows",
    "flows.diagnostics",
    "flows.distributions",
    "flows.export",
    "flows.givens",
    "flows.householder",
    "flows.interop",
    "flows.nets",
    "flows.objectives",
    "flows.optim",
    "flows.parametrize",
    "flows.plots",
    "flows.recipes",
    "flows.recipes.mixing",
    "flows.splines",
    "flows.training",
    "flows.transforms",
    *(f"datasets.{module.name}" for module in pkgutil.iter_modules(datasets.__path__)),
]

# What every transform has: flows.transforms.base and Coupling.recover say what it means.
CONTRACT = {"forward", "inverse", "recover", "volume_preserving"}


def public() -> dict[str, object]:
    """Our classes and functions that a module names in ``__all__``, by where they are defined."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith(("flows.", "datasets."))
            if ours and callable(value):
                found[f"{value.__module__}.{name}"] = value
    return found


PUBLIC = public()


def is_on_tensors(value: object) -> bool:
    """Whether it is a module or a density, or a function that takes or returns tensors."""
    if inspect.isclass(value):
        return issubclass(value, nn.Module) or hasattr(value, "log_prob")
    signature = inspect.signature(value)
    hints = [parameter.annotation for parameter in signature.parameters.values()]
    return any("Tensor" in str(hint) for hint in [*hints, signature.return_annotation])


def raises_errors(value: object) -> bool:
    """Whether its code has an error of its own, or one of the checks whose names say so."""
    return bool(re.search(r"\braise \w|check_\w+\(", inspect.getsource(value)))


def each(condition=lambda value: True):
    chosen = {name: value for name, value in PUBLIC.items() if condition(value)}
    return pytest.mark.parametrize("value", chosen.values(), ids=chosen.keys())


def sections(value: object) -> dict[str, str]:
    """The parts of a docstring by their titles; the text before the first title by ``""``."""
    parts = re.split(r"^([A-Z]\w+):\n(?= )", inspect.cleandoc(value.__doc__ or ""), flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_public_names_are_found():
    assert {"flows.flow.Flow", "flows.givens.dispatch.matrix", "datasets.toy.Toy"} <= set(PUBLIC)


@each()
def test_it_begins_with_a_sentence(value):
    first = sections(value)[""].split("\n\n")[0].strip()
    assert first.endswith("."), f"the first paragraph must end in a full stop, got {first!r}."


@each()
def test_args_are_those_of_the_signature(value):
    # A class that takes over the constructor of another takes over its Args.
    owners = inspect.getmro(value) if inspect.isclass(value) else [value]
    args = next((sections(owner)["Args"] for owner in owners if "Args" in sections(owner)), "")
    described = re.findall(r"^    \**(\w+):", args, flags=re.M)
    made_without = getattr(value, "__init__", None) is nn.Module.__init__
    assert described == ([] if made_without else list(inspect.signature(value).parameters))


@each(is_on_tensors)
def test_it_names_its_shapes(value):
    assert sections(value).get("Shape"), "there must be a section Shape:."


@each(raises_errors)
def test_it_names_its_errors(value):
    assert sections(value).get("Raises"), "there must be a section Raises:."


@each()
def test_its_example_runs_as_it_stands(value):
    text = sections(value).get("Example", "")
    example = doctest.DocTestParser().get_doctest(text, {}, value.__name__, None, None)
    assert example.examples, "there must be a section Example: with >>>."
    output = []
    doctest.DocTestRunner(verbose=False).run(example, out=output.append)
    assert not output, "".join(output)


@each(inspect.isclass)
def test_its_methods_are_described(value):
    members = {name: member for name, member in vars(value).items() if not name.startswith("_")}
    if issubclass(value, Transform):
        members = {name: member for name, member in members.items() if name not in CONTRACT}
    mute = [
        name
        for name, member in members.items()
        if (inspect.isroutine(member) or isinstance(member, property))
        and not inspect.getdoc(getattr(value, name))
    ]
    assert not mute, f"these have no docstring: {mute}."


def test_no_example_is_left_out():
    """Examples below names that no module exports run nowhere."""
    found = []
    for module in pkgutil.walk_packages(flows.__path__, "flows."):
        try:
            found += doctest.DocTestFinder().find(importlib.import_module(module.name))
        except ImportError as error:
            assert error.name in ("numba", "triton"), error
    assert not [test.name for test in found if test.examples and test.name not in PUBLIC]
