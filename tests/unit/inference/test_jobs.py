"""Jobs of many prompts: whole, killed, shared, begun with other settings."""

import json
import multiprocessing
import os
import signal
from itertools import islice

import pytest

from megagpt.errors import UsageError, UserError
from megagpt.inference.jobs import Output, Prompt, read_prompts, sample_prompts, share
from megagpt.inference.sampling import Sampling
from megagpt.tokenizer import load_tokenizer
from tests.unit.model.configs import FAMILIES, build

PROMPTS = [Prompt(f"p{index}" if index % 2 else index, "ab" * (index % 5) + "é") for index in range(11)]
SETTINGS = {"seed": 1}


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"].model_copy(update={"vocab_size": 257}))


def lines(model, todo, batch_size=4):
    return sample_prompts(
        model, load_tokenizer("bytes"), todo, Sampling(), batch_size=batch_size, max_tokens=12, seed=1, stop=["e"]
    )


def work(model, path, rank=0, world_size=1, most=None):
    """Be one process of the job, for `most` lines; says whether all is done."""
    with Output(path, SETTINGS, rank, world_size) as output:
        mine = share(PROMPTS, 2, output, rank, world_size)
        for record in islice(lines(model, mine.todo), most):
            output.append(record)
        return output.merge(mine.keys)


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert work(model, path)
    return path.read_bytes()


def test_the_output_is_in_the_order_of_the_input_and_nothing_else_is_left(model, tmp_path, expected):
    records = [json.loads(line) for line in expected.splitlines()]
    assert [(record["id"], record["sample"]) for record in records] == [(p.id, i) for p in PROMPTS for i in range(2)]
    assert all("e" not in record["text"] for record in records)
    assert all((record["ended"] == "length") == (record["tokens"] == 12) for record in records)
    assert work(model, tmp_path / "out.jsonl")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]


def test_a_job_that_is_killed_goes_on_where_it_was(model, tmp_path, expected):
    path = tmp_path / "out.jsonl"

    def be_killed():
        with Output(path, SETTINGS) as output:
            for record in islice(lines(model, share(PROMPTS, 2, output).todo), 9):
                output.append(record)
            output._file.write(b'{"id": "p1", "sa')  # half a line
            output._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=be_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with Output(path, SETTINGS) as output:
        assert len(output.done()) == 9
        assert len(share(PROMPTS, 2, output).todo) == 13
    assert work(model, path)
    assert path.read_bytes() == expected


def test_several_processes_share_the_lines_and_the_last_one_merges_them(model, tmp_path, expected):
    path = tmp_path / "out.jsonl"
    assert not work(model, path, 2, 3)
    assert not work(model, path, 0, 3)
    assert not path.exists()
    assert work(model, path, 1, 3)
    assert path.read_bytes() == expected


def test_another_number_of_processes_completes_a_job(model, tmp_path, expected):
    path = tmp_path / "out.jsonl"
    assert not work(model, path, 1, 3, most=5)
    assert not work(model, path, 0, 2)
    assert work(model, path, 1, 2)
    assert path.read_bytes() == expected


def test_what_is_written_is_kept_and_only_new_prompts_are_done(model, tmp_path, expected):
    path = tmp_path / "out.jsonl"
    with Output(path, SETTINGS) as output:
        few = share(PROMPTS[:3], 2, output)
        for record in lines(model, few.todo):
            output.append(record)
        assert output.merge(few.keys)
    with Output(path, SETTINGS) as output:
        assert len(share(PROMPTS, 2, output).todo) == 16
    assert work(model, path)
    assert path.read_bytes() == expected


def test_other_settings_and_second_writers_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        Output(path, SETTINGS),
        pytest.raises(UserError, match="another process is writing it"),
        Output(path, SETTINGS),
    ):
        pass
    with pytest.raises(UsageError, match="was begun with seed 1, not 2"), Output(path, {"seed": 2}):
        pass
    (tmp_path / "mine.jsonl").write_text("precious\n")
    with pytest.raises(UsageError, match="exists, and is no job's output"), Output(tmp_path / "mine.jsonl", SETTINGS):
        pass
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"
    with pytest.raises(UserError, match="cannot be written: No such file"), Output(tmp_path / "no/x", SETTINGS):
        pass


def test_a_prompt_that_does_not_fit_is_named(model):
    with pytest.raises(UsageError, match="prompt 'long': the prompt has 41 tokens; this model reads 1 to 40"):
        next(lines(model, [(Prompt("short", "a"), 0), (Prompt("long", "a" * 41), 0)]))


def test_log_probabilities_are_one_a_token(model):
    options = {"batch_size": 2, "max_tokens": 60}
    (record,) = sample_prompts(
        model, load_tokenizer("bytes"), [(PROMPTS[1], 0)], Sampling(0.5), logprobs=True, **options
    )
    assert len(record["token_ids"]) == len(record["logprobs"]) == record["tokens"]
    assert all(value < 0 for value in record["logprobs"])
    assert record["ended"] == "context" if record["tokens"] == 37 else "end"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": 1, "prompt": "a"}\nnonsense', "line 2: not JSON"),
        (b"\xff", "line 1: not JSON in UTF-8"),
        (b'\n{"prompt": "a"}', "line 2: write .*id"),
        (b'{"id": true, "prompt": "a"}', "line 1: write"),
        (b'{"id": 1, "prompt": 2}', "line 1: write"),
        (b'{"id": 1, "prompt": ""}\n{"id": 1, "prompt": ""}', "line 2: id 1 was there before"),
    ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path, content, message):
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "in.jsonl")
