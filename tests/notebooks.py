"""The notebooks as programs: executed from top to bottom, each in a kernel of its own, as a reader does.

`python tests/notebooks.py NAME` executes one in the size for a processor, in an empty directory, and keeps in its file
what it shows. `python tests/notebooks.py NAME DIR` works in DIR and leaves the file as it is.
"""

import os
import sys
import tempfile
from pathlib import Path

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def execute(file, directory):
    """The notebook with what it shows. An error of a cell is one here."""
    import nbclient
    import nbformat

    os.environ |= {"IPYTHONDIR": directory, "JUPYTER_RUNTIME_DIR": directory}  # nothing is left in the user's own
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": directory}},
        record_timing=False, coalesce_streams=True,
    ).execute()  # fmt: skip
    # Without what is of this machine.
    notebook.metadata.language_info = {"name": "python"}
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if output.output_type == "stream":
            output.text = output.text.replace(f"{directory}/", "")
    return notebook


def main(name, directory=None):
    import nbformat

    file = NOTEBOOKS / f"{name}.ipynb"
    with tempfile.TemporaryDirectory() as scratch:
        notebook = execute(file, directory or scratch)
    nbformat.write(notebook, Path(directory, file.name) if directory else file)


if __name__ == "__main__":
    main(*sys.argv[1:])
