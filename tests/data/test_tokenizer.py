"""Tokenizers of real folders: BOS once, never a closing EOS, chat templates, damaged files, disagreement."""

import gzip
import json
import os
import shutil

import pytest

from deer_jax.data import tokenizer as tokenizer_module
from deer_jax.data.tokenizer import Tokenizer, copy_tokenizer, differing_ids
from deer_jax.errors import InputError

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def qwen_dir(data_dir, tmp_path_factory):
    source, folder = data_dir / "tokenizers" / "qwen3", tmp_path_factory.mktemp("qwen3")
    if not source.is_dir():
        pytest.skip(f"no {source}")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


@pytest.fixture(scope="module")
def qwen(qwen_dir):
    return Tokenizer.load(qwen_dir)


@pytest.fixture
def stories(stories_dir, tmp_path):
    """The stories260k tokenizer in a folder of its own, and a way to change its tokenizer.json."""

    def make(change=lambda values: None, name="changed", **settings):
        folder = tmp_path / name
        folder.mkdir()
        values = json.loads((stories_dir / "tokenizer.json").read_text(encoding="utf-8"))
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
        given = json.loads((stories_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(given | settings), encoding="utf-8")
        return Tokenizer.load(folder)

    return make


@pytest.mark.representative
def test_plain_text_with_bos(stories_dir):
    tokenizer = Tokenizer.load(stories_dir)
    ids = tokenizer.encode("Once upon a time")
    assert ids == [1, 403, 407, 261, 378]
    assert tokenizer.decode(ids) == "Once upon a time"
    assert tokenizer.encode("") == [1]
    assert len(tokenizer.vocabulary()) == 512
    assert tokenizer.vocabulary()["<s>"] == 1


def test_spaces_before_punctuation_stay(stories_dir):
    tokenizer = Tokenizer.load(stories_dir)
    assert tokenizer.decode(tokenizer.encode("a , b .")) == "a , b ."


def test_plain_text_without_bos(qwen):
    ids = qwen.encode("Once upon a time")
    assert ids == [12522, 5193, 264, 882]
    assert qwen.decode([*ids, 151645]) == "Once upon a time"  # special tokens are left out
    assert qwen.vocabulary()["<tool_response>"] == 151665


def test_a_closing_eos_is_not_added(stories):
    def close(values):
        piece = {"Sequence": {"id": "A", "type_id": 0}}
        special = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("<s>", "</s>")]
        values["post_processor"] = {
            "type": "TemplateProcessing", "single": [special[0], piece, special[1]], "pair": [piece, piece],
            "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in (("<s>", 1), ("</s>", 2))},
        }  # fmt: skip

    tokenizer = stories(close)
    assert tokenizer._inner("a")["input_ids"][-1] == 2  # what the trap looks like
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    assert tokenizer.encode("") == [1]


@pytest.mark.representative
def test_chat_template_with_arguments(qwen):
    thinking = qwen.encode_chat(CHAT)
    short = qwen.encode_chat(CHAT, enable_thinking=False)
    text = qwen._inner.decode(short)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert short[: len(thinking)] == thinking
    assert len(short) > len(thinking)


def test_chat_templates_write_bos_themselves(stories):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ids = stories(chat_template=template).encode_chat([{"role": "user", "content": "Once"}])
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_chats_are_refused_where_they_cannot_be_rendered(stories):
    with pytest.raises(InputError, match=r"no chat template[^\n]*\Z"):
        stories(name="plain").encode_chat(CHAT)
    refusing = stories(name="strict", chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"roles must alternate\Z"):
        refusing.encode_chat(CHAT)


def test_folders_without_tokenizer(tmp_path):
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("content", ['{"version": "1.0", "tru', "[]", '{"version": "1.0"}', ""])
def test_damaged_files_are_refused(content, tmp_path, stories_dir):
    shutil.copyfile(stories_dir / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"\A[^\n]*download it again|\A[^\n]*download them again"):
        Tokenizer.load(tmp_path)


