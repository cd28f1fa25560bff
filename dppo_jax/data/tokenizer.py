"""A model directory's tokenizer, and the tokens that end a response."""

import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from dppo_jax.errors import UserError
from dppo_jax.files import Path, is_file, local_folder, read_json_object, shown, user_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
READABLE = ("tokenizer.json", "vocab.json")  # one of them is enough
OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")

# What fields of tokenizer_config.json must be, where they are not null: transformers stumbles over the rest.
TEXT, TOKEN = ((str,), "text"), ((str, dict), "a token's text, or an object with it as content")
FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "tokenizer_class": TEXT,
    "padding_side": TEXT,
    "truncation_side": TEXT,
    "chat_template": ((str, dict, list), "text, or several by name"),
    "model_max_length": ((int, float), "a number"),
    "added_tokens_decoder": ((dict,), "an object of tokens by id"),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), TOKEN),
}

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
# GPT-2's alphabet: a byte that can be printed is itself, the others are U+0100 and on. Whatever else is no byte.
BYTE_ALPHABET = {byte: "\uffff" for byte in _HIDDEN} | {256 + n: chr(byte) for n, byte in enumerate(_HIDDEN)}
BYTE_TOKEN = re.compile(rb"<0x([0-9a-fA-F]{2})>")  # SentencePiece's

PROBE = " Q:  what's 12 + 3456?\n\n\tIt's x_1, THE na\u00efve \u6771\u4eac...\r\n  <b>2023</b> "


def load_tokenizer(directory: str | os.PathLike[str]):
    """The tokenizer of a Hugging Face directory. Nothing comes from the hub and no code in it is run.

    Raises: UserError for what is not there, or cannot be read, or contradicts itself.
    """
    folder = user_path(directory, "tokenizer")
    if not folder.is_dir():
        raise UserError(f"tokenizer: there is no directory {str(directory)!r}")
    with local_folder(folder, without="*.safetensors") as local:
        try:
            return _load(local, str(directory))
        except UserError as error:
            raise UserError(str(error).replace(str(local), str(folder))) from error


