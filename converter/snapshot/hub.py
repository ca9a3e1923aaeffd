"""A Hub repository at one commit: its file list, its small files, and safetensors headers by range request.

Every failure of the Hub or the network becomes one ConvertError that says what to do.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, tqdm

from ..format.header import PREFIX_BYTES, Header, header_length, parse_header
from ..format.untrusted import check_size, read_whole
from ..telling.errors import ConvertError, ResumableError
from .access import HubAccess, clean_token
from .files import LocalFiles, file_pieces

_FIRST_BYTES = 64 * 1024  # most headers fit; a longer one costs a second request
_CLIENTS = {module.partition(".")[0] for module in (HfApi.__module__, HTTPError.__module__)}  # and its HTTP library
_STORED_TOKEN = "The Hub token of this machine (HF_TOKEN, or what `hf auth login` stored)"
LOG_IN = "log in with `hf auth login` or pass --token"
_SECRETS = (
    (re.compile(r"(?i)\b(bearer|basic)(\s+|%20)[^\s'\"]+"), r"\1 …"),
    (re.compile(r"\b(hf|api|api_org)_[A-Za-z0-9]\w*"), "…"),
    (re.compile(r"(://)[^/\s@]+@"), r"\1…@"),
    (re.compile(r"(://[^\s?'\"]+\?)[^\s'\"]+"), r"\1…"),  # what signs the address of a download
)


class HubFiles:
    """The files of a repository at the commit that `revision` names now; nothing but small files is downloaded."""

    def __init__(self, repo: str, options: HubAccess) -> None:
        self.repo, self.options = repo, options
        self._api = HfApi(token=options.token)
        with translated(repo, options):
            check_stored_token(options)
            info = self._api.repo_info(repo, revision=options.revision)
            if info.sha is None:
                raise ResumableError(f"The Hub does not say which commit of {repo} it has; run again in a while.")
            self.commit: str = info.sha
            tree = self._api.list_repo_tree(repo, recursive=True, revision=self.commit)
            self.entries = [entry for entry in tree if isinstance(entry, RepoFile)]
        self._sizes, self._sha256 = _listing(self.entries)
        self._read: dict[str, bytes] = {}  # a commit does not change, and the client would ask the Hub each time
        self.label = repo

    def sizes(self) -> Mapping[str, int]:
        return self._sizes

    def sha256(self, path: str) -> str | None:
        return self._sha256.get(path)

    def local(self, path: str) -> Path | None:
        return None

    def read(self, path: str, limit: int) -> bytes:
        if path not in self._read:
            where = f"{path} in {self.repo}"
            check_size(self._sizes[path], limit, where)
            self._read[path] = read_whole(self._downloaded(path), where, limit)
        return self._read[path]

    def pieces(self, path: str) -> Iterator[bytes]:
        return file_pieces(self._downloaded(path), f"{path} in {self.repo}", self._sizes[path])

    def _downloaded(self, path: str) -> Path:
        """The file in the Hub cache."""
        options = self.options
        with translated(self.repo, options):
            return Path(
                self._api.hf_hub_download(
                    self.repo, path, revision=self.commit, cache_dir=options.cache_dir, tqdm_class=_bar(options)
                )
            )

    def header(self, path: str) -> Header:
        where, size = f"{path} in {self.repo}", self._sizes[path]
        start = self.range(path, 0, min(_FIRST_BYTES, size))
        length = header_length(start[:PREFIX_BYTES], size, where)
        raw = start[PREFIX_BYTES : PREFIX_BYTES + length]
        if len(raw) < length:
            raw += self.range(path, PREFIX_BYTES + len(raw), PREFIX_BYTES + length)
        return parse_header(raw, size, where)

    def range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        if start == stop:
            return b""
        url = hf_hub_url(self.repo, path, revision=self.commit, endpoint=self._api.endpoint)
        headers = {**build_hf_headers(token=self.options.token), "range": f"bytes={start}-{stop - 1}"}
        with translated(self.repo, self.options):
            response = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
            content = bytes(response.content)
        if response.status_code != 206 or len(content) != stop - start:
            raise ResumableError(f"The Hub did not send bytes {start} to {stop} of {path} as asked; run again.")
        return content

    def download_into(self, path: str, folder: Path, stopped: threading.Event) -> Path:
        """Download one file to `folder/path`, past the cache.

        Raises ResumableError, also soon after `stopped` was set.
        """

        class Stoppable(_bar(self.options)):  # type: ignore[misc]
            def update(self, n: float | None = 1) -> bool | None:
                if stopped.is_set():
                    raise InterruptedError("the conversion was stopped")
                shown: bool | None = super().update(n)
                return shown

        with translated(self.repo, self.options):
            return Path(
                self._api.hf_hub_download(self.repo, path, revision=self.commit, local_dir=folder, tqdm_class=Stoppable)
            )


class CachedFiles(LocalFiles):
    """A repository's commit in the Hub cache: all files of its listing count, those that are not here are errors."""

    def __init__(self, repo: str, folder: Path, entries: Iterable[RepoFile]) -> None:
        super().__init__(folder)
        self.label = self.repo = repo
        self.commit = folder.name
        self._sizes, self._sha256 = _listing(entries)

    def sizes(self) -> Mapping[str, int]:
        return self._sizes or super().sizes()

    def sha256(self, path: str) -> str | None:
        return self._sha256.get(path)

    def local(self, path: str) -> Path:
        if not (self.root / path).is_file():
            raise ConvertError(f"{path} of {self.label} is not in the cache; go online once to fetch it.")
        return super().local(path)


