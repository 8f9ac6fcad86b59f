"""An export on the Hub: the files that were written here, in one commit, and no others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from jaxup.errors import UserError, first_line
from jaxup.files import manifest
from jaxup.files.storage import SECONDS, Local, ask_hub
from jaxup.hub.directory import CARD
from jaxup.progress import say, tell
from jaxup.text import named, size


def look(repo: str, *, private: bool, force: bool) -> list[str]:
    """The files that the Hub's model `repo` has now, if it is there; what would refuse a push is a UserError.

    Args:
      private: nobody but its owners is to see it.
      force: what it has may be replaced.
    """
    from huggingface_hub import HfApi, errors, get_token, utils

    with _asking(repo):
        if repo.count("/") != 1:
            raise UserError("a model of the Hub is ORG/NAME", hint="ORG is your user name or an organisation of yours")
        utils.validate_repo_id(repo)
        if not get_token():
            raise UserError("there is no token", hint="`hf auth login`, or set HF_TOKEN to one that may write")
        try:
            info = ask_hub(functools.partial(HfApi().model_info, repo))
        except errors.RepositoryNotFoundError:
            return []
        files = [file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes"]
        if private and not info.private:
            raise UserError("is there, and public", hint="make it private on its page, or choose another name")
        if files and not force:
            shown = ", ".join(map(named, files[:3])) + ", ..." * (len(files) > 3)
            raise UserError(f"holds {shown} already", hint="choose another name, or force (--force) to replace that")
        return files


def push(directory: Path, repo: str, there: list[str], *, private: bool) -> None:
    """Makes the model directory `directory`, which is compared with its manifest first, the Hub's model `repo`.

    What is not in the manifest stays here. `there` is what `look` gave. UserError: `directory` is as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    listed = manifest.read_manifest(directory)
    if listed is None:
        hint = "`jaxup export DIR OUT --push` writes one"
        raise UserError(f"is not an export of jaxup: it has no {manifest.NAME}", at=str(directory), hint=hint)
    for file, fault in manifest.faults(directory):
        if fault == manifest.ADDED:
            say(f"{named(file)} was not written by jaxup, and is not pushed")
        elif file != CARD:  # which may be written further by hand
            raise UserError(f"{named(file)} {fault}", at=str(directory), hint="write it again")
    local = Local(directory)
    paths = {file: local.path(file) for file in [*listed, manifest.NAME]}
    gone = [file for file in there if file not in paths]
    total = sum(path.stat().st_size for path in paths.values())
    instead = f", in the place of {len(there)} that are there" if there else ""
    tell(f"pushing {len(paths)} files, {size(total)}, of {directory} to {repo}{', private' * private}{instead}")
    with _asking(repo, hint=f"{directory} is whole: `jaxup export {directory} --push {repo}` tries again"):
        api = HfApi()
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        added = [CommitOperationAdd(file, str(path)) for file, path in paths.items()]
        deleted = [CommitOperationDelete(file, is_folder=False) for file in gone]
        api.create_commit(repo, [*added, *deleted], commit_message="Model written by jaxup")
    tell(f"pushed to {url}")


@contextlib.contextmanager
def _asking(repo: str, hint: str = "") -> Iterator[None]:
    """What the Hub and its client refuse, and the network, as a UserError."""
    from huggingface_hub import errors

    at = f"--push {repo}"
    try:
        yield
    except UserError as error:
        raise error.within(at) from None
    except TimeoutError:
        raise UserError(f"the Hub does not answer within {SECONDS} s", at=at, hint=hint) from None
    except errors.HfHubHTTPError as error:
        what = (error.server_message or first_line(error))[:300]
        if error.response.status_code in (401, 403):
            what = f"the token may not write there ({what})"
        raise UserError(what, at=at, hint=hint) from None
    except Exception as error:  # a name that is none, offline, the network: all kinds
        raise UserError(first_line(error)[:300], at=at, hint=hint) from None
