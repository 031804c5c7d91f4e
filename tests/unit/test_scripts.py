"""What the rules' scripts import is there: they run inside Snakemake only, where nothing looks at them before."""

import ast
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def top_level(module: str) -> set[str]:
    """Names that a module has, read without importing it (some need torch); of a package its modules."""
    path = SCRIPTS.joinpath(*module.split("."))
    names = {p.stem for p in path.glob("*")} if path.is_dir() else set()
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(source.read_text())):  # also what stands under `if TYPE_CHECKING` or `try`
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_imports_of_a_script_exist(script):
    found = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    own = [node for node in found if (node.module or "").split(".")[0] == "slidemake"]
    assert own
    missing = [(n.module, a.name) for n in own for a in n.names if a.name not in top_level(n.module)]
    assert not missing