def _load(folder: Path, name: str) -> Any:
    """Of a folder on this machine's disk; `name` is its directory's, for sentences."""
    present = [file for file in TOKENIZER_FILES if is_file(folder / file)]
    if not present:
        raise UserError(f"tokenizer: {name!r} holds none of {', '.join(TOKENIZER_FILES)}")
    if not set(READABLE) & set(present):
        raise UserError(_without_vocabulary(name, present))
    try:
        files = {file: read_json_object(folder / file) for file in OBJECTS if is_file(folder / file)}
    except UserError as error:
        raise UserError(f"tokenizer: {name!r} cannot be read: {error}") from None
    for field, value in files.get("tokenizer_config.json", {}).items():
        types, words = FIELDS.get(field, ((object,), ""))
        if value is not None and not isinstance(value, types):
            raise UserError(f"{folder / 'tokenizer_config.json'}: {field} must be {words}, not {shown(value)}")
    _named_ids(folder)  # transformers reads config.json, and says less well what is wrong there
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that PyTorch is missing
    try:
        own_code = "auto_map" in files.get("tokenizer_config.json", {})
        tokenizer = _read(folder, "tokenizer.json" in files, own_code)
        ids = list(tokenizer("")["input_ids"])
        vocabulary = tokenizer.get_vocab()
        tokenizer.decode(ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library in Rust is no Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        if "tokenizer.json" not in files:  # what transformers says then is of packages that do not help
            reason = "there is no tokenizer.json, and of vocab.json with its tokenizer_class transformers makes none"
        raise UserError(f"tokenizer: {name!r} cannot be read: {reason[:300]}") from error
    _check(tokenizer, vocabulary, ids, files, folder)
    return tokenizer


def _read(folder: Path, has_json: bool, own_code: bool) -> Any:
    """What transformers makes of the directory. Some of its classes take from tokenizer.json the vocabulary alone and
    split text in their own way: where that is another than the file's, it is read as it stands; and so it is where the
    directory would have code of its own run."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if has_json and own_code:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not has_json or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if _probe_ids(tokenizer) == _probe_ids(plain):
        return tokenizer
    print(
        f"tokenizer: {type(tokenizer).__name__} splits text otherwise than {folder / 'tokenizer.json'}, which is what "
        "is used",
        file=sys.stderr,
    )
    return plain


def _probe_ids(tokenizer: Any) -> list[int] | None:
    """Tokens of a text in which tokenizers differ; None if its vocabulary cannot say it."""
    try:
        return tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    except Exception:
        return None


def _without_vocabulary(name: str, present: list[str]) -> str:
    """The sentence for a directory whose vocabulary is elsewhere, or in sentencepiece's own file."""
    if "tokenizer.model" not in present:
        return f"tokenizer: {name!r} holds {present[0]}, but no tokenizer.json, which has the vocabulary"
    return (
        f"tokenizer: {name!r} holds tokenizer.model, a file of sentencepiece, but no tokenizer.json, which is what is "
        "read; where sentencepiece is installed, transformers writes one: "
        f"AutoTokenizer.from_pretrained({name!r}).save_pretrained({name!r})"
    )


def _check(tokenizer: Any, vocabulary: dict[str, int], ids: list[int], files: dict[str, Any], folder: Path) -> None:
    """What transformers reads without a word, though it cannot be meant."""
    if not vocabulary:
        raise UserError(f"tokenizer: {str(folder)!r} has an empty vocabulary")
    if strange := set(ids) - set(vocabulary.values()):
        raise UserError(f"tokenizer: {str(folder)!r} adds the token {min(strange)}, which its vocabulary lacks")
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [] if template is None else [template]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"tokenizer: chat_template in {folder} must be text, not {shown(text)}")
    if "tokenizer.json" not in files:
        if lacking := sorted(files["vocab.json"].keys() - vocabulary.keys()):
            raise UserError(
                f"tokenizer: {type(tokenizer).__name__} does not read {folder / 'vocab.json'}: it lacks "
                f"{shown(lacking[0])}; a tokenizer.json is read as it stands"
            )
        return
    known_tokens, settings = _tokens(files["tokenizer.json"]), files.get("tokenizer_config.json", {})
    added = settings.get("added_tokens_decoder") or {}
    contents = {str(entry.get("content")): number for number, entry in added.items() if isinstance(entry, dict)}
    for token, number in contents.items():
        if token not in known_tokens and vocabulary.get(token) != int(number):
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder gives {shown(token)} the id {number}, but "
                f"with tokenizer.json, which lacks it, it is {vocabulary.get(token)}"
            )
    known_tokens |= contents.keys() | files.get("added_tokens.json", {}).keys()
    if tokenizer.eos_token is not None and str(tokenizer.eos_token) not in known_tokens:
        raise UserError(f"tokenizer: the vocabulary in {folder} lacks its eos_token {shown(str(tokenizer.eos_token))}")


def _tokens(file: dict[str, Any]) -> set[str]:
    """All that a tokenizer.json, which transformers has read, gives an id."""
    pairs = (file.get("model") or {}).get("vocab") or {}
    tokens = set(pairs) if isinstance(pairs, dict) else {token for token, _ in pairs}  # pairs with scores: unigrams
    return tokens | {entry["content"] for entry in file.get("added_tokens") or []}


def eos_ids(
    tokenizer: Any, model_dir: str | os.PathLike[str] | None = None, extra: Iterable[int | str] = ()
) -> tuple[int, ...]:
    """All tokens that end a response, sorted: the tokenizer's, those that generation_config.json and config.json of
    the model directory name, and `extra` (ids, or tokens as text).

    Raises: UserError where one is no id, or beyond the vocab_size in config.json, and where there is none.
    """
    extra = list(extra)
    from_files, size = (set(), 2**31) if model_dir is None else _named_ids(user_path(model_dir, "model directory"))
    ends = from_files | {tokenizer.eos_token_id} - {None}
    vocabulary = tokenizer.get_vocab() if any(isinstance(token, str) for token in extra) else {}
    for token in extra:
        if isinstance(token, str) and token not in vocabulary:
            raise UserError(f"end-of-sequence token {token!r} is not in the tokenizer's vocabulary")
        ends.add(_token_id(vocabulary.get(token, token), size, "end-of-sequence tokens"))
    if not ends:
        where = "" if model_dir is None else f", nor {str(model_dir)!r}"
        raise UserError(f"no end-of-sequence token: the tokenizer names none{where}")
    return tuple(sorted(ends))


