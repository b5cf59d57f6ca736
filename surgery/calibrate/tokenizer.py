"""The tokenizer of a checkpoint, with the rules that decide which ids a model gets to see.

Where a sequence begins is the trap: a model trained with a start token in front of everything loses most of
its accuracy without it, and tokenizer files do not always add it (a chat template may leave it to the
tokenizer, which then has no rule for it). So the start token is put in front of every prompt and document
that does not have it already if

- the settings say so, else
- tokenizer_config.json says so (`add_bos_token`), else
- config.json names the tokenizer's start token as its `bos_token_id`,

and the result says whether it was.

The second trap: transformers' AutoTokenizer goes by config.json's model_type, and the class that it takes may
bring splitting rules of its own (5.17: Qwen2Tokenizer for any qwen2, whatever tokenizer.json says). That is
what programs built on transformers run, so it is what is measured; `as_shipped` tells whether tokenizer.json
agrees.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError
from surgery.stream.source import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.stream.checkpoint import Checkpoint


THINK = "<think>"
"""Some templates open the reasoning for the model."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class Tokenizer:
    """A transformers tokenizer and the ids around a text: `start` before it, any of `ends` after it.

    `as_shipped` is False where it does not cut text as the checkpoint's tokenizer.json does.
    """

    plain: PreTrainedTokenizerBase
    start: tuple[int, ...]
    ends: frozenset[int]
    as_shipped: bool = True

    @property
    def pad(self) -> int:
        """An id to fill short rows with; it is masked, so any will do."""
        return self.plain.pad_token_id if isinstance(self.plain.pad_token_id, int) else 0

    def prompt(self, text: str) -> list[int]:
        """Ids of one user turn through the chat template, up to where the reply begins; without a template,
        of the text itself."""
        if not self.plain.chat_template:
            return self._started(self.plain.encode(text))
        return self._templated([{"role": "user", "content": text}], reply_begins=True)

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a whole conversation, an end token behind the last turn.

        All but a last reply goes through the chat template; the reply stands behind it as it is, reasoning
        included, which many templates would cut out. Raises CheckpointError where there is no template, or
        where it refuses these messages.
        """
        if not self.plain.chat_template:
            raise CheckpointError(
                "this tokenizer has no chat template",
                hint="give the demonstrations as `text`, or put a chat_template.jinja beside the weights",
            )
        *head, last = messages
        if last["role"] != "assistant" or not head:
            return self._ended(self._templated(messages, reply_begins=False))
        # The reply as the model would write it: templates leave the reasoning of past turns out.
        opened = self._rendered(head, reply_begins=True)
        reply = last["content"]
        if opened.rstrip().endswith(THINK):
            reply = reply.removeprefix(THINK)
        ids = self._started(self.plain.encode(opened, add_special_tokens=False, verbose=False))
        return self._ended([*ids, *self.plain.encode(reply, add_special_tokens=False, verbose=False)])

    def _ended(self, ids: list[int]) -> list[int]:
        last = self.plain.eos_token_id
        tail = ids[-4:]  # templates may put a line break behind the end token
        return ids if not isinstance(last, int) or self.ends & {*tail} else [*ids, last]

    def _templated(self, messages: Sequence[Mapping[str, str]], *, reply_begins: bool) -> list[int]:
        rendered = self._rendered(messages, reply_begins=reply_begins)
        return self._started(self.plain.encode(rendered, add_special_tokens=False, verbose=False))

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, reply_begins: bool) -> str:
        from jinja2 import TemplateError

        turns = [dict(each) for each in messages]
        try:
            return str(
                self.plain.apply_chat_template(turns, add_generation_prompt=reply_begins, tokenize=False)
            )
        except TemplateError as error:
            what = "a single turn of a user" if len(turns) == 1 else f"a conversation of {len(turns)} turns"
            raise CheckpointError(
                f"the chat template refuses {what}: {error}",
                hint="check chat_template.jinja or the chat_template of tokenizer_config.json",
            ) from error

    def document(self, text: str, *, ended: bool) -> list[int]:
        """Ids of a text of its own: start token, text and, where it is `ended`, end token."""
        # verbose would warn of every text that is longer than the model's context; windows are not.
        ids = self._started(self.plain.encode(text, add_special_tokens=False, verbose=False))
        last = self.plain.eos_token_id
        return [*ids, last] if ended and isinstance(last, int) else ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids. Tags that are special tokens stay visible."""
        return str(self.plain.decode(list(ids), skip_special_tokens=False))

    def _started(self, ids: list[int]) -> list[int]:
        return ids if tuple(ids[: len(self.start)]) == self.start else [*self.start, *ids]


