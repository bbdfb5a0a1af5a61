"""How Sphinx builds these pages: `make docs`."""

import pkmem

project = "pkmem"
author = "The pkmem authors"
project_copyright = "The pkmem authors"
version = release = pkmem.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "literal"  # `x` in a docstring is code, as in the pages
nitpicky = False  # types of torch are not documented here

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"pkmem {version}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["pages.css"]
html_css_files = ["pages.css"]
