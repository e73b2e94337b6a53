"""The stage `extract` with filters and evaluation data: what it writes and counts of what goes and what is reported."""

import json
from pathlib import Path

from megagpt.corpus.config import CleanConfig, DecontaminateConfig, DedupConfig, FilterConfig
from megagpt.corpus.decontaminate import EvaluationTask, evaluation_files
from megagpt.corpus.extract import DOCUMENT, REMOVED, ExtractTask
from megagpt.corpus.finding import find_files
from megagpt.corpus.plan import cut_into_chunks
from megagpt.corpus.reasons import CONTAMINATED, REASONS, TOO_FEW_WORDS
from megagpt.corpus.screening import Screening
from megagpt.corpus.workspace import Receipt, map_array
from tests.unit.corpus.texts import write_jsonl

EXAM = "to be or not to be that is the question whether it is nobler in the mind to suffer"


def extracted(tmp_path: Path, texts: list[str], decontaminate: DecontaminateConfig) -> tuple[Path, Receipt]:
    path = write_jsonl(tmp_path / "input.jsonl", texts)
    evaluation, result = tmp_path / "evaluation", tmp_path / "result"
    evaluation.mkdir()
    result.mkdir()
    files = tuple(evaluation_files(decontaminate))
    EvaluationTask(files, ("text",), decontaminate.ngram_words, CleanConfig()).run(evaluation)
    only_words = FilterConfig(enabled=True, min_words=3, min_stop_words=None)
    screening = Screening(CleanConfig(), only_words, decontaminate, evaluation)
    (chunk,) = cut_into_chunks(find_files([str(path)]), 1 << 20)
    dedup = DedupConfig(method="exact")
    task = ExtractTask(chunk=chunk, text_key="text", max_document_bytes=1 << 20, screening=screening, dedup=dedup)
    return result, task.run(result)


def test_reasons_and_details_of_removed_documents_are_written(tmp_path: Path) -> None:
    exam = tmp_path / "exam.txt"
    exam.write_text(EXAM)
    texts = ["one two three", "two words", f"he said: {EXAM.title()}", "here are four words"]
    result, receipt = extracted(tmp_path, texts, DecontaminateConfig(files=[str(exam)]))
    part = result / "part_00000"
    removed = map_array(part / "removed.bin", REMOVED)
    assert [REASONS[code] for code in removed["reason"]] == [TOO_FEW_WORDS, CONTAMINATED]
    details = [json.loads(line) for line in (part / "details.jsonl").read_text().splitlines()]
    run = " ".join(EXAM.split()[:13])
    assert details == ["2 words, fewer than 3", f'"{run}" is in {exam}:0']
    assert map_array(part / "documents.bin", DOCUMENT).size == receipt["kept"] == 2
    assert receipt["removed filter.too_few_words"] == receipt["removed decontaminate"] == 1
    assert receipt["contaminated"] == 0
    examples = json.loads((result / "examples.json").read_text())
    assert examples["filter.too_few_words"][0]["text"] == "two words"


def test_contaminated_documents_that_stay_are_listed_and_counted(tmp_path: Path) -> None:
    exam = tmp_path / "exam.txt"
    exam.write_text(EXAM)
    texts = ["one two three", f"he said: {EXAM}", "two words"]
    result, receipt = extracted(tmp_path, texts, DecontaminateConfig(files=[str(exam)], action="report"))
    lines = [json.loads(line) for line in (result / "contaminated.jsonl").read_text().splitlines()]
    documents = map_array(result / "part_00000" / "documents.bin", DOCUMENT)
    run = " ".join(EXAM.split()[:13])
    assert lines == [{"file": 0, "position": int(documents["position"][1]), "detail": f'"{run}" is in {exam}:0'}]
    assert documents.size == receipt["kept"] == 2
    assert receipt["contaminated"] == 1
