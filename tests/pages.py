"""The pages of docs/ as programs: what a reader does from top to bottom, in one directory.

A block after a line that ends in "`NAME`:" is that file. Of ```bash each line is a command, which is run; of training
only that it is one, in test_train, and so of what is said of any MODEL. ```python is run, with the names of the blocks
before it. ```text is a part of what the commands before it printed, and a command that is refused is followed by its
line.

`python tests/pages.py gallery DIR` runs a page in DIR, and leaves there what it makes: the pictures of the gallery.
"""

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

from jaxup.errors import UserError

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"(?:`([\w./-]+)`:\n\n)?^```(\w+)\n(.*?)^```", re.S | re.M)


def command(line):
    """What a command prints, and whether it was refused."""
    _, _, module, *words = shlex.split(line, comments=True)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            its = importlib.import_module(module)
            (its.parse_args if "MODEL" in words else its.main)([module, *words])
        except UserError as error:
            return f"{out.getvalue()}jaxup: {error}\n", True
    return out.getvalue(), False


def run(name, directory):
    said, refused, scope = "", False, {}
    with contextlib.chdir(directory):
        for file, kind, text in BLOCK.findall((DOCS / f"{name}.md").read_text()):
            assert kind == "text" or not refused, said
            if file:
                Path(file).write_text(text)
            elif kind == "bash":
                lines = [line for line in text.replace("\\\n", "").splitlines() if "-m jaxup.train " not in line]
                done = [command(line) for line in lines]
                said, refused = "".join(out for out, _ in done), any(no for _, no in done)
            elif kind == "python":
                exec(text, scope)
            else:
                assert kind == "text"
                assert text in said, said
                refused = False
    assert not refused, said


if __name__ == "__main__":
    run(*sys.argv[1:])
