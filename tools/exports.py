"""Write adam_jax/optimizers/__init__.py and docs/optimizers.md: `python tools/exports.py`.

Type checkers and editors read a package without running it, so its imports must be written out.
With --check it exits with 1 if the imports are stale.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "adam_jax" / "optimizers"
INIT = PACKAGE / "__init__.py"
TABLE = PACKAGE.parents[1] / "docs" / "optimizers.md"


def exported(path: Path) -> list[str]:
    """Return the names in `__all__` of a file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    sys.exit(f"{path} must define __all__, its exported names")


def import_line(module: str, names: list[str]) -> str:
    """Return the import of these names in ruff's format."""
    start = f"from adam_jax.optimizers.{module} import "
    line = start + ", ".join(names)
    return line if len(line) <= 100 else start + "(\n    " + ",\n    ".join(names) + ",\n)"


def source() -> str:
    """Return the text of the package's `__init__.py`."""
    modules = [path for path in sorted(PACKAGE.glob("*.py")) if not path.name.startswith("_")]
    names = {path.stem: exported(path) for path in modules}
    imports = [import_line(module, exports) for module, exports in names.items()]
    listed = [f"    {name!r}," for name in sorted(name for each in names.values() for name in each)]
    return "\n".join(
        [
            '"""The optimizers, one file per variant."""',
            "",
            "# Written by tools/exports.py, so that type checkers see every name.",
            *imports,
            "",
            "__all__ = [",
            *listed,
            "]",
            "",
        ]
    ).replace("'", '"')


def write_table() -> None:
    """Write the catalogue's table into docs/optimizers.md, between its markers."""
    command = [sys.executable, "-m", "adam_jax", "list", "--markdown"]
    table = subprocess.check_output(command, cwd=PACKAGE.parents[1], text=True)
    start, end = "<!-- catalogue -->\n", "<!-- /catalogue -->"
    before, _, rest = TABLE.read_text().partition(start)
    TABLE.write_text(f"{before}{start}{table}{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    if "--check" not in sys.argv:
        INIT.write_text(source())
        write_table()
    elif INIT.read_text() != source():
        sys.exit(f"{INIT} is stale; run python tools/exports.py")
