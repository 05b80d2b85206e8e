"""Run docs/first-hour.ipynb in a temporary folder, without Jupyter, and store what its cells print and draw.

    python scripts/notebook.py

tests/docs/test_notebook.py runs the same cells.
"""

import base64
import io
import json
import os
import tempfile
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first-hour.ipynb"


def execute(notebook: dict[str, Any]) -> None:
    """Run the code cells in order, in the current folder and one namespace, and replace their outputs. Whatever a cell
    raises is raised here."""
    os.environ["MPLBACKEND"] = "Agg"
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"<cell {number}: {cell['id']}>", "exec"), names)
        text = printed.getvalue().splitlines(keepends=True)
        stream = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
        cell |= {"execution_count": number, "outputs": [*stream, *_pictures()]}


def _pictures() -> list[dict[str, Any]]:
    """The figures that a cell drew, as Jupyter keeps them; they are closed."""
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        png = io.BytesIO()
        figure = plt.figure(number)
        figure.savefig(png, format="png", dpi=80, bbox_inches="tight")
        plt.close(figure)
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<Figure>"]}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    return found


if __name__ == "__main__":
    page = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        execute(page)
    NOTEBOOK.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