def abort_downloads() -> None:
    """Stop what the Hub's Xet transport is downloading: unlike HTTP downloads it does not heed `stopped`."""
    with contextlib.suppress(ImportError, AttributeError):  # no public call does this
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]


def cache_folder(options: HubAccess) -> Path:
    """Where downloads are kept."""
    return Path(options.cache_dir or constants.HF_HUB_CACHE)


def bytes_to_download(files: HubFiles, paths: list[str]) -> int:
    """Bytes of `paths` that `download` would add to the cache."""
    with translated(files.label, files.options):
        found = snapshot_download(**_selection(files, paths), dry_run=True, tqdm_class=_NoBar)
    return sum(file.file_size or 0 for file in found if file.will_download)


def download(files: HubFiles, paths: list[str]) -> CachedFiles:
    """Download exactly `paths` of a repository at its described commit into the Hub cache."""
    repo, commit, options = files.label, files.commit, files.options
    with translated(repo, options):
        folder = Path(snapshot_download(**_selection(files, paths), tqdm_class=_bar(options)))
    revision = options.revision or constants.DEFAULT_REVISION
    if revision != commit:  # downloads by commit leave no ref, without which the revision is not found offline
        ref = folder.parent.parent / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    return CachedFiles(repo, folder, files.entries)


def cached(repo: str, options: HubAccess) -> CachedFiles:
    """A repository's commit that is in the cache already, or a part of it; no connection is made."""
    with translated(repo, options):
        try:
            folder = snapshot_download(
                repo, revision=options.revision, cache_dir=options.cache_dir, local_files_only=True, token=False
            )
        except IncompleteSnapshotError as error:  # the files that a conversion needs may all be there
            folder = str(error.snapshot_path)
        try:
            entries = get_cached_repo_tree(repo, revision=options.revision, cache_dir=options.cache_dir)
        except CachedRepoTreeNotFoundError:
            entries = []
    return CachedFiles(repo, Path(folder), entries)


