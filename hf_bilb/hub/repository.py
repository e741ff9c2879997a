"""A repository of the Hub: whether it can be pushed to, and the push, in one commit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_bilb.errors import HfBilbError, HubError, OptionError, one_line

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from huggingface_hub.errors import HfHubHTTPError

_LOG_IN = "set HF_TOKEN, or log in once with `hf auth login`"


@dataclass(frozen=True)
class Repository:
    """Where a model is pushed to.

    Attributes:
        name: `owner/name`, or `name` in the namespace of the token's user.
        private: whether it is to be seen by its owners alone; None: as the Hub has it by default, or as it is.
        revision: the branch; None: `main`. It is made where it is not there.
        token: of the Hub; None: that of the environment or of `hf auth login`.
        key: the option that the name stands in, for messages.
    """

    name: str
    private: bool | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    key: str = "repository"

    @property
    def address(self) -> str:
        """Of the repository, for a browser."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.name}"


def prepare_repository(repository: Repository) -> Repository:
    """See that the token may push to the repository, which is made where it is not there; nothing is uploaded.

    Returns:
        the same with its full name.

    Raises:
        OptionError: no token, one that the Hub does not take, a name that no repository can have, a namespace that is
            not the token's, a repository that is public where a private one is asked for.
        HubError: the Hub cannot be reached, or failed.

    Cost: three small requests.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository.name)
    except HFValidationError as error:
        raise OptionError(f"{repository.key}: {error}") from None
    api = HfApi(token=repository.token)
    with talking(repository.key):
        user = api.whoami()
    name = _in_a_namespace(repository, user)
    with talking(f"{repository.key}: {name!r}"):
        api.create_repo(name, private=repository.private, exist_ok=True)
        is_private = api.repo_info(name).private
    if repository.private and is_private is False:
        raise OptionError(
            f"{repository.key}: {name!r} is there already, and is public; make it private on the Hub, or take another "
            "name"
        )
    return Repository(name, repository.private, repository.revision, repository.token, repository.key)


def _in_a_namespace(repository: Repository, user: Mapping[str, Any]) -> str:
    """`owner/name`; raises `OptionError` where the token's user does not belong to the owner."""
    owner, slash, _ = repository.name.partition("/")
    if not slash:
        return f"{user['name']}/{repository.name}"
    known = [user["name"], *(one["name"] for one in user.get("orgs") or ())]
    if owner not in known and "orgs" in user:
        others = f" (and of {', '.join(known[1:])})" if len(known) > 1 else ""
        raise OptionError(
            f"{repository.key}: {repository.name!r} is in the namespace of {owner!r}, and the token is that of "
            f"{user['name']!r}{others}"
        )
    return repository.name


def push_files(
    repository: Repository,
    files: Mapping[str, Path | bytes],
    message: str,
    replaced: Collection[str] = (),
) -> CommitInfo:
    """Push `files` in one commit: a reader of the repository sees all of them or none.

    Large files are sent first, and those that the Hub has already are not sent again: after an interruption the same
    call goes on.

    Args:
        repository: from `prepare_repository`.
        files: path in the repository -> a file, or its content.
        message: of the commit.
        replaced: patterns (`model*.safetensors`) of files that are deleted where `files` does not have them.

    Raises:
        HubError: it did not work; nothing in the repository was changed.
        OptionError: the token is none any more.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=repository.token)
    with talking(f"{repository.key}: {repository.name!r}"):
        branch = repository.revision
        if branch is not None and branch != "main" and not branch.startswith("refs/"):
            api.create_branch(repository.name, branch=branch, exist_ok=True)
        there = api.list_repo_files(repository.name, revision=branch) if replaced else []
        added = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        stale = [p for p in there if p not in files and any(fnmatch(p, pattern) for pattern in replaced)]
        return api.create_commit(
            repository.name,
            [*added, *(CommitOperationDelete(path) for path in stale)],
            commit_message=message,
            revision=branch,
        )


@contextlib.contextmanager
def talking(where: str) -> Iterator[None]:
    """What goes wrong between here and the Hub, as one line; `where` names what it was about."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HfBilbError, MemoryError):
        raise
    except LocalTokenNotFoundError:
        raise OptionError(f"{where}: there is no token of the Hub: {_LOG_IN}") from None
    except OfflineModeIsEnabled:
        raise HubError(f"{where}: the Hub is not asked while HF_HUB_OFFLINE is set") from None
    except HfHubHTTPError as error:
        raise _refused(where, error) from None
    except Exception as error:  # of the network, of the Hub's libraries in several languages, of a file
        raise HubError(f"{where}: {_cause(error)}") from error


def _refused(where: str, error: HfHubHTTPError) -> HfBilbError:
    """The line for an answer of the Hub that is an error."""
    status = error.response.status_code
    said = f": {error.server_message}" if error.server_message else ""
    if status == 401:
        return OptionError(f"{where}: the Hub does not take the token{said}; {_LOG_IN}")
    if status == 403:
        return OptionError(f"{where}: the token may not write there{said}")
    return HubError(f"{where}: the Hub answered {status}{said}")


def _cause(error: Exception) -> str:
    """What lies at the bottom of an error: the libraries of the Hub put their own words around it."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and isinstance(below, Exception):
        chain.append(below)
    if isinstance(error, ValueError):  # the card's metadata, of which the Hub has said what is wrong
        return one_line(error, 300)
    if answer := next((one for one in chain if isinstance(one, HfHubHTTPError)), None):
        return f"the Hub answered {answer.response.status_code}: {one_line(answer.server_message or error, 200)}"
    words = one_line(f"{type(chain[-1]).__name__}: {chain[-1]}".rstrip(": "), 200)
    # After an error in one of several uploads, the others find their connection closed.
    is_network = any(isinstance(one, HTTPError | ConnectionError | TimeoutError) for one in chain)
    if is_network or "client has been closed" in words:
        return f"the Hub cannot be reached ({words})"
    return words
