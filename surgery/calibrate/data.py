"""Calibration data: files of texts or conversations, cut into sequences of ids, with a hash of all of it.

A JSONL file has one object a line: `text`, or `messages` (role and content of each turn), or `prompt` with
its `reply` (`response` and `completion` are read as well); conversations go through the model's chat
template. Any other file is one running text. A name that begins with hf://datasets/ is fetched from the hub:
hf://datasets/OWNER/NAME[@REVISION]/FILE.

Sequences are the documents themselves, cut off at `sequence_length`, or (`packed`) all documents in a row,
cut every `sequence_length` tokens, where a rest shorter than that is left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from surgery.calibrate.lines import read_lines, read_object
from surgery.calibrate.tokenizer import Tokenizer
from surgery.errors import PlanError, UsageError

HUB = "hf://datasets/"
SEQUENCE_LENGTH = 4096
_REPLIES = ("reply", "response", "completion")


class Calibration(BaseModel):
    """Which data to calibrate on. In a recipe also a file name, a list of them, or {domain: file}."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    files: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Files by domain; with several domains each one's scores are normalised before they are averaged."""
    num_samples: int | None = Field(default=None, ge=1)
    """Sequences of each domain, the first ones; all by default."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens of a sequence at most; 4,096 by default, or what the model takes where that is less."""
    packed: bool = Field(default=False, strict=True)
    """Join documents and cut them into sequences of full length."""
    add_bos: bool | None = None
    """Whether sequences begin with the start token; by default as the tokenizer's files say."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if isinstance(data, str | list | tuple):
            return {"files": data}
        if isinstance(data, Mapping) and data and "files" not in data and not {*data} & {*cls.model_fields}:
            return {"files": data}
        return data

    @field_validator("files", mode="before", json_schema_input_type=str | list[str] | dict[str, Any])
    @classmethod
    def _by_domain(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = (value,)
        if isinstance(value, list | tuple):
            return {"all": tuple(value)}
        if isinstance(value, Mapping):
            return {key: (each,) if isinstance(each, str) else each for key, each in value.items()}
        return value

    @field_validator("files")
    @classmethod
    def _none_empty(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for domain, files in value.items():
            if not files:
                raise ValueError(f"the domain {domain} names no file")
        return value


@dataclass(frozen=True)
class CalibrationSet:
    """Sequences as (domain, ids). `digest` is a hash of domains and ids; `cut` documents were longer than the
    sequence length, `left_over` tokens filled no sequence."""

    sequences: tuple[tuple[int, tuple[int, ...]], ...]
    domains: tuple[str, ...]
    digest: str
    cut: int
    left_over: int

    @property
    def tokens(self) -> int:
        return sum(len(ids) for _, ids in self.sequences)

    def describe(self) -> dict[str, Any]:
        """For manifests."""
        counts = [
            sum(domain == number for domain, _ in self.sequences) for number in range(len(self.domains))
        ]
        return {
            "sha256": self.digest, "domains": dict(zip(self.domains, counts, strict=True)),
            "sequences": len(self.sequences), "tokens": self.tokens, "cut": self.cut,
            "left_over_tokens": self.left_over,
        }  # fmt: skip


def read_calibration(
    spec: Calibration,
    tokenizer: Tokenizer,
    *,
    folders: Sequence[Path] = (),
    vocab_size: int | None = None,
    longest: int | None = None,
) -> CalibrationSet:
    """The sequences of `spec`. Relative files are looked up in the current folder, then in `folders`.

    `vocab_size` and `longest` are the model's. Raises UsageError with file and line for what cannot be read,
    PlanError where the data does not fit the model.
    """
    length = spec.sequence_length or min(SEQUENCE_LENGTH, longest or SEQUENCE_LENGTH)
    if longest is not None and length > longest:
        raise PlanError(
            f"sequences of {length} tokens are longer than the {longest} positions of the model",
            hint=f"set calibration.sequence_length to {longest} or less",
        )
    sequences: list[tuple[int, tuple[int, ...]]] = []
    cut = left_over = 0
    for number, (domain, files) in enumerate(spec.files.items()):
        documents = (ids for name in files for ids in _documents(find_file(name, folders), tokenizer))
        if spec.packed:
            found, rest = _packed(documents, length, spec.num_samples)
            left_over += rest
        else:
            found, longer = _separate(documents, length, spec.num_samples)
            cut += longer
        if not found:
            what = f"fewer than {length} tokens" if spec.packed else "no document"
            raise UsageError(
                f"the calibration data of {domain} ({', '.join(files)}) holds {what}",
                hint="give more demonstrations, or a shorter sequence_length",
            )
        sequences += [(number, ids) for ids in found]
    largest = max(max(ids) for _, ids in sequences)
    if vocab_size is not None and largest >= vocab_size:
        raise PlanError(
            f"the tokenizer gives id {largest}, but the model's vocabulary has {vocab_size} tokens",
            hint="the tokenizer files beside the weights are another model's",
        )
    digest = sha256("\0".join(spec.files).encode())
    for domain_number, ids in sequences:
        digest.update(f"\n{domain_number}:{','.join(map(str, ids))}".encode())
    return CalibrationSet(tuple(sequences), tuple(spec.files), digest.hexdigest(), cut, left_over)


def _separate(
    documents: Iterator[list[int]], length: int, limit: int | None
) -> tuple[list[tuple[int, ...]], int]:
    found: list[tuple[int, ...]] = []
    cut = 0
    for ids in documents:
        cut += len(ids) > length
        found.append(tuple(ids[:length]))
        if len(found) == limit:
            break
    return found, cut


def _packed(
    documents: Iterator[list[int]], length: int, limit: int | None
) -> tuple[list[tuple[int, ...]], int]:
    found: list[tuple[int, ...]] = []
    row: list[int] = []
    for ids in documents:
        row += ids
        while len(row) >= length:
            found.append(tuple(row[:length]))
            del row[:length]
            if len(found) == limit:
                return found, 0
    return found, len(row)


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    if path.suffix == ".json":
        raise UsageError(
            f"{path}: calibration data is JSONL, one object a line, or plain text",
            hint="write the objects one a line and name the file .jsonl",
        )
    lines = read_lines(path)
    if path.suffix != ".jsonl":
        text = "\n".join(lines)
        if not text.strip():
            raise UsageError(f"{path} holds no text")
        yield tokenizer.document(text, ended=False)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _document(read_object(line, f"{path}:{number}"), f"{path}:{number}", tokenizer)


def _document(found: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> list[int]:
    text = found.get("text")
    if isinstance(text, str):
        if not text.strip():
            raise UsageError(f"{where}: `text` is empty")
        return tokenizer.document(text, ended=True)
    messages = found.get("messages")
    if messages is None and "prompt" in found:
        reply = next((found[key] for key in _REPLIES if key in found), None)
        if reply is None:
            raise UsageError(
                f"{where}: a `prompt` without its `reply`",
                hint="let the model reply first: surgery demonstrate MODEL --prompts FILE -o DEMOS",
            )
        messages = [{"role": "user", "content": found["prompt"]}, {"role": "assistant", "content": reply}]
    if messages is None:
        raise UsageError(f"{where}: neither `text` nor `messages` nor `prompt`")
    return tokenizer.conversation(_checked(messages, where))


def _checked(messages: Any, where: str) -> list[dict[str, str]]:
    fine = isinstance(messages, list) and bool(messages)
    if not fine or not all(
        isinstance(each, Mapping)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str)
        for each in messages
    ):
        raise UsageError(f"{where}: `messages` must be turns with `role` and `content`, both texts")
    if not messages[-1]["content"].strip():
        raise UsageError(f"{where}: the last turn is empty", hint="leave out demonstrations without a reply")
    return [{"role": each["role"], "content": each["content"]} for each in messages]


def find_file(name: str, folders: Sequence[Path]) -> Path:
    """A data file by its path (in the current folder, else in one of `folders`), or from the hub."""
    if name.startswith(HUB):
        return _fetch(name)
    path = Path(name).expanduser()
    for folder in (Path(), *folders):
        if (folder / path).is_file():
            return folder / path
    if path.is_dir():
        raise UsageError(f"{name} is a folder, not a file", hint="name its files one by one")
    raise UsageError(
        f"there is no file {name}",
        hint="a relative path is looked up here, then beside the recipe; hub files are "
        "hf://datasets/OWNER/NAME/FILE",
    )


def _fetch(name: str) -> Path:
    """A file of a dataset on the hub, from the local cache where it is there."""
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    pieces = name.removeprefix(HUB).split("/", 2)
    if len(pieces) < 3 or not all(pieces):
        raise UsageError(f"{name} names no file of a dataset", hint=f"write {HUB}OWNER/NAME/FILE")
    owner, dataset, file = pieces
    dataset, _, revision = dataset.partition("@")
    try:
        return Path(
            hf_hub_download(f"{owner}/{dataset}", file, repo_type="dataset", revision=revision or None)
        )
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{name} cannot be fetched: {reason}",
            hint="check the name and the network (HF_ENDPOINT, HF_TOKEN), or give a local file",
        ) from error