def is_offline(options: HubAccess) -> bool:
    """Whether `local_files_only` or HF_HUB_OFFLINE forbids connections."""
    return options.local_files_only or bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def translated(repo: str, options: HubAccess) -> Iterator[None]:
    """Turn the Hub client's exceptions into sentences for the user, which hold no token whatever the client said."""
    revision = f" at revision {options.revision}" if options.revision else ""
    try:
        yield
    except HFValidationError as error:
        raise ConvertError(f"{repo!r} is neither a folder nor a Hub id such as Qwen/Qwen-Image; check it.") from error
    except LocalTokenNotFoundError as error:
        raise ConvertError(f"token=True asks for the Hub token of this machine, and it has none; {LOG_IN}.") from error
    except GatedRepoError as error:
        raise ConvertError(f"{repo} is gated: accept its terms on its Hub page, then {LOG_IN}.") from error
    except RevisionNotFoundError as error:
        raise ConvertError(f"{repo} has no revision {options.revision!r}; check --revision.") from error
    except RepositoryNotFoundError as error:
        raise ConvertError(
            f"{repo} is not a folder here and does not exist on the Hub, or is private: check the name, or pass "
            "--token."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if is_offline(options):
            message = f"{repo}{revision} is not in the cache and the Hub may not be asked; go online once to fetch it."
            raise ConvertError(message) from error
        raise _unreachable(repo, options, error) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise ResumableError(
            f"The Hub answered {status} for {repo}{revision}; run the same command again in a while."
        ) from error
    except (HTTPError, OSError) as error:
        raise _unreachable(repo, options, error) from None  # the client's own text may hold a secret
    except (ValueError, KeyError) as error:  # an answer by something else than a Hub, or a bad HF_ENDPOINT
        raise ResumableError(
            f"What answers for the Hub about {repo} is not understood ({_reason(error, options)}); check HF_ENDPOINT "
            "and the connection."
        ) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        raise _unreachable(repo, options, error) from None  # a bad proxy or HF_ENDPOINT, no identity in a CI job, …


def redacted(text: str, options: HubAccess) -> str:
    """The text without anything that is secret: the token, and whatever looks like one or signs an address."""
    token: str | bool | None = options.token
    if token in (None, True):
        with contextlib.suppress(Exception):  # this is no time to say so
            token = get_token()
    if isinstance(token, str):
        text = text.replace(token, "…")
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def check_stored_token(options: HubAccess) -> None:
    """Raise ConvertError if the machine's own token, where it would be sent, is none that can be."""
    if options.token is False or isinstance(options.token, str):
        return
    if options.token is None and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return
    try:
        token = get_token()
    except UnicodeDecodeError:
        raise ConvertError(f"{_STORED_TOKEN} is not text; {LOG_IN}.") from None
    if token is not None:
        clean_token(token, _STORED_TOKEN)


def _unreachable(repo: str, options: HubAccess, error: Exception) -> ResumableError:
    return ResumableError(
        f"The Hub cannot be reached for {repo} ({_reason(error, options)}); check the connection, or use "
        "--local-files-only."
    )


def _reason(error: Exception, options: HubAccess) -> str:
    return redacted(" ".join(str(error).split()), options)[:160]


def _listing(entries: Iterable[RepoFile]) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and, for what the Hub stores as large files, sha256 by path."""
    files = sorted(entries, key=lambda entry: entry.path)
    return {f.path: int(f.size) for f in files}, {f.path: f.lfs.sha256 for f in files if f.lfs is not None}


class _NoBar(tqdm):
    """For what is over at once, and for logs."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "disable": True})  # type: ignore[no-untyped-call]


def _bar(options: HubAccess) -> type[tqdm]:
    """The client's progress bar: on a terminal alone."""
    shown = not options.quiet and sys.stderr is not None and sys.stderr.isatty()
    return tqdm if shown else _NoBar


def _selection(files: HubFiles, paths: list[str]) -> dict[str, Any]:
    """Arguments of `snapshot_download`."""
    options = files.options
    return {
        "repo_id": files.label,
        "revision": files.commit,
        "allow_patterns": [_literal(path) for path in paths],
        "token": options.token,
        "cache_dir": options.cache_dir,
    }


def _literal(path: str) -> str:
    """The path as an fnmatch pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)
