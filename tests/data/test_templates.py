"""Chat templates: the text is that of transformers, what they do not know is refused, and none can hang a run."""

import datetime
import os
import random
import shutil
import subprocess
import sys

import pytest

from deer_jax.data import templates
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.errors import InputError, RunError

CHAT = [{"role": "user", "content": "hello é"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": 1.5, "b": [None, True]}}}]
# As those of Llama 3.1 and Qwen, in small.
REAL = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if tools %}
    {{- "<tools>" }}
    {%- for tool in tools %}{{ tool | tojson }}
    {% endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<' + message.role + '>' + (message.content | trim) + (message.reasoning_content or '') }}
    {% generation %}{{ message.tool_calls }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' + date_string }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{%- endif %}"""
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "doubling": "{% set n = namespace(x='a'*999) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "long": "{{ 'a' * 10**12 }}",
    "wide": "{{ '%1000000000d' % 3 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "zero": "{{ 1 / 0 }}",
    "undefined": "{{ nope() }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "syntax": "{% if %}",
    "nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "minuses": "{{ " + "-" * 30000 + "1 }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "two lines": "{{ raise_exception('roles\nmust alternate') }}",
    "long error": "{{ raise_exception('x' * 100000) }}",
    "half a pair": "\ud83d",
    "a number": 7,
    "no default": {"other": "x"},
}


@pytest.fixture(scope="module")
def tokenizer(stories_dir, tmp_path_factory):
    """One whose template the tests put in place, so that they share its process."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories_dir / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "MEMORY", 2**28)  # sooner full
        yield Tokenizer.load(folder)


def text(tokenizer, template, messages=CHAT, **arguments) -> str:
    tokenizer._inner.chat_template = template
    return tokenizer._inner.decode(tokenizer.encode_chat(messages, **arguments))


@pytest.mark.parametrize(
    "arguments", [{}, {"enable_thinking": False}, {"tools": TOOLS}, {"date_string": "today"}, {"bos_token": "x"}]
)
def test_the_text_is_that_of_transformers(tokenizer, arguments):
    chat = [
        {"role": "system", "content": "Be short. "},
        {"role": "assistant", "reasoning_content": "why", "tool_calls": [{"id": "1"}], "content": ""},
        {"role": "user", "content": "hello é\u2028", "name": "ann"},
    ]
    tokenizer._inner.chat_template = {"default": "no tools", "tool_use": REAL} if "tools" in arguments else REAL
    expected = tokenizer._inner.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **arguments)
    assert len(expected) > 20
    assert tokenizer.encode_chat(chat, **arguments) == tokenizer.plain(expected)


def test_the_date_is_that_of_the_run(tokenizer):
    moment = datetime.datetime(2020, 1, 2, 23, 59)
    assert "02 Jan 2020" in text(tokenizer, REAL, now=moment)
    assert "02 Jan 2020" not in text(tokenizer, REAL)


def test_what_the_template_does_not_know_is_refused(tokenizer):
    for arguments, message in (
        (
            {"enable_thinkin": True},
            "the chat template has no argument 'enable_thinkin', did you mean 'enable_thinking'",
        ),
        ({"documents": [{}]}, "the chat template has no place for documents; leave them out of the chat"),
        ({"tokenize": True}, "'tokenize': is not for the template"),
        ({"return_tensors": "pt"}, "'return_tensors': is not for the template"),
        ({"chat_template": "x"}, "'chat_template': is not for the template"),
        ({"raise_exception": 1}, "no argument 'raise_exception'"),
        ({"message": 1}, "no argument 'message'"),
    ):
        with pytest.raises(InputError, match=message):
            text(tokenizer, REAL, **arguments)
    with pytest.raises(InputError, match="no argument 'x', it takes none"):
        text(tokenizer, "{{ messages }}", x=1)


def refused(tokenizer, template) -> str:
    """The error's line; whatever else a template does fails the test, and the next chat is rendered all the same."""
    with pytest.raises((InputError, RunError)) as caught:
        text(tokenizer, template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert text(tokenizer, "{{ messages[0].content }}").strip() == "hello é"
    return str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_one_line(tokenizer, name):
    assert "template" in refused(tokenizer, HOSTILE[name])


def test_an_endless_template_is_ended(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1.5)
    assert "the chat template takes more than 1.5 seconds for one chat" in refused(tokenizer, ENDLESS)


def test_a_process_that_is_killed_is_one_line(tokenizer):
    text(tokenizer, "a")
    tokenizer._renderer._process.kill()
    tokenizer._renderer._process.wait()
    assert text(tokenizer, "a") == "a"  # between two chats nobody notices


def test_nothing_is_left_running(tokenizer, tmp_path):
    """A script without a guard: its process must not start it again, and must end with it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"from deer_jax.data.tokenizer import Tokenizer\nt = Tokenizer.load({str(tokenizer.folder)!r})\n"
        "t._inner.chat_template = '{{ messages[0].content }}'\n"
        "print(t.decode(t.encode_chat([{'role': 'user', 'content': 'hello'}])), t._renderer._process.pid)\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, check=True)
    said, pid = done.stdout.split()
    assert (said, done.stderr) == ("hello", "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


PIECES = (
    "{{", "}}", "{%", "%}", "{% endfor %}", "{% endif %}", " for m in messages ", " if ", "messages", "[0]", ".content",
    "|tojson", "|length", "|join", " ~ ", "*9**9", "**", "range(9999)", "loop.index", "(", ")", "'", "namespace(a=1)",
    "{% set x = ", "x", "x.y", " in ", " is defined", "{#", "#}", "\n", "-", "é", "\ud83d", "\0", "strftime_now('%Q')",
    "{% macro m() %}", "m()", "{% endmacro %}", "{% break %}", "raise_exception()", "raise_exception('a', 'b')", "/ 0",
)  # fmt: skip


def test_fuzz_templates(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1)
    for seed in range(150):
        rng = random.Random(seed)
        parts = list(rng.choices(PIECES, k=rng.randint(1, 12)))
        if rng.random() < 0.5:
            at = rng.randrange(len(REAL))
            parts = [REAL[:at], *parts[:2], REAL[at + rng.randrange(9) :]]
        template = "".join(parts)
        refusal = ""
        try:
            text(tokenizer, template)
        except (InputError, RunError) as error:
            refusal = str(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {template!r} raises {error!r}") from error
        assert "\n" not in refusal, (seed, template)
        assert len(refusal) < 1000, (seed, template)
