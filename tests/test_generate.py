"""`bigtrain generate`: batches write what single prompts write; stop texts, top-p, streaming."""

import json
from pathlib import Path

import pytest
import torch
from conftest import bigtrain
from exports import GPT2, LLAMA, T5, export_of

from bigtrain.data.tokenizer import make_tokenizer
from bigtrain.errors import RequestError
from bigtrain.inference.decoding import Decoding, TextWriter, _choose
from bigtrain.inference.generate import Generator, read_prompts

pytestmark = pytest.mark.trained

PROMPTS = ["def f(x):", "a", "", "import os, sys, re", "class Ärger:", "x" * 60, "def g"]


def words(*stops: str, tokens: int = 12) -> Decoding:
    return Decoding(tokens, 0.0, stops=stops)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_of(tmp_path_factory.mktemp("llama") / "export", "causal_lm", "llama", LLAMA)


@pytest.mark.parametrize(
    ("task", "model", "args"),
    [
        ("causal_lm", "llama", LLAMA),
        ("causal_lm", "gpt2", GPT2),
        ("causal_lm", "rnn", {"embed": 24, "hidden": 32, "tied": False}),
        ("seq2seq", "t5", T5),
    ],
)
def test_a_batch_of_prompts_writes_what_each_alone_writes(
    task: str, model: str, args: dict[str, int], tmp_path: Path
) -> None:
    """One of the prompts is 60 tokens of 64: beside it the others would have no room."""
    generator = Generator(export_of(tmp_path / "export", task, model, args))
    together = list(generator.write_all(PROMPTS, words(), 0))
    assert together == [(prompt, generator.write(prompt, words(), 0)) for prompt in PROMPTS]
    assert len({text for _, text in together}) > 1


def test_a_batch_has_more_than_one_prompt_and_the_order_of_the_file(llama: Path) -> None:
    generator = Generator(llama)
    encoded = [torch.ones(length, dtype=torch.long) for length in (3, 9, 61, 4, 2)]
    batches = [[len(ids) for ids in batch] for batch in generator._batches(encoded, 12)]
    assert batches == [[3, 9], [61], [4, 2]]


def test_the_text_before_a_stop_is_the_same_text(llama: Path) -> None:
    generator = Generator(llama)
    whole = generator.write("def", words(tokens=20), 0)
    stop = whole[5:7]
    expected = whole[: whole.index(stop)]
    shown: list[str] = []
    assert generator.write("def", words("never", stop, tokens=20), 0, shown.append) == expected
    assert "".join(shown) == "def" + expected
    assert dict(generator.write_all(["def"], words(stop, tokens=20), 0)) == {"def": expected}


def test_characters_are_shown_whole_and_stop_texts_not_at_all() -> None:
    """Each token is one byte here: no piece may be a part of a character, or of a stop text."""
    tokenizer = make_tokenizer("bytes", [])
    text = "naïve 日本 😀 en"
    shown: list[str] = []
    writer = TextWriter(tokenizer, words("endX", "X", tokens=99), {1}, shown.append)
    for token in tokenizer(text + "dless X never")["input_ids"]:
        writer.add(token)
    assert writer.is_over and writer.text == text + "dless "
    assert "".join(shown) == writer.text
    assert "日" in shown and "😀" in shown  # each as soon as it was whole
    assert not any(piece in ("e", "en", "end") for piece in shown)


def test_top_p_draws_from_the_likeliest_tokens_alone() -> None:
    """As transformers' own filter has it."""
    from transformers import TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(1, 40)
    kept = TopPLogitsWarper(0.6)(torch.empty(0), logits.clone()).isfinite()[0]
    drawn = {int(_choose(Decoding(1, 1.0, 0.6), logits)) for _ in range(400)}
    assert drawn == set(kept.nonzero().flatten().tolist()) and 1 < len(drawn) < 20
    assert int(_choose(Decoding(1, 1.0, 0.0), logits)) == int(logits.argmax())


def test_the_command_line_streams_and_reads_prompts_from_a_file(
    llama: Path, tmp_path: Path
) -> None:
    draw = ["--tokens", "9", "--temperature", "0.7", "--top-p", "0.9", "--seed", "3"]
    plain = bigtrain("generate", str(llama), "def ", *draw, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    answer = bigtrain("generate", str(llama), "def ", *draw, "--json", cwd=tmp_path)
    assert plain.stdout == "def " + json.loads(answer.stdout)["text"] + "\n"
    lines = [json.dumps({"prompt": prompt}) for prompt in ("one", "", "two\nlines")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    done = bigtrain(
        "generate", str(llama), "--from", "prompts.jsonl", "--tokens", "4", cwd=tmp_path
    )
    written = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in written] == ["one", "", "two\nlines"]
    assert list(written[0]) == ["prompt", "text"]


def test_what_cannot_be_written_is_refused(llama: Path, tmp_path: Path) -> None:
    generator = Generator(llama)
    with pytest.raises(RequestError, match="prompt 1 has 65 tokens"):
        next(generator.write_all(["a", "x" * 64], words(), 0))
    with pytest.raises(RequestError, match="empty text"):
        generator.decoding(3, None, 1.0, ("",))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(RequestError, match="line 2 has no prompt"):
        read_prompts(prompts)
    prompts.write_text("")
    with pytest.raises(RequestError, match="is empty"):
        read_prompts(prompts)
    prompts.write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match="not UTF-8 text"):
        read_prompts(prompts)
    with pytest.raises(RequestError, match="absent: No such file"):
        read_prompts(tmp_path / "absent")