@contextmanager
def side_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A temporary folder with links to the side files, and the config without its quantization.

    transformers finds configs, tokenizers and remote code by folder, but the side files of a checkpoint may
    lie in several places and its config may be of an operator's making.
    """
    config = unquantized(checkpoint.config)
    with tempfile.TemporaryDirectory(prefix="surgery-side-") as name:
        folder = Path(name)
        for relative, path in checkpoint.side_files.items():
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if relative != "config.json":
                target.symlink_to(path.resolve())
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it is for decoded weights."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def load_tokenizer(
    checkpoint: Checkpoint, *, add_bos: bool | None = None, trust_remote_code: bool = False
) -> Tokenizer:
    """The checkpoint's own tokenizer; `add_bos` overrules the rule in the module's docstring.

    Raises CheckpointError where there is none that loads.
    """
    from transformers import AutoTokenizer

    if not any(_is_vocabulary(name) for name in checkpoint.side_files):
        # transformers would make an empty one of the architecture's class.
        raise CheckpointError(
            f"{checkpoint.label} has no tokenizer files", hint="put its tokenizer files beside the weights"
        )
    with side_folder(checkpoint) as folder:
        try:
            plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"the tokenizer of {checkpoint.label} does not load: {error}",
                hint="put its tokenizer files beside the weights"
                + ("" if trust_remote_code else "; if they need code of their own, allow remote code"),
            ) from error
    bos = plain.bos_token_id
    explicit = _json_side_file(checkpoint, "tokenizer_config.json").get("add_bos_token")
    if add_bos is None:
        add_bos = explicit if isinstance(explicit, bool) else bos in _named_ids(checkpoint, "bos_token_id")
    ends = {*_named_ids(checkpoint, "eos_token_id"), *_ids(plain.eos_token_id)}
    start = (bos,) if add_bos and isinstance(bos, int) else ()
    return Tokenizer(plain, start, frozenset(ends), _cuts_as_shipped(checkpoint, plain))


def _is_vocabulary(name: str) -> bool:
    """Whether a side file holds a vocabulary, or code that may make one."""
    return name in _VOCABULARIES or name.endswith((".tiktoken", ".model", ".py"))


def _cuts_as_shipped(checkpoint: Checkpoint, plain: PreTrainedTokenizerBase) -> bool:
    """Whether a text with digits, line breaks, indents, marks and accents gets the ids of tokenizer.json."""
    from tokenizers import Tokenizer as TokenizerFile

    path = checkpoint.side_files.get("tokenizer.json")
    if path is None:
        return True
    probe = "Sum 1234567.89:\n\n  if x == 10:\n\treturn 'naïve' ;  done !!\n\nDon't — 東京 ,\nend. \n x"
    shipped = TokenizerFile.from_file(str(path)).encode(probe, add_special_tokens=False).ids
    return bool(plain.encode(probe, add_special_tokens=False) == shipped)


def _named_ids(checkpoint: Checkpoint, key: str) -> set[int]:
    """What config.json and generation_config.json say of a special token: an id or a list of them."""
    config = checkpoint.config
    found = {*_ids(config.get(key)), *_ids((config.get("text_config") or {}).get(key))}
    if key == "eos_token_id":
        found.update(_ids(_json_side_file(checkpoint, "generation_config.json").get(key)))
    return found


def _json_side_file(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """An object from a side file; empty where there is no such file."""
    path = checkpoint.side_files.get(name)
    return read_json(path) if path is not None else {}


def _ids(value: Any) -> Iterable[int]:
    if isinstance(value, int):
        return (value,)
    return tuple(each for each in value if isinstance(each, int)) if isinstance(value, list) else ()
