"""How the documentation is built: `make docs`. Notebooks are executed, and a warning is an error."""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
# The notebooks' kernels and shell lines use the environment that builds the documentation.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["COLUMNS"] = "110"

from sphinx.ext.napoleon.docstring import GoogleDocstring

import probgen

# A property's docstring is a sentence; napoleon would take what stands before its colon for a type.
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end

project = "probgen"
author = "The probgen authors"
copyright = author
version = release = probgen.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
default_role = "code"

myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_use_rtype = False
toc_object_entries = False

html_theme = "furo"
html_title = "probgen"
html_static_path = ["_static"]
html_css_files = ["probgen.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0a6fae", "color-brand-content": "#0a6fae"},
    "dark_css_variables": {"color-brand-primary": "#6cb6e8", "color-brand-content": "#6cb6e8"},
}


def shapes_as_written(app, what, name, obj, options, lines):
    """A star in a shape, [*batch_shape, D], begins no emphasis."""
    lines[:] = [re.sub(r"\[[^]`]*\]", lambda shape: shape[0].replace("*", r"\*"), line) for line in lines]


def bars_as_written(app, what, name, obj, options, lines):
    """|det ∂y/∂x| and ‖x‖ are formulas, and no substitutions; lines that begin with a bar are blocks of lines."""
    lines[:] = [line if line.lstrip().startswith("| ") else line.replace("|", "\\|") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", shapes_as_written)
    app.connect("autodoc-process-docstring", bars_as_written)
