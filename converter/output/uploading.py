"""A snapshot's files into a Hub repository: what is there, what may be replaced, and one commit that holds all of it.

One commit, since a reader must never meet half a snapshot (the client's `upload_folder` cuts a long upload into
several); it names the commit that was looked at before, so that two pushes cannot mix. What the Hub has of an upload
that broke off is not sent again. What the Hub shows afterwards is compared with what was sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..format import layout
from ..format.record import Record, read_record
from ..format.untrusted import check_text
from ..snapshot.access import HubAccess
from ..snapshot.files import SourceFile
from ..snapshot.hub import LOG_IN, HubFiles, check_stored_token, redacted, translated
from ..snapshot.snapshot import CONFIG, MODEL_INDEX
from ..telling.errors import ConvertError, ResumableError, one_clause
from .card import MAX_CARD_BYTES, may_replace

_MODEL_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5"}


@dataclass(frozen=True)
class Upload:
    """A file to push: where its bytes are (the file, or they themselves), how many they are and their sha256."""

    content: SourceFile | bytes
    size: int
    sha256: str


class Repository:
    """A model repository of the Hub and the branch of it that is pushed to, either of which need not exist yet.

    repo: `NAMESPACE/NAME`, or a name in the token's own namespace. options: the token and the branch. private: what is
    wanted, refused where a repository is public. Raises ConvertError, also where nobody is logged in.
    """

    def __init__(self, repo: str, options: HubAccess, *, private: bool) -> None:
        if constants.HF_HUB_OFFLINE:
            raise ConvertError("HF_HUB_OFFLINE is set, and a push needs the Hub; unset it.")
        self._private, self.branch = private, options.revision or constants.DEFAULT_REVISION
        token = _token(options)
        self._options = HubAccess(revision=self.branch, token=token, quiet=options.quiet)
        self._api = HfApi(token=token)
        with _answers(repo, self._options):
            owner = self._api.whoami()["name"]
            self.repo = repo if "/" in repo else f"{owner}/{repo}"
            self._exists = self._api.repo_exists(self.repo)
            if self._exists and private and not self._api.repo_info(self.repo).private:
                raise ConvertError(
                    f"{self.repo} exists and is public; make it private in its settings on the Hub, or drop --private."
                )

    @property
    def url(self) -> str:
        return f"{self._api.endpoint}/{self.repo}"

    def look(self) -> HubFiles | None:
        """The files on the branch as it is now, or on the one that it would start from; None where there is none."""
        if not self._exists:
            return None
        with _answers(self.repo, self._options):
            there = self._api.revision_exists(self.repo, self.branch)
        return HubFiles(self.repo, self._options if there else HubAccess(token=self._options.token))

    def prepare(self) -> HubFiles:
        """Create the repository and the branch where they are missing; returns the files on it."""
        with _answers(self.repo, self._options):
            if not self._exists:
                self._api.create_repo(self.repo, private=True if self._private else None)
            if not self._api.revision_exists(self.repo, self.branch):
                self._api.create_branch(self.repo, branch=self.branch)
        return HubFiles(self.repo, self._options)

    def commit(self, files: HubFiles, uploads: Mapping[str, Upload], obsolete: Collection[str], message: str) -> str:
        """Upload all of `uploads` and delete `obsolete` in one commit on top of `files`; returns the commit's hash.

        It is that of `files` where the Hub has all of it already.
        """
        with _answers(self.repo, self._options):
            additions = [_addition(path, upload) for path, upload in uploads.items()]
            self._api.preupload_lfs_files(self.repo, additions, revision=self.branch, free_memory=False)
            for upload in uploads.values():  # hours may have passed since their digests were compared
                if isinstance(upload.content, SourceFile):
                    upload.content.check_unchanged()
            info = self._api.create_commit(
                self.repo,
                [*(CommitOperationDelete(path, is_folder=False) for path in obsolete), *additions],
                commit_message=message,
                revision=self.branch,
                parent_commit=files.commit,
            )
        self._check(str(info.oid), uploads)
        return str(info.oid)

    def _check(self, commit: str, uploads: Mapping[str, Upload]) -> None:
        """Raise ConvertError unless the commit has every file as it was sent."""
        there = HubFiles(self.repo, HubAccess(revision=commit, token=self._options.token))
        sizes = there.sizes()
        for path, upload in uploads.items():
            if sizes.get(path) != upload.size or there.sha256(path) not in (None, upload.sha256):
                raise ConvertError(
                    f"The Hub took the commit {commit[:12]} of {self.repo}, but {path} is not in it as it was sent; "
                    "look at the repository's .gitignore and push again."
                )


def _addition(path: str, upload: Upload) -> CommitOperationAdd:
    operation = CommitOperationAdd(path, upload.content if isinstance(upload.content, bytes) else upload.content.path)
    operation.upload_info.sha256 = bytes.fromhex(upload.sha256)  # known: the client need not read the file for it
    return operation


def check_repo_name(repo: str) -> None:
    """Raise ConvertError for what cannot be the name of a repository."""
    check_text(repo, "The repository")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConvertError(
            f"{repo!r} cannot be a Hub repository's name; give one such as me/qwen-image-fp8."
        ) from error


def former_files(files: HubFiles, record: Record) -> set[str]:
    """What an earlier push left in a repository, and this one may replace or delete; empty where there was none.

    Raises ConvertError where the repository holds something else that a push would spoil.
    """
    there = files.sizes()
    if layout.RECORD_FILE not in there:
        models = (p for p in there if PurePosixPath(p).suffix in _MODEL_FILES or p in (MODEL_INDEX, CONFIG))
        if (found := next(models, None)) is not None:
            raise ConvertError(
                f"{files.label} holds a model that fp8-convert did not push ({found}); give another repository's name."
            )
        return set()
    try:
        former = read_record(files.read(layout.RECORD_FILE, layout.MAX_RECORD_BYTES), layout.RECORD_FILE)
    except ResumableError:
        raise
    except ConvertError as error:
        raise ConvertError(
            f"What {files.label} holds cannot be told, since its record cannot be read; push to another repository, or "
            f"delete {layout.RECORD_FILE} and the weights there."
        ) from error
    was, now = (r.source.repo or r.source.base_repo for r in (former, record))
    if was is None or now is None:  # of a folder only the classes are known
        was, now = (r.source.pipeline or str(r.classes) for r in (former, record))
    if was != now:
        raise ConvertError(
            f"{files.label} holds the FP8 snapshot of {was!r:.80}, and this is one of {now!r:.80}; give another "
            "repository's name."
        )
    return {*former.files, layout.RECORD_FILE, layout.SOURCE_CARD} & there.keys()


def keeps_card(files: HubFiles, source_card: bytes | None) -> bool:
    """Whether the repository's README.md was written or edited by somebody, and so is not to be replaced."""
    if layout.CARD not in files.sizes():
        return False
    card = files.read(layout.CARD, MAX_CARD_BYTES)
    return card != source_card and not may_replace(card.decode(errors="replace"))


