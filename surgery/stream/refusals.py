"""What the hub's failures mean: which may pass by themselves, and what to say of the others."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.errors import CheckpointError
from surgery.stream.transfer import RETRIED, Fault, pause_of


def fault_of(error: BaseException, *, reached: bool) -> Fault | None:
    """The fault behind an error that another try may mend; None for all others.

    Not to get a connection is one where the host was `reached` before; else there is likely no network.
    """
    from httpx import ConnectError, TransportError, UnsupportedProtocol
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for each in chain(error):
        if isinstance(each, OfflineModeIsEnabled | UnsupportedProtocol):
            return None
        if isinstance(each, ConnectError) and not reached:
            return None
        if isinstance(each, TransportError):
            return Fault(str(each) or type(each).__name__)
        if isinstance(each, HfHubHTTPError):
            status = each.response.status_code
            if status not in RETRIED:
                return None
            pause = pause_of(status, each.response.headers)
            return Fault(f"the hub answered {status} {each.response.reason_phrase}", pause_s=pause)
    return None


def explain(error: BaseException) -> tuple[str, str]:
    """What went wrong and what to do, in words."""
    from httpx import TransportError
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    for each in chain(error):
        if isinstance(each, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set", "unset it"
        if isinstance(each, GatedRepoError):
            return (
                "the repo is gated and this account may not read it",
                "accept its terms on its page, then log in: hf auth login (or set HF_TOKEN)",
            )
        if isinstance(each, RevisionNotFoundError):
            return "there is no such revision", "give a branch, a tag or a commit after the @"
        if isinstance(each, EntryNotFoundError) and not isinstance(each, FileNotFoundError):
            return "there is no such file", "look at the repo's files on its page"
        if isinstance(each, HfHubHTTPError):
            return _status(each)
        if isinstance(each, TransportError):
            reason = str(each) or type(each).__name__
            return f"the hub cannot be reached ({reason})", "check the network, HF_ENDPOINT and proxies"
    return " ".join(str(error).split()) or type(error).__name__, ""


def _status(error: object) -> tuple[str, str]:
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        raise TypeError(f"{type(error).__name__} is no answer of the hub")
    status = error.response.status_code
    said = f"the hub answered {status} {error.response.reason_phrase}"
    if error.server_message:
        said += f" ({error.server_message.partition(chr(10))[0]})"
    if status == 401:
        return (
            f"{said}: no such repo, or one that only its members see, or a token that is not valid",
            "check the name, then log in: hf auth login (or set HF_TOKEN)",
        )
    if status == 403:
        return f"{said}: the token may not do this", "use a token with the right to it (HF_TOKEN)"
    if status == 404:
        return f"{said}: no such repo, or a private one", "check the name; private repos need HF_TOKEN"
    if status == 429:
        return f"{said}: too many requests", "wait some minutes, or log in for a higher limit"
    return said, "try again later; the same command resumes"


def refusal(error: BaseException, place: str) -> CheckpointError:
    """The error for a model that the hub does not give."""
    reason, hint = explain(error)
    return CheckpointError(f"{place}: {reason}", hint=hint)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from; huggingface_hub wraps answers when it falls back to its cache."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
