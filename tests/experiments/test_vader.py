"""The four VADER domains: parsed strictly, shuffled by a seed, split."""

import io
import tarfile

import pytest

from experiments import vader
from experiments.fetch import FetchError
from experiments.vader import DOMAINS, Domain, load_vader, parse_ratings


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package of the real one's layout: ratings -2, -1, 0, 1, 2, ..."""
    lines = "".join(f"{i}\t{i % 5 - 2}\tText {i}, café\r\n" for i in range(20))
    inner = tmp_path / vader.INNER
    inner.parent.mkdir(parents=True)
    with tarfile.open(inner, "w:gz") as pack:
        info = tarfile.TarInfo(vader.MEMBER.format("tiny"))
        info.size = len(lines.encode())
        pack.addfile(info, io.BytesIO(lines.encode()))
    monkeypatch.setattr(vader, "fetch_package", lambda _: tmp_path)
    monkeypatch.setitem(DOMAINS, "vader/tiny", Domain("tiny", 12, 3))
    return inner


def test_splits_are_disjoint_complete_and_labelled_by_sign(package):
    splits = load_vader("vader/tiny", seed=0)
    assert [len(part) for part in splits] == [12, 3, 5]
    everything = [e for part in splits for e in part]
    assert {e["text"] for e in everything} == {f"Text {i}, café" for i in range(20)}
    for example in everything:
        number = int(example["text"].split()[1].rstrip(","))
        assert example["label"] == int(number % 5 - 2 > 0)


def test_zeros_can_be_dropped(package):
    splits = load_vader("vader/tiny", seed=0, drop_zeros=True)
    assert [len(part) for part in splits] == [12, 3, 1]
    numbers = {e["text"] for part in splits for e in part}
    assert numbers.isdisjoint(f"Text {i}, café" for i in range(2, 20, 5))


def test_the_seed_decides_the_order(package):
    assert load_vader("vader/tiny", seed=1) == load_vader("vader/tiny", seed=1)
    assert load_vader("vader/tiny", seed=1) != load_vader("vader/tiny", seed=2)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'vader/movie'.*got 'vader/film'"):
        load_vader("vader/film", seed=0)


def test_bad_lines_are_all_named():
    content = (
        b"1\t2.5\tfine\n2\tx\ttext\n\n4\t9\ttext\n5\t1\t \n6\t1\ta\tb\n7\n8\t0\tok"
    )
    with pytest.raises(ValueError, match=r"movie: .*5 of 7 are not") as error:
        parse_ratings(content, "movie")
    for number in (2, 4, 5, 6, 7):
        assert f"line {number}: " in str(error.value)


def test_a_damaged_archive_is_named(package):
    package.write_bytes(package.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"hutto_ICWSM_2014.tar.gz must be"):
        load_vader("vader/tiny", seed=0)
    package.unlink()
    with pytest.raises(ValueError, match=r"hutto_ICWSM_2014.tar.gz must be"):
        load_vader("vader/tiny", seed=0)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "sizes", "positive"),
    [
        ("vader/movie", [8000, 1000, 1605], 5242),
        ("vader/amazon", [2800, 350, 558], 2128),
        ("vader/nyt", [3900, 500, 790], 2204),
        ("vader/tweets", [3150, 400, 650], 2897),
    ],
)
def test_the_real_domains_have_their_known_sizes(name, sizes, positive):
    try:
        splits = load_vader(name, seed=0)
    except FetchError as error:
        pytest.skip(f"real data can't be fetched: {error}")
    assert [len(part) for part in splits] == sizes
    assert sum(e["label"] for part in splits for e in part) == positive