def _token(options: HubAccess) -> str:
    with translated("the Hub", options):
        check_stored_token(options)
    token = options.token if isinstance(options.token, str) else None if options.token is False else get_token()
    if token is None:
        raise ConvertError(f"A push needs a Hub token with write access, and there is none; {LOG_IN}.")
    return token


@contextlib.contextmanager
def _answers(repo: str, options: HubAccess) -> Iterator[None]:
    """Turn what the Hub refuses into sentences for somebody who writes; everything else as for those who read."""
    with translated(repo, options):
        try:
            yield
        except HfHubHTTPError as error:
            if (sentence := _refusal(repo, error, options)) is not None:
                raise sentence from error
            raise
        except ValueError as error:
            if not isinstance(error.__cause__, BadRequestError):
                raise
            raise ConvertError(f"The Hub does not take the model card ({one_clause(error)}); report it.") from error
        except RuntimeError as error:  # from the threads that upload
            cause = error.__cause__
            if isinstance(cause, HfHubHTTPError) and (sentence := _refusal(repo, cause, options)) is not None:
                raise sentence from error
            reason = redacted(one_clause(cause or error), options)
            raise ResumableError(
                f"The upload to {repo} broke off ({reason}); run the same command again: what the Hub has is not sent "
                "twice."
            ) from None


def _refusal(repo: str, error: HfHubHTTPError, options: HubAccess) -> ConvertError | None:
    """What to say to an answer that only somebody who writes gets, None for any other."""
    said = redacted(one_clause(ValueError(error.server_message or str(error))), options)
    match error.response.status_code:
        case 401:
            return ConvertError(
                f"The Hub does not accept the token ({said}); make a new one in its settings, then {LOG_IN}."
            )
        case 403:
            return ConvertError(
                f"The Hub does not let this token write to {repo} ({said}); use one with write access to it, or "
                "another repository's name."
            )
        case 409:
            return ConvertError(f"The Hub cannot create {repo} ({said}); give another repository's name.")
        case 412:
            return ResumableError(f"{repo} changed while the upload ran; run the same command again.")
        case 400:
            return ConvertError(f"The Hub does not take what was sent to {repo}: {said}.")
    return None
