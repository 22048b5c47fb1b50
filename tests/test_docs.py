"""The documents hold what they promise: the API page is up to date, links lead somewhere, commands name what exists."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deer_jax").rglob("*.md")])
SHELL = {"|", "||", "&&", "&", ";", ">", ">>", "<", "(", ")"}  # what ends a command


@pytest.fixture(scope="module")
def api() -> dict:
    """The names of docs/make_api.py."""
    return runpy.run_path(str(ROOT / "docs" / "make_api.py"))


def without_code(text: str) -> str:
    """A Markdown text without its code blocks and code spans, headings kept whole."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", lambda code: re.sub(r"[^\n]", " ", code[0]), text)


def anchors(text: str, slug) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown text; the second of a name ends with -1."""
    found: list[str] = []
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, flags=re.MULTILINE):
        found.append(slug(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")))
    return {f"{name}-{found[:i].count(name)}" if name in found[:i] else name for i, name in enumerate(found)}


def link_problems(text: str, path: Path, slug) -> Iterator[str]:
    """Relative links of a Markdown text at `path` that lead nowhere."""
    links = re.findall(r"\]\(\s*<?([^)\s>]+)[^)]*\)", without_code(text))
    links += re.findall(r"""(?:src|href|srcset)=["']([^"']+)["']""", without_code(text))
    links += re.findall(r"^\[[^]]+\]: *(\S+)", without_code(text), flags=re.MULTILINE)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        to = path.parent / name
        if name and not to.exists():
            yield f"{link}: no such file"
        elif not to.resolve().is_relative_to(ROOT):
            yield f"{link}: leads out of the repository"
        elif anchor:
            there = text if not name else to.read_text(encoding="utf-8") if to.suffix == ".md" else ""
            if anchor not in anchors(there, slug):
                yield f"{link}: no such heading"


def commands(text: str) -> Iterator[list[str]]:
    """The words behind each `deer-jax` in a Markdown text's code, up to the end of the command, no comments."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + [span.replace("\n", " ") for span in spans]:
        if not re.search(r"\bdeer-jax\s", line):
            continue
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] | None = None
        for word in [*words, ";"]:
            if word in SHELL:
                if command:
                    yield command
                command = None
            elif word == "deer-jax":
                command = []
            elif command is not None:
                command.append(word)


def command_problems(text: str, options: dict[str, set[str]]) -> Iterator[str]:
    """Commands that name a verb or an option that does not exist; `VERB` stands for any verb."""
    every = {"--help"}.union(*options.values())
    for verb, *words in commands(text):
        if verb == "VERB" or verb.startswith("-"):
            known = every | {"--version"}
        elif verb in options:
            known = options[verb]
        else:
            yield f"deer-jax {verb}: no such verb"
            continue
        for word in [verb, *words]:
            name = word.partition("=")[0]
            if re.match(r"-[^\d\s]", name) and " " not in name and name not in known:
                yield f"deer-jax {verb} {word}: no such option"


@pytest.fixture(scope="module")
def options(api) -> dict[str, set[str]]:
    return {verb: {name for action in api["parser"](verb)._actions for name in action.option_strings}
            for verb in api["VERBS"]}  # fmt: skip


def test_api_page_is_up_to_date(api):
    assert api["PAGE"].read_text(encoding="utf-8") == api["page"](), "run make docs"


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links(path: Path, api):
    assert list(link_problems(path.read_text(encoding="utf-8"), path, api["slug"])) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_commands(path: Path, options):
    assert list(command_problems(path.read_text(encoding="utf-8"), options)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](nowhere.md)", "nowhere.md: no such file"),
        ("![two\nlines](nowhere.svg)", "nowhere.svg: no such file"),
        ('<img src="nowhere.svg">', "nowhere.svg: no such file"),
        ("[a]: nowhere.md", "nowhere.md: no such file"),
        ("# Here\n[a](#there)", "#there: no such heading"),
        ("```\n# there\n```\n[a](#there)", "#there: no such heading"),
        ("[a](README.md#there-is-no-such-heading)", "README.md#there-is-no-such-heading: no such heading"),
        ("[a](../../../../../etc)", "../../../../../etc: leads out of the repository"),
    ],
)
def test_wrong_link_is_found(text: str, problem: str, api):
    assert list(link_problems(text, ROOT / "made-up.md", api["slug"])) == [problem]


def test_right_links_pass(api):
    text = (
        "# A `b` is not c: τ\n# Twice\n# Twice\n"
        "[a](#a-b-is-not-c-τ) [b](#twice-1) [c](docs/) [d](https://x.y/z) `[e](f)`"
    )
    assert list(link_problems(text, ROOT / "made-up.md", api["slug"])) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```bash\ndeer-jax undo --target x\n```", "deer-jax undo: no such verb"),
        ("```\ndeer-jax decode --target x \\\n  --drafters y\n```", "deer-jax decode --drafters: no such option"),
        ("`deer-jax bench\n--draft-length=4`", "deer-jax bench --draft-length=4: no such option"),
        ("```bash\necho x | deer-jax decode -k 4\n```", "deer-jax decode -k: no such option"),
        ("`deer-jax --versions`", "deer-jax --versions --versions: no such option"),
    ],
)
def test_wrong_command_is_found(text: str, problem: str, options):
    assert list(command_problems(text, options)) == [problem]


def test_right_commands_pass(options):
    text = (
        "`deer-jax VERB --help`, `deer-jax --version`, `deer-jax` alone, `let deer-jax`\n"
        "```bash\ndeer-jax decode --target x --prompt '--not an option' | grep --count a  # deer-jax makes --this\n"
        "deer-jax decode --target=x --no-chat --seed -1 && ls --all\n```\n"
    )
    assert list(command_problems(text, options)) == []
