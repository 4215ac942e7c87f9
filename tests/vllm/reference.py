"""The reference model in a form that vLLM can load, and its held-out problems."""

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lynx.reference_model import Problem

PAD, EOS = 256, 257


def save(folder: Path) -> Path:
    """Write the model with a tokenizer whose tokens are bytes."""
    with as_file(files("lynx.reference_model")) as source:
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(source / name, folder / name)
    return save_tokenizer(folder)


def save_tokenizer(folder: Path) -> Path:
    """Write a tokenizer whose tokens are bytes."""
    tokenizer = Tokenizer(models.BPE(vocab=_bytes(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    assert tokenizer.token_to_id("<eos>") == EOS
    assert tokenizer.encode("Ab\n~é").ids == list("Ab\n~é".encode())
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 1024}))
    return folder


def problems() -> list[Problem]:
    """The held-out problems that come with the model."""
    text = files("lynx.reference_model").joinpath("prompts.json").read_text("utf-8")
    return [Problem(**each) for each in json.loads(text)["problems"]]


def parts(chosen: list[Problem]) -> list[str]:
    """The beginnings of problems, which say little of what comes next: so the model is not certain, and errors show."""
    return [problem.prompt[: len(problem.prompt) // 3] for problem in chosen]


def _bytes() -> dict[str, int]:
    """The characters that stand for bytes in byte-level tokenizers: printable ones themselves, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {characters[byte]: byte for byte in range(256)}