def test_saving_copies_the_files(qwen, qwen_dir, tmp_path):
    copy_tokenizer(qwen.folder, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (qwen_dir / name).read_bytes()


def test_differing_ids(stories_dir, stories):
    target = Tokenizer.load(stories_dir)

    def rename(values, pairs=((300, "first"), (310, "second"))):
        inverse = {token: text for text, token in values["model"]["vocab"].items()}
        for token, text in pairs:
            old = inverse[token]
            values["model"]["vocab"][text] = values["model"]["vocab"].pop(old)
            values["model"]["merges"] = [m for m in values["model"]["merges"] if old not in ("".join(m), *m)]

    assert differing_ids(target, stories(name="same"), ()) == ()
    drafter = stories(rename, name="renamed")
    assert differing_ids(target, drafter, {300, 310, 400}) == (300, 310)
    with pytest.raises(InputError, match=r"id 310.*'second'[^\n]*\Z"):
        differing_ids(target, drafter, {300})

    def widen(values):
        added = dict(values["added_tokens"][0], id=512, content="<M>")
        values["added_tokens"].append(added)

    assert differing_ids(target, stories(widen, name="wider"), ()) == ()


def test_byte_tokens_at_the_end_are_not_settled(stories_dir):
    """A wrong byte behind them would turn the whole run into replacement characters."""
    tokenizer = Tokenizer.load(stories_dir)
    ids = tokenizer.vocabulary()
    said, first, second = tokenizer.encode("said")[1:], ids["<0xC3>"], ids["<0xB1>"]
    assert tokenizer.decode([first, second]) == "ñ"
    assert "ñ" not in tokenizer.decode([first, second, ids["<0xFF>"]])
    assert tokenizer.settled([*said, first, second]) == len(said)
    assert tokenizer.settled([first, second, *said]) == 2 + len(said)
    assert tokenizer.settled([]) == 0
    assert tokenizer.decode([first, ids["</s>"], second]) == "ñ"  # what is left out of the text does not end a run
    assert tokenizer.settled([*said, first, ids["</s>"]]) == len(said)


def test_without_byte_tokens_all_is_settled(qwen):
    assert qwen.settled([12522, 5193, 151645]) == 3


@pytest.mark.parametrize("wrong", [{"rms_norm_eps": None}, {"rope_parameters": []}, {"eos_token_id": "x"}])
def test_a_config_that_transformers_refuses_is_one_line(stories_dir, tmp_path, wrong):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((stories_dir / name).read_bytes())
    values = json.loads((stories_dir / "config.json").read_text()) | wrong
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config\.json: transformers refuses it"):
        Tokenizer.load(tmp_path)


def test_links_out_of_the_folder_are_not_copied(stories_dir, tmp_path):
    secret, source = tmp_path / "id_rsa", tmp_path / "source"
    secret.write_text("secret", encoding="utf-8")
    source.mkdir()
    shutil.copyfile(stories_dir / "tokenizer.json", source / "tokenizer.json")
    (source / "merges.txt").symlink_to(secret)
    (tmp_path / "copy").mkdir()
    with pytest.raises(InputError, match=r"source/merges\.txt: is a link to .*id_rsa, outside its folder"):
        copy_tokenizer(source, tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []
    (source / "merges.txt").unlink()
    (source / "merges.txt").symlink_to("tokenizer.json")  # stays inside
    copy_tokenizer(source, tmp_path / "copy")
    assert not (tmp_path / "copy" / "merges.txt").is_symlink()


def test_folders_of_the_hub_are_copied(stories_dir, tmp_path):
    """Their files are links to the same repository's blobs."""
    source, blob = tmp_path / "models--a--b" / "snapshots" / "1f2e", tmp_path / "models--a--b" / "blobs" / "77"
    for folder in (source, blob.parent, tmp_path / "copy"):
        folder.mkdir(parents=True)
    shutil.copyfile(stories_dir / "tokenizer.json", blob)
    (source / "tokenizer.json").symlink_to("../../blobs/77")
    copy_tokenizer(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == blob.read_bytes()
    (source / "merges.txt").symlink_to("../../../id_rsa")
    with pytest.raises(InputError, match="outside its folder"):
        copy_tokenizer(source, tmp_path / "copy")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "merges.txt", "other.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(stories_dir, tmp_path, name, kind):
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories_dir / each, tmp_path / each)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"\A{tmp_path}/{name}: is [^\n]*; name a file[^\n]*\Z"):
        Tokenizer.load(tmp_path)


def test_links_to_nothing_are_one_line(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read: Too many levels of symbolic links"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_model_alone_names_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "SENTENCEPIECE", ("no_such_module", "no.such.one"))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(
        InputError, match=r"tokenizer\.model alone, which sentencepiece reads: pip install 'deer_jax\[s"
    ):
        Tokenizer.load(tmp_path)


def test_text_that_has_no_bytes_is_refused(stories_dir):
    tokenizer = Tokenizer.load(stories_dir)
    for encode in (tokenizer.encode, tokenizer.plain):
        with pytest.raises(InputError, match="character 2 is half of a surrogate pair"):
            encode("a\ud83d")
