"""The prompts that SmolLM2's bundled drafter is trained by: code, mathematics and chat, in one shuffled file.

    python benchmarks/smollm2/prompts.py --data DATA --target MODEL --output prompts.jsonl --held-out held_out.jsonl

DATA holds the public sets named below, one folder each. None is one that the drafter is evaluated on (HumanEval, the
test part of GSM8K, MT-Bench); of MBPP the official train range is read. Every prompt is one user message. The order is
fixed, so that any beginning of the file is a mixture like the whole. Those of more than 255 tokens as chat are left
out, so that with 128 more all fit the training length. Another file has prompts that choose the
checkpoint: the end of GSM8K's test part, the beginning of MBPP's validation range, questions of Spec-Bench.
"""

import argparse
import ast
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deer_jax
from deer_jax.data.sources import mbpp_prompt
from deer_jax.decoding.prompts import encode_prompts

MOST_CHARACTERS = 900  # of a prompt, some 220 tokens
MOST_TOKENS = 255


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, gzip or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a text, each on one line."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    return [" ".join(each.split()) for each in re.split(r"\n\s*\n", text)]


def head_from_docs(row: dict[str, Any]) -> str | None:
    """A function of a library with its description, as the beginning of a file that is to be continued."""
    found = re.fullmatch(r"(?:[\w.]+\.)?([a-z_]\w*)\((.*)\)", row["snippet"].strip())
    if found is None:
        return None
    code = f'def {found[1]}({found[2]}):\n    """{row["intent"].replace(" .", ".").strip()}\n    """\n'
    try:
        ast.parse(code)
    except SyntaxError:
        return None
    return code


def head_from_sample(row: dict[str, Any]) -> str | None:
    """The main function of a program with its task, as the beginning of a file that is to be continued."""
    found = re.search(r"^def main_solution\((.*)\):$", row["code_sample"], re.MULTILINE)
    name = "_".join(re.findall(r"[a-z]+", row["task_description"].lower())[-4:])
    if found is None or not name:
        return None
    spec = row["input_output_spec"].strip().replace("\n", "\n    ")
    return f'def {name}({found[1]}):\n    """{row["task_description"].strip()}\n\n    {spec}\n    """\n'


def collected(data: Path, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Name and text of every prompt."""

    def some(found: list[str | None], count: int) -> list[str]:
        whole = [each for each in dict.fromkeys(found) if each and 20 <= len(each) <= MOST_CHARACTERS]
        return draw.sample(whole, min(count, len(whole)))

    def with_input(row: dict[str, Any]) -> str:
        return "\n\n".join(part for part in (row["instruction"], row["input"]) if part.strip())

    def named(name: str, found: list[str]) -> Iterator[tuple[str, str]]:
        return ((f"{name}-{i}", text) for i, text in enumerate(found))

    code = rows(data / "gpteacher/codegen_instruct.jsonl.gz")
    codeio = rows(data / "codeio_python/codeio_python.jsonl.gz")
    docs = rows(data / "python_docs_pairs/python_docs_pairs.jsonl.gz")
    mbpp = [row for row in rows(data / "mbpp/mbpp_nontest.jsonl") if row["split"] == "train"]
    yield from named("python", some([with_input(row) for row in code if row["python"]], 1100))
    yield from named("code", some([with_input(row) for row in code if not row["python"]], 1600))
    yield from named("codeio", some([row["task_description"] + " Write a Python function." for row in codeio], 1600))
    yield from named("head", some([head_from_sample(row) for row in codeio], 2600))
    yield from named("docs", some([head_from_docs(row) for row in docs], 3400))
    yield from named("mbpp", some([mbpp_prompt(row["text"], row["test_list"]) for row in mbpp], 400))

    cot = rows(data / "flan_cot/flan_cot.jsonl.gz")
    programs = rows(data / "math_python_programs/svamp_python_programs.jsonl.gz")
    yield from named("gsm8k", some([row["question"] for row in rows(data / "gsm8k/train.jsonl.gz")], 8000))
    yield from named("svamp", some([row["question"] for row in programs], 1200))
    yield from named("aqua", some([row["input"] for row in cot if row["task"] == "aqua"], 1200))

    roleplay = rows(data / "gpteacher/roleplay_instruct.jsonl.gz")
    dialogues = rows(data / "sgd_dialogues/sgd_train_utterances.jsonl.gz")
    books = [text for path in sorted((data / "public_domain_books").glob("*.gz")) for text in paragraphs(path)]
    books = [text for text in books if len(text) > 300]
    stories = [text.split(". ")[0] + "." for text in paragraphs(data / "tinystories/stories.txt.gz")]
    yield from named("roleplay", some([with_input(row) for row in roleplay], 2000))
    for task, count in (("strategyqa", 1200), ("ecqa", 700), ("creak", 400), ("qasc", 400)):
        yield from named(task, some([row["input"] for row in cot if row["task"] == task], count))
    yield from named("dialogue", some([row["turns"][0][1] for row in dialogues], 1000))
    yield from named("summary", some([f"Summarize the following passage.\n\n{text}" for text in books], 500))
    yield from named("rewrite", some([f"Rewrite this in simple modern English: {text}" for text in books], 400))
    yield from named("story", some([f"Write a short story that begins like this: {text}" for text in stories], 800))


def held_out(data: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the prompts that choose the checkpoint."""
    mbpp = [row["text"] for row in rows(data / "mbpp/mbpp_nontest.jsonl") if row["split"] == "validation"]
    spec_bench = rows(data / "spec_bench/question_shared.jsonl")
    questions = [row["turns"][0] for row in spec_bench if row["category"] == "qa"]
    gsm8k = [row["question"] for row in rows(data / "gsm8k/test_0000_0999.jsonl")]
    for name, texts in (("gsm8k", gsm8k[-8:]), ("mbpp", mbpp[:8]), ("qa", questions[:8])):
        yield from ((f"{name}-{i}", text) for i, text in enumerate(texts))


def write(path: Path, found: list[tuple[str, str]]) -> None:
    """As prompts of one message each."""
    with path.open("w", encoding="utf-8") as file:
        for name, text in found:
            file.write(json.dumps({"id": name, "messages": [{"role": "user", "content": text}]}) + "\n")
    print(f"{path}: {len(found):,} prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", required=True, help="whose chat template and tokenizer count")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    options = parser.parse_args()
    draw = random.Random(0)
    found = list(collected(options.data, draw))
    draw.shuffle(found)
    target = deer_jax.load_target(options.target)
    chats = encode_prompts(target, [[{"role": "user", "content": text}] for _, text in found])
    write(options.output, [each for each, tokens in zip(found, chats, strict=True) if len(tokens) <= MOST_TOKENS])
    write(options.held_out, list(held_out(options.data)))


if __name__ == "__main__":
    main()
