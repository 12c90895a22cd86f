"""Repositories of the hub, through huggingface_hub: files of one commit, folders sent as one, errors in words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deltatune.errors import ConfigError, FormatError, PeftError, SaveError
from deltatune.storage.locate import is_repository

OPTIONS = {
    *("revision", "token", "cache_dir", "local_files_only", "force_download", "repo_type", "endpoint", "headers"),
    *("user_agent", "etag_timeout", "local_dir", "library_name", "library_version", "tqdm_class", "proxies"),
    "use_auth_token",  # the older name of token
}


@dataclass
class Repository:
    """A repository, or a subfolder of it. The first file that is found fixes the commit of the others."""

    name: str
    subfolder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    local: bool = False

    def __post_init__(self) -> None:
        given = {key: value for key, value in self.options.items() if value is not None}
        token = given.pop("use_auth_token", None)
        self.options = {"token": token, **given} if token is not None else given

    def find(self, filename: str) -> Path | None:
        """The file in the local cache, fetched if need be; None if the repository lacks it.

        Raises:
            FormatError: The repository, the revision or the hub cannot be reached.
        """
        hub = _hub()
        known = inspect.signature(hub.hf_hub_download).parameters
        options = {key: value for key, value in self.options.items() if key in known}
        try:
            file = Path(hub.hf_hub_download(self.name, filename, subfolder=self.subfolder, **options))
        except hub.errors.LocalEntryNotFoundError as error:
            if self.options.get("local_files_only") or hub.is_offline_mode():
                return None
            raise self.unreachable(filename, error) from error
        except hub.errors.EntryNotFoundError:
            return None
        except Exception as error:  # the client raises many kinds
            raise self.unreachable(filename, error) from error
        self._pin(file)
        return file

    def _pin(self, file: Path) -> None:
        """Take everything else from the same commit: a branch may move in between."""
        commit = re.search(r"[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]", str(file))
        if commit is not None:
            self.options["revision"] = commit[1]

    def missing(self, filename: str) -> FormatError:
        if self.options.get("local_files_only") or _hub().is_offline_mode():
            return self._error(
                filename,
                "it is not in the local cache, and downloads are switched off (local_files_only or HF_HUB_OFFLINE)",
                "fetch it once with them switched on, or check cache_dir",
            )
        return self._error(filename, "the repository has no such file", "it is no adapter; check name and subfolder")

    def unreachable(self, filename: str, error: Exception) -> FormatError:
        return self._error(filename, *_reason(error, self.options.get("revision")))

    def _error(self, filename: str, why: str, way_out: str) -> FormatError:
        where = "/".join(part for part in (self.name, self.subfolder, filename) if part)
        revision = f" at {self.options['revision']}" if "revision" in self.options else ""
        return FormatError(
            f"{where}{revision} cannot be had from {self._endpoint()}: {why}; {way_out}"
            f" (there is no local folder {self.name!r} either)",
            path=self.name,
            hint=way_out,
        )

    def _endpoint(self) -> str:
        return self.options.get("endpoint") or _hub().constants.ENDPOINT


def _reason(error: Exception, revision: str | None) -> tuple[str, str]:
    """Why the hub's client failed, and what to do. One line each: its own messages are pages."""
    errors = _hub().errors
    answers: list[tuple[type[Exception], str, str]] = [
        (errors.GatedRepoError, "access to it is granted by its owners", "ask for it there, then pass token=..."),
        (
            errors.RepositoryNotFoundError,
            "there is no such repository, or it is private",
            "check the name; for a private one pass token=... or log in with `hf auth login`",
        ),
        (errors.RevisionNotFoundError, f"it has no revision {revision!r}", "check revision"),
        (
            errors.LocalEntryNotFoundError,
            "the hub does not answer, and the file is not in the local cache",
            "check the connection, or pass the folder of a copy",
        ),
    ]
    for kind, why, way_out in answers:
        if isinstance(error, kind):
            return why, way_out
    status = getattr(getattr(error, "response", None), "status_code", None)
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}{f' (status {status})' if status else ''}: {first}", "try again, or check the name"


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ConfigError(
            "repositories of the hub need the package huggingface_hub (pip install 'deltatune[transformers]'); "
            "give a local folder otherwise",
            field="huggingface_hub",
            expected="the package huggingface_hub",
            hint="pip install 'deltatune[transformers]'",
        ) from error
    return huggingface_hub


def push(
    write: Callable[[Path], None],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
    stale: list[str] | None = None,
) -> Any:
    """Make the repository if there is none, and put what `write` writes into it as one commit.

    A model card that is there already stays as it is.

    Args:
        stale: Files that the commit removes, if the repository has them.

    Raises:
        SaveError: The hub refused, or cannot be reached; the repository is at the commit it was at.
    """
    if not is_repository(repo_id if "/" in repo_id else f"owner/{repo_id}"):  # alone it is put under the user's name
        raise SaveError(f"push_to_hub: {repo_id!r} is a path, expected a repository as 'owner/name'", path=repo_id)
    api = _hub().HfApi(endpoint=endpoint, token=token)
    with TemporaryDirectory() as folder:
        write(Path(folder))
        try:
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(name, branch=revision, exist_ok=True)
            return api.create_commit(
                name,
                _operations(api, name, revision, Path(folder), stale or []),
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        except PeftError:
            raise
        except Exception as error:
            why, way_out = _reason(error, revision)
            raise SaveError(
                f"push_to_hub: {repo_id} at {api.endpoint} was not written: {why}; {way_out}; a token needs the right "
                "to write",
                path=repo_id,
                hint=way_out,
            ) from error


def _operations(api: Any, name: str, revision: str | None, folder: Path, stale: list[str]) -> list[Any]:
    """Every file of the folder but a card where the repository has one, and what goes away."""
    hub = _hub()
    there = {file for file in (*stale, "README.md") if api.file_exists(name, file, revision=revision)}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    added = [hub.CommitOperationAdd(file, str(path)) for file, path in files.items() if file not in there - {*stale}]
    return [*added, *(hub.CommitOperationDelete(file) for file in stale if file in there and file not in files)]