def _named_ids(folder: Path) -> tuple[set[int], int]:
    """The tokens that end a response by generation_config.json and config.json, and how many tokens there are."""
    ends, size = set(), 2**31
    for name in ("config.json", "generation_config.json"):
        if not is_file(folder / name):
            continue
        fields = read_json_object(folder / name)
        rows = fields.get("vocab_size") if name == "config.json" else None
        if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0:
            size = rows
        ids = fields.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            ends.add(_token_id(token, size, f"{folder / name}: eos_token_id"))
    return ends, size


def _token_id(value: Any, size: int, where: str) -> int:
    """It, if it is one of a vocabulary of this size."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: a token id is a whole number, not {shown(value)}")
    if not 0 <= value < size:
        raise UserError(f"{where}: there is no token {shown(value)}; ids go from 0 to {size - 1}")
    return value


def token_bytes(tokenizer: Any, *, first: bool = False) -> list[bytes]:
    """By id, the UTF-8 that each token adds to decoded text, behind other tokens or, if it is the `first`, before them.

    An id without a token adds nothing. A token of SentencePiece's <0xNN> is its byte, though `decode` writes a
    replacement character for each of a row of them that is no UTF-8.
    Raises: UserError for a tokenizer that joins tokens in a way that is not known here.
    """
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer, a {type(tokenizer).__name__}, has no tokenizer.json to say how it decodes")
    vocabulary, decoder = tokenizer.get_vocab(), tokenizer.backend_tokenizer.decoder
    parts = [b""] * (1 + max(vocabulary.values()))
    for token, number in vocabulary.items():
        parts[number] = token.encode()
    if decoder is None:  # words, between spaces
        return parts if first else [b" " + part if part else part for part in parts]
    joined = False  # what follows sees the whole text, and not each token
    for step in _decoding_steps(json.loads(decoder.__getstate__())):
        kind, at_start = step["type"], first or not joined
        match kind, joined:
            case "Fuse", _:
                joined = True
            case "ByteLevel", False:
                parts, joined = [_of_byte_alphabet(part) for part in parts], True
            case "ByteFallback", False:
                parts = [bytes.fromhex(m[1].decode()) if (m := BYTE_TOKEN.fullmatch(part)) else part for part in parts]
            case "Metaspace", False:
                drops = first and step["prepend_scheme"] != "never"
                parts = [part.replace(step["replacement"].encode(), b"" if drops else b" ") for part in parts]
            case "Replace", _ if "String" in step["pattern"] and (not joined or len(step["pattern"]["String"]) == 1):
                old, new = step["pattern"]["String"].encode(), step["content"].encode()
                parts = [part.replace(old, new) for part in parts]
            case "Strip", _ if not joined or (step["stop"] == 0 and step["start"] <= 1):
                start, stop, character = step["start"] if at_start else 0, step["stop"], step["content"].encode()
                parts = [_stripped(part, character, start, stop) for part in parts]
            case _:
                raise UserError(f"the tokenizer decodes by {kind}, of which it is not known what one token adds")
    return parts


def _decoding_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's steps, one after another."""
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _decoding_steps(inner)]
    return [decoder]


def _of_byte_alphabet(part: bytes) -> bytes:
    """The bytes that a token spells; its own text where a character is none of the alphabet."""
    try:
        return part.decode().translate(BYTE_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return part


def _stripped(part: bytes, character: bytes, start: int, stop: int) -> bytes:
    """Without so many of a character at its ends, at most."""
    while start and part.startswith(character):
        part, start = part.removeprefix(character), start - 1
    while stop and part.endswith(character):
        part, stop = part.removesuffix(character), stop - 1
    return part
