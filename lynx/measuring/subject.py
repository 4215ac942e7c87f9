"""The model that is measured, with what turns text into its tokens and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lynx.errors import ConfigError
from lynx.reference_model import load_reference_model
from lynx.reference_model.model import EOS_ID, PAD_ID

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Subject:
    """A causal language model and its tokenizer.

    Attributes:
        name: Where it came from.
        model: A transformers causal language model in eval mode.
        encode: Turns a text into token ids, without special tokens.
        decode: Turns token ids into text, without special tokens.
        pad_id: What rows are filled up with.
        stop_ids: Tokens that end a text; the first is put behind continuations that are whole.
        template: Turns a conversation into the prompt of its next answer; None for models without a chat template.
        begin: Tokens that a text of this model begins with; a chat template brings its own.
    """

    name: str
    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    pad_id: int
    stop_ids: tuple[int, ...]
    template: Callable[[Messages], str] | None = None
    begin: tuple[int, ...] = ()


def load_subject(source: str, text: bool = True, device: str | None = None, dtype: str = "auto") -> Subject:
    """Load a model with its tokenizer; nothing is downloaded.

    Args:
        source: ``reference`` for the packaged model, a folder, or a name in the local cache of transformers.
        text: Whether text will be turned into tokens; if not, there need be no tokenizer.
        device: Where the model goes; None for a GPU, where there is one.
        dtype: Of the weights; ``auto`` for that of the file.

    Raises:
        ConfigError: There is no such model, no tokenizer beside it, or no such device or dtype.
    """
    kind, place = _dtype(dtype), _device(device)
    if source == "reference":
        model = load_reference_model().model
        model = model if isinstance(kind, str) else model.to(kind)
        return Subject(source, model.to(place), _bytes_of, _text_of, PAD_ID, (EOS_ID,))
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # asked first: transformers would try the network, again and again
        if not Path(source).is_dir() and not isinstance(try_to_load_from_cache(source, "config.json"), str):
            raise OSError("no such folder, and not in the local cache")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True) if text else None
    except (OSError, ValueError, KeyError) as error:
        what, all_of_it = ("a model with its tokenizer", "both") if text else ("a model", "one")
        raise ConfigError(
            f"cannot load {what} from {source!r}: {error}. Give a folder that holds {all_of_it}, a name "
            "in the local cache of transformers, or `reference`."
        ) from error
    model = model.to(place)
    return (
        Subject(source, model, _no_text, _no_text, 0, ()) if tokenizer is None else subject_of(model, tokenizer, source)
    )


def subject_of(model: Any, tokenizer: Any, name: str = "") -> Subject:
    """Make a subject of a loaded model and a tokenizer of transformers.

    Args:
        model: In eval mode; put on its device by the caller.
        tokenizer: The model's.
        name: What reports call it; the model's class without one.
    """
    stops = getattr(model.generation_config, "eos_token_id", None)
    stops = stops if isinstance(stops, (list, tuple)) else [stops]
    stop_ids = tuple(dict.fromkeys(stop for stop in (*stops, tokenizer.eos_token_id) if stop is not None))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*stop_ids, 0)[0]

    def template(messages: Messages) -> str:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text

    return Subject(
        name or type(model).__name__,
        model,
        lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        pad,
        stop_ids,
        template if getattr(tokenizer, "chat_template", None) else None,
        tuple(token for token in tokenizer("").input_ids if token not in stop_ids),
    )


def _bytes_of(text: str) -> list[int]:
    return list(text.encode())


def _text_of(ids: Sequence[int]) -> str:
    return bytes(token for token in ids if token < PAD_ID).decode(errors="replace")


def _no_text(given: Any) -> Any:
    raise ConfigError("this model was loaded without a tokenizer, for random tokens alone.")


def _dtype(name: str) -> Any:
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name != "auto" and name not in known:
        raise ConfigError(f"no dtype {name!r}; there are auto, {', '.join(known)}.")
    return known.get(name, name)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device {name!r}; give cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"no device {name!r}; torch sees {torch.cuda.device_count()} CUDA devices here.")
    return device
