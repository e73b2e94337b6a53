"""What the model is given in a conversation: the tokens that training gave it."""

import pytest

from megagpt.corpus.chat import encode_conversation
from megagpt.corpus.chat_template import load_template
from megagpt.errors import UsageError
from megagpt.inference.chat import Conversation
from megagpt.inference.sampling import Sampling
from megagpt.tokenizer import load_tokenizer
from tests.unit.inference.test_generate import Script
from tests.unit.model.configs import FAMILIES, build

TOKENIZER = load_tokenizer("bytes")


class Encoder:
    """As training's, of this tokenizer."""

    def encode(self, text):
        return TOKENIZER.encode_to_numpy(text)


def conversation(context, **options):
    model = build(FAMILIES["llama"].model_copy(update={"vocab_size": 257, "max_seq_len": context}))
    read = []

    def note(module, args, kwargs):
        view = kwargs["cache"]
        read.append(args[0][0].tolist() if view.mask is None else [int(args[0][0, 0])])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return Conversation(model, TOKENIZER, Sampling(), load_template("chatml"), max_tokens=5, **options), read


def test_the_model_reads_what_training_had_before_an_answer():
    chat, read = conversation(400)
    first = "".join(chat.say("Hi"))
    read.clear()
    list(chat.say("Why?"))
    assert chat.messages[:2] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first}]
    messages = [*chat.messages[:3], {"role": "assistant", "content": "Because."}]
    tokens, mask = encode_conversation(load_template("chatml").render(messages), True, Encoder(), TOKENIZER.eod_id)
    last_learned = int(mask.nonzero()[0][-1]) + 1
    before = tokens[: last_learned - len("Because.<|im_end|>") - 1].tolist()
    assert read[0] + read[1] == before


def test_a_cache_that_grows_with_the_conversation_gives_the_same_answers(monkeypatch):
    def answers():
        chat, _ = conversation(400)
        return ["".join(chat.say(content)) for content in ("Hi", "Why?", "And so on?")]

    expected = answers()  # by a cache as long as the context
    monkeypatch.setattr("megagpt.inference.chat._LEAST_POSITIONS", 1)
    assert answers() == expected


def test_the_oldest_exchanges_leave_the_context_first():
    chat, read = conversation(120)
    for content in ("first", "second", "third", "fourth"):
        read.clear()
        list(chat.say(content))
    seen = bytes(token for token in read[0] + read[1] if token < 256).decode(errors="replace")
    assert len(read[0]) + 1 <= 115
    assert "first" not in seen
    assert seen.endswith("<|im_start|>user\nfourth<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_ends_before_chatmls_end_of_turn_or_a_stop_string():
    says = b"_" + b"one<|im_end|>"  # a step each, the first of them for reading the prompt
    chat = Conversation(
        Script(says + b"_two x"),
        TOKENIZER,
        Sampling(0),
        load_template("chatml"),
        max_tokens=99,
        stop=["x"],
    )
    assert "".join(chat.say("?")) == "one"
    assert "".join(chat.say("?")) == "two "
    assert [message["content"] for message in chat.messages] == ["?", "one", "?", "two "]


def test_what_is_longer_than_the_context_is_refused_and_forgotten():
    chat, _ = conversation(120)
    with pytest.raises(UsageError, match="this model reads 1 to 120"):
        next(chat.say("x" * 200))
    assert chat.messages == []
