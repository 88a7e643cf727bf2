"""The Hugging Face Hub, as far as the service needs it: which commit a model's name means, and how large it is.

A name and a branch may mean other weights tomorrow, so ids are made from the commit, and jobs record it. It is asked
for when a request comes, in the way in which `transformers` would: a HEAD for the model's config.json, whose answer
names the commit and says whether this server may read the model. Where the hub cannot be asked (HF_HUB_OFFLINE, or no
connection), the branch means what it meant at the last download on this machine. For an estimate a model's
configuration and tokenizer are fetched, and the headers of its weights; the weights are for workers to download.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from gradstore.types import ProblemItem

from datastore.errors import DownloadFailed, HubUnreachable, InvalidInput, first_line
from datastore.tensors import TensorInfo

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
MAIN = "main"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
TIMEOUT = 10.0  # seconds for the hub's answer


def commit(model: str, revision: str | None) -> str:
    """The commit that a revision of a model means, by default its main branch's; a commit is left as it is.

    Raises `InvalidInput` where there is no such model or revision that this server may read, and `HubUnreachable`.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, errors, hf_hub_url  # noqa: PLC0415 - heavy, for models of the hub only

    try:
        url = hf_hub_url(model, CONFIG, revision=revision or MAIN)
        found = HfApi().get_hf_file_metadata(url=url, timeout=TIMEOUT).commit_hash
    except errors.EntryNotFoundError as error:
        raise _refused(f"{model!r} is no model for transformers: it has no {CONFIG} on the hub") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # httpx's, of whichever version
        refusal = _refusal(error, model, revision)
        if refusal is not None:
            raise refusal from error
        return _downloaded_commit(model, revision, reason=_outage(error) or first_line(error))
    if found is None:
        raise HubUnreachable(model, "it answers without saying which commit that is")
    return found


def explained(error: BaseException, model: str, revision: str | None) -> InvalidInput | DownloadFailed | None:
    """What the hub has to do with it that a model could not be loaded, as an error that says what to do next.

    Libraries tell it in words of their own; what the hub answered is among the causes of their errors. None where it
    is none of them.
    """
    causes = list(_causes(error))
    refusals = (_refusal(cause, model, revision) for cause in causes)
    reasons = (_outage(cause) for cause in causes)
    refusal = next(filter(None, refusals), None)
    reason = next(filter(None, reasons), None)
    return refusal or (None if reason is None else DownloadFailed(model, reason))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _refusal(error: BaseException, model: str, revision: str | None) -> InvalidInput | None:
    """What the hub's refusal means; None for what is none."""
    from huggingface_hub import errors  # noqa: PLC0415 - see above

    if isinstance(error, errors.GatedRepoError):
        return _refused(
            f"the hub shows {model!r} to those who have accepted its terms: accept them on its page, and start the "
            "server and its workers with a token of that account in HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _refused(
            f"the hub has no model {model!r} that this server may see: check its name, or where it is private start "
            "the server and its workers with a token in HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return _refused(f"{model!r} has no branch, tag or commit {revision!r} on the hub", field="revision")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in {401, 403}:
        return _refused(f"the hub refuses this server's HF_TOKEN for {model!r}: {first_line(error)}")
    return None


def _outage(error: BaseException) -> str | None:
    """Why the hub gives nothing, and may later; None where the error does not tell."""
    from huggingface_hub import constants, errors  # noqa: PLC0415 - see above

    if isinstance(error, errors.OfflineModeIsEnabled) or (
        isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"it answers {status}" if status in {408, 429} or status >= 500 else None
    if isinstance(error, errors.HTTPError):  # type: ignore[attr-defined]  # see above
        return first_line(error)
    return None


def downloaded(model: str, revision: str | None) -> Path | None:
    """The folder of a model's download on this machine, where there is one."""
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - see above
    except ImportError:  # the client's packages only
        return None
    config = try_to_load_from_cache(model, CONFIG, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def described(model: str, commit: str) -> tuple[Path, dict[str, TensorInfo]] | None:
    """The folder of a model's configuration and tokenizer, fetched now, and its tensors; None where it is unknown.

    The tensors come from the headers of the weights, some hundred kilobytes a file.
    """
    from huggingface_hub import HfApi, errors  # noqa: PLC0415 - see above

    api = HfApi()
    try:
        folder = Path(api.hf_hub_download(model, CONFIG, revision=commit, etag_timeout=TIMEOUT)).parent
        with suppress(errors.EntryNotFoundError):  # an older tokenizer: lengths are estimated
            api.hf_hub_download(model, TOKENIZER, revision=commit, etag_timeout=TIMEOUT)
        found = api.get_safetensors_metadata(model, revision=commit, timeout=TIMEOUT)
    except (
        errors.HTTPError,  # type: ignore[attr-defined]  # see above
        errors.NotASafetensorsRepoError,
        errors.SafetensorsParsingError,
        OSError,
    ) as error:
        log.warning("the hub does not describe a model", extra={"model": model, "reason": first_line(error)})
        return None
    return folder, {
        name: TensorInfo(tensor.dtype, tuple(tensor.shape), start=tensor.data_offsets[0])
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def files(model: str, commit: str | None, names: Iterable[str]) -> Path | None:
    """The folder of a model's download with those of the small files named that it has, fetched now.

    None where the first of them is not to be had.
    """
    from huggingface_hub import HfApi, errors  # noqa: PLC0415 - see above

    found: Path | None = None
    for name in names:
        try:
            path = Path(HfApi().hf_hub_download(model, name, revision=commit, etag_timeout=TIMEOUT))
            found = found or path.parent
        except errors.EntryNotFoundError:
            pass
        except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # see above
            log.warning(
                "the hub does not give a file", extra={"model": model, "name": name, "reason": first_line(error)}
            )
            return None
        if found is None:
            return None
    return found


def _downloaded_commit(model: str, revision: str | None, *, reason: str) -> str:
    """The commit that a revision meant at its last download. Raises `HubUnreachable` where there is none."""
    folder = downloaded(model, revision)
    if folder is None:
        raise HubUnreachable(model, reason)
    log.warning("the hub is not asked", extra={"model": model, "reason": reason, "commit": folder.name})
    return folder.name


def _refused(detail: str, *, field: str = "model") -> InvalidInput:
    return InvalidInput(detail, errors=[ProblemItem(pointer=f"/{field}", detail=detail)])
