"""Pieces of text: spaces that tokenizers drop, characters cut into bytes, texts that go on."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import chatml_tokenizer, gemma_tokenizer
from transformers import PreTrainedTokenizerFast

from halfbyte.data.chat_template import load_template
from halfbyte.data.render import Renderer
from halfbyte.serve.chat_codec import ChatCodec
from halfbyte.serve.text import TextStream

TEXTS = ("the heart is red and blue", "القلب أحمر", "東京 é 😀", "tab\tand\n\nlines")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """ChatCodec with ▁ before them, of which a decoder drops the first, and byte fallback."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [chr(code) for code in range(0x21, 0x7F)]
    words += ["▁", *letters, *(f"▁{w}" for w in ("the", "heart", "is", "red", "and", "blue"))]
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.Unigram([(w, -float(n)) for w, n in vocabulary.items()], 0, True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>"
        "{% endif %}{% endfor %}",
    )


def codec_of(tokenizer: PreTrainedTokenizerFast) -> ChatCodec:
    template = None if tokenizer.chat_template else load_template("gemma")
    return ChatCodec(Renderer(tokenizer, template), len(tokenizer))


@pytest.mark.parametrize("make", [chatml_tokenizer, gemma_tokenizer, llama_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_pieces_join_to_the_text(make: type, text: str) -> None:
    codec = codec_of(make())
    ids = codec.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    pieces = [codec.piece(token) for token in ids]
    assert b"".join(content for _, content in pieces).decode().strip() == text
    if "\ufffd" not in "".join(shown for shown, _ in pieces):
        assert "".join(shown for shown, _ in pieces).strip() == text


@pytest.mark.parametrize("make", [chatml_tokenizer, gemma_tokenizer, llama_tokenizer])
def test_a_completion_goes_on_with_its_prompt(make: type) -> None:
    codec = codec_of(make())
    ids = codec.renderer.tokenizer("the heart is red", add_special_tokens=False)["input_ids"]
    whole = codec.decode(ids)
    for cut in range(1, len(ids)):
        stream = TextStream(codec.decode, (), ids[:cut])
        text = "".join([*(stream.push(token) for token in ids[cut:]), stream.flush()])
        assert codec.decode(ids[:cut]) + text == whole
