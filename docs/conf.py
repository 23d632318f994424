"""The site: python -m sphinx -W --keep-going -b html docs docs/_build/html, no network needed."""

import importlib
import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

sys.path.insert(0, str(Path(__file__).parents[1]))  # `datasets` is in the checkout alone

import flows  # noqa: E402

project = "givens-flows"
copyright = "the authors of givens-flows, MIT licence"
version = release = flows.__version__

extensions = [
    "myst_nb",  # Markdown pages and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # formulas without a network
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"givens-flows {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

# Notebooks are shown with the outputs they were committed with; the tests execute them.
nb_execution_mode = "off"
myst_heading_anchors = 3

autodoc_inherit_docstrings = False  # what a layer only overrides is documented where it is defined
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "returns_style"), ("Reference", "returns_style")]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# A reference to a name of ours must be documented; those of other libraries are plain text.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!flows\.|datasets\.).*")]
nitpick_ignore = [
    ("py:class", "flows.optim.preconditioned.Preconditioned"),
    ("py:class", "flows.plots.Density"),
]


def public_names():
    """What names of ours stand for in the code of a page: classes, and functions in full."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("api/flows*.rst"), reverse=True):
        module = importlib.import_module(path.stem)
        for name in module.__all__:
            full, value = f"{path.stem}.{name}", getattr(module, name)
            if inspect.isclass(value) or path.stem == "flows" and callable(value):
                found[name] = full
            if callable(value):
                found[full] = full
    return found


PUBLIC = public_names()


def link_names(app, doctree):
    """Make `Rotation` on a page a link; read elsewhere the page has plain code there."""
    for code in list(doctree.findall(nodes.literal)):
        name = PUBLIC.get(code.astext())
        if name and isinstance(code.parent, nodes.paragraph):
            target = {"refdomain": "py", "reftype": "obj", "reftarget": name}
            link = addnodes.pending_xref("", refdoc=app.env.docname, refwarn=True, **target)
            code.replace_self(link)
            link += code


def find_public_name(app, env, node, contnode):
    """`flows.elbo` is documented as `flows.objectives.elbo`: link what users import to it."""
    found = getattr(flows, node.get("reftarget", "").removeprefix("flows."), None)
    if node.get("refdomain") == "py" and callable(found):
        name = f"{found.__module__}.{found.__qualname__}"
        python = env.get_domain("py")
        return python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def keep_stars(app, what, name, obj, options, lines):
    """Shapes such as (batch, *shape) are plain text in our docstrings, no emphasis."""
    for number, line in enumerate(lines):
        if "``" not in line and ">>>" not in line:
            lines[number] = re.sub(r"(?<=[( ])\*(?=[\w.]+[,)])", r"\*", line)


def setup(app):
    app.connect("doctree-read", link_names)
    app.connect("missing-reference", find_public_name)
    app.connect("autodoc-process-docstring", keep_stars)
