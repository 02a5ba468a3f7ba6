"""Pages on the methods: one for every family, with what users import from it, in the order of its papers' files."""

import ast
import re
from collections.abc import Sequence

from fairtrial.catalog import FAMILIES, Catalogue
from fairtrial.methods.registry import exported
from fairtrial.trial.fingerprint import ROOT

METHODS = ROOT / "methods"
CALLS = ("forward", "__call__")


def families() -> list[str]:
    """The families that have methods."""
    return [family for family in FAMILIES if (METHODS / family / "__init__.pyi").is_file()]


def pages(catalogue: Catalogue) -> dict[str, str]:
    """Markdown by address."""
    return {f"api/{family}.md": family_page(catalogue, family) for family in families()}


def family_page(catalogue: Catalogue, family: str) -> str:
    lines = [f"# {family.capitalize()}", ""]
    for module, names in exported(METHODS / family / "__init__.pyi").items():
        source = ast.parse((METHODS / family / f"{module}.py").read_text(encoding="utf-8"))
        about = (ast.get_docstring(source) or module).partition("\n")[0]
        lines += [f"## {re.split(r'[:.](?: |$)', about)[0]} {{ #{module} }}", ""]
        if module in catalogue:
            lines += [f"The paper’s claims and evidence: [{catalogue[module].title}](../papers/{module}.md).", ""]
        lines += _directive(f"fairtrial.methods.{family}.{module}", [], heading=False)
        for node in source.body:  # in the order of the file, where the headline method comes first
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names:
                lines += _directive(f"fairtrial.methods.{family}.{node.name}", _members(node))
    return "\n".join(lines)


def _members(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    """What a reader wants to see of a class: how it is called, with the shapes, and all that has a docstring."""
    inside = node.body if isinstance(node, ast.ClassDef) else []
    functions = [part for part in inside if isinstance(part, ast.FunctionDef)]
    public = [part for part in functions if not part.name.startswith("_") and ast.get_docstring(part)]
    return [part.name for part in functions if part in public or part.name in CALLS]


def _directive(name: str, members: Sequence[str], *, heading: bool = True) -> list[str]:
    options = [f"members: {list(members) or 'false'}"]
    options += [] if heading else ["show_root_heading: false", "show_root_toc_entry: false"]
    return [f"::: {name}", "    options:", *(f"      {option}" for option in options), ""]
